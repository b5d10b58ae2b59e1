"""``unwrite finetune``: a task learned plainly, or gracefully."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from unwrite.console import LOG
from unwrite.errors import BadSetting
from unwrite.files import user_path
from unwrite.verb import RESUMABLE, pairs, verb


def finetune(
    base: Annotated[str, typer.Argument(help="Folder, built-in name or hub id.", metavar="BASE")],
    task: Annotated[
        str, typer.Option("--task", help="A file, bank:NAME or hub:OWNER/NAME.", metavar="TASK")
    ],
    out_folder: Annotated[
        Path, typer.Option("--out", help="The new model's folder.", metavar="FOLDER")
    ],
    forget: Annotated[
        list[str] | None,
        typer.Option("--forget", help="A task to let go of; may be repeated.", metavar="TASK"),
    ] = None,
    method: Annotated[
        str, typer.Option("--method", "-m", help="plain, graceful, l2, ewc or early.")
    ] = "plain",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A setting of the course or of the letting go.", metavar="KEY=VALUE"
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="At most so many training examples.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run Python code that the model brings along."),
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="Where to compute (default: the GPU if there is one).")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on standard output.")
    ] = False,
) -> None:
    """Fine-tune BASE on a task, gracefully if wished, and measure what it learned and forgot.

    FOLDER becomes an ordinary model folder; FOLDER/run says how it came about.
    """
    with verb(as_json, RESUMABLE) as out:
        from unwrite import finetuning

        run = user_path(out_folder) / "run"
        out.log_to(run / LOG, when=(run / "run.json").exists)
        course, letting = _settings(pairs(settings or []), seed)
        done = finetuning.finetune(
            base,
            task,
            out_folder,
            forget=forget or [],
            method=method,
            course=course,
            letting=letting,
            limit=limit,
            trust_remote_code=trust_remote_code,
            device=device,
            progress=out,
        )
        states = list(done.result["perplexity"])
        rows = [
            [name, row["n"], *(f"{100 * row[state]:.1f}" for state in states)]
            for name, row in done.result["accuracy"].items()
        ]
        out.table("Accuracy in %", ("task", "n", *states), rows, numbers=len(states) + 1)
        before, after = (done.result["perplexity"][state] for state in ("before", "after"))
        out.say(f"Perplexity on neutral text {before:.2f} -> {after:.2f}.")
        out.say(f"All about this run: {done.folder / 'run' / 'report.md'}")
        out.data(str(done.folder))
        out.result({"out": str(done.folder), **done.result})


def _settings(given: dict[str, str], seed: int) -> tuple[Any, Any]:
    """``--set`` words as fields of the course and of the letting go."""
    import dataclasses

    from unwrite.finetuning import Course, Letting
    from unwrite.methods import build_fields

    course = {field.name for field in dataclasses.fields(Course)} - {"seed"}
    letting = {field.name for field in dataclasses.fields(Letting)}
    if unknown := [key for key in given if key not in course | letting]:
        raise BadSetting(
            f"finetune has no setting {unknown[0]!r}. Settings: "
            f"{', '.join(sorted(course | letting))}."
        )
    return (
        build_fields(Course, {k: v for k, v in given.items() if k in course} | {"seed": str(seed)}),
        build_fields(Letting, {key: value for key, value in given.items() if key in letting}),
    )

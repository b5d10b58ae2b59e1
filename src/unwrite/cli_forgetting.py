"""``unwrite forgetting``: measure what learning destroys, forecast it, and choose what to replay.

A FOLDER holds one forgetting matrix (``matrix.npz`` and what belongs to it); every verb works on
it. ``collect`` makes or extends it, ``show`` and ``fit`` describe it, ``forecast`` and ``replay``
look ahead from a few observations of a new task.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unwrite.console import LOG, Terminal
from unwrite.errors import BadEdits, BadSetting
from unwrite.files import user_path, write_jsonl
from unwrite.verb import RESUMABLE, AddressOption, ExecutorOption, pairs, verb, words
from unwrite.verb import executor as chosen_executor

if TYPE_CHECKING:
    import numpy as np

    from unwrite.forgetting.completion import Prediction
    from unwrite.forgetting.matrix import ForgettingMatrix
    from unwrite.training import Pair

app = typer.Typer(
    help="What learning makes the model forget: the forgetting matrix, forecasts, and replay.",
    no_args_is_help=True,
)

FolderArgument = Annotated[
    Path,
    typer.Argument(
        help="Folder of the forgetting matrix; 'bundled' is the one that comes with the package.",
        metavar="FOLDER",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Seen = Annotated[
    Path | None,
    typer.Option(help="JSONL of observations: 'example' and 'change'.", metavar="FILE"),
]
After = Annotated[
    str | None,
    typer.Option(
        help="A model, or a home of the matrix's base, after the new task: a few examples are "
        "measured on it.",
        metavar="MODEL_OR_HOME",
    ),
]
TaskOption = Annotated[
    str | None, typer.Option(help="Take the known row of a collected task instead.", metavar="NAME")
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Forecast with this model (default: as fitted).")
]
Observations = Annotated[int, typer.Option(help="How many examples to measure.", min=1)]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings along.")
]

TasksOption = Annotated[
    list[str] | None,
    typer.Option("--tasks", help="Tasks: 'bank', 'bank:NAME' or a JSONL file.", metavar="TASK"),
]
TaskEditsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--edits", help="Edits as tasks, one a relation: a file or 'atlas'.", metavar="FILE"
    ),
]
PairsOption = Annotated[
    int | None, typer.Option("--limit", help="Learn at most so many pairs a task.")
]


@app.command()
def collect(
    folder: FolderArgument,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Folder, built-in name or hub id.", metavar="MODEL"),
    ] = None,
    tasks: TasksOption = None,
    edits: TaskEditsOption = None,
    examples: Annotated[
        list[str] | None,
        typer.Option(
            help="What may be forgotten: a file, 'atlas' or 'neutral' (default: both).",
            metavar="FILE",
        ),
    ] = None,
    method: Annotated[str, typer.Option("--method", "-m", help="What learns each task.")] = "lora",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A field of the method.", metavar="KEY=VALUE")
    ] = None,
    limit: PairsOption = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Record lost right answers (0 or 1) instead.")
    ] = False,
    home: Annotated[
        Path | None, typer.Option(help="Add an update of this home.", metavar="HOME")
    ] = None,
    update: Annotated[
        str | None, typer.Option(help="Which update of --home.", metavar="ID")
    ] = None,
    trust_remote_code: Trust = False,
    executor: ExecutorOption = "local",
    address: AddressOption = None,
    as_json: Json = False,
) -> None:
    """Learn each task from the base and measure what every example lost; goes on where it was.

    With --home and --update, add what an update of a home did instead.
    """
    with verb(as_json, RESUMABLE) as out:
        if (home is None) != (update is None):
            raise BadSetting("--home and --update belong together: give both.")
        if home is not None and update is not None:
            if base or tasks or edits:
                raise BadSetting("Collect tasks from a base, or an update of a home; not both.")
            matrix = _append(folder, home, update, trust_remote_code, out)
            learned: list[str] = [update]
            seconds: dict[str, float] = {}
        else:
            if base is None or not (tasks or edits):
                raise BadSetting("Collecting needs --base MODEL and --tasks or --edits.")
            from unwrite import api, methods
            from unwrite.forgetting.collection import BASE as MEASURED
            from unwrite.forgetting.collection import collect as collect_tasks
            from unwrite.forgetting.examples import read_examples

            out.log_to(user_path(folder) / LOG, when=(user_path(folder) / MEASURED).exists)
            tuner: Any = methods.build(method, pairs(settings or []))
            to_learn = _tasks(tasks or [], edits or [], limit)
            watched = read_examples(*(examples or ["atlas", "neutral"]))
            model = api.load(base, trust_remote_code=trust_remote_code, progress=out)
            done = collect_tasks(
                model,
                to_learn,
                watched,
                tuner,
                folder,
                settings=methods.settings_of(tuner),
                quantity="exact-match" if exact else "log-perplexity",
                executor=chosen_executor(executor, address),
            )
            matrix, learned, seconds = done.matrix, list(done.learned), dict(done.seconds)
        out.say(
            f"{folder} holds {len(matrix.tasks)} tasks x {len(matrix.examples)} examples; "
            f"{len(learned)} were added now."
        )
        out.result({"folder": str(folder), **_size(matrix), "added": learned, "seconds": seconds})


@app.command()
def show(
    folder: FolderArgument,
    top: Annotated[int, typer.Option(help="How many tasks and examples to list.", min=1)] = 10,
    as_json: Json = False,
) -> None:
    """The matrix in a few numbers: what forgets, what is forgotten, and how simple it all is.

    FOLDER may be a home: its matrix is that of its updates with --protect.
    """
    with verb(as_json) as out:
        matrix = _of_home(folder, out) or _load(folder)
        facts = _facts(matrix, top)
        out.say(
            f"{facts['tasks']} tasks x {facts['examples']} examples of "
            f"{matrix.provenance.get('base_name', 'an unknown base')}, "
            f"{100 * facts['observed']:.1f} % observed."
        )
        unit = "mean change"
        out.table("Tasks that destroy most", ("task", unit), _pretty(facts["worst_tasks"]), 1)
        out.table("Examples that suffer most", ("example", unit), _pretty(facts["worst"]), 1)
        _show_profile(out, facts["profile"])
        out.result({"folder": str(folder), **facts, "provenance": dict(matrix.provenance)})


@app.command()
def fit(
    folder: FolderArgument,
    models: Annotated[
        str | None, typer.Option(help="Models to try, with commas (default: all).", metavar="M,...")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Draws of revealed examples.", min=1)] = 3,
    revealed: Annotated[int, typer.Option(help="Examples revealed a task.", min=0)] = 30,
    as_json: Json = False,
) -> None:
    """Try the forecasting models on the collected tasks, and remember the best for 'forecast'."""
    with verb(as_json) as out:
        from unwrite.forgetting import fitting
        from unwrite.forgetting.matrix import is_bundled
        from unwrite.forgetting.protocol import Trial
        from unwrite.forgetting.similarity import models_beside
        from unwrite.matrix_report import profile_of

        matrix = _load(folder)
        names = words(models) if models else None
        trial = Trial(revealed=revealed, seeds=tuple(range(seeds)))
        beside = models_beside(folder, matrix)
        verdict = fitting.compare(matrix, names, trial, beside=beside)
        if not is_bundled(folder):
            fitting.remember(folder, verdict)
        columns = ("rmse", "f1", "precision", "recall", "pr_auc", "lift")
        out.table(
            f"Forecasts of tasks left out, {verdict.trial.revealed} examples revealed",
            ("model", *columns),
            [
                [name, *(_number(found[column]["mean"]) for column in columns)]
                for name, found in verdict.scores.items()
            ],
            numbers=len(columns),
        )
        _show_profile(out, profile_of(matrix))
        kept = "" if is_bundled(folder) else "; 'forecast' uses it from now on"
        out.say(f"Best: {verdict.best}{kept}.")
        out.result(
            {
                "folder": str(folder),
                "best": verdict.best,
                "revealed": verdict.trial.revealed,
                "scores": verdict.scores,
                "profile": profile_of(matrix),
            }
        )


@app.command()
def features(
    folder: FolderArgument,
    base: Annotated[str, typer.Option("--base", help="The base of the matrix.", metavar="MODEL")],
    kind: Annotated[
        str, typer.Option(help="hidden, gradient, or semantic (extra: unwrite[semantic]).")
    ] = "hidden",
    tasks: TasksOption = None,
    edits: TaskEditsOption = None,
    limit: PairsOption = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Say what tasks and examples are about, as vectors: 'fit' then tries what looks alike, too.

    Give the --tasks, --edits and --limit that the matrix was collected with.
    """
    with verb(as_json) as out:
        from unwrite import api
        from unwrite.forgetting.examples import from_details
        from unwrite.forgetting.features import make_features

        _check_own(folder)
        matrix = _load(folder)
        learned = _tasks(tasks or [], edits or [], limit)
        unknown = [name for name in matrix.tasks if name not in learned]
        if unknown:
            raise BadSetting(
                f"The task {unknown[0]!r} of the matrix is not among those given: name all of them."
            )
        examples = from_details(matrix.examples, matrix.example_details)
        model = api.load(base, trust_remote_code=trust_remote_code, progress=out)
        wanted = {name: learned[name] for name in matrix.tasks}
        made = make_features(kind, model, wanted, examples)
        path = made.save(folder, kind)
        out.say(f"{path} holds vectors from the {made.source}; 'fit' uses them from now on.")
        out.data(str(path))
        out.result({"file": str(path), "kind": kind, "source": made.source})


@app.command()
def forecast(
    folder: FolderArgument,
    seen: Seen = None,
    after: After = None,
    choose: Annotated[
        bool, typer.Option("--choose", help="Only name the examples worth observing.")
    ] = False,
    count: Observations = 30,
    threshold: Annotated[
        float | None, typer.Option(help="Forgotten means a change above this (default: 0).")
    ] = None,
    top: Annotated[int, typer.Option(help="How many endangered examples to list.", min=1)] = 20,
    model: ModelOption = None,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="Write every example's forecast as JSONL.")
    ] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """From a few observations of a new task: which examples it endangers, and how many."""
    with verb(as_json) as out:
        matrix = _load(folder)
        if choose:
            names = [matrix.examples[at] for at in _telling(matrix, count)]
            for name in names:
                out.data(name)
            out.result({"folder": str(folder), "observe": names})
            return
        row = _observed(folder, matrix, seen, after, None, count, trust_remote_code, out)
        name, prediction = _predict(folder, matrix, row, model)
        expected, unsure = prediction.count_above(threshold)
        worst = [_endangered(matrix, prediction, at) for at in prediction.ranking[:top]]
        out.say(
            f"Of {len(matrix.examples)} examples about {expected:.0f} +- {unsure:.0f} would be "
            f"forgotten (by {name}, from {int(_known(row).sum())} observations)."
        )
        out.table(
            "The most endangered",
            ("example", "prompt", "expected change", "std"),
            [
                [
                    one["example"],
                    one["prompt"] or "",
                    f"{one['expected']:+.3f}",
                    f"{one['std']:.3f}",
                ]
                for one in worst
            ],
            numbers=2,
        )
        if out_file is not None:
            everything = range(len(matrix.examples))
            write_jsonl(out_file, [_endangered(matrix, prediction, at) for at in everything])
            out.data(str(out_file))
        out.result(
            {
                "folder": str(folder),
                "model": name,
                "observed": int(_known(row).sum()),
                "threshold": prediction.threshold if threshold is None else threshold,
                "expected": expected,
                "std": unsure,
                "endangered": worst,
            }
        )


@app.command()
def replay(
    folder: FolderArgument,
    out_file: Annotated[Path, typer.Option("--out", help="JSONL to write.", metavar="FILE")],
    seen: Seen = None,
    after: After = None,
    task: TaskOption = None,
    policy: Annotated[str, typer.Option(help="uniform, softmax or top.")] = "softmax",
    temperature: Annotated[float, typer.Option(help="Of softmax; inf is uniform.")] = 0.1,
    number: Annotated[
        int | None, typer.Option("--number", help="How many examples to replay.", min=1)
    ] = None,
    beside: Annotated[
        int | None,
        typer.Option("--beside", help="Or: as many as suit so many new examples (1 in 32)."),
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option(help="Names never to be replayed, one a line.", metavar="FILE")
    ] = None,
    model: ModelOption = None,
    count: Observations = 30,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Choose the examples to mix into the training of a new task, and write them as JSONL."""
    with verb(as_json) as out:
        import numpy as np

        from unwrite.forgetting.replay import ReplayPolicy

        matrix = _load(folder)
        chosen_policy = ReplayPolicy(policy, temperature)  # type: ignore[arg-type]  # it is checked
        if (number is None) == (beside is None):
            raise BadSetting("Say how many to replay: --number N, or --beside N new examples.")
        wanted = number if number is not None else chosen_policy.count(int(beside or 0))
        if policy == "uniform" and not (seen or after or task):
            scores = np.zeros(len(matrix.examples))
        else:
            row = _observed(folder, matrix, seen, after, task, count, trust_remote_code, out)
            # A row that was collected whole is the truth: the upper bound of what forecasts can do.
            scores = row if _known(row).all() else _predict(folder, matrix, row, model)[1].values
        out_names = _names(held_out, matrix) if held_out is not None else []
        picks = chosen_policy.choose(scores, wanted, held_out=out_names, seed=seed)
        rows = [
            {
                "id": matrix.examples[at],
                **matrix.example_details.get(matrix.examples[at], {}),
                "score": float(scores[at]),
            }
            for at in picks
        ]
        write_jsonl(out_file, rows)
        out.say(f"{len(rows)} examples to replay are in {out_file}.")
        out.data(str(out_file))
        out.result({"file": str(out_file), "policy": policy, "examples": [r["id"] for r in rows]})


# ---- shared by the verbs -------------------------------------------------------------------------


def _load(folder: Path) -> ForgettingMatrix:
    from unwrite.forgetting.matrix import ForgettingMatrix

    return ForgettingMatrix.load(folder)


def _of_home(folder: Path, out: Terminal) -> ForgettingMatrix | None:
    """The matrix of a home's own updates; None if the folder is no home."""
    from unwrite.home import Home, is_home

    if not is_home(folder):
        return None
    matrix = Home.open(folder, progress=out).forgetting()
    if not matrix.examples:
        raise BadSetting(f"No update of {folder} was made with --protect, so it has no matrix yet.")
    return matrix


def _append(
    folder: Path, home: Path, update: str, trust_remote_code: bool, out: Terminal
) -> ForgettingMatrix:
    from unwrite import api
    from unwrite.forgetting.collection import append_update

    _check_own(folder)
    _load(folder)  # before a model is loaded for nothing
    opened = api.open(home, trust_remote_code=trust_remote_code, progress=out)
    return append_update(opened, update, folder)


def _check_own(folder: Path) -> None:
    from unwrite.forgetting.matrix import is_bundled

    if is_bundled(folder):
        raise BadSetting("The bundled matrix is not written to; collect one of your own.")


def _tasks(tasks: list[str], edits: list[str], limit: int | None) -> dict[str, list[Pair]]:
    """Pairs to learn by task: the training part of tasks, and edits by their relation."""
    from unwrite.edits import read_edits
    from unwrite.tasks import read_tasks
    from unwrite.training import Pair

    found: dict[str, list[Pair]] = {}
    for source in tasks:
        for task in read_tasks(source):
            if task.name in found:
                raise BadSetting(f"The task {task.name!r} is given twice.")
            found[task.name] = [Pair(one.prompt, one.answer) for one in task.train][:limit]
    for source in edits:
        for edit in read_edits(source):
            name = edit.relation or Path(source).stem
            pairs_of_task = found.setdefault(name, [])
            if limit is None or len(pairs_of_task) < limit:
                pairs_of_task.append(Pair(edit.prompt, edit.new))
    return found


def _observed(
    folder: Path,
    matrix: ForgettingMatrix,
    seen: Path | None,
    after: str | None,
    task: str | None,
    count: int,
    trust_remote_code: bool,
    out: Terminal,
) -> np.ndarray:
    """The new task's row, NaN where nothing is known of it."""
    if sum(source is not None for source in (seen, after, task)) != 1:
        raise BadSetting(
            "Say what is known of the new task: --seen FILE, or --after MODEL_OR_HOME to measure a "
            "few examples now."
        )
    if task is not None:
        if task not in matrix.tasks:
            raise BadSetting(f"The matrix has no task {task!r}; 'show' lists some.")
        return matrix.values[matrix.tasks.index(task)]
    if seen is not None:
        return _read_seen(seen, matrix)
    from unwrite import api
    from unwrite.forgetting.collection import base_numbers, change
    from unwrite.home import is_home

    base = base_numbers(folder, matrix)
    name = str(after)
    if is_home(name):
        opened = api.open(name, trust_remote_code=trust_remote_code, progress=out)
        if opened.base.fingerprint != matrix.provenance.get("base"):
            raise BadSetting(f"{name} is a home of another base than the matrix in {folder}.")
        loaded = opened.model()
    else:
        loaded = api.load(name, trust_remote_code=trust_remote_code, progress=out)
    return change(loaded, matrix, base, _telling(matrix, count))


def _read_seen(file: Path, matrix: ForgettingMatrix) -> np.ndarray:
    import numpy as np

    from unwrite.formats import file_name, read_bytes, read_records

    name = file_name(file)
    at = {example: position for position, example in enumerate(matrix.examples)}
    row = np.full(len(matrix.examples), np.nan)
    for record in read_records(read_bytes(file), name):
        example, value = record.values.get("example"), record.values.get("change")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if example not in at or not number:
            raise BadEdits(
                f"{name}, {record.place}: needs `example`, one of the matrix's, and `change`, a "
                "number."
            )
        row[at[example]] = value
    return row


def _telling(matrix: ForgettingMatrix, count: int) -> list[int]:
    """The examples whose observation says most about a new task."""
    from unwrite.forgetting.design import d_optimal
    from unwrite.forgetting.factorization import Factorization

    count = min(count, len(matrix.examples))
    return [int(at) for at in d_optimal(Factorization().fit(matrix), count)]


def _predict(
    folder: Path, matrix: ForgettingMatrix, row: np.ndarray, model: str | None
) -> tuple[str, Prediction]:
    from unwrite.forgetting import fitting

    name = model or fitting.remembered(folder, matrix)
    return name, fitting.model_named(name, matrix).fit(matrix).predict(row)


def _known(row: np.ndarray) -> np.ndarray:
    import numpy as np

    return ~np.isnan(row)


def _names(file: Path, matrix: ForgettingMatrix) -> list[int]:
    from unwrite.formats import file_name, read_bytes

    at = {example: position for position, example in enumerate(matrix.examples)}
    lines = read_bytes(file).decode("utf-8", "replace").split("\n")
    names = [line.strip() for line in lines if line.strip()]
    unknown = [name for name in names if name not in at]
    if unknown:
        raise BadSetting(f"{file_name(file)} names {unknown[0]!r}, which is not in the matrix.")
    return [at[name] for name in names]


def _endangered(matrix: ForgettingMatrix, prediction: Prediction, at: int) -> dict[str, Any]:
    name = matrix.examples[at]
    details = matrix.example_details.get(name, {})
    return {
        "example": name,
        "prompt": details.get("prompt") or details.get("answer"),
        "expected": float(prediction.values[at]),
        "std": float(prediction.std[at]),
    }


def _size(matrix: ForgettingMatrix) -> dict[str, Any]:
    observed = float(matrix.observed.mean()) if matrix.values.size else 0.0
    return {"tasks": len(matrix.tasks), "examples": len(matrix.examples), "observed": observed}


def _facts(matrix: ForgettingMatrix, top: int) -> dict[str, Any]:
    from unwrite.matrix_report import profile_of

    return {
        **_size(matrix),
        "worst_tasks": _worst(matrix.tasks, matrix.values, top),
        "worst": _worst(matrix.examples, matrix.values.T, top),
        "profile": profile_of(matrix),
    }


def _worst(labels: tuple[str, ...], values: np.ndarray, top: int) -> list[dict[str, Any]]:
    """The labels whose observed values are largest on average."""
    means = {
        label: float(row[_known(row)].mean())
        for label, row in zip(labels, values, strict=True)
        if _known(row).any()
    }
    best = sorted(means, key=lambda label: -means[label])[:top]
    return [{"name": label, "mean": means[label]} for label in best]


def _pretty(rows: list[dict[str, Any]]) -> list[list[str]]:
    return [[row["name"], f"{row['mean']:+.4f}"] for row in rows]


def _show_profile(out: Terminal, profile: dict[str, Any] | None) -> None:
    if profile is None:
        return
    rows = [
        ["task mean", _number(profile["task_mean"])],
        ["example mean", _number(profile["example_mean"])],
        ["additive", _number(profile["additive"])],
        *([f"rank {n}", _number(r2)] for n, r2 in enumerate(profile["rank"], start=1)),
    ]
    out.table("How much simple models explain (R2)", ("model", "R2"), rows, numbers=1)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

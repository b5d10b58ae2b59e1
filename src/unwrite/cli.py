"""The command line: each verb reads its words, calls the library, and shows what came back.

Exit codes: 0 done; 1 a bug (traceback); 2 the user must act; 3 a requirement was not met and
nothing was committed; 130 interrupted, nothing half-done.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unwrite.cli_finetune import finetune
from unwrite.cli_forgetting import app as forgetting_app
from unwrite.console import (
    LOG,
    LOG_FILE,
    PLAIN,
    SCORE_COLUMNS,
    TRACK,
    Terminal,
    harmless,
    score_rows,
)
from unwrite.errors import BadSetting, DamagedFile, NotReproduced, RequirementNotMet
from unwrite.files import readable_size, user_path
from unwrite.verb import RESUMABLE as _RESUMABLE
from unwrite.verb import AddressOption, ExecutorOption
from unwrite.verb import executor as _executor
from unwrite.verb import pairs as _pairs
from unwrite.verb import terminate as _terminate
from unwrite.verb import verb as _verb
from unwrite.verb import words as _words

if TYPE_CHECKING:
    from unwrite.edits import Edits
    from unwrite.home import Home
    from unwrite.prompts import Protected
    from unwrite.protection import Outlook

app = typer.Typer(
    help="Change what a language model knows. Every update is planned, trained, verified, and then "
    "committed or dropped; every committed update can be undone exactly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(forgetting_app, name="forgetting")
ledger_app = typer.Typer(help="Care for the storage of a home.", no_args_is_help=True)
app.add_typer(ledger_app, name="ledger")


@app.callback()
def options(
    context: typer.Context,
    plain: Annotated[
        bool,
        typer.Option("--plain", help="No lines, bars and colours; UNWRITE_PLAIN=1 does the same."),
    ] = False,
    log_file: Annotated[
        str | None,
        typer.Option("--log-file", help="Write all that is said there as well.", metavar="FILE"),
    ] = None,
    track: Annotated[
        str | None,
        typer.Option(
            "--track",
            help="Trackers for the loss: tensorboard (files in ./runs), wandb and others.",
            metavar="NAME,...",
        ),
    ] = None,
) -> None:
    """What stands before the verb."""
    given = {PLAIN: "1" if plain else None, LOG_FILE: log_file, TRACK: track}
    for name, value in given.items():
        if value and not os.environ.get(name):
            os.environ[name] = value
            context.call_on_close(partial(os.environ.pop, name, None))


HomeArgument = Annotated[Path, typer.Argument(help="Folder of the model home.", metavar="HOME")]
EditsArgument = Annotated[
    str,
    typer.Argument(
        help="A file of edits, 'atlas' (bundled facts), or hub:OWNER/NAME:SPLIT.", metavar="EDITS"
    ),
]
IdArgument = Annotated[str, typer.Argument(help="Id of an update, as in 'history'.", metavar="ID")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Base = Annotated[
    str | None,
    typer.Option("--base", help="Folder, built-in name (smollm2-135m) or hub id.", metavar="MODEL"),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings along.")
]
Limit = Annotated[int | None, typer.Option(help="Read at most so many records.", min=1)]
Offset = Annotated[int, typer.Option(help="Skip so many records first.", min=0)]
OnlyKnown = Annotated[
    bool,
    typer.Option("--only-known", help="Keep the facts that the model answers with 'old' now."),
]
Why = Annotated[str, typer.Option(help="The reason, kept in the ledger.", metavar="TEXT")]


@app.command()
def init(
    home: HomeArgument,
    base: Annotated[str, typer.Option("--base", help="Model to start from.", metavar="MODEL")],
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Make a model home: a folder that keeps a model's base, its updates and their history."""
    with _verb(as_json) as out:
        opened = _open(home, base, trust_remote_code, out)
        facts = {
            key: getattr(opened.base, key) for key in ("name", "revision", "dtype", "parameters")
        }
        out.say(
            f"{home} is a home of {facts['name']} ({facts['parameters'] / 1e6:.0f} million "
            f"parameters, {facts['dtype']})."
        )
        out.result({"home": str(home), **facts, "fingerprint": opened.base.fingerprint})


@app.command()
def update(
    home: HomeArgument,
    edits: EditsArgument,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="See 'methods'; auto by default.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A field of the method.", metavar="KEY=VALUE")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Time for the default method, auto: fast, balanced or thorough."),
    ] = None,
    base: Base = None,
    limit: Limit = None,
    offset: Offset = 0,
    only_known: OnlyKnown = False,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(help="Commit only if this holds, e.g. 'locality>=0.9'.", metavar="BOUND"),
    ] = None,
    protect: Annotated[
        Path | None,
        typer.Option(
            help="Prompts that must go on being answered as now, one a line or JSONL: the damage "
            "is forecast, and the endangered ones are protected.",
            metavar="FILE",
        ),
    ] = None,
    why: Why = "",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Estimate time, memory and disk, and with --protect what would be forgotten; "
            "change nothing.",
        ),
    ] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Teach the model new answers: plan, train, verify, then commit or leave the home untouched."""
    with _verb(as_json) as out:
        from unwrite.prompts import read_protected
        from unwrite.requirements import parse

        given = _pairs(settings or []) | ({} if budget is None else {"budget": budget})
        chosen = _method(method, given)
        parse(require or [])
        protected = read_protected(protect) if protect is not None else ()
        facts = _read(edits, limit, offset, out)  # before a home is made: bad edits leave nothing
        if dry_run:
            needs = _plan(home, base, facts, chosen, trust_remote_code, out)
            if protected:
                outlook = _outlook(
                    home, base, facts, chosen, protected, seed, trust_remote_code, out
                )
                for sentence in outlook.sentences():
                    out.say(sentence)
                needs["protection"] = outlook.as_json()
            out.result({"dry_run": True, "committed": False, **needs})
            return
        committed = Event()  # until then, the home is left as it was, its log included
        out.log_to(user_path(home) / LOG, when=committed.is_set)
        opened = _open(home, base, trust_remote_code, out)
        if only_known:
            facts = _known(facts, opened, out)
        try:
            done = opened.update(
                facts,
                chosen,
                require=require or [],
                protect=protected,
                why=why,
                seed=seed,
                command=_command(),
            )
        except RequirementNotMet as error:
            measured = error.update
            if measured is not None:
                _show_scores(out, "Measured, not committed", measured.before, measured.after)
                _say_notes(out, measured.notes)
                out.result(measured.as_json())
                out.as_json = False  # the one object has been printed
            raise
        committed.set()
        _show_scores(out, f"{done.edits} edits by {done.method['name']}", done.before, done.after)
        _say_notes(out, done.notes)
        _say_protection(out, done.protection)
        _say_update(out, home, done)
        out.result(done.as_json())


@app.command()
def ask(
    home: HomeArgument,
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answer.", min=1)] = 32,
    at: Annotated[
        str | None,
        typer.Option(help="Answer as right after this update ('base': before all).", metavar="ID"),
    ] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Ask the model: the greedy answer of its current state, or of an earlier one."""
    with _verb(as_json) as out:
        opened = _open(home, None, trust_remote_code, out)
        answer = opened.ask(prompt, max_new_tokens=max_new_tokens, at=at)
        if not answer.strip():
            out.say(
                "The model says nothing: its text ends right after the prompt. One that was not "
                "taught to answer questions goes on with text: ask 'The capital of France is'."
            )
        out.data(harmless(answer.strip(), 100_000))
        out.result({"prompt": prompt, "answer": answer, "at": at})


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(help="A home or a model.", metavar="HOME_OR_MODEL")],
    edits: EditsArgument,
    limit: Limit = None,
    offset: Offset = 0,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Score a home (its base and its current state) or a model on edits, changing nothing."""
    with _verb(as_json) as out:
        from unwrite import api, scores
        from unwrite.home import is_home

        facts = _read(edits, limit, offset, out)
        if is_home(target):
            opened = _open(Path(target), None, trust_remote_code, out)
            before, after = opened.evaluate(facts)
        else:
            model = api.load(target, trust_remote_code=trust_remote_code, progress=out)
            before, after = api.evaluate(model, facts)
        _show_scores(out, f"{len(facts)} edits on {target}", before, after)
        out.result(
            {
                "edits": len(facts),
                "scores": {"before": scores.as_json(before), "after": scores.as_json(after)},
            }
        )


@app.command()
def history(home: HomeArgument, as_json: Json = False) -> None:
    """What was done to the model, in order."""
    with _verb(as_json) as out:
        entries = _open(home, None, False, out).history()
        out.table(
            f"History of {home}",
            ("n", "when", "what", "by", "reliability", "locality", "state", "why"),
            [_history_row(entry) for entry in entries],
        )
        out.result({"home": str(home), "entries": entries})


@app.command()
def show(home: HomeArgument, update_id: IdArgument, as_json: Json = False) -> None:
    """One update: its method, its scores, and where in the model its change lives."""
    with _verb(as_json) as out:
        facts = _open(home, None, False, out).show(update_id)
        state = "live" if facts["live"] else "undone"
        out.say(f"{update_id} ({state}), {facts['at']}, by {facts['by']}. {facts['why']}")
        settings = ", ".join(f"{key}={value}" for key, value in facts["method"].items())
        out.say(f"Method: {settings}")
        out.say(
            f"Change: {facts['delta']['encoding']}, {facts['delta']['tensors']} tensors, "
            f"{100 * facts['delta']['changed_fraction']:.1f} % of the weights, "
            f"{readable_size(facts['delta']['bytes'])}."
        )
        _say_notes(out, facts["notes"])
        _say_protection(out, facts.get("protection"), listed=20)
        from unwrite.scores import from_json

        _show_scores(
            out,
            "Scores",
            from_json(facts["scores"]["before"]),
            from_json(facts["scores"]["after"]),
        )
        out.say(facts["reading"])
        kinds = _moved_kinds(facts["kinds"])
        out.table(
            "Where the change lives, by kind of module (share: of the squared norm)",
            ("kind", "of", "share, %", "mean |change|", "relative norm, %", "moved, %"),
            _kind_rows(facts["kinds"], kinds),
            numbers=4,
        )
        blocks, cells = _grid(facts["where"], kinds)
        out.table(
            "Where the change lives: share of its squared norm, in %",
            ("block", *kinds),
            [[block, *cells[block]] for block in blocks],
            numbers=len(kinds),
        )
        out.result(facts)


@app.command()
def diff(
    home: HomeArgument,
    update_id: IdArgument,
    other: Annotated[
        str | None, typer.Argument(help="A second update, to compare states.", metavar="[ID2]")
    ] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """What the model said before and after an update, question by question."""
    with _verb(as_json) as out:
        rows = _open(home, None, trust_remote_code, out).diff(update_id, other)
        changed = [row for row in rows if row["before"] != row["after"]]
        out.table(
            f"{len(changed)} of {len(rows)} answers differ",
            ("role", "prompt", "before", "after", "expected"),
            [
                [row["role"], row["prompt"], row["before"], row["after"], row["target"]]
                for row in changed
            ],
        )
        out.result({"id": update_id, "other": other, "rows": rows})


@app.command()
def undo(
    home: HomeArgument,
    update_id: IdArgument,
    why: Why = "",
    recheck: Annotated[
        bool, typer.Option(help="Ask the edits of later updates again, which stood on this one.")
    ] = True,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Revert one update, exactly: bit for bit the state that the other updates give."""
    with _verb(as_json) as out:
        from dataclasses import asdict

        opened = _open(home, None, trust_remote_code, out)
        done = opened.undo(update_id, why=why, recheck=recheck)
        at_base = done.fingerprint == opened.base.fingerprint
        out.say(
            f"Undid {update_id}. The weights are now bit for bit "
            + ("those of the base." if at_base else f"base + {', '.join(done.live)}.")
        )
        for later, score in done.later.items():
            out.warn(
                f"{later} was trained on top of it; its own edits are now answered right in "
                f"{100 * (score.token or 0):.0f} % of tokens ({score.n} edits)."
            )
        out.result(
            {
                "id": update_id,
                "fingerprint": done.fingerprint,
                "at_base": at_base,
                "live": list(done.live),
                "later": {key: asdict(value) for key, value in done.later.items()},
            }
        )


@app.command()
def verify(home: HomeArgument, as_json: Json = False) -> None:
    """Check the history's hash chain, every stored file and tensor, and the recomposed state."""
    with _verb(as_json) as out:
        opened = _open(home, None, False, out)
        problems = opened.verify()
        out.result({"home": str(home), "ok": not problems, "problems": problems})
        if problems:
            out.as_json = False
            for problem in problems:
                out.warn(problem)
            raise DamagedFile(f"{home} has {len(problems)} problem(s), listed above.")
        out.say(f"{home} is sound: history, files, tensors and recomposed state all match.")


@app.command("replay-update")
def replay_update(
    home: HomeArgument,
    update_id: IdArgument,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Do an update once more, in scratch, and say whether every bit comes out the same."""
    with _verb(as_json) as out:
        found = _open(home, None, trust_remote_code, out).replay_update(update_id)
        out.result(found.as_json())
        if not found.reproduced:
            out.as_json = False  # the one object has been printed
            raise NotReproduced(found.sentence())
        out.say(found.sentence())


@ledger_app.command()
def compact(home: HomeArgument, as_json: Json = False) -> None:
    """Store what the live updates add up to, so that a home with many of them answers as fast as
    one with few. The same bits; history and updates stay as they are."""
    with _verb(as_json) as out:
        done = _open(home, None, False, out).compact()
        out.result({"home": str(home), "updates": done.updates, "bytes": done.bytes})
        if not done.updates:
            out.say(f"No update of {home} is live: there is nothing to add up.")
        else:
            out.say(
                f"{done.updates} live updates of {home} are one sum now "
                f"({readable_size(done.bytes)}). Nothing else has changed."
            )


@app.command()
def export(
    home: HomeArgument,
    folder: Annotated[Path, typer.Argument(help="A new folder.", metavar="FOLDER")],
    as_: Annotated[
        str, typer.Option("--as", help="model, delta, or adapter (low-rank changes only).")
    ] = "model",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Write the current state as a Hugging Face folder, or its changes as a delta or adapter."""
    with _verb(as_json) as out:
        if as_ not in ("model", "delta", "adapter"):
            raise BadSetting(f"--as must be model, delta or adapter, not {as_!r}.")
        path = _open(home, None, trust_remote_code, out).export(folder, as_)
        out.data(str(path))
        out.result({"folder": str(path), "as": as_})


EditSets = Annotated[
    list[str],
    typer.Option("--edits", help="A file of edits, or 'atlas'; may be repeated.", metavar="FILE"),
]
Run = Annotated[Path, typer.Option("--out", help="Folder of the comparison.", metavar="RUN")]
Seeds = Annotated[str, typer.Option(help="Seeds, with commas.", metavar="N,...")]
Sizes = Annotated[
    str | None,
    typer.Option("--limit", help="Use the first N records; several with commas.", metavar="N,..."),
]
Plant = Annotated[
    bool,
    typer.Option("--plant", help="Start from the model fine-tuned on the old answers (3 epochs)."),
]
PlantRate = Annotated[float, typer.Option("--plant-lr", help="Learning rate of planting.")]
References = Annotated[
    str,
    typer.Option(
        help="Rows beside the methods: all, none, or some of no-change, in-context, full-ft, "
        "random-mask, random-delta, with commas."
    ),
]
TokenOnly = Annotated[
    bool, typer.Option("--token-only", help="Do not let the model answer freely: faster.")
]
ModeOption = Annotated[str, typer.Option(help="batch, sequential (with --chunk) or single.")]
Chunk = Annotated[int | None, typer.Option(help="Edits in one sequential step.", min=1)]
NeighbourMetrics = Annotated[
    bool,
    typer.Option("--neighbour-metrics", help="Also the scores of ROME and EasyEdit, as named."),
]
Robust = Annotated[
    str,
    typer.Option(
        help="Score each state again after: save-reload, bf16, int8, int4, chat, relearn:STEPS, "
        "with commas.",
        metavar="CHECK,...",
    ),
]
LmEval = Annotated[
    str,
    typer.Option(
        "--lm-eval",
        help="Tasks of lm-evaluation-harness before and after; 'unwrite' for two bundled ones.",
        metavar="TASK,...",
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda; default: the GPU if there is one.")]


@app.command()
def compare(
    base: Annotated[str, typer.Argument(help="The model to compare on.", metavar="BASE")],
    edits: EditSets,
    out_folder: Run,
    names: Annotated[
        str, typer.Option("--methods", help="Methods with commas, each NAME or NAME:KEY=VALUE:...")
    ] = "",
    variants: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            help="A method with settings under a label of its own, e.g. "
            "'small=delicate:top=0.05:tuner=lora:tuner.rank=8'. Settings are those of --set, "
            "joined by colons; a value may have commas. May be repeated.",
            metavar="LABEL=NAME:KEY=VALUE:...",
        ),
    ] = None,
    seeds: Seeds = "0",
    limit: Sizes = None,
    offset: Offset = 0,
    plant: Plant = False,
    plant_lr: PlantRate = 1e-4,
    only_known: OnlyKnown = False,
    references: References = "all",
    token_only: TokenOnly = False,
    mode: ModeOption = "batch",
    chunk: Chunk = None,
    neighbour_metrics: NeighbourMetrics = False,
    robust: Robust = "",
    lm_eval: LmEval = "",
    trust_remote_code: Trust = False,
    device: Device = None,
    executor: ExecutorOption = "local",
    address: AddressOption = None,
    as_json: Json = False,
) -> None:
    """Methods side by side on the same facts; goes on where it was interrupted.

    RUN/report.html, table.md, table.csv and table.json are rewritten after every method. The same
    command again computes only what is missing; methods, seeds, limits and edit sets can be added.
    """
    with _verb(as_json, _RESUMABLE) as out:
        from unwrite import api

        _log_in(out_folder, out)
        found = api.compare(
            base,
            edits,
            [*_words(names), *(variants or [])],
            out_folder,
            **_options(seeds, limit, references, mode),
            offset=offset,
            plant=plant,
            plant_lr=plant_lr,
            only_known=only_known,
            exact=not token_only,
            chunk=chunk,
            neighbour_metrics=neighbour_metrics,
            robust=_words(robust),
            lm_eval=_words(lm_eval),
            trust_remote_code=trust_remote_code,
            device=device,
            executor=_executor(executor, address),
            progress=out,
        )
        _show_comparison(out, found)


@app.command()
def sweep(
    base: Annotated[str, typer.Argument(help="The model to compare on.", metavar="BASE")],
    edits: EditSets,
    out_folder: Run,
    method: Annotated[str, typer.Option("--method", "-m", help="See 'methods'.")],
    over: Annotated[
        list[str],
        typer.Option(help="A field and its values; may be repeated.", metavar="KEY=VALUE,VALUE"),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A field that stays fixed.", metavar="KEY=VALUE"),
    ] = None,
    seeds: Seeds = "0",
    limit: Sizes = None,
    offset: Offset = 0,
    plant: Plant = False,
    plant_lr: PlantRate = 1e-4,
    only_known: OnlyKnown = False,
    references: References = "all",
    token_only: TokenOnly = False,
    mode: ModeOption = "batch",
    chunk: Chunk = None,
    neighbour_metrics: NeighbourMetrics = False,
    robust: Robust = "",
    lm_eval: LmEval = "",
    trust_remote_code: Trust = False,
    device: Device = None,
    executor: ExecutorOption = "local",
    address: AddressOption = None,
    as_json: Json = False,
) -> None:
    """One method over all combinations of some settings: trade-offs, with the Pareto front."""
    with _verb(as_json, _RESUMABLE) as out:
        from unwrite import api

        _log_in(out_folder, out)
        found = api.sweep(
            base,
            edits,
            method,
            {key: _words(values) for key, values in _pairs(over, "--over").items()},
            out_folder,
            settings=_pairs(settings or []),
            **_options(seeds, limit, references, mode),
            offset=offset,
            plant=plant,
            plant_lr=plant_lr,
            only_known=only_known,
            exact=not token_only,
            chunk=chunk,
            neighbour_metrics=neighbour_metrics,
            robust=_words(robust),
            lm_eval=_words(lm_eval),
            trust_remote_code=trust_remote_code,
            device=device,
            executor=_executor(executor, address),
            progress=out,
        )
        _show_comparison(out, found)


app.command()(finetune)


@app.command()
def report(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder of a home, a comparison or a forgetting matrix.", metavar="FOLDER"
        ),
    ],
    out_file: Annotated[Path | None, typer.Option("--out", help="File to write.")] = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page about a home, a comparison or a forgetting matrix."""
    with _verb(as_json) as out:
        from unwrite import reporting

        path = reporting.report(folder, out_file)
        out.data(str(path))
        out.result({"report": str(path)})


@app.command()
def serve(
    home: HomeArgument,
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than this machine need --expose.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen at; 0: any free one.", min=0, max=65535)
    ] = 8642,
    expose: Annotated[
        bool, typer.Option("--expose", help="Let other machines in, who have the key.")
    ] = False,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page.")] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """The report of a home, live in the browser: ask, change, commit or discard, undo."""
    with _verb(as_json) as out:
        try:
            from unwrite import serve as server
        except ModuleNotFoundError as error:
            if error.name not in ("starlette", "uvicorn"):
                raise
            raise BadSetting(
                f"'unwrite serve' needs {error.name}, which is not installed: "
                "pip install 'unwrite[serve]'"
            ) from None

        def ready(address: str) -> None:
            out.say(f"{home} is served at this address until Ctrl-C:")
            out.data(address)
            out.result({"home": str(home), "address": address})
            sys.stdout.flush()

        server.serve(
            home,
            host=host,
            port=port,
            expose=expose,
            open_browser=open_browser,
            trust_remote_code=trust_remote_code,
            command=_command(),
            on_ready=ready,
            say=out.say,
        )


@app.command()
def methods(as_json: Json = False) -> None:
    """The methods, their fields and defaults, their papers, and when to use each."""
    with _verb(as_json) as out:
        from unwrite import methods as known

        described = [known.describe(name) for name in known.method_names()]
        for method in described:
            out.say(f"\n{method['name']}: {method['advice']}\n  {method['paper']}")
            out.table(
                "",
                ("field", "type", "default"),
                [[name, f["type"], f["default"]] for name, f in method["fields"].items()],
            )
        out.result({"methods": described})


@app.command()
def trace(
    model_name: Annotated[
        str, typer.Argument(help="Folder, built-in name or hub id.", metavar="MODEL")
    ],
    edits: EditsArgument,
    limit: Annotated[int, typer.Option(help="Trace at most so many edits.", min=1)] = 10,
    offset: Offset = 0,
    samples: Annotated[int, typer.Option(help="Draws of noise for each.", min=1)] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="Write the picture as SVG.", metavar="FILE")
    ] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Causal trace: in which layer, and at which token, the model recalls the facts of EDITS."""
    with _verb(as_json) as out:
        from unwrite import api
        from unwrite import trace as tracing
        from unwrite.files import write_atomically
        from unwrite.trace_picture import picture

        facts = _read(edits, limit, offset, out)
        model = api.load(model_name, trust_remote_code=trust_remote_code, progress=out)
        found = tracing.trace(model, facts, samples=samples, seed=seed)
        for line in tracing.lines(found):
            out.say(line)
        out.say(
            f"The answer's probability falls from {found.clean:.3f} to {found.disturbed:.3f} when "
            f"the subject is disturbed; MLPs around layer {found.strongest} bring back most."
        )
        if out_file is not None:
            write_atomically(out_file, picture(found))
            out.data(str(out_file))
        out.result(found.as_json())


@app.command()
def doctor(
    base: Annotated[str | None, typer.Argument(help="A model to plan for.", metavar="BASE")] = None,
    method: Annotated[str | None, typer.Option("--method", "-m", help="See 'methods'.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A field of the method.", metavar="KEY=VALUE")
    ] = None,
    layout: Annotated[
        list[str] | None,
        typer.Option(
            help="How it will be launched: processes=8, sharded=true, offloaded=true, "
            "recomputed=true, device=cuda, per_machine=8. May be repeated.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(help="GB of memory of the device it is planned for (default: of this one)."),
    ] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Versions, devices, memory and disk; with a model, what an update of it needs.

    For that the configuration of the model is enough: no weights are fetched or read.
    """
    with _verb(as_json) as out:
        from unwrite import methods as known
        from unwrite import plan
        from unwrite.footprint import Layout

        chosen = _method(method, _pairs(settings or []))
        launched = _pairs(layout or [], "--layout")
        needs = None
        if base is not None:
            needs = plan.for_model(
                base,
                chosen,
                layout=known.build_fields(Layout, launched) if launched else None,
                memory=None if memory is None else int(memory * 1e9),
                trust_remote_code=trust_remote_code,
                progress=out,
            )
        machine = plan.machine()
        out.table("This machine", ("what", "value"), list(machine.items()))
        if needs is not None:
            _show_plan(out, needs)
        out.result({"machine": machine, "plan": needs.as_json() if needs else None})


def main() -> None:
    """Entry point. Ctrl-C and SIGTERM unwind like errors, so that every clean-up runs.

    Under ``accelerate launch`` the first process runs the command, and the others follow it.
    """
    # A process that ends need not look for cycles in what it drops: there are many in torch's
    # modules (benchmarks.startup).
    atexit.register(gc.freeze)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as in the background of a shell
            signal.signal(number, _terminate)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        # What torch's store has to say of connections is not for people; failures are told below.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from unwrite import processes

        processes.run(app)
    else:
        app()


# ---- shared by the verbs ---------------------------------------------------------------------


def _open(home: Path, base: str | None, trust_remote_code: bool, out: Terminal) -> Home:
    from unwrite.home import Home

    return Home.open(home, base, trust_remote_code=trust_remote_code, progress=out)


def _read(edits: str, limit: int | None, offset: int, out: Terminal) -> Edits:
    from unwrite.edits import read_edits

    facts = read_edits(edits, limit, offset)
    for sentence in facts.dropped[:5]:
        out.warn(sentence)
    if len(facts.dropped) > 5:
        out.warn(f"... and {len(facts.dropped) - 5} more records left out.")
    return facts


def _known(facts: Edits, home: Home, out: Terminal) -> Edits:
    from unwrite.edits import read_edits

    known = read_edits(facts, known_to=home.model())
    out.say(f"The model knows {len(known)} of the {known.asked} facts asked; those are used.")
    return known


def _options(seeds: str, limit: str | None, references: str, mode: str) -> dict[str, Any]:
    """Options of a comparison that are lists on the command line."""
    from unwrite.reference import NAMES

    known = {"all": list(NAMES), "none": []}
    return {
        "seeds": _numbers(seeds, "--seeds"),
        "sizes": [None] if limit is None else _numbers(limit, "--limit"),
        "references": known.get(references.strip(), _words(references)),
        "mode": mode,
    }


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in _words(text)]
    except ValueError:
        raise BadSetting(f"{option} takes whole numbers with commas, not {text!r}.") from None


def _log_in(run: Path, out: Terminal) -> None:
    """Leave a log in the folder of a comparison, once there is one."""
    from unwrite.grid import NAME

    folder = user_path(run)
    out.log_to(folder / LOG, when=(folder / NAME).exists)


def _show_comparison(out: Terminal, found: Any) -> None:
    """The table for people on standard error, or all rows as JSON."""
    for title, columns, rows in found.summaries():
        out.table(title, columns, rows, numbers=len(columns) - 1)
    for one in found.failed:
        out.warn(f"{one['method']} on {one['edits']} failed: {one['error']}")
    out.say(f"All figures, before and after, with intervals: {found.folder / 'table.md'}")
    out.say(f"The same as a page, with what every method said: {found.folder / 'report.html'}")
    out.result({"run": str(found.folder), "rows": found.rows, "failed": found.failed})


def _command() -> str:
    import shlex

    return shlex.join(["unwrite", *sys.argv[1:]])


def _method(name: str | None, settings: Mapping[str, str]) -> Any:
    """The method of that name, or the default; what is wrong with the settings of one that nobody
    named is told with its name."""
    from unwrite import methods

    try:
        return methods.build(name or methods.DEFAULT, settings)
    except BadSetting as error:
        if name is not None:
            raise
        raise BadSetting(
            f"{error} (No --method was named, so it is {methods.DEFAULT}; 'unwrite methods' lists "
            "them all.)"
        ) from None


def _plan(
    home: Path, base: str | None, facts: Edits, method: Any, trust_remote_code: bool, out: Terminal
) -> dict[str, Any]:
    from unwrite import plan
    from unwrite.home import is_home

    name: Any = base
    if is_home(home):
        name = _open(home, base, trust_remote_code, out).source
    elif base is None:
        raise BadSetting(f"{home} is not a model home yet; add --base MODEL.")
    needs = plan.for_model(
        name, method, facts, folder=home, trust_remote_code=trust_remote_code, progress=out
    )
    _show_plan(out, needs)
    return needs.as_json()


def _outlook(
    home: Path,
    base: str | None,
    facts: Edits,
    method: Any,
    protected: Sequence[Protected],
    seed: int | None,
    trust_remote_code: bool,
    out: Terminal,
) -> Outlook:
    """The forecast of a home, or of a model that is to become one."""
    from unwrite.home import is_home

    if is_home(home):
        opened = _open(home, base, trust_remote_code, out)
        return opened.forecast(facts, method, protect=protected, seed=seed)
    from unwrite import api, methods
    from unwrite.protection import look_ahead

    if seed is not None:
        method, _ = methods.replaced(method, "seed", seed)
    model = api.load(str(base), trust_remote_code=trust_remote_code, progress=out)
    return look_ahead(model, facts, method, protected)


def _show_plan(out: Terminal, needs: Any) -> None:
    out.table("Plan (an estimate; nothing was changed)", ("what", "value"), needs.rows())
    for sentence in needs.warnings:
        out.warn(sentence)


def _show_scores(out: Terminal, title: str, before: Any, after: Any) -> None:
    out.table(f"{title} (in %)", SCORE_COLUMNS, score_rows(before, after), numbers=7)


def _say_update(out: Terminal, home: Path, done: Any) -> None:
    perplexity, seconds = done.perplexity, done.seconds
    out.say(
        f"Perplexity on neutral text {perplexity['before']:.2f} -> {perplexity['after']:.2f}. "
        f"Change: {done.summary['encoding']}, {readable_size(done.summary['bytes'])}. "
        f"Training {seconds['train']:.1f} s, arithmetic {seconds['arithmetic']:.1f} s, "
        f"observing {seconds['observe']:.1f} s."
    )
    out.say(f"Committed as {done.id}. Undo with: unwrite undo {home} {done.id}")


def _say_notes(out: Terminal, notes: dict[str, Any]) -> None:
    for sentence in notes.get("sentences", []):
        out.say(sentence)


def _say_protection(out: Terminal, found: dict[str, Any] | None, listed: int = 0) -> None:
    """Forecast and truth of protected prompts: in sentences, and the first so many one by one."""
    if found is None:
        return
    for sentence in [*found["forecast"]["sentences"], found["truth"]["sentence"]]:
        out.say(sentence)
    if listed and found["prompts"]:
        out.table(
            "Protected prompts: forecast without protection, and the truth (changed above margin)",
            ("prompt", "answer before", "", "", "margin", "forecast", "std", "chance, %", "lost"),
            [
                [
                    row["prompt"],
                    row["answer"].strip(),
                    "protected" if row["protected"] else "",
                    "changed" if row["changed"] else "",
                    f"{row['margin']:.2f}",
                    f"{row['expected']:.2f}",
                    f"{row['std']:.2f}",
                    f"{100 * row['chance']:.0f}",
                    f"{row['lost']:.2f}",
                ]
                for row in found["prompts"][:listed]
            ],
            numbers=5,
        )


def _history_row(entry: dict[str, Any]) -> list[str]:
    if entry["do"] == "init":
        what, state, scores = f"made from {entry['base']['name']}", "", {}
    elif entry["do"] == "apply":
        what = f"{entry['id']}: {entry['edits']} edits by {entry['method']['name']}"
        state, scores = ("live" if entry["live"] else "undone"), entry["scores"]["after"]
    else:
        what, state, scores = f"undid {entry['of']}", "", {}

    def percent(role: str) -> str:
        value = scores.get(role, {}).get("token")
        return "" if value is None else f"{100 * value:.1f}"

    return [
        str(entry["n"]),
        entry["at"],
        what,
        entry.get("by", ""),
        percent("reliability"),
        percent("locality"),
        state,
        entry.get("why", ""),
    ]


def _moved_kinds(deltas: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The kinds of modules in which anything changes."""
    from unwrite.where import in_order

    return sorted(
        {row["kind"] for rows in deltas.values() for row in rows if row["changed"]}, key=in_order
    )


def _kind_rows(deltas: dict[str, list[dict[str, Any]]], kinds: list[str]) -> list[list[str]]:
    """For each kind of module a line on each delta."""
    measures: dict[str, Callable[[float], str]] = {
        "share": lambda value: f"{100 * value:.1f}",
        "mean": lambda value: f"{value:.1e}",
        "relative": lambda value: f"{100 * value:.2g}",
        "selected": lambda value: f"{100 * value:.1f}",
    }
    lines = []
    for kind in kinds:
        label = kind
        for name, rows in deltas.items():
            row = next((row for row in rows if row["kind"] == kind), {})
            values = {measure: row.get(measure) for measure in measures}
            cells = ["-" if v is None else measures[measure](v) for measure, v in values.items()]
            lines.append([label, name, *cells])
            label = ""
    return lines


def _grid(where: list[dict[str, Any]], kinds: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Blocks, and for each its shares by kind (in percent, as text)."""
    blocks = list(dict.fromkeys(_block(row["block"]) for row in where))
    shares = {(_block(row["block"]), row["kind"]): row["share"] for row in where}
    cells = {
        block: [
            f"{100 * shares[block, kind]:.2f}" if (block, kind) in shares else "" for kind in kinds
        ]
        for block in blocks
    }
    return blocks, cells


def _block(number: int | None) -> str:
    return "outside" if number is None else str(number)

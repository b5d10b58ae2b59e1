"""Does an update outlive what happens to a model afterwards? A cell's state, scored again.

- ``save-reload``: the state is written as a Hugging Face folder and asked by a fresh process.
- ``bf16``: every weight rounded to bf16 (computing stays in fp32, as everywhere here).
- ``int8``, ``int4``: the weights of all projections but the head rounded to the nearest of 255 or
  15 levels, symmetric about zero: one scale an output channel (int8), or one for every 64 inputs of
  an output channel (int4). Embedding, head, norms and biases stay, as the usual loaders leave them.
  Quantised models have been seen to give back what they had been made to forget (Zhang et al. 2024,
  arXiv 2410.16454).
- ``chat``: the questions under the tokenizer's chat template, as a user's turn; compared with the
  starting state under the same template.
- ``relearn:K``: K optimiser steps on the old answers. Does the old fact come back faster than one
  that the model never knew? For that, the same steps are taken with answers of other records: same
  prompts, same kind of answers, never taught. If both rise alike, the fact is gone; if the old one
  is ahead, it was only hidden.

Rounding goes tensor by tensor into the one network that is there, and takes no copy. ``relearn``
needs what full fine-tuning needs, ``save-reload`` a second model in a process of its own.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from unwrite import scores as scoring
from unwrite.bench import Bench
from unwrite.delta import Delta
from unwrite.edits import Edit
from unwrite.errors import BadSetting, UnwriteError
from unwrite.export import PROJECTIONS, export_state
from unwrite.model import Model
from unwrite.observe import Question, has_chat_template, neutral_text, perplexity
from unwrite.reload import ask_saved
from unwrite.scores import normalise
from unwrite.training import AfterStep, Pair, Recipe, Step, fine_tune

NAMES = ("save-reload", "bf16", "int8", "int4", "chat", "relearn")
GROUP = 64  # inputs that share a scale in int4
BATCH = 8  # records in one step of relearning
_NO_NUMBERS = "The weights no longer give numbers."

Rows = list[dict[str, Any]]
Ask = Callable[[Sequence[Question]], Rows]
Finish = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Subject:
    """The state to be checked: ``base + deltas``, and what it said and is asked.

    ``before``: rows of the starting state; ``chat``: the same under the chat template; ``after``:
    rows of this state. ``answers(rows, ask)`` asks again what ``rows`` asked (the row in context
    tells the new fact first). ``scratch``: a folder that may be made and is removed.
    """

    bench: Bench
    deltas: Sequence[Delta]
    edits: Sequence[Edit]
    before: Rows
    chat: Rows
    after: Rows
    answers: Callable[[Sequence[Mapping[str, Any]], Ask], Rows]
    scratch: Path


@dataclass(frozen=True)
class Found:
    """``facts`` for ``result.json``; ``rows`` by the stem of the file that they are stored in."""

    facts: dict[str, Any]
    rows: dict[str, Rows] = field(default_factory=dict)


def checked(names: Sequence[str]) -> tuple[str, ...]:
    """The checks, each once, in the order of ``NAMES``. Raises ``BadSetting``."""
    if isinstance(names, str):
        raise BadSetting("The robustness checks are a list of names: put them in [ ].")
    found = {}
    for name in dict.fromkeys(names):
        kind = str(name).partition(":")[0]
        if kind not in NAMES or (kind == "relearn") != (":" in str(name)):
            known = ", ".join((*NAMES[:-1], "relearn:STEPS (or relearn:STEPS:LR)"))
            raise BadSetting(f"There is no robustness check {name!r}. Checks: {known}.")
        if kind == "relearn":
            _course(name)
        found[name] = NAMES.index(kind)
    return tuple(sorted(found, key=lambda name: found[name]))


def run(name: str, subject: Subject) -> Found:
    """One check. The network is then in any state: the bench must be put into the next.

    What cannot be done (no chat template, no old answers, a diverged training) is a ``note`` in the
    facts instead of scores. Raises ``OSError`` of a full disk.
    """
    started = time.perf_counter()
    try:
        found = _run(name, subject)
    except UnwriteError as error:
        found = Found({"note": str(error)})
    return Found({**found.facts, "seconds": time.perf_counter() - started}, found.rows)


def stem(name: str) -> str:
    """A check's name as a file's."""
    return name.replace(":", "-")


def stored(name: str, facts: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The files of a check in a cell, by what they give: (rows before, rows after) as stems; an
    empty stem is the cell's own ``before.jsonl`` or ``after.jsonl``."""
    own = stem(name)
    if "note" in facts:
        return {}
    if name.startswith("relearn"):
        never = f"{own}-never-known"
        return {"old_recall": ("", own), "never_known": (f"{never}-before", never)}
    return {"scores": (f"{own}-before" if name == "chat" else "", own)}


def _run(name: str, subject: Subject) -> Found:
    bench = subject.bench
    if name.startswith("relearn"):
        return _relearned(name, subject)
    if name == "save-reload":
        return _reloaded(name, subject)
    if name == "chat":
        if not has_chat_template(bench.model):
            raise UnwriteError("The tokenizer has no chat template.")
        bench.become(subject.deltas)
        rows = _numbers(subject.answers(subject.chat, bench.chat))
        facts = {
            "before": scoring.as_json(bench.score(subject.chat, subject.chat)),
            "scores": scoring.as_json(bench.score(subject.chat, rows)),
            "perplexity": None,
        }
        return Found(facts, {"chat-before": subject.chat, "chat": rows})
    bench.become(subject.deltas, finish=rounding(name, bench.model))
    rows = subject.answers(subject.before, bench.observe)
    return _scored(name, subject, rows, perplexity(bench.model, neutral_text()))


def _scored(name: str, subject: Subject, rows: Rows, measured: float, **more: Any) -> Found:
    if not math.isfinite(measured):
        raise UnwriteError(_NO_NUMBERS)
    scores = scoring.as_json(subject.bench.score(subject.before, _numbers(rows)))
    return Found({"scores": scores, "perplexity": measured, **more}, {stem(name): rows})


def _numbers(rows: Rows) -> Rows:
    """The rows; ``UnwriteError`` if the network gave none that could be written down."""
    if not all(math.isfinite(row["logprob"]) for row in rows):
        raise UnwriteError(_NO_NUMBERS)
    return rows


# ---- rounding ------------------------------------------------------------------------------------


def rounding(name: str, model: Model) -> Finish:
    """What a tensor (by file name) becomes in ``bf16``, ``int8`` or ``int4``, in fp32 again."""

    def cast(_name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.bfloat16().float() if tensor.is_floating_point() else tensor

    def quantised(file: str, tensor: torch.Tensor) -> torch.Tensor:
        parameter = model.names[file]
        kind = model.anatomy.kind(parameter)
        if kind not in PROJECTIONS - {"head"} or tensor.dim() != 2:
            return tensor
        bits, group = (8, None) if name == "int8" else (4, GROUP)
        if model.anatomy.transposed(parameter):
            return nearest(tensor.float().T, bits, group).T
        return nearest(tensor.float(), bits, group)

    return cast if name == "bf16" else quantised


def nearest(weight: torch.Tensor, bits: int, group: int | None = None) -> torch.Tensor:
    """``weight`` (out, in), fp32, with every value rounded to the nearest of ``2 ** bits - 1``
    multiples of a scale; a scale for each row, or for each ``group`` neighbours within a row. The
    largest value of those that share a scale stays as it is."""
    levels = 2 ** (bits - 1) - 1
    rows, columns = weight.shape
    size = group or columns
    padded = torch.nn.functional.pad(weight, (0, -columns % size)).reshape(rows, -1, size)
    scale = padded.abs().amax(dim=-1, keepdim=True) / levels
    steps = (padded / scale.where(scale > 0, torch.ones_like(scale))).round()
    return (steps * scale).reshape(rows, -1)[:, :columns]


# ---- save and reload -----------------------------------------------------------------------------


def _reloaded(name: str, subject: Subject) -> Found:
    bench = subject.bench
    fresh: dict[str, Any] = {}

    def ask(probes: Sequence[Question]) -> Rows:
        fresh.update(
            ask_saved(
                subject.scratch,
                probes,
                free=bench.protocol.exact,
                device=str(bench.model.device),
                trust_remote_code=bench.trust_remote_code,
            )
        )
        rows: Rows = fresh.pop("rows")
        return rows

    try:
        source, progress = bench.model.source, bench.model.progress
        export_state(subject.scratch, "model", bench.base, source, (), (), subject.deltas, progress)
        rows = subject.answers(subject.before, ask)
    finally:
        shutil.rmtree(subject.scratch, ignore_errors=True)
    keys = ("predicted", "text")
    same = all(
        one[key] == other[key]
        for one, other in zip(subject.after, rows, strict=True)
        for key in keys
    )
    identical = same and fresh["fingerprint"] == bench.fingerprint(subject.deltas)
    return _scored(name, subject, rows, fresh["perplexity"], identical=identical)


# ---- relearning ----------------------------------------------------------------------------------


def strangers(edits: Sequence[Edit]) -> list[Pair]:
    """For each edit with an old answer, a prompt with the old answer of another record: neither
    this one's old nor its new answer, of the same relation where there is one, else any; edits for
    which there is none are left out. The next suitable record is taken, so that no answer is had
    too often."""
    known = [edit for edit in edits if edit.old is not None]
    found = []
    for number, edit in enumerate(known):
        others = known[number + 1 :] + known[:number]
        related = [one for one in others if edit.relation and one.relation == edit.relation]
        own = {normalise(str(edit.old)), normalise(edit.new)}
        answers = [str(one.old) for one in (*related, *others)]
        fitting = [answer for answer in answers if normalise(answer) not in own]
        if fitting:
            found.append(Pair(edit.prompt, fitting[0]))
    return found


def _relearned(name: str, subject: Subject) -> Found:
    bench, (steps, lr) = subject.bench, _course(name)
    known = [edit for edit in subject.edits if edit.old is not None]
    names = {edit.prompt: str(edit.id) for edit in known}
    never = strangers(known)
    if not known:
        raise UnwriteError("No record has an old answer that could be learned again.")
    if not never:
        raise UnwriteError("No record has an old answer that could stand for one never known.")
    bench.become(subject.deltas)
    old = [row for row in subject.after if row["role"] == "old_recall"]
    # As probes of the same role, so that they are scored alike.
    probes = [
        Question(names[pair.prompt], "old_recall", pair.prompt, pair.answer) for pair in never
    ]
    unknown = subject.answers([vars(probe) for probe in probes], bench.observe)

    def after_learning(pairs: Sequence[Pair], rows: Rows) -> Rows:
        ask = partial(subject.answers, rows, bench.observe)
        return _numbers(_after_steps(bench.model, pairs, steps, lr, ask))

    relearned = after_learning([Pair(edit.prompt, str(edit.old)) for edit in known], old)
    learned = after_learning(never, unknown)
    own = stem(name)
    facts = {
        "steps": steps,
        "lr": lr,
        "old_recall": {"before": _recall(bench, old), "after": _recall(bench, relearned)},
        "never_known": {"before": _recall(bench, unknown), "after": _recall(bench, learned)},
    }
    return Found(
        facts,
        {
            own: relearned,
            f"{own}-never-known-before": unknown,
            f"{own}-never-known": learned,
        },
    )


def _recall(bench: Bench, rows: Rows) -> dict[str, Any]:
    return scoring.as_json(bench.score(rows, rows))["old_recall"]


class _Enough(Exception):
    """The last step was taken, and the network was asked."""


def _after_steps(
    model: Model, pairs: Sequence[Pair], steps: int, lr: float, ask: Callable[[], Rows]
) -> Rows:
    """What ``ask`` gives after exactly so many optimiser steps on ``pairs``. It is asked within the
    training, so that no copy of the trained weights is made; the model is as before afterwards."""
    rows: Rows = []

    def hook(_parameters: Mapping[str, torch.nn.Parameter], step: Step) -> None:
        if step.number == steps:
            rows.extend(ask())
            raise _Enough

    epochs = math.ceil(steps / math.ceil(len(pairs) / BATCH))
    recipe = Recipe(epochs=epochs, lr=lr, batch_size=BATCH, until="epochs")
    after_step: AfterStep = hook
    try:
        fine_tune(model, pairs, recipe, after_step=after_step)
    except _Enough:
        return rows
    raise AssertionError("training ended before its last step")


def _course(name: str) -> tuple[int, float]:
    """Steps and learning rate of ``relearn:STEPS`` or ``relearn:STEPS:LR``."""
    _, *given = name.split(":")
    try:
        steps, lr = int(given[0]), float(given[1]) if len(given) > 1 else Recipe().lr
    except (ValueError, IndexError):
        steps, lr = 0, 0.0
    if steps < 1 or not (0 < lr < math.inf) or len(given) > 2:
        raise BadSetting(
            f"{name!r} is not relearn:STEPS or relearn:STEPS:LR: steps are a whole number from 1 "
            "on, and the learning rate is greater than 0."
        )
    return steps, lr

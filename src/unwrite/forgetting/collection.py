"""Making a forgetting matrix: learn one task, see what every example lost, begin again.

Every task is learned from the same base by a tuner of the library; its delta is added for the
length of one measurement. The matrix is written after every task, so that an interrupted collection
goes on where it was.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from unwrite.delta import Delta
from unwrite.errors import BadSetting
from unwrite.executors import Executor
from unwrite.files import (
    only_writer,
    read_json,
    sha256_bytes,
    speaking_of_disk,
    user_path,
    write_json,
)
from unwrite.forgetting.examples import UpstreamExample, from_details
from unwrite.forgetting.matrix import Array, ForgettingMatrix, is_matrix, place_of
from unwrite.forgetting.measurement import measure, measure_right, settle
from unwrite.model import Model
from unwrite.pretrained import Source
from unwrite.scratch import remove_temporaries
from unwrite.training import Pair

BASE = "base.json"
Quantity = Literal["log-perplexity", "exact-match"]


class Tuner(Protocol):
    """What learns a task: ``LoRA``, ``FullFT``, or anything with this function."""

    def delta(self, model: Model, pairs: Sequence[Pair], /) -> Delta:
        """The change that teaches the pairs; the model stays as it is."""


@dataclass(frozen=True)
class Collection:
    """What ``collect`` did: the matrix, the tasks learned now, and seconds by kind of work."""

    matrix: ForgettingMatrix
    learned: tuple[str, ...]
    seconds: Mapping[str, float]


def collect(
    model: Model,
    tasks: Mapping[str, Sequence[Pair]],
    examples: Sequence[UpstreamExample],
    tuner: Tuner,
    folder: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    quantity: Quantity = "log-perplexity",
    executor: Executor | None = None,
) -> Collection:
    """Add a row for every task that the matrix in ``folder`` does not have yet.

    The first call settles the examples, measures them on the base, once, and keeps those numbers
    in ``base.json``. Examples of which the base gives no number are left out; with
    ``quantity="exact-match"`` so are those that it answers wrongly, and an entry is 1 where the
    answer is wrong after the task, else 0. ``settings`` (JSON) says in the provenance what the
    tuner is. ``executor``: where tasks are learned (default: here, one after the other). The model
    is bitwise unchanged.

    Raises ``BadSetting`` when the folder's matrix is of another model, other examples, another
    tuner or quantity; and what the tuner raises. Memory: the model, and what the tuner holds.
    """
    if quantity not in ("log-perplexity", "exact-match"):
        raise BadSetting(f"quantity must be log-perplexity or exact-match, not {quantity!r}.")
    path = user_path(folder)
    seconds = {"base": 0.0, "learn": 0.0, "measure": 0.0}
    for name, pairs in tasks.items():
        if not pairs:
            raise BadSetting(f"The task {name!r} has nothing to learn from.")
    started = time.perf_counter()
    identity = {
        "base": model.fingerprint,
        "base_name": model.source.name,
        "quantity": quantity,
        "tuner": dict(settings or {}),
        "examples": _digest(examples),
    }
    first = None if is_matrix(path) else _first(model, examples, identity, quantity)
    seconds["base"] = time.perf_counter() - started
    with speaking_of_disk(f"write {path}"):
        path.mkdir(parents=True, exist_ok=True)
        with only_writer(path):
            remove_temporaries(path)
            if first is not None and not is_matrix(path):  # nobody was faster meanwhile
                matrix, values = first
                numbers = dict(zip(matrix.examples, values.tolist(), strict=True))
                write_json(path / BASE, {"quantity": quantity, "values": numbers})
                matrix.save(path)
            return _grown(path, model, tasks, tuner, identity, quantity, seconds, executor)


def _grown(
    path: Path,
    model: Model,
    tasks: Mapping[str, Sequence[Pair]],
    tuner: Tuner,
    identity: Mapping[str, Any],
    quantity: Quantity,
    seconds: dict[str, float],
    executor: Executor | None,
) -> Collection:
    """Learn and measure the tasks that the matrix in ``path`` lacks. Only under its lock."""
    matrix = ForgettingMatrix.load(path)
    for key, value in identity.items():
        if matrix.provenance.get(key) != value and key != "base_name":
            raise BadSetting(
                f"The matrix in {path} was begun with another {key}. Use a new folder, or the "
                "settings it was begun with."
            )
    _check_unchanged(matrix, tasks)
    base = base_numbers(path, matrix)
    kept = from_details(matrix.examples, matrix.example_details)
    waiting = [name for name in tasks if name not in matrix.tasks]
    rows = RowMaker.of(model, tuner, kept, base, quantity)
    jobs = [(name, tuple(tasks[name])) for name in waiting]
    with model.progress.stage("collecting tasks", len(waiting)) as advance:
        for name, row, took in _in_order(rows, jobs, model, executor):
            seconds["learn"] += took[0]
            seconds["measure"] += took[1]
            details = {"pairs": len(tasks[name]), "digest": _digest(tasks[name])}
            matrix = matrix.append(name, row, details)
            matrix.save(path)
            advance(1, name)
    return Collection(matrix, tuple(waiting), seconds)


Job = tuple[str, tuple[Pair, ...]]  # a task and what it teaches
Row = tuple[Array, tuple[float, float]]  # and the seconds of learning and of measuring


@dataclass(frozen=True)
class RowMaker:
    """What a worker of an executor needs to make rows of the matrix: sent to it once."""

    source: Source
    trust_remote_code: bool
    tuner: Tuner
    examples: Sequence[UpstreamExample]
    base: Array
    quantity: Quantity

    @classmethod
    def of(
        cls,
        model: Model,
        tuner: Tuner,
        examples: Sequence[UpstreamExample],
        base: Array,
        quantity: Quantity,
    ) -> RowMaker:
        """For rows of the model as its source has it."""
        trusted = type(model.network).__module__.startswith("transformers_modules")
        return cls(model.source, trusted, tuner, examples, base, quantity)

    def __call__(self) -> Callable[[Job], Row]:
        """A worker with a model of its own."""
        model = Model.load(self.source, trust_remote_code=self.trust_remote_code)
        return lambda job: self.row(model, job)

    def row(self, model: Model, job: Job) -> Row:
        """Learn one task and measure what it changed."""
        started = time.perf_counter()
        delta = self.tuner.delta(model, job[1])
        learned = time.perf_counter()
        with model.shifted(delta):
            row = _change(model, self.examples, self.base, self.quantity)
        return row, (learned - started, time.perf_counter() - learned)


def _in_order(
    rows: RowMaker, jobs: Sequence[Job], model: Model, executor: Executor | None
) -> Iterator[tuple[str, Array, tuple[float, float]]]:
    """The rows in the order of their tasks, wherever and whenever they are finished."""
    if executor is None:
        for job in jobs:
            yield (job[0], *rows.row(model, job))
        return
    early: dict[str, Row] = {}
    waiting = [name for name, _ in jobs]
    with contextlib.closing(executor.work(rows, jobs)) as work:
        for (name, _), row in work:
            early[name] = row
            while waiting and waiting[0] in early:
                first = waiting.pop(0)
                yield (first, *early.pop(first))


def append_update(home: Any, update: str, folder: str | Path) -> ForgettingMatrix:
    """Add what an update of a home did to the examples of the matrix in ``folder``.

    Measured between the state right before the update and the state right after it, so that earlier
    updates do not count. The home (``unwrite.Home``) is not changed. Raises ``BadSetting`` when the
    matrix is of another base or has the update already, ``HomeError`` for an unknown update.
    """
    path = user_path(folder)
    ForgettingMatrix.load(path)  # a folder without one is refused before anything is written
    with speaking_of_disk(f"write {path}"), only_writer(path):
        remove_temporaries(path)
        return _with_update(home, update, path)


def _with_update(home: Any, update: str, path: Path) -> ForgettingMatrix:
    matrix = ForgettingMatrix.load(path)
    of = matrix.provenance.get("base")
    if of != home.base.fingerprint:
        raise BadSetting(
            f"The matrix in {path} is of another model ({matrix.provenance.get('base_name')}) than "
            f"{home.folder}. Collect one for {home.base.name}."
        )
    if update in matrix.tasks:
        raise BadSetting(f"The matrix in {path} has the update {update} already.")
    entry = home.ledger.entry(update)
    quantity: Quantity = matrix.provenance.get("quantity", "log-perplexity")
    examples = from_details(matrix.examples, matrix.example_details)
    before = _measured(home.model_before(update), examples, quantity)
    after = _measured(home.model(update), examples, quantity)
    row = _difference(before, after, quantity)
    details = {
        "update": update,
        "edits": entry["edits"],
        "method": entry["method"]["name"],
    }
    grown = matrix.append(update, row, details)
    grown.save(path)
    return grown


def change(model: Model, matrix: ForgettingMatrix, base: Array, at: Sequence[int]) -> Array:
    """A row of the matrix for ``model`` as it is now, measured at the positions ``at`` only:
    (examples,), NaN elsewhere. ``base``: the numbers of the state before, (examples,)."""
    quantity: Quantity = matrix.provenance.get("quantity", "log-perplexity")
    chosen = [matrix.examples[position] for position in at]
    row = np.full(len(matrix.examples), np.nan)
    kept = from_details(chosen, matrix.example_details)
    row[list(at)] = _change(model, kept, np.asarray(base)[list(at)], quantity)
    return row


def base_numbers(folder: str | Path, matrix: ForgettingMatrix) -> Array:
    """What ``collect`` measured on the base, (examples,). Raises ``DamagedFile`` without it."""
    kept = read_json(place_of(folder) / BASE)["values"]
    return np.array([kept[name] for name in matrix.examples], dtype=np.float64)


def _first(
    model: Model,
    examples: Sequence[UpstreamExample],
    identity: dict[str, Any],
    quantity: Quantity,
) -> tuple[ForgettingMatrix, Array]:
    """A matrix without tasks, and what the base gives for its examples. Writes nothing."""
    settled = settle(model, examples)
    values = _measured(model, settled, quantity)
    useful = np.isfinite(values) if quantity == "log-perplexity" else values == 1
    kept = [one for one, good in zip(settled, useful, strict=True) if good]
    if not kept:
        raise BadSetting(
            "No example is left: the base answers none of them"
            + (" rightly. " if quantity == "exact-match" else " with a number. ")
            + "Use other examples."
        )
    matrix = ForgettingMatrix.empty(
        [one.name for one in kept],
        identity | {"left_out": len(settled) - len(kept)},
        {one.name: one.details() for one in kept},
    )
    return matrix, values[useful]


def _check_unchanged(matrix: ForgettingMatrix, tasks: Mapping[str, Sequence[Pair]]) -> None:
    for name, pairs in tasks.items():
        kept = matrix.task_details.get(name, {}).get("digest")
        if name in matrix.tasks and kept != _digest(pairs):
            raise BadSetting(
                f"The matrix has a task {name!r} already, learned from other pairs. Give this one "
                "another name, or use a new folder."
            )


def _measured(model: Model, examples: Sequence[UpstreamExample], quantity: Quantity) -> Array:
    if quantity == "exact-match":
        return measure_right(model, examples).astype(np.float64)
    return measure(model, examples)


def _change(
    model: Model, examples: Sequence[UpstreamExample], before: Array, quantity: Quantity
) -> Array:
    return _difference(before, _measured(model, examples, quantity), quantity)


def _difference(before: Array, after: Array, quantity: Quantity) -> Array:
    if quantity == "exact-match":
        return np.where(before == 1, 1 - after, np.nan)  # of what was right before
    # Single precision is what a forward pass gives; the rest would be noise on disk.
    return (after - before).astype(np.float32).astype(np.float64)


def _digest(rows: Sequence[Pair] | Sequence[UpstreamExample]) -> str:
    content = [[getattr(row, "name", ""), row.prompt, row.answer] for row in rows]
    return sha256_bytes(json.dumps(content, ensure_ascii=False).encode("utf-8"))[:16]

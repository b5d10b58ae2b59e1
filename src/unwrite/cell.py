"""One cell of a comparison: one method on one start, computed, measured and stored.

cells/delicate-zsre-n100-s0-1a2b3c4d/
  cell.json         the method with all settings, and the environment
  before.jsonl      the starting state, probe by probe
  after.jsonl       the state after the updates
  rivals-before.jsonl, rivals-after.jsonl   what was forced besides, where it was asked for
  robust/           the same after what befalls a model, where it was asked for
  tensors.json      how each tensor changed (mode batch)
  result.json       scores, costs, fingerprints; written last, so a cell with it is finished
  failed.json       instead: the sentence that the method failed with
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unwrite import ability, neighbour_metrics, record, robustness
from unwrite import scores as scoring
from unwrite.bench import Bench
from unwrite.delta import Delta, DeltaSummary
from unwrite.deltafile import TensorFacts, totals
from unwrite.edits import Edit
from unwrite.errors import TrainingFailed
from unwrite.files import read_json, sync_folder, write_json, write_jsonl
from unwrite.grid import Cell
from unwrite.measuring import Meter
from unwrite.observe import Question
from unwrite.reference import InContext
from unwrite.start import Start, asked

RESULT, FAILED = "result.json", "failed.json"
TENSORS, WHERE = "tensors.json", "where.json"
RIVALS_BEFORE, RIVALS_AFTER = "rivals-before.jsonl", "rivals-after.jsonl"
STEPS, ROBUST = "steps", "robust"

Ask = Callable[[Sequence[Question]], list[dict[str, Any]]]
# The method, on the state that the bench is in: edits to learn, and those that led to that state.
Learn = Callable[[Sequence[Edit], Sequence[Edit]], Delta]


@dataclass
class Outcome:
    """What a cell found out. ``notes``: what the method said, with its ``sentences`` for people;
    ``steps``: one entry per chunk of the mode ``sequential``."""

    after: list[dict[str, Any]]
    perplexity: float
    facts: dict[str, TensorFacts]
    delta: dict[str, Any]
    fingerprint: str | None
    notes: dict[str, Any]
    where: dict[str, Any] | None = None
    steps: list[dict[str, Any]] | None = None
    worst: float | None = None  # the highest perplexity after a single edit
    rivals: list[dict[str, Any]] = field(default_factory=list)  # forced besides, in this state
    deltas: Sequence[Delta] = ()  # what the base is changed by, of a state that there is


def compute(
    folder: Path, cell: Cell, method: Any, learn: Learn, start: Start, bench: Bench
) -> None:
    """Compute a cell and store it; the model is then, bit for bit, what it was at the start.

    However this ends, ``result.json`` is whole or not there. Raises what the method raises; the
    caller decides whether the grid goes on.
    """
    if folder.exists():  # of a run that was cut off, or failed
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_json(
        folder / "cell.json", {"cell": asdict(cell), "environment": record.environment("compare")}
    )
    write_jsonl(folder / "before.jsonl", start.before)
    work = _Work(folder, method, learn, start, bench, Meter())
    outcome: Outcome = getattr(work, bench.protocol.mode)()
    memory = work.meter.memory()  # what is measured on request is no cost of the method
    write_jsonl(folder / "after.jsonl", outcome.after)
    if bench.protocol.neighbour_metrics:
        write_jsonl(folder / RIVALS_BEFORE, start.rivals)
        write_jsonl(folder / RIVALS_AFTER, outcome.rivals)
    if outcome.where is not None:
        tensors = {name: asdict(facts) for name, facts in outcome.facts.items()}
        write_json(folder / TENSORS, tensors)
        write_json(folder / WHERE, outcome.where)
    general = work.general_ability(outcome)
    robust = {name: work.check(name, outcome) for name in bench.protocol.robust}
    shutil.rmtree(folder / STEPS, ignore_errors=True)
    sync_folder(folder)
    result = _result(cell, outcome, work) | {"memory": memory}
    asked_for = {"robust": robust, "lm_eval": general}
    result |= {name: found for name, found in asked_for.items() if found}
    write_json(folder / RESULT, result)
    bench.become(start.deltas)


def tensor_facts(folder: Path) -> dict[str, TensorFacts]:
    """How each tensor changed in a finished cell."""
    stored = read_json(folder / TENSORS) if (folder / TENSORS).is_file() else {}
    return {
        name: TensorFacts(**{**facts, "shape": tuple(facts["shape"])})
        for name, facts in stored.items()
    }


@dataclass
class _Work:
    """The three ways to apply edits; each leaves the bench in the state that it reached."""

    folder: Path
    method: Any
    learn: Learn
    start: Start
    bench: Bench
    meter: Meter

    def batch(self) -> Outcome:
        """All edits in one update."""
        start, bench = self.start, self.bench
        bench.become(start.deltas)
        delta = self._learned(start.edits)
        notes = record.notes_of(delta)
        with self.meter.of("arithmetic"):
            facts, where = delta.facts(), bench.base.where(delta)
            deltas = [*start.deltas, *([delta] if delta else [])]
            bench.become(deltas)
            fingerprint = bench.fingerprint(deltas) if delta else start.fingerprint
        with self.meter.of("observe"):
            after = self._rows(start.before, changed=bool(delta))
            rivals = self._rows(start.rivals, changed=bool(delta), ask=bench.force)
            perplexity = bench.perplexity() if delta else start.perplexity
        return Outcome(
            after=after,
            rivals=rivals,
            deltas=deltas,
            perplexity=perplexity,
            facts=facts,
            delta=_summary(facts, bench.base.parameters),
            fingerprint=fingerprint,
            notes=notes,
            where=where if delta else None,
        )

    def sequential(self) -> Outcome:
        """Chunk after chunk, each an update on top of those before, all scored after each."""
        start, bench, size = self.start, self.bench, self.bench.protocol.chunk or 1
        chunks = [start.edits[at : at + size] for at in range(0, len(start.edits), size)]
        deltas: list[Delta] = []
        steps: list[dict[str, Any]] = []
        notes: list[dict[str, Any]] = []
        after: list[dict[str, Any]] = []
        bench.become(start.deltas)
        for number, chunk in enumerate(chunks, start=1):
            held = list(deltas)
            try:
                delta = self._learned(chunk, start.edits[: (number - 1) * size])
                with self.meter.of("arithmetic"):
                    if delta:
                        # On disk, as in a home: all of them are needed until the end.
                        deltas.append(delta.save(self.folder / STEPS / f"{number:04}"))
                        bench.become([*start.deltas, *deltas])
                with self.meter.of("observe"):
                    perplexity = bench.perplexity() if deltas else start.perplexity
            except TrainingFailed as error:
                if number == 1:
                    raise
                # The model collapsed. The curve up to here is what was to be found out.
                notes.append({"sentences": [f"It ended before step {number}: {error}"]})
                deltas = held
                break
            notes.append(record.notes_of(delta))
            with self.meter.of("observe"):
                after, step = self._step(chunks[:number], perplexity, changed=bool(deltas))
                steps.append(step)
        if len(steps) < len(chunks):  # the chunks that were not reached are asked as well
            bench.become([*start.deltas, *deltas])
            with self.meter.of("observe"):
                after = self._rows(start.before, changed=bool(deltas))
        with self.meter.of("observe"):
            rivals = self._rows(start.rivals, changed=bool(deltas), ask=bench.force)
        with self.meter.of("arithmetic"):
            fingerprint = bench.fingerprint([*start.deltas, *deltas])
            total = sum(deltas[1:], start=deltas[0]) if deltas else Delta.nothing()
            summary = _summary(total.facts(), bench.base.parameters)
            summary["bytes"] = sum(delta.summary().bytes for delta in deltas)
        return Outcome(
            after=after,
            rivals=rivals,
            deltas=[*start.deltas, *deltas],
            perplexity=steps[-1]["perplexity"],
            facts={},
            delta=summary,
            fingerprint=fingerprint,
            notes=_joined(notes),
            steps=steps,
        )

    def _step(
        self, chunks: Sequence[Sequence[Edit]], perplexity: float, changed: bool
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """All rows after a chunk, and the scores: on its own edits, on those of all earlier chunks,
        and, for the retention matrix, the reliability of each chunk so far."""
        before = [self._of(chunk, self.start.before) for chunk in chunks]
        rows = self._rows([row for part in before for row in part], changed)
        after: list[list[dict[str, Any]]] = []
        used = 0
        for part in before:
            after.append(rows[used : used + len(part)])
            used += len(part)
        earlier = [[row for part in side[:-1] for row in part] for side in (before, after)]
        scores = [self.bench.score(one, two) for one, two in zip(before, after, strict=True)]
        return rows, {
            "step": len(chunks),
            "edits": sum(map(len, chunks)),
            "new": scoring.as_json(scores[-1]),
            "earlier": scoring.as_json(self.bench.score(*earlier)) if len(chunks) > 1 else None,
            "reliability_by_chunk": [
                {"token": one["reliability"].token, "exact": one["reliability"].exact}
                for one in scores
            ],
            "perplexity": perplexity,
        }

    def single(self) -> Outcome:
        """Every edit alone, from the starting state; the scores are pooled."""
        start, bench = self.start, self.bench
        after: list[dict[str, Any]] = []
        rivals: list[dict[str, Any]] = []
        summaries: list[dict[str, Any]] = []
        perplexities: list[float] = []
        notes: list[dict[str, Any]] = []
        with bench.model.progress.stage("single edits", len(start.edits)) as advance:
            for edit in start.edits:
                bench.become(start.deltas)
                delta = self._learned([edit])
                with self.meter.of("arithmetic"):
                    summaries.append(_summary(delta.facts(), bench.base.parameters))
                    bench.become([*start.deltas, *([delta] if delta else [])])
                with self.meter.of("observe"):
                    own, besides = (self._of([edit], rows) for rows in (start.before, start.rivals))
                    after += self._rows(own, changed=bool(delta))
                    rivals += self._rows(besides, changed=bool(delta), ask=bench.force)
                    perplexities.append(bench.perplexity() if delta else start.perplexity)
                notes.append(record.notes_of(delta))
                advance(1, "")
        return Outcome(
            after=after,
            rivals=rivals,
            perplexity=sum(perplexities) / len(perplexities),
            worst=max(perplexities),
            facts={},
            delta=_mean_summary(summaries),
            fingerprint=None,
            notes=_joined(notes),
        )

    def general_ability(self, outcome: Outcome) -> dict[str, Any] | None:
        """What lm-eval finds before and after; a state without a change is not asked again."""
        start, bench = self.start, self.bench
        before = start.facts.get("lm_eval")
        if before is None:
            return None
        bench.become(outcome.deltas)
        changed = outcome.fingerprint != start.fingerprint
        after = bench.ability(start.edits) if changed else before
        return {"version": ability.version(), "before": before, "after": after}

    def check(self, name: str, outcome: Outcome) -> dict[str, Any]:
        """What one check of robustness finds of the state that was reached; its rows are stored."""
        start = self.start

        def answers(rows: Sequence[Mapping[str, Any]], ask: Ask) -> list[dict[str, Any]]:
            return self._rows(rows, changed=True, ask=ask)

        subject = robustness.Subject(
            bench=self.bench,
            deltas=outcome.deltas,
            edits=start.edits,
            before=start.before,
            chat=start.chat,
            after=outcome.after,
            answers=answers,
            scratch=self.folder / "reloaded",
        )
        found = robustness.run(name, subject)
        (self.folder / ROBUST).mkdir(exist_ok=True)
        for stem, rows in found.rows.items():
            write_jsonl(self.folder / ROBUST / f"{stem}.jsonl", rows)
        return found.facts

    def _learned(self, edits: Sequence[Edit], earlier: Sequence[Edit] = ()) -> Delta:
        with self.meter.of("train"):
            delta = self.learn(edits, earlier)
        with self.meter.of("arithmetic"):
            return delta.in_memory()  # a lazy view would be computed three times

    def _of(self, edits: Sequence[Edit], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Of rows of the starting state, those that belong to these edits."""
        names = {str(edit.id) for edit in edits}
        return [row for row in rows if row["edit"] in names]

    def _rows(
        self, before: Sequence[Mapping[str, Any]], changed: bool, ask: Ask | None = None
    ) -> list[dict[str, Any]]:
        """What the state that the bench is in says to the probes of ``before``."""
        probes, ask = asked(before), ask or self.bench.observe
        if isinstance(self.method, InContext):
            told = ask(self.method.told(self.start.edits, probes))
            return [
                {**row, "prompt": probe.prompt} for row, probe in zip(told, probes, strict=True)
            ]
        # A state without a change has been asked already.
        return ask(probes) if changed else [dict(row) for row in before]


def _result(cell: Cell, outcome: Outcome, work: _Work) -> dict[str, Any]:
    """What ``compare --json`` prints of a cell; the fields of ``update --json`` and more."""
    start, bench = work.start, work.bench
    perplexity = {"before": start.perplexity, "after": outcome.perplexity}
    result = {
        "id": cell.name,
        "committed": False,  # a comparison keeps no change
        "method": cell.method,
        "settings": cell.settings,
        "edits": cell.edits,
        "size": cell.size,
        "records": len(start.edits),
        "seed": cell.seed,
        "start": bench.protocol.start,
        "mode": bench.protocol.mode,
        "seconds": work.meter.seconds,
        "scores": {
            "before": start.facts["scores"],
            "after": scoring.as_json(bench.score(start.before, outcome.after)),
        },
        "perplexity": perplexity | ({} if outcome.worst is None else {"worst": outcome.worst}),
        "delta": outcome.delta,
        "start_fingerprint": start.fingerprint,
        "fingerprint": outcome.fingerprint,
        "notes": outcome.notes,
        "steps": outcome.steps,
    }
    if bench.protocol.neighbour_metrics:
        result["neighbour_metrics"] = {
            "before": neighbour_metrics.metrics(start.before, start.before, start.rivals),
            "after": neighbour_metrics.metrics(start.before, outcome.after, outcome.rivals),
        }
    return result


def _summary(facts: dict[str, TensorFacts], parameters: int) -> dict[str, Any]:
    """A delta's totals as in ``update --json``; ``changed_fraction`` is that of the whole model."""
    heaviest = max(facts, key=lambda name: facts[name].squared_norm, default="")
    return DeltaSummary(heaviest=heaviest, **totals(facts.values())).as_json(parameters)


def _mean_summary(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean over single edits; the encoding is that of all, or ``mixed``."""
    mean = {
        key: sum(one[key] for one in summaries) / len(summaries)
        for key in ("tensors", "parameters", "changed", "bytes", "squared_norm", "changed_fraction")
    }
    encodings = {one["encoding"] for one in summaries}
    encoding = encodings.pop() if len(encodings) == 1 else "mixed"
    return {**mean, "encoding": encoding, "heaviest": None}


def _joined(notes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a method said of several updates; the same sentence is said once."""
    sentences = dict.fromkeys(text for one in notes for text in one.get("sentences", ()))
    return {"sentences": list(sentences), "updates": list(notes)}

"""Where the cells on one edit set and size begin: the same records, the same weights, asked once.

    starts/<edits>-n100-1a2b3c4d/
      edits.jsonl       the records, after the choice of known ones
      planted/          the delta that plants the old answers, where the protocol asks for it
      before.jsonl      what the starting state says, probe by probe
      chat.jsonl        the same under the chat template, where asked for
      rivals.jsonl      what is forced besides for the metrics of other toolkits, where asked for
      start.json        its fingerprint, perplexity and scores; written last

Planting is the protocol of the F-Learning and Delicate Fine-Tuning papers (METHODS 1.3): the base,
fine-tuned on the old answers for three epochs, is the "original model" that every method starts
from and against which locality is measured.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unwrite import scores as scoring
from unwrite.bench import Bench
from unwrite.delta import Delta
from unwrite.edits import Edits, read_edits, write_edits
from unwrite.errors import BadEdits
from unwrite.files import read_json, read_jsonl, write_json, write_jsonl
from unwrite.methods.full_ft import FullFT
from unwrite.observe import Question, has_chat_template, settle
from unwrite.scores import Row, Scores
from unwrite.scratch import remove_temporaries

NAME, RIVALS, CHAT = "start.json", "rivals.jsonl", "chat.jsonl"
_EXTRA = (RIVALS, CHAT)  # what only some protocols ask for


def planting(lr: float) -> FullFT:
    """The recipe that plants old answers: three epochs over all weights, always the same seed."""
    return FullFT(epochs=3, until="epochs", lr=lr, seed=0)


@dataclass(frozen=True)
class Start:
    """A finished start. ``deltas``: what the base is changed by, nothing or the planted delta;
    ``before``: the rows of its observation; ``facts``: what ``start.json`` holds; ``rivals``: rows
    of what is forced besides; ``chat``: rows under the chat template."""

    folder: Path
    edits: Edits
    deltas: tuple[Delta, ...]
    before: list[dict[str, Any]]
    facts: dict[str, Any]
    rivals: list[dict[str, Any]] = field(default_factory=list)
    chat: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path) -> Start | None:
        """The start in ``folder`` if it is finished."""
        if not (folder / NAME).is_file():
            return None
        planted = folder / "planted"
        return cls(
            folder,
            read_edits(folder / "edits.jsonl"),
            (Delta.open(planted),) if planted.is_dir() else (),
            read_jsonl(folder / "before.jsonl"),
            read_json(folder / NAME),
            *(read_jsonl(folder / name) if (folder / name).is_file() else [] for name in _EXTRA),
        )

    @classmethod
    def make(
        cls,
        folder: Path,
        edits: Edits,
        bench: Bench,
        recipe: FullFT | None,
        perplexities: dict[str, float],
    ) -> Start:
        """Make and store the start; what a killed process left is used or made anew, with the same
        result. ``perplexities``: those known by fingerprint, to be added to.

        Raises ``BadEdits`` for probes that the model cannot read.
        """
        folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(folder)
        write_edits(folder / "edits.jsonl", edits)
        deltas, planted = ((), None) if recipe is None else _planted(folder, edits, bench, recipe)
        bench.become(deltas)
        fingerprint = bench.fingerprint(deltas)
        probes = settle(bench.model, bench.questions(edits))
        before = bench.observe(probes)
        scores = bench.score(before, before)
        if fingerprint not in perplexities:
            perplexities[fingerprint] = bench.perplexity()
        if planted is not None:
            planted["old_recall"]["planted"] = scoring.as_json(scores)["old_recall"]
        write_jsonl(folder / "before.jsonl", before)
        rivals = bench.force(bench.rivals(edits))
        in_chat = "chat" in bench.protocol.robust and has_chat_template(bench.model)
        chat = bench.chat(probes) if in_chat else []
        for name, rows in zip(_EXTRA, (rivals, chat), strict=True):
            if rows:
                write_jsonl(folder / name, rows)
        facts = {
            "records": len(edits),
            "asked": edits.asked,
            "planting": planted,
            "fingerprint": fingerprint,
            "perplexity": perplexities[fingerprint],
            "scores": scoring.as_json(scores),
        }
        if bench.protocol.lm_eval:
            facts["lm_eval"] = bench.ability(edits)
        write_json(folder / NAME, facts)
        return cls(folder, edits, deltas, before, facts, rivals, chat)

    @property
    def fingerprint(self) -> str:
        """Of the weights of the starting state."""
        return str(self.facts["fingerprint"])

    @property
    def perplexity(self) -> float:
        """Of the starting state."""
        return float(self.facts["perplexity"])

    @property
    def scores(self) -> Scores:
        """Of the starting state against itself."""
        return scoring.from_json(self.facts["scores"])


def asked(rows: Sequence[Row]) -> list[Question]:
    """The probes that were asked, every target settled."""
    keys = ("edit", "role", "prompt", "target")
    return [Question(*(row[key] for key in keys)) for row in rows]


def check_plantable(edits: Sequence[Any], label: str) -> None:
    """Refuse (``BadEdits``) to plant what has no old answer."""
    without = [str(edit.id) for edit in edits if edit.old is None]
    if without:
        raise BadEdits(
            f"{label} cannot be planted: {len(without)} of {len(edits)} records have no 'old' "
            f"answer (the first: {without[0]}). Add the old answers, or leave out --plant."
        )


def _planted(
    folder: Path, edits: Edits, bench: Bench, recipe: FullFT
) -> tuple[tuple[Delta, ...], dict[str, Any]]:
    """The stored delta that plants the old answers, and how well they were known without it."""
    bench.become(())
    asked = [probe for probe in bench.questions(edits) if probe.role == "old_recall"]
    unplanted = bench.observe(asked)
    known = scoring.as_json(bench.score(unplanted, unplanted))["old_recall"]
    facts: dict[str, Any] = {"old_recall": {"base": known}, "seconds": None}
    place = folder / "planted"
    if not (place / "delta.json").is_file():
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(place)
        started = time.perf_counter()
        delta = recipe.delta(bench.model, [edit.asserting_old() for edit in edits])
        facts["seconds"] = time.perf_counter() - started
        delta.save(place, provenance={"base": bench.base.fingerprint, "base_name": bench.base.name})
    return (Delta.open(place),), facts

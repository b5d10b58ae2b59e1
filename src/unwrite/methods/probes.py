"""What F-Learning and Delicate share: pairs of old and new answers, and paired probe runs.

A probe is a short fine-tune whose only purpose is its delta: which weights move when the model is
taught the old answer, and which when it is taught the new one. Both start from the same weights and
share seed, order, number of steps and optimiser settings (METHODS, decisions), so that their
difference is the difference of the answers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from unwrite.delta import Delta
from unwrite.edits import Edit
from unwrite.errors import BadSetting
from unwrite.methods import METHODS
from unwrite.model import Model
from unwrite.scores import answer_in
from unwrite.training import Pair, Trained

OldAnswers = Literal["data", "ask"]


class Tuner(Protocol):
    """What a method may fine-tune with: ``FullFT``, ``LoRA``, or anything with this function."""

    def delta(self, model: Model, pairs: Sequence[Pair], /) -> Delta:
        """The change that teaches the pairs."""


@dataclass(frozen=True)
class Answers:
    """Old and new answers to the same prompts. ``asked``: how many old answers are the model's own
    words; ``fallbacks``: how many of those asked for do not contain the known old answer, so that
    the bare answers of the data are used."""

    old: tuple[Pair, ...]
    new: tuple[Pair, ...]
    asked: int
    fallbacks: int


def answers(model: Model, edits: Sequence[Edit], old: OldAnswers) -> Answers:
    """Pairs of old and new data points that differ in the key knowledge and in nothing else.

    ``old="data"``: the edits' own ``old`` and ``new``; where ``old`` is missing, the model's greedy
    answer now is the old one. ``old="ask"`` (introduction of Delicate Fine-Tuning): the model's own
    greedy sentence is the old data point, and the new one is that sentence with ``old`` replaced by
    ``new``; if ``old`` does not occur in it, the bare answers are used and counted.
    """
    to_ask = [edit for edit in edits if old == "ask" or edit.old is None]
    said = dict(
        zip(
            [edit.prompt for edit in to_ask],
            (answer_in(text) for text in model.generate([edit.prompt for edit in to_ask])),
            strict=True,
        )
        if to_ask
        else ()
    )
    pairs: list[tuple[Pair, Pair]] = []
    asked = fallbacks = 0
    for edit in edits:
        sentence = said.get(edit.prompt, "")
        before, after = edit.old, edit.new
        if edit.old is None and sentence:
            before, asked = sentence, asked + 1
        elif old == "ask" and edit.old is not None and (place := _occurs(edit.old, sentence)):
            before, asked = sentence, asked + 1
            after = sentence[: place.start()] + edit.new + sentence[place.end() :]
        elif old == "ask" or before is None:
            fallbacks += 1
        # A model that answers nothing at all has nothing to forget: its old answer is an end mark.
        pairs.append(
            (
                Pair(edit.prompt, before or ".", subject=edit.subject),
                Pair(edit.prompt, after, subject=edit.subject),
            )
        )
    return Answers(
        tuple(one for one, _ in pairs), tuple(other for _, other in pairs), asked, fallbacks
    )


def check_tuner(tuner: Any) -> None:
    """Refuse (``BadSetting``) what cannot be taught plain pairs of prompt and answer."""
    ours = getattr(tuner, "name", None) in METHODS
    if not hasattr(tuner, "delta") or (ours and not hasattr(tuner, "train")):
        named = getattr(tuner, "name", repr(tuner))
        raise BadSetting(f"{named} cannot be used as a tuner; use full-ft, lora or ft-c.")


def run(tuner: Any, model: Model, pairs: Sequence[Pair], start: Delta | None = None) -> Trained:
    """One fine-tune from the weights of ``model`` plus ``start``, by any tuner."""
    if hasattr(tuner, "train"):
        trained: Trained = tuner.train(model, pairs, start)
        return trained
    with model.shifted(start or Delta.nothing()):
        return Trained(tuner.delta(model, pairs), (), 0, False, 0.0)


def run_paired(
    tuner: Any, model: Model, both: Answers, start: Delta | None = None
) -> tuple[Trained, Trained]:
    """The probes on old and on new answers, with equal numbers of steps; as twins where the tuner
    can. The new answers decide when ``until="learned"`` ends.

    Of two full runs, the first delta waits in scratch files: memory holds one training at a time.
    """
    if hasattr(tuner, "train_twins"):
        old, new = tuner.train_twins(model, both.old, both.new, start)
        return old, new
    new = run(tuner, model, both.new, start)
    new = dataclasses.replace(new, delta=new.delta.stored())
    if new.epochs and hasattr(tuner, "until"):
        tuner = dataclasses.replace(tuner, epochs=new.epochs, until="epochs")
    return run(tuner, model, both.old, start), new


def parts(**deltas: Delta) -> dict[str, Any]:
    """How large named deltas are, tensor by tensor, for ``Delta.provenance["parts"]``."""
    return {part: dict(_sizes(delta)) for part, delta in deltas.items()}


def _sizes(delta: Delta) -> Iterable[tuple[str, dict[str, float]]]:
    for name, facts in delta.facts().items():
        yield (
            name,
            {
                "mean": delta[name].mean_magnitude,
                "squared_norm": facts.squared_norm,
                "changed": facts.changed,
                "size": facts.size,
            },
        )


def _occurs(old: str, sentence: str) -> re.Match[str] | None:
    """The whole-word occurrence of an answer in a sentence, whatever the case."""
    return re.search(rf"(?<!\w){re.escape(old)}(?!\w)", sentence, re.IGNORECASE)

"""Rows that every comparison needs beside its methods, so that their numbers mean something.

- ``NoChange``: what the model scores as it is.
- ``InContext``: the new fact is told in the prompt, and no weight moves.
- ``FullFT()``: plain fine-tuning until the facts are learned, so that no method is compared with a
  straw man.
- ``RandomMask``: as many weights as a masking method moves, but chosen by chance.
- ``RandomDelta``: as much change as full fine-tuning makes, but in a random direction.

The last two need what another row found out: ``made`` takes it. Their labels are in brackets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch

from unwrite import methods
from unwrite.change import Change, Dense, mask
from unwrite.delta import Delta
from unwrite.deltafile import TensorFacts
from unwrite.edits import Edit
from unwrite.errors import BadSetting
from unwrite.methods.full_ft import FullFT
from unwrite.model import Model
from unwrite.observe import Question

NAMES = ("no-change", "in-context", "full-ft", "random-mask", "random-delta")


@dataclass(frozen=True)
class NoChange:
    """The state that all methods start from, scored like any other."""

    name: ClassVar[str] = "no-change"

    def delta(self, model: Model, edits: Sequence[Edit]) -> Delta:
        return Delta.nothing()


@dataclass(frozen=True)
class InContext:
    """The new fact as a sentence before every prompt of its edit, bystanders included.

    The upper bound of what telling a model something can do, at the price of telling it each time.
    """

    name: ClassVar[str] = "in-context"

    def delta(self, model: Model, edits: Sequence[Edit]) -> Delta:
        return Delta.nothing()

    def told(self, edits: Sequence[Edit], probes: Sequence[Question]) -> list[Question]:
        """The probes with the statement of their edit in front of the prompt."""
        facts = {str(edit.id): f"{edit.prompt} {edit.new.rstrip('.')}." for edit in edits}
        return [replace(one, prompt=f"{facts[one.edit]} {one.prompt}") for one in probes]


@dataclass(frozen=True)
class RandomMask:
    """As many elements as the core of ``like`` has, drawn uniformly among all that ``values``
    moves, each with the value it has there. Says whether the choice of elements matters.
    """

    like: Any
    values: Any = field(default_factory=FullFT)
    seed: int = 0

    name: ClassVar[str] = "random-mask"

    def made(self, values: Delta, kept: int) -> Delta:
        """``kept`` elements of ``values``, spread over its tensors in proportion to how many of
        each move. Holds one tensor in several copies besides the result."""
        facts = {name: one for name, one in values.facts().items() if one.changed}
        moved = sum(one.changed for one in facts.values())
        counts = _shares({name: one.changed for name, one in facts.items()}, min(kept, moved))
        changes: dict[str, Change] = {}
        for number, (name, count) in enumerate(counts.items()):
            dense = values[name].dense()
            places = np.flatnonzero(dense.numpy())
            random = np.random.default_rng([self.seed, number])
            keep = torch.zeros(dense.numel(), dtype=torch.bool)
            keep[torch.from_numpy(random.choice(places, count, replace=False, shuffle=False))] = (
                True
            )
            changes[name] = mask(dense, keep.view(dense.shape))
        return Delta.from_changes(changes)


@dataclass(frozen=True)
class RandomDelta:
    """A change in a random direction, in every tensor as large as that of ``like``."""

    like: Any = field(default_factory=FullFT)
    seed: int = 0

    name: ClassVar[str] = "random-delta"

    def made(self, facts: Mapping[str, TensorFacts]) -> Delta:
        """Independent normal numbers, scaled tensor by tensor to the norms in ``facts``."""
        random = torch.Generator().manual_seed(self.seed)
        changes: dict[str, Change] = {}
        for name, one in facts.items():
            noise = torch.randn(one.shape, generator=random)
            norm = noise.double().norm().item()
            if one.squared_norm and norm:
                changes[name] = Dense(noise.mul_(math.sqrt(one.squared_norm) / norm))
        return Delta.from_changes(changes)


def references(names: Sequence[str], chosen: Mapping[str, Any], mode: str) -> dict[str, Any]:
    """The reference rows by label, for the methods ``chosen`` by label.

    Plain fine-tuning is left out when the grid has the very same; the random rows belong to the
    mode ``batch``. Raises ``BadSetting`` for an unknown name.
    """
    if isinstance(names, str):
        raise BadSetting("The references are a list of names: put them in [ ].")
    for name in names:
        if name not in NAMES:
            raise BadSetting(f"There is no reference {name!r}. References: {', '.join(NAMES)}.")
    found: dict[str, Any] = {}
    if "no-change" in names:
        found["[no change]"] = NoChange()
    if "in-context" in names:
        found["[in context]"] = InContext()
    if mode == "batch" and "random-mask" in names:
        for label, method in chosen.items():
            if methods.settings_of(method)["name"] == "delicate":
                found[f"[random mask of {label}]"] = RandomMask(like=method)
    if mode == "batch" and "random-delta" in names:
        found["[random delta]"] = RandomDelta()
    needs_full_ft = "full-ft" in names or "[random delta]" in found
    if needs_full_ft and not any(is_plain(methods.settings_of(one)) for one in chosen.values()):
        found["[full-ft until learned]"] = FullFT()
    return found


def is_plain(settings: Mapping[str, Any]) -> bool:
    """Whether these are the settings of plain full fine-tuning, whatever its seed."""
    return {**settings, "seed": 0} == methods.settings_of(FullFT())


def _shares(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """``count`` split in proportion to ``sizes``, by largest remainders; zeros are left out."""
    total = max(1, sum(sizes.values()))
    shares = {name: count * size // total for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: -(count * sizes[name] % total))
    for name in by_remainder[: count - sum(shares.values())]:
        shares[name] += 1
    return {name: share for name, share in shares.items() if share}

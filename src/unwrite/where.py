"""Where in a model a change lives: how large it is in which blocks and kinds of modules.

Section 5.8 of the Delicate Fine-Tuning paper claims that knowledge moves MLPs more than attention,
without numbers. Three measures make it a claim that can be checked, and they answer different
questions: how far a weight moves on average (mean |change|), how far its matrix moves for its size
(norm of the change / norm of the weights), and how many weights move at all. Weights that a change
does not touch count as zeros, so that the numbers describe the model and not the method's choice.

A *row* is a JSON object about one block and kind, ``{block, kind, share, mean, relative, selected,
size, changed, squared_norm, weights}``: ``share`` of the squared norm of the whole change,
``selected`` = changed / size, ``weights`` = squared norm of the base's weights there. What was not
measured is null. Plain numbers: neither torch nor a model is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

Row = dict[str, Any]

KINDS = ("embedding", "q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "norm", "head")
GROUPS: Mapping[str, tuple[str, ...]] = {
    "MLP projections": ("gate", "up", "gate_up", "down"),
    "attention": ("q", "k", "v", "qkv", "o"),
    "embeddings": ("embedding", "head"),
    "norms": ("norm",),
    "other modules": ("other",),
}


@dataclass(frozen=True)
class Region:
    """A change within some tensors of a model, added up; None is what was not measured."""

    size: int = 0  # weights there
    changed: int = 0  # how many of them move
    squared_norm: float = 0.0  # of the change
    magnitude: float | None = 0.0  # sum of |change|
    weights: float | None = 0.0  # squared norm of the base's weights

    @classmethod
    def of(cls, facts: Mapping[str, Any], place: Mapping[str, Any]) -> Region:
        """One tensor. ``facts``: of its change, empty if it has none; ``place``: of base.json."""
        weights = place.get("squared_norm")
        if not facts:
            return cls(size=place.get("size", 0), weights=weights)
        size = facts["size"] if "size" in facts else math.prod(facts["shape"])
        mean = facts.get("mean")
        magnitude = None if mean is None else mean * size
        return cls(size, facts["changed"], facts["squared_norm"], magnitude, weights)

    def __add__(self, other: Region) -> Region:
        return Region(
            self.size + other.size,
            self.changed + other.changed,
            self.squared_norm + other.squared_norm,
            _sum(self.magnitude, other.magnitude),
            _sum(self.weights, other.weights),
        )

    def as_row(self, whole: float, **labels: Any) -> Row:
        """With its ``share`` of the squared norm ``whole``."""
        known = self.magnitude is not None and self.size > 0
        return {
            **labels,
            "share": self.squared_norm / whole if whole else 0.0,
            "mean": self.magnitude / self.size if known and self.magnitude is not None else None,
            "relative": math.sqrt(self.squared_norm / self.weights) if self.weights else None,
            "selected": self.changed / self.size if self.size else None,
            "size": self.size,
            "changed": self.changed,
            "squared_norm": self.squared_norm,
            "weights": self.weights,
        }

    @classmethod
    def of_row(cls, row: Row) -> Region:
        """What ``as_row`` was made of (``magnitude`` up to rounding)."""
        mean, size = row["mean"], row["size"]
        # Without weights there is no mean, but nothing is unknown either.
        magnitude = mean * size if mean is not None else None if size else 0.0
        return cls(size, row["changed"], row["squared_norm"], magnitude, row["weights"])


def located(
    tensors: Mapping[str, Mapping[str, Any]],
    parts: Mapping[str, Mapping[str, Mapping[str, Any]]],
    places: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The content of where.json: ``{"where": rows, "parts": {"old": rows, ...}}``.

    ``tensors``: the change by tensor, ``{mean, squared_norm, changed, size}`` (``mean`` may be
    missing, and ``shape`` stand for ``size``); ``parts``: the same for the deltas that a method
    made on the way; ``places``: of base.json.
    """
    return {
        "where": rows(tensors, places),
        "parts": {part: rows(measured, places) for part, measured in parts.items()},
    }


def of_description(
    description: Mapping[str, Any], places: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The same, without means, from the delta.json of an update that has no where.json."""
    return located(description["tensors"], {}, places)


def rows(
    tensors: Mapping[str, Mapping[str, Any]], places: Mapping[str, Mapping[str, Any]]
) -> list[Row]:
    """A row for each block and kind that the model has, blocks in order, then what is outside."""
    regions: dict[tuple[int | None, str], Region] = {}
    for name in dict.fromkeys((*places, *tensors)):
        place = places.get(name, {"block": None, "kind": "other"})
        at = place["block"], place["kind"]
        regions[at] = regions.get(at, Region()) + Region.of(tensors.get(name, {}), place)
    whole = math.fsum(region.squared_norm for region in regions.values())
    order = sorted(regions, key=lambda at: (at[0] is None, at[0] or 0, in_order(at[1])))
    return [regions[at].as_row(whole, block=at[0], kind=at[1]) for at in order]


def named(found: Mapping[str, Any]) -> dict[str, list[Row]]:
    """All deltas of a where.json under the names that people read: ``{"change": rows}``, or, with
    parts, ``{"old": rows, "new": rows, "core": rows}``."""
    return {**found["parts"], own_name(found): found["where"]}


def own_name(found: Mapping[str, Any]) -> str:
    """What the update's own delta is called: the ``core`` of the others, if there are others."""
    return "core" if found["parts"] else "change"


def by_kind(found: Iterable[Row]) -> list[Row]:
    """The rows of one delta added up over the blocks: a row for each kind, without ``block``."""
    found = list(found)
    kinds = sorted({row["kind"] for row in found}, key=in_order)
    whole = math.fsum(row["squared_norm"] for row in found)
    return [_total(found, [kind]).as_row(whole, kind=kind) for kind in kinds]


def reading(found: Sequence[Row], whose: str) -> str:
    """One sentence on the rows of one delta: MLP against attention, and the rest by weight."""
    whole = math.fsum(row["squared_norm"] for row in found)
    if not whole > 0:
        return f"The {whose} moves nothing."
    totals = {group: _total(found, kinds) for group, kinds in GROUPS.items()}
    unknown = {row["kind"] for row in found}.difference(*GROUPS.values())
    totals["other modules"] += _total(found, sorted(unknown))
    shares = {group: total.squared_norm / whole for group, total in totals.items() if total.size}
    (first, most), *others = sorted(shares.items(), key=lambda item: -item[1])
    rest = "".join(f", {group} {percent(share)}" for group, share in others if share > 0)
    first = first[0].upper() + first[1:]
    verb = "holds" if first == "Attention" else "hold"
    sentence = f"{first} {verb} {percent(most)} of the {whose}'s squared norm{rest}"
    mlp, attention = (_total(found, GROUPS[group]) for group in ("MLP projections", "attention"))
    if mlp.magnitude and attention.magnitude:
        times = (mlp.magnitude / mlp.size) / (attention.magnitude / attention.size)
        text = f"{times:.2f}" if times < 10 else f"{times:.0f}"
        sentence += f"; on average an MLP weight moves {text} times as far as one of attention"
    return sentence + "."


def is_measured(facts: Any) -> bool:
    """Whether these are the facts of one tensor's change that ``located`` takes for a part."""
    numbers = [facts.get(name) for name in ("mean", "squared_norm", "changed", "size")]
    return all(isinstance(number, (int, float)) and number >= 0 for number in numbers)


def in_order(kind: str) -> tuple[int, str]:
    """Sorts kinds from the embedding to the head; unknown ones come last."""
    return (KINDS.index(kind) if kind in KINDS else len(KINDS)), kind


def percent(share: float | None) -> str:
    """``0.97`` as ``97 %``; never rounded up to all or down to nothing."""
    if share is None:
        return "–"
    for text in (f"{100 * share:.0f}", f"{100 * share:.1f}"):
        if share in (0.0, 1.0) or float(text) not in (0.0, 100.0):
            return f"{text}\u00a0%"
    return "<0.1\u00a0%" if share < 0.5 else ">99.9\u00a0%"


def _total(found: Sequence[Row], kinds: Sequence[str]) -> Region:
    return reduce(add, (Region.of_row(row) for row in found if row["kind"] in kinds), Region())


def _sum(one: float | None, two: float | None) -> float | None:
    return None if one is None or two is None else one + two

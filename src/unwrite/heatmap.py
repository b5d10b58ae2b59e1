"""Where a change lives, as a page shows it: a sentence, a table by kind and heat maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unwrite import where
from unwrite.where import percent

PARTS = 2  # deltas mapped that a method made on the way to its own
SHADES = 9  # steps of the heat map's colour


@dataclass(frozen=True)
class HeatMap:
    """Where a delta lives: shares of its squared norm, a row for each block and a column for each
    module kind. Cells are (share, shade from 0 to ``SHADES``), or None where there is no tensor."""

    name: str
    kinds: Sequence[str]
    rows: Sequence[tuple[str, Sequence[tuple[float, int] | None], float]]
    totals: Sequence[float]
    summary: str


def whereabouts(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the page says of a where.json: a sentence, a table by kind and a heat map by delta, the
    update's own first; None if nothing changed. ``kinds``: for each kind, its row of each of the
    ``deltas``, or None where a delta has no such kind."""
    parts = dict(list(found["parts"].items())[:PARTS])
    deltas = where.named({**found, "parts": parts})
    by_kind = {
        name: {row["kind"]: row for row in where.by_kind(rows)} for name, rows in deltas.items()
    }
    kinds = sorted({kind for one in by_kind.values() for kind in one}, key=where.in_order)
    own = where.own_name(found)
    maps = [heat_map(deltas[name], name) for name in (own, *parts)]
    if not any(maps):
        return None
    return {
        "reading": where.reading(found["where"], own),
        "deltas": list(deltas),
        "kinds": [(kind, [by_kind[name].get(kind) for name in deltas]) for kind in kinds],
        "maps": [one for one in maps if one],
        "more": len(found["parts"]) - len(parts),
    }


def heat_map(rows: Sequence[where.Row], name: str = "change") -> HeatMap | None:
    """From the rows of one delta in where.json; None if nothing changed."""
    shares = {(row["block"], row["kind"]): row["share"] for row in rows}
    largest = max(shares.values(), default=0.0)
    if not largest > 0.0:
        return None
    kinds = sorted({kind for _, kind in shares}, key=where.in_order)
    lines = []
    for block in dict.fromkeys(row["block"] for row in rows):
        cells = [
            (shares[block, kind], math.ceil(SHADES * (shares[block, kind] / largest)))
            if (block, kind) in shares
            else None
            for kind in kinds
        ]
        label = "outside" if block is None else str(block)
        lines.append((label, cells, math.fsum(cell[0] for cell in cells if cell)))
    columns = zip(*(cells for _, cells, _ in lines), strict=True)
    totals = [math.fsum(cell[0] for cell in column if cell) for column in columns]
    heaviest = sorted(zip(totals, kinds, strict=True), reverse=True)[:3]
    parts = ", ".join(f"{kind} {percent(share)}" for share, kind in heaviest if share > 0)
    label, _, share = max(lines, key=lambda line: line[2])
    place = "outside the blocks" if label == "outside" else f"in block {label}"
    summary = f"Mostly in {parts}. The largest part, {percent(share)}, lies {place}."
    return HeatMap(name, kinds, lines, totals, summary)

"""The picture of a causal trace: a panel a kind, roles down, layers across."""

from __future__ import annotations

from unwrite.page import plain
from unwrite.plots import heat_maps
from unwrite.trace import KINDS, ROLES, Trace

LONGEST = 60  # letters of a model's name


def picture(found: Trace) -> str:
    """It as a self-contained SVG."""
    model = plain(found.model, LONGEST)
    panels = [
        (f"{model}: the {kind} put back, {found.facts} facts", rows)
        for kind, rows in zip(KINDS, found.effects, strict=True)
    ]
    return heat_maps(panels, ROLES, "layer", "probability regained")

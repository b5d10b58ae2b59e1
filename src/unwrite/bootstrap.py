"""Means over edits with 95 % intervals, and differences between methods on the same edits.

Edits are resampled, not probes or seeds: the probes of one edit stand or fall together, and a
second seed on the same edits is not a second sample of the world's facts. Of several seeds, the
means of each edit are pooled. The draws are fixed: the same observations give the same interval.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unwrite.scores import RESAMPLES, ROLES, Row, score

# For one role: edit -> (sum of token shares, sum of exact hits, number of probes).
Sums = dict[str, np.ndarray[Any, np.dtype[np.float64]]]


def sums_by_edit(before: Sequence[Row], after: Sequence[Row]) -> dict[str, Sums]:
    """By role and edit, what ``scores.score`` averages over. Exact sums are NaN where the
    observations hold no generations."""
    rows: dict[str, tuple[list[Row], list[Row]]] = defaultdict(lambda: ([], []))
    for side, observed in enumerate((before, after)):
        for row in observed:
            rows[str(row["edit"])][side].append({**row, "text": row["text"] or ""})
    silent = any(row["text"] is None for row in after)
    found: dict[str, Sums] = {role: {} for role in ROLES}
    for edit in sorted(rows):
        for role, one in score(*rows[edit]).items():
            if one.token is not None and one.exact is not None:
                exact = np.nan if silent else one.exact
                found[role][edit] = np.array([one.token, exact, 1.0]) * one.n
    return found


def pooled(seeds: Sequence[Sums]) -> Sums:
    """The mean over seeds of the sums of one role, edit by edit (all seeds ask the same probes)."""
    if len(seeds) == 1:
        return seeds[0]
    return {edit: np.mean([sums[edit] for sums in seeds], axis=0) for edit in seeds[0]}


def interval(sums: Sums) -> dict[str, float | int | None]:
    """Mean, bounds and ``n`` of one role in both forms, in the fields of a ``Score``."""
    if not sums:
        return _fields(None, None, None, 0)
    values = np.array([sums[edit] for edit in sorted(sums)])
    total = values.sum(axis=0)
    return _fields(total[:2] / total[2], *_bounds(_means(values)), round(total[2]))


def difference(sums: Sums, other: Sums) -> dict[str, float | int | None]:
    """Paired bootstrap of ``mean(sums) - mean(other)`` over the edits that both have, in the fields
    of a ``Score``; ``n`` counts edits."""
    edits = sorted(set(sums) & set(other))
    if not edits:
        return _fields(None, None, None, 0)
    one, two = (np.array([side[edit] for edit in edits]) for side in (sums, other))
    total, others = one.sum(axis=0), two.sum(axis=0)
    mean = total[:2] / total[2] - others[:2] / others[2]
    return _fields(mean, *_bounds(_means(one) - _means(two)), len(edits))


def _means(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Means of resampled edits, of shape (resamples, forms); the draws depend on the number only,
    so that two methods on the same edits are drawn alike."""
    draws = np.random.default_rng(0).integers(0, len(values), size=(RESAMPLES, len(values)))
    resampled = values[draws].sum(axis=1)
    return np.asarray(resampled[:, :2] / resampled[:, 2:])


def _bounds(means: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return low, high


def _fields(
    mean: np.ndarray[Any, Any] | None,
    low: np.ndarray[Any, Any] | None,
    high: np.ndarray[Any, Any] | None,
    n: int,
) -> dict[str, float | int | None]:
    def of(values: np.ndarray[Any, Any] | None, form: int) -> float | None:
        return None if values is None or np.isnan(values[form]) else float(values[form])

    fields: dict[str, float | int | None] = {"token": of(mean, 0), "exact": of(mean, 1), "n": n}
    for form, name in enumerate(("token", "exact")):
        fields |= {f"{name}_low": of(low, form), f"{name}_high": of(high, form)}
    return fields


def front(points: Mapping[str, Sequence[float]]) -> set[str]:
    """Names of the points that no other point beats: at least as large in every coordinate and
    larger in one (the Pareto front)."""

    def beaten(name: str) -> bool:
        mine = points[name]
        return any(
            all(a >= b for a, b in zip(other, mine, strict=True)) and tuple(other) != tuple(mine)
            for key, other in points.items()
            if key != name
        )

    return {name for name in points if not beaten(name)}

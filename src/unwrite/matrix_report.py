"""The report of a forgetting matrix: one self-contained HTML page that tells what learning
destroys, how simple that is, and how well it can be forecast.

A pure reader of the matrix's folder: nothing is measured or fitted, and the same folder always
gives the same page, byte for byte. The look is in ``templates/``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from unwrite import page
from unwrite.files import read_json
from unwrite.forgetting.matrix import Array, ForgettingMatrix
from unwrite.plots import Curve, curves
from unwrite.where import percent

NAME, FIT = "report.html", "fit.json"
METRICS = ("rmse", "f1", "precision", "recall", "pr_auc", "lift")

# What keeps the page below 3 MB, whatever is in the matrix; the page says what was left out.
TASKS, GROUPS = 60, 24  # rows and columns of the heat map
SHADES = 9
WORST = 50  # examples listed
MODELS = 60
RANKS = 9


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a matrix to ``out`` (default: ``report.html`` in its folder), whole or
    not at all; returns the path. Raises as ``ForgettingMatrix.load`` and ``page.write`` do."""
    return page.write(render(folder), folder / NAME if out is None else out, folder)


def render(folder: Path) -> str:
    """The page as text; raises like ``write_report``."""
    matrix = ForgettingMatrix.load(folder)
    profile = profile_of(matrix)
    fitted = _fitted(folder, matrix)
    sentence, remarks = verdict(matrix, profile, fitted)
    return page.render(
        "matrix.html.jinja",
        name=folder.resolve().name,
        verdict=sentence,
        remarks=remarks,
        provenance=matrix.provenance,
        binary=_is_binary(matrix),
        tasks=len(matrix.tasks),
        examples=len(matrix.examples),
        profile=None if profile is None else _told(profile),
        panel=None if profile is None else _panel(profile),
        map=heat_map(matrix),
        worst=_worst(matrix),
        more=max(len(matrix.examples) - WORST, 0),
        fitted=fitted,
        metrics=METRICS,
    )


def verdict(
    matrix: ForgettingMatrix,
    profile: Mapping[str, Any] | None,
    fitted: Mapping[str, Any] | None,
) -> tuple[str, list[str]]:
    """The whole story in one sentence, and what has to be added so that it is not misread."""
    known = matrix.observed
    if not known.any():
        return "Nothing has been observed yet.", []
    forgotten = float((matrix.values[known] > (0.5 if _is_binary(matrix) else 0)).mean())
    clauses = [
        f"{len(matrix.tasks)} tasks and {len(matrix.examples)} examples",
        f"{percent(forgotten)} of what was watched got worse",
    ]
    if profile is not None and len(profile["rank"]) >= 3 and profile["rank"][2] is not None:
        clauses.append(f"three factors explain {percent(max(profile['rank'][2], 0.0))} of it")
    if fitted is not None and fitted["best"] is not None:
        best = fitted["best"]
        lift = best["lift"]
        clauses.append(
            f"of the forecasts tried, {best['model']} is best"
            + ("" if lift is None else f", finding {lift:.1f} times as many as chance")
        )
    remarks = []
    if not known.all():
        remarks.append(f"{percent(float(known.mean()))} of the entries were observed.")
    if profile is None:
        remarks.append("No two tasks share an observed example, so it has no rank profile.")
    if fitted is None:
        remarks.append("No forecasts have been tried on it yet: unwrite forgetting fit.")
    elif fitted["stale"]:
        remarks.append("Tasks were added since forecasts were tried; try them again.")
    return "; ".join(clauses) + ".", remarks


def heat_map(matrix: ForgettingMatrix) -> dict[str, Any] | None:
    """Tasks x groups of examples, both from what is hurt least to what is hurt most.

    ``columns``: number of examples of each group; ``rows``: (task, cells), a cell (mean, shade from
    0 for no loss to ``SHADES``) or None where nothing was observed. Of many tasks, evenly chosen
    ones are shown. None without observations.
    """
    known = matrix.observed
    rows = np.flatnonzero(known.any(axis=1))
    columns = np.flatnonzero(known.any(axis=0))
    if not len(rows) or not len(columns):
        return None
    by_task, by_example = _means(matrix.values, 1), _means(matrix.values, 0)
    rows = rows[np.argsort(by_task[rows], kind="stable")]
    columns = columns[np.argsort(by_example[columns], kind="stable")]
    shown = rows
    if len(rows) > TASKS:
        shown = rows[np.linspace(0, len(rows) - 1, TASKS).round().astype(int)]
    groups = np.array_split(columns, min(GROUPS, len(columns)))
    means = np.array([_means(matrix.values[np.ix_(shown, group)], 1) for group in groups]).T
    largest = float(np.nanmax(means))
    lines = [
        (matrix.tasks[task], [_cell(value, largest) for value in line])
        for task, line in zip(shown, means, strict=True)
    ]
    return {
        "rows": lines,
        "columns": [len(group) for group in groups],
        "left_out": len(rows) - len(shown),
        "largest": largest,
    }


def _cell(value: float, largest: float) -> tuple[float, int] | None:
    if math.isnan(value):
        return None
    return float(value), (math.ceil(SHADES * min(value / largest, 1.0)) if value > 0 else 0)


def _worst(matrix: ForgettingMatrix) -> list[dict[str, Any]]:
    """The examples that suffer most, with the task that hurts each most."""
    means = _means(matrix.values, 0)
    order = [at for at in np.argsort(-means, kind="stable") if not math.isnan(means[at])]
    found = []
    for at in order[:WORST]:
        column = matrix.values[:, at]
        task = int(np.nanargmax(column))
        details = matrix.example_details.get(matrix.examples[at], {})
        found.append(
            {
                "example": matrix.examples[at],
                "prompt": details.get("prompt") or "",
                "answer": details.get("answer") or "",
                "mean": float(means[at]),
                "task": matrix.tasks[task],
                "most": float(column[task]),
            }
        )
    return found


def _fitted(folder: Path, matrix: ForgettingMatrix) -> dict[str, Any] | None:
    """What fit.json says, models in the order of RMSE; None if there is none."""
    if not (folder / FIT).is_file():
        return None
    kept = read_json(folder / FIT)
    rows = [
        {"model": name, **{metric: _mean_of(scores, metric) for metric in METRICS}}
        for name, scores in list(kept["scores"].items())[:MODELS]
    ]
    rows.sort(key=lambda row: math.inf if row["rmse"] is None else row["rmse"])
    return {
        "rows": rows,
        "best": next((row for row in rows if row["model"] == kept["best"]), None),
        "revealed": kept["revealed"],
        "seeds": len(kept["seeds"]),
        "stale": kept["tasks"] != len(matrix.tasks),
    }


def _mean_of(scores: Mapping[str, Any], metric: str) -> float | None:
    mean = (scores.get(metric) or {}).get("mean")
    return None if mean is None else float(mean)


def _told(profile: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    rows = [
        ("task mean", profile["task_mean"]),
        ("example mean", profile["example_mean"]),
        ("both (additive)", profile["additive"]),
    ]
    return rows + [(f"rank {rank}", r2) for rank, r2 in enumerate(profile["rank"], start=1)]


def _panel(profile: Mapping[str, Any]) -> Markup | None:
    """R2 by rank, with the means as level lines; None where it is undefined."""
    last = len(profile["rank"])
    if last < 2 or None in profile["rank"]:
        return None
    lines = [_curve("low rank", list(enumerate(profile["rank"], start=1)))]
    for label, key in (("additive", "additive"), ("example mean", "example_mean")):
        lines.append(_curve(label, [(1, profile[key]), (last, profile[key])]))
    name = "R² in % over the rank; the numbers are in the table of simple models"
    return curves(lines, "rank", name)


def _curve(label: str, points: Sequence[tuple[int, float]]) -> Curve:
    return Curve(label, [(at, r2, f"{label}, rank {at}: {r2:.3f}") for at, r2 in points])


def profile_of(matrix: ForgettingMatrix) -> dict[str, Any] | None:
    """The rank profile; None where no example was observed in each of two tasks or more."""
    rows = matrix.observed.any(axis=1)
    complete = matrix.observed[rows].all(axis=0)
    return matrix.rank_profile(RANKS) if rows.sum() > 1 and complete.any() else None


def _means(values: Array, axis: int) -> Array:
    """Means of what was observed along an axis; NaN where nothing was."""
    known: npt.NDArray[np.bool_] = ~np.isnan(values)
    counts = known.sum(axis=axis)
    sums = np.where(known, values, 0.0).sum(axis=axis)
    found: Array = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return found


def _is_binary(matrix: ForgettingMatrix) -> bool:
    return matrix.provenance.get("quantity") == "exact-match"

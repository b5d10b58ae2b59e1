"""Tables of ``auto`` in docs/results.md from the committed result; see ``benchmarks.tables``."""

from __future__ import annotations

from typing import Any

from benchmarks.measure import measured
from benchmarks.planted_study import ROLES

KINDS = {
    "counterfact": "CounterFact, planted",
    "zsre": "zsRE, planted",
    "known-counterfact": "CounterFact, known to the model",
    "atlas": "atlas, known to the model",
}


def blocks() -> dict[str, list[str]]:
    """Lines by block; a split that was not measured leaves a sentence that says so."""
    result = measured("auto_study")
    tables = [] if result is None else result["tables"]
    return {f"auto, {split}": lines(tables, split) for split in ("test", "development")}


def lines(tables: list[dict[str, Any]], split: str) -> list[str]:
    """One table over all kinds of facts of a split."""
    chosen = [one for one in tables if one["split"] == split]
    if not chosen:
        return ["*Not measured yet.*"]
    found = [
        "| facts | method | seeds | reliability | generality | locality | old recall | "
        "harmonic mean | spill | perplexity | time |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for table in chosen:
        for one in table["rows"]:
            spread = (
                f" ({100 * one['lowest']:.1f} to {100 * one['highest']:.1f})"
                if one["seeds"] > 1
                else ""
            )
            cells = (
                f"{table['facts']} {KINDS[table['kind']]}",
                one["variant"],
                str(one["seeds"]),
                *(f"{100 * one[role]:.1f}" for role in ROLES),
                f"{100 * one['harmonic_mean']:.1f}{spread}",
                "" if one["spill"] is None else f"{100 * one['spill']:.1f}",
                f"x {one['perplexity_ratio']:.2f}",
                f"x {one['seconds_over_plain']:.1f}" if one["seconds_over_plain"] else "",
            )
            found.append(f"| {' | '.join(cells)} |")
    return found

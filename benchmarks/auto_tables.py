"""Tables of ``auto`` in docs/results.md from the committed result; see ``benchmarks.tables``."""

from __future__ import annotations

from typing import Any

from benchmarks import second_model
from benchmarks.auto_study import BASES
from benchmarks.measure import measured
from benchmarks.planted_study import ROLES

KINDS = {
    "counterfact": "CounterFact, planted",
    "zsre": "zsRE, planted",
    "known-counterfact": "CounterFact, known to the model",
    "atlas": "atlas, known to the model",
}
MISSING = "*Not measured yet.*"


def blocks() -> dict[str, list[str]]:
    """Lines by block; a split that was not measured leaves a sentence that says so."""
    result = measured("auto_study")
    tables = [] if result is None else result["tables"]
    sequence = measured("auto_sequence")
    return {
        **{f"auto, {split}": lines(tables, split) for split in ("test", "development")},
        "auto, second": lines(tables, "test", second_model.NAME),
        "auto, exact": exact_lines(tables),
        "auto, time": time_lines(measured("auto_time")),
        "auto, bystanders": bystander_lines(measured("moved_bystanders")),
        "auto, sequence": [MISSING] if sequence is None else sequence_lines(sequence["rows"]),
    }


def lines(tables: list[dict[str, Any]], split: str, base: str = BASES[0]) -> list[str]:
    """One table over all kinds of facts of a split, of one model. These runs had company on the
    machine: times are those of ``benchmarks.auto_time``."""
    chosen = [one for one in tables if (one["split"], one["base"]) == (split, base)]
    if not chosen:
        return [MISSING]
    found = [
        "| facts | method | seeds | reliability | generality | locality | old recall | "
        "harmonic mean | spill | perplexity |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
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
            )
            found.append(f"| {' | '.join(cells)} |")
    return found


def exact_lines(tables: list[dict[str, Any]]) -> list[str]:
    """What the model says by itself, where that was scored."""
    found = [
        "| facts | method | seeds | reliability | generality | locality | old recall |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for table in tables:
        for one in table["rows"]:
            if one["exact"] and (table["split"], table["base"]) == ("test", BASES[0]):
                cells = (
                    f"{table['facts']} {KINDS[table['kind']]}",
                    one["variant"],
                    str(one["exact_seeds"]),
                    *(f"{100 * one['exact'][role]:.1f}" for role in ROLES),
                )
                found.append(f"| {' | '.join(cells)} |")
    return found if len(found) > 2 else [MISSING]


def time_lines(result: dict[str, Any] | None) -> list[str]:
    """The budget ``fast`` against plain fine-tuning, a row a kind of facts."""
    if result is None:
        return [MISSING]
    found = ["| facts | draws | time of fast against full-ft |", "| --- | --- | --- |"]
    for one in result["rows"]:
        spread = one["over_plain"]
        cells = (
            f"{one['facts']} {KINDS[one['kind']]}",
            str(one["draws"]),
            f"x {spread['median']:.1f} ({spread['min']:.1f} to {spread['max']:.1f})",
        )
        found.append(f"| {' | '.join(cells)} |")
    return found


def bystander_lines(result: dict[str, Any] | None) -> list[str]:
    """Quarters of the bystanders by how sure the model was, and what stays of each."""
    if result is None:
        return [MISSING]
    names = list(result["tables"][0]["quarters"][0]["stayed"])
    found = [
        f"| facts | quarter | lead | {' | '.join(names)} |",
        f"| --- | --- | --- |{' --- |' * len(names)}",
    ]
    for table in result["tables"]:
        for number, quarter in enumerate(table["quarters"], start=1):
            cells = (
                f"{table['facts']} {KINDS[table['kind']]}, {table['bystanders']} bystanders of "
                f"{table['seeds']} draws",
                str(number),
                f"{quarter['lead']:.2f}",
                *(f"{100 * quarter['stayed'][name]:.1f}" for name in names),
            )
            found.append(f"| {' | '.join(cells)} |")
    return found


def sequence_lines(rows: list[dict[str, Any]]) -> list[str]:
    """What is left of earlier updates, a row a method."""
    found = [
        "| method | updates | learned | retained | generality | locality | perplexity |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in rows:
        shares = ("learned", "retained", "generality", "locality")
        cells = (
            one["method"],
            str(one["updates"]),
            *(f"{100 * one[share]:.1f}" for share in shares),
            f"x {one['perplexity_ratio']:.2f}",
        )
        found.append(f"| {' | '.join(cells)} |")
    return found

"""Tables of ``auto`` in docs/results.md from the committed result; see ``benchmarks.tables``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import second_model
from benchmarks.auto_study import BASES
from benchmarks.measure import measured
from benchmarks.paper_blocks import percent, table
from benchmarks.planted_study import ROLES

KINDS = {
    "counterfact": "CounterFact, planted",
    "zsre": "zsRE, planted",
    "known-counterfact": "CounterFact, known to the model",
    "atlas": "atlas, known to the model",
}
MISSING = "*Not measured yet.*"
SCORED = ("facts", "method", "seeds", *(role.replace("_", " ") for role in ROLES))


def blocks() -> dict[str, list[str]]:
    """Lines by block; a split that was not measured leaves a sentence that says so."""
    result = measured("auto_study")
    tables = [] if result is None else result["tables"]
    sequence = measured("auto_sequence")
    chosen = measured("auto_sequence_development")
    return {
        **{f"auto, {split}": lines(tables, split) for split in ("test", "development")},
        "auto, second": lines(tables, "test", second_model.NAME),
        "auto, exact": exact_lines(tables),
        "auto, time": time_lines(measured("auto_time")),
        "auto, bystanders": bystander_lines(measured("moved_bystanders")),
        "auto, sequence": sequence_lines(sequence["rows"] if sequence else []),
        "auto, sequence, development": sequence_lines(chosen["rows"] if chosen else []),
        "auto, subjects": subject_lines(measured("subject_guesses")),
    }


def lines(tables: list[dict[str, Any]], split: str, base: str = BASES[0]) -> list[str]:
    """One table over all kinds of facts of a split, of one model. These runs had company on the
    machine: times are those of ``benchmarks.auto_time``."""
    found = []
    for facts, one in _rows(tables, split, base):
        spread = (
            f" ({percent(one['lowest'])} to {percent(one['highest'])})" if one["seeds"] > 1 else ""
        )
        found.append(
            (
                facts,
                one["variant"],
                str(one["seeds"]),
                *(percent(one[role]) for role in ROLES),
                f"{percent(one['harmonic_mean'])}{spread}",
                beside_auto(one),
                "" if one["spill"] is None else percent(one["spill"]),
                f"x {one['perplexity_ratio']:.2f}",
            )
        )
    return _table((*SCORED, "harmonic mean", "beside auto", "spill", "perplexity"), found)


def beside_auto(one: dict[str, Any]) -> str:
    """The difference to ``auto`` on the same draws, in points; nothing for ``auto`` itself."""
    found = one["beside_auto"]
    if found is None or one["variant"] == "auto":
        return ""
    least, mean, most = (f"{100 * found[name]:+.1f}" for name in ("lowest", "mean", "highest"))
    return mean if one["seeds"] == 1 else f"{mean} ({least} to {most})"


def exact_lines(tables: list[dict[str, Any]]) -> list[str]:
    """What the model says by itself, where that was scored."""
    found = [
        (
            facts,
            one["variant"],
            str(one["exact_seeds"]),
            *(percent(one["exact"][role]) for role in ROLES),
        )
        for facts, one in _rows(tables, "test", BASES[0])
        if one["exact"]
    ]
    return _table(SCORED, found)


def time_lines(result: dict[str, Any] | None) -> list[str]:
    """``auto`` against plain fine-tuning, a row a kind of facts."""
    found = []
    for one in result["rows"] if result else ():
        spread = one["over_plain"]
        ratio = f"x {spread['median']:.1f} ({spread['min']:.1f} to {spread['max']:.1f})"
        found.append((_facts(one), str(one["draws"]), ratio))
    return _table(("facts", "draws", "time of auto against full-ft"), found)


def bystander_lines(result: dict[str, Any] | None) -> list[str]:
    """Quarters of the bystanders by how sure the model was, and what stays of each."""
    tables = result["tables"] if result else []
    names = [name for one in tables[:1] for name in one["quarters"][0]["stayed"]]
    found = [
        (
            f"{_facts(one)}, {one['bystanders']} bystanders of {one['seeds']} draws",
            str(number),
            f"{quarter['lead']:.2f}",
            *(percent(quarter["stayed"][name]) for name in names),
        )
        for one in tables
        for number, quarter in enumerate(one["quarters"], start=1)
    ]
    return _table(("facts", "quarter", "lead", *names), found)


def sequence_lines(rows: list[dict[str, Any]]) -> list[str]:
    """What is left of earlier updates, a row a method."""
    shares = ("learned", "retained", "generality", "locality")
    found = [
        (
            one["method"],
            str(one["updates"]),
            *(percent(one[share]) for share in shares),
            f"x {one['perplexity_ratio']:.2f}",
        )
        for one in rows
    ]
    return _table(("method", "updates", *shares, "perplexity"), found)


def subject_lines(result: dict[str, Any] | None) -> list[str]:
    """Subjects guessed from test prompts."""
    found = [
        (
            one["kind"],
            str(one["prompts"]),
            *(percent(one[part] / one[whole]) for part, whole in PARTS),
        )
        for one in (result["rows"] if result else ())
        if one["split"] == "test"
    ]
    return _table(("facts", "prompts", "guessed", "right", "ending where it does"), found)


PARTS = (("guessed", "prompts"), ("right", "guessed"), ("ends_there", "guessed"))


def _rows(
    tables: list[dict[str, Any]], split: str, base: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of a split and a model, with the name of its facts."""
    for one in tables:
        if (one["split"], one["base"]) == (split, base):
            for row in one["rows"]:
                yield _facts(one), row


def _facts(one: dict[str, Any]) -> str:
    return f"{one['facts']} {KINDS[one['kind']]}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table, or the sentence that there is none yet."""
    return table(head, rows) if rows else [MISSING]

"""What a comparison measured on request, as tables for people and columns for programs.

Made from finished cells and nothing else. ``tables`` gives each table a title, a line that says
what it is, and its rows; nothing of it is there in runs that did not ask for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unwrite import neighbour_metrics
from unwrite.bootstrap import Sums, interval, pooled, sums_by_edit
from unwrite.files import read_jsonl
from unwrite.robustness import stem
from unwrite.scores import ROLES, Row

Table = tuple[str, str, list[list[str]]]  # title, what it is, header and rows
# By check, by what it gives ("scores", or of relearning "old_recall before" and the like), by role.
Checks = dict[str, dict[str, dict[str, Sums]]]

FORMS = ("token", "exact")
SHOWN = ("reliability", "generality", "locality", "old_recall")  # of robustness, one table each
RELEARNING = [
    (kind, side) for kind in ("old_recall", "never_known") for side in ("before", "after")
]

_ROBUST = (
    "The same questions after what may befall a model, token / exact in %. Locality is agreement "
    "with the starting state as it was, so the row without a change shows what a check costs by "
    "itself (of chat: with the starting state under the chat template)."
)
_RELEARNED = (
    "Old answers given (token / exact, in %) before and after steps of training on them, and the "
    "same with answers of other records, which the model never knew. An old answer that comes back "
    "faster than a new one is learned was only hidden."
)


def read_checks(
    folder: Path, result: Mapping[str, Any], before: Sequence[Row], after: Sequence[Row]
) -> Checks:
    """What the stored rows of a cell's checks add up to; ``folder`` is the cell's ``robust``."""
    found: Checks = {}
    for name, facts in result.get("robust", {}).items():
        if "note" in facts:
            continue
        own = stem(name)
        rows = read_jsonl(folder / f"{own}.jsonl")
        if "never_known" in facts:
            ends = ("-never-known-before", "-never-known")
            never = [read_jsonl(folder / f"{own}{end}.jsonl") for end in ends]
            old = [row for row in after if row["role"] == "old_recall"]
            asked: list[Sequence[Row]] = [old, rows, *never]
            found[name] = {
                f"{kind} {side}": sums_by_edit(one, one)
                for (kind, side), one in zip(RELEARNING, asked, strict=True)
            }
        else:
            start = read_jsonl(folder / f"{own}-before.jsonl") if "before" in facts else before
            found[name] = {"scores": sums_by_edit(start, rows)}
    return found


def means(rows: Sequence[Mapping[str, Any]], checks: Sequence[Checks]) -> dict[str, Any]:
    """What is known of one method over its seeds, by the name of the field in ``table.json``;
    ``rows``: results of its cells, ``checks``: their ``read_checks``."""
    found: dict[str, Any] = {}
    if "neighbour_metrics" in rows[0]:
        sides = [row["neighbour_metrics"] for row in rows]
        found["neighbour_metrics"] = {
            side: neighbour_metrics.mean([one[side] for one in sides])
            for side in ("before", "after")
        }
    if "robust" in rows[0]:
        found["robust"] = {
            name: _mean_check(
                [row["robust"][name] for row in rows], [one.get(name) for one in checks]
            )
            for name in rows[0]["robust"]
        }
    if "lm_eval" in rows[0]:
        found["lm_eval"] = {
            **rows[0]["lm_eval"],
            "after": _mean_ability([row["lm_eval"]["after"] for row in rows]),
        }
    return found


def tables(entries: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """All tables of the methods on one edit set and size."""
    if "neighbour_metrics" in entries[0]:
        yield _neighbours(entries)
    if "robust" in entries[0]:
        names = list(entries[0]["robust"])
        again = [name for name in names if not name.startswith("relearn")]
        if again:
            yield from _robust(entries, again)
        for name in names:
            if name not in again:
                yield _relearned(entries, name)
    if "lm_eval" in entries[0]:
        yield _ability(entries)


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """One cell's columns of ``table.csv``."""
    line: dict[str, Any] = {}
    for side, toolkits in row.get("neighbour_metrics", {}).items():
        end = "_before" if side == "before" else ""
        for toolkit, values in toolkits.items():
            line |= {f"{toolkit}_{name}{end}": value for name, value in values.items()}
    for name, facts in row.get("robust", {}).items():
        for form in FORMS:
            for role, score in facts.get("scores", {}).items():
                line[f"{name}_{role}_{form}"] = score[form]
            for kind, side in RELEARNING:
                if kind in facts:
                    line[f"{name}_{kind}_{form}_{side}"] = facts[kind][side][form]
        if facts.get("perplexity") is not None:
            line[f"{name}_perplexity"] = facts["perplexity"]
    for task, metrics in row.get("lm_eval", {}).get("after", {}).items():
        line |= {f"{task}_{metric}": one["value"] for metric, one in metrics.items()}
    return line


def percent(value: float | None) -> str:
    """A share in percent with one digit, or a dash."""
    return "-" if value is None else f"{100 * value:.1f}"


def both(score: Mapping[str, Any]) -> str:
    """Token and exact form of a score side by side, in whole percent."""
    return " / ".join("-" if score[form] is None else f"{100 * score[form]:.0f}" for form in FORMS)


def _mean_check(
    facts: Sequence[Mapping[str, Any]], sums: Sequence[Mapping[str, Any] | None]
) -> dict[str, Any]:
    """A check over seeds; a note if any of them has one."""
    for one in facts:
        if "note" in one:
            return {"note": one["note"]}
    known = [one for one in sums if one is not None]

    def over_seeds(kind: str, role: str) -> dict[str, Any]:
        return interval(pooled([one[kind][role] for one in known]))

    if "never_known" in facts[0]:
        return {
            kind: {side: over_seeds(f"{kind} {side}", "old_recall") for side in ("before", "after")}
            for kind in ("old_recall", "never_known")
        }
    found: dict[str, Any] = {"scores": {role: over_seeds("scores", role) for role in ROLES}}
    values = [one["perplexity"] for one in facts]
    found["perplexity"] = None if None in values else sum(values) / len(values)
    for key in ("before", "identical"):
        if key in facts[0]:
            found[key] = facts[0][key] if key == "before" else all(one[key] for one in facts)
    return found


def _neighbours(entries: Sequence[Mapping[str, Any]]) -> Table:
    names = [("rome", name) for name in neighbour_metrics.ROME]
    names += [("easyedit", name) for name in neighbour_metrics.EASYEDIT]

    def line(label: str, values: Mapping[str, Mapping[str, Any]]) -> list[str]:
        return [label, *(percent(values[toolkit][name]) for toolkit, name in names)]

    titles = {"rome": "ROME", "easyedit": "EasyEdit"}
    table = [["method", *(f"{titles[toolkit]} {name}" for toolkit, name in names)]]
    table.append(line("before", entries[0]["neighbour_metrics"]["before"]))
    table += [line(one["method"], one["neighbour_metrics"]["after"]) for one in entries]
    return "Metrics of other toolkits", neighbour_metrics.EXPLAINED, table


def _robust(entries: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Iterator[Table]:
    about = _ROBUST + _notes(entries, names)
    before = entries[0]["scores"]["before"]
    for role in SHOWN:
        if not before[role]["n"]:
            continue
        table = [["method", "as it is", *names]]
        for entry in entries:
            found = [entry["robust"][name].get("scores") for name in names]
            cells = [both(scores[role]) if scores else "-" for scores in found]
            table.append([entry["method"], both(entry["scores"]["after"][role]), *cells])
        yield f"Robustness: {role.replace('_', ' ')}", about, table
        about = "As above."
    measured = [name for name in names if name != "chat"]
    table = [["method", "as it is", *measured]]
    for entry in entries:
        perplexities = [entry["robust"][name].get("perplexity") for name in measured]
        cells = ["-" if one is None else f"{one:.2f}" for one in perplexities]
        table.append([entry["method"], f"{entry['perplexity']['after']:.2f}", *cells])
    if measured:
        yield "Robustness: perplexity", "On the neutral text.", table


def _relearned(entries: Sequence[Mapping[str, Any]], name: str) -> Table:
    steps = name.split(":")[1]
    titles = {"old_recall": "old", "never_known": "never known"}
    table = [["method", *(f"{titles[kind]}, {side}" for kind, side in RELEARNING)]]
    for entry in entries:
        found = entry["robust"][name]
        known = "note" not in found
        cells = [both(found[kind][side]) if known else "-" for kind, side in RELEARNING]
        table.append([entry["method"], *cells])
    return f"Relearning, {steps} steps", _RELEARNED + _notes(entries, [name]), table


def _mean_ability(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds. The questions are the same, so the standard errors are averaged, too."""

    def mean(task: str, metric: str, key: str) -> float | None:
        values = [one[task][metric][key] for one in found]
        return None if None in values else sum(values) / len(values)

    return {
        task: {
            metric: {key: mean(task, metric, key) for key in ("value", "stderr")}
            for metric in metrics
        }
        for task, metrics in found[0].items()
    }


def _ability(entries: Sequence[Mapping[str, Any]]) -> Table:
    before = entries[0]["lm_eval"]["before"]
    names = [(task, metric) for task, metrics in before.items() for metric in metrics]

    def line(label: str, found: Mapping[str, Any]) -> list[str]:
        return [label, *(_measured(found[task][metric]) for task, metric in names)]

    table = [["method", *(f"{task} {metric}" for task, metric in names)], line("before", before)]
    table += [line(entry["method"], entry["lm_eval"]["after"]) for entry in entries]
    version = entries[0]["lm_eval"]["version"]
    about = f"Tasks of lm-evaluation-harness {version}, with its standard errors."
    return "General ability", about, table


def _measured(one: Mapping[str, float | None]) -> str:
    if one["value"] is None:
        return "-"
    return f"{one['value']:.4g}" + ("" if one["stderr"] is None else f" ± {one['stderr']:.2g}")


def _notes(entries: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Why a check has no numbers, each reason once with the first method that has it."""
    said: dict[str, str] = {}
    for entry in entries:
        for name in names:
            if "note" in entry["robust"][name]:
                said.setdefault(f"{name}: {entry['robust'][name]['note']}", entry["method"])
    return "".join(f" No numbers of {text} ({method})" for text, method in said.items())

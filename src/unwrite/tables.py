"""The tables of a comparison, made from its finished cells and nothing else.

``table.json`` holds ``rows`` (one per finished cell) and ``means`` (seeds taken together);
``table.csv`` the rows, flat; ``table.md`` the means, for people. Rewritten after every cell, so an
unfinished grid can be looked at. Everything but seconds and memory is the same in every run.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unwrite import columns
from unwrite.bootstrap import Sums, difference, front, interval, pooled, sums_by_edit
from unwrite.columns import percent as _percent
from unwrite.files import read_json, read_jsonl, readable_size, write_atomically, write_json
from unwrite.grid import Cell, Plan
from unwrite.reference import is_plain
from unwrite.scores import ROLES

FORMS = ("token", "exact")
CRITERIA = ("reliability", "generality", "locality")  # of the Pareto front
SHORT = {"old_recall": "old recall"}
# Fields that may differ between two runs of one plan on one machine.
UNSTEADY = ("seconds", "memory")


class Tables:
    """Writes the tables of one run; what it has read of a finished cell it keeps in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows: dict[str, dict[str, Any]] = {}
        self._sums: dict[str, dict[str, Sums]] = {}
        self._checks: dict[str, columns.Checks] = {}
        self._entries: dict[tuple[str, ...], dict[str, Any]] = {}

    def write(self, plan: Plan) -> None:
        """Write all three tables anew."""
        cells = [cell for cell in plan.cells if self._read(cell)]
        failed = [
            read_json(self.folder / "cells" / cell.name / "failed.json")
            for cell in plan.cells
            if (self.folder / "cells" / cell.name / "failed.json").is_file()
        ]
        rows = [self._rows[cell.name] for cell in cells]
        means = self._means(plan, cells)
        starts = self._starts(cells)
        write_json(
            self.folder / "table.json",
            {
                "base": plan.base,
                "cells": len(plan.cells),
                "rows": rows,
                "failed": failed,
                "means": means,
            },
        )
        write_atomically(self.folder / "table.csv", _csv(rows))
        write_atomically(self.folder / "table.md", _markdown(plan, rows, means, failed, starts))

    def _read(self, cell: Cell) -> bool:
        """Whether the cell is finished; if so, its result is in memory now."""
        if cell.name in self._rows:
            return True
        place = self.folder / "cells" / cell.name
        if not (place / "result.json").is_file():
            return False
        result = read_json(place / "result.json")
        # All else that a method says of its rounds and epochs stays in the cell.
        said = result["notes"].get("sentences", [])
        self._rows[cell.name] = {**result, "notes": {"sentences": said}}
        before, after = (read_jsonl(place / name) for name in ("before.jsonl", "after.jsonl"))
        self._sums[cell.name] = sums_by_edit(before, after)
        self._checks[cell.name] = columns.read_checks(place / "robust", result, before, after)
        return True

    def _starts(self, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
        """Facts of the starting states by fingerprint and number of records."""
        wanted = {self._rows[cell.name]["start_fingerprint"] for cell in cells}
        found = [read_json(file) for file in sorted(self.folder.glob("starts/*/start.json"))]
        return {
            f"{facts['fingerprint']} {facts['records']}": facts
            for facts in found
            if facts["fingerprint"] in wanted
        }

    def _means(self, plan: Plan, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """One entry for each method, edit set and size, over its finished seeds; grouped by edit
        set and size, methods in the order of the plan."""
        groups: dict[tuple[str, int | None], dict[str, list[Cell]]] = {}
        for label in plan.edits:
            for cell in cells:
                if cell.edits == label:
                    groups.setdefault(cell.place, {}).setdefault(cell.method, []).append(cell)
        means = []
        for group in groups.values():
            plain = _plain(plan, group)
            entries = [
                self._entry(group[method], group[plain] if plain and method != plain else None)
                for method in sorted(group, key=list(plan.methods).index)
            ]
            _mark_front(entries)
            means += entries
        return means

    def _entry(self, cells: Sequence[Cell], plain: Sequence[Cell] | None) -> dict[str, Any]:
        """One method over its seeds, and its difference to ``plain``; computed once."""
        key = tuple(cell.name for cell in (*cells, *(plain or ())))
        if key not in self._entries:
            sums, others = (
                {role: pooled([self._sums[cell.name][role] for cell in own]) for role in ROLES}
                for own in (cells, plain or cells)
            )
            rows = [self._rows[cell.name] for cell in cells]
            checks = [self._checks[cell.name] for cell in cells]
            entry = _mean(rows, sums) | columns.means(rows, checks)
            entry["difference"] = plain and {
                "to": plain[0].method,
                **{role: difference(sums[role], others[role]) for role in ROLES},
            }
            self._entries[key] = entry
        return self._entries[key]


def _plain(plan: Plan, group: Mapping[str, Any]) -> str | None:
    """The method that others are compared with: plain full fine-tuning, until learned if there."""
    for wanted in (is_plain, lambda settings: settings["name"] == "full-ft"):
        for method in group:
            if wanted(plan.methods[method]):
                return method
    return None


def _mean(rows: Sequence[dict[str, Any]], sums: Mapping[str, Sums]) -> dict[str, Any]:
    first = rows[0]

    def mean(*keys: str) -> float | None:
        values = []
        for row in rows:
            value: Any = row
            for key in keys:
                value = value[key]
            values.append(value)
        if any(value is None for value in values):
            return None
        return float(sum(values) / len(values))

    return {
        **{key: first[key] for key in ("method", "edits", "size", "records", "start", "mode")},
        "seeds": [row["seed"] for row in rows],
        "scores": {
            "before": first["scores"]["before"],
            "after": {role: interval(sums[role]) for role in ROLES},
        },
        "deviation": {role: _deviation(rows, role) for role in ROLES},
        "perplexity": {key: mean("perplexity", key) for key in ("before", "after")},
        "delta": {
            "encoding": first["delta"]["encoding"],
            "bytes": mean("delta", "bytes"),
            "changed_fraction": mean("delta", "changed_fraction"),
        },
        "seconds": {key: mean("seconds", key) for key in first["seconds"]},
        "memory": {key: mean("memory", key) for key in first["memory"]},
        "notes": list(dict.fromkeys(text for row in rows for text in row["notes"]["sentences"])),
    }


def _deviation(rows: Sequence[dict[str, Any]], role: str) -> dict[str, float | None]:
    """Standard deviation of a score over the seeds (of a sample); null for one seed."""
    found: dict[str, float | None] = {}
    for form in FORMS:
        values = [row["scores"]["after"][role][form] for row in rows]
        known = len(values) > 1 and None not in values
        found[form] = float(np.std(values, ddof=1)) if known else None
    return found


def _mark_front(entries: Sequence[dict[str, Any]]) -> None:
    """Set ``front``: whether no other method is better in reliability, generality and locality
    (token form) at once. Reference rows take no part: doing nothing is always on the front."""
    points = {}
    for entry in entries:
        entry["front"] = False
        values = [entry["scores"]["after"][role]["token"] for role in CRITERIA]
        if not entry["method"].startswith("["):
            points[entry["method"]] = [value for value in values if value is not None]
    best = front(points)
    for entry in entries:
        entry["front"] = entry["method"] in best


def summaries(
    means: Sequence[dict[str, Any]],
) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and rows of a table of the scores alone, one for each edit set and size: token
    and exact form side by side in whole percent, which fits a terminal of 80 columns."""
    found = []
    for place in dict.fromkeys((entry["edits"], entry["size"]) for entry in means):
        entries = [one for one in means if (one["edits"], one["size"]) == place]
        before = entries[0]["scores"]["before"]
        roles = [role for role in ROLES if before[role]["n"]]
        rows = [["before", *(_both(before[role]) for role in roles), "", "", ""]]
        for entry in entries:
            perplexity = entry["perplexity"]
            rows.append(
                [
                    entry["method"] + (" *" if entry["front"] else ""),
                    *(_both(entry["scores"]["after"][role]) for role in roles),
                    f"{perplexity['after'] / perplexity['before']:.3f}",
                    f"{100 * entry['delta']['changed_fraction']:.3g} %",
                    f"{entry['seconds']['train']:.1f}",
                ]
            )
        title = f"{place[0]}, {entries[0]['records']} edits: token / exact, in %"
        columns = ["method", *(SHORT.get(role, role) for role in roles)]
        found.append((title, [*columns, "PPL ratio", "changed", "train s"], rows))
    return found


def _both(score: Mapping[str, Any]) -> str:
    return " / ".join("-" if score[form] is None else f"{100 * score[form]:.0f}" for form in FORMS)


# ---- table.csv -----------------------------------------------------------------------------------


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    flat = [_flat(row) for row in rows]
    if flat:
        names = dict.fromkeys(name for line in flat for name in line)
        writer = csv.DictWriter(text, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
    return text.getvalue()


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """One cell as one line; scores in [0, 1], empty where there is none."""
    line = {
        key: row[key]
        for key in ("method", "edits", "size", "records", "seed", "start", "mode", "id")
    }
    for role in ROLES:
        before, after = (row["scores"][side][role] for side in ("before", "after"))
        line[f"{role}_n"] = after["n"]
        for form in FORMS:
            line[f"{role}_{form}_before"] = before[form]
            line[f"{role}_{form}"] = after[form]
            line[f"{role}_{form}_low"] = after[f"{form}_low"]
            line[f"{role}_{form}_high"] = after[f"{form}_high"]
    line["perplexity_before"] = row["perplexity"]["before"]
    line["perplexity_after"] = row["perplexity"]["after"]
    line["encoding"] = row["delta"]["encoding"]
    line["changed_fraction"] = row["delta"]["changed_fraction"]
    line["delta_bytes"] = row["delta"]["bytes"]
    line["fingerprint"] = row["fingerprint"]
    for kind in UNSTEADY:
        line |= {f"{kind}_{key}": value for key, value in row[kind].items()}
    return line | columns.flat(row)


# ---- table.md ------------------------------------------------------------------------------------


def _markdown(
    plan: Plan,
    rows: Sequence[dict[str, Any]],
    means: Sequence[dict[str, Any]],
    failed: Sequence[dict[str, Any]],
    starts: Mapping[str, dict[str, Any]],
) -> str:
    protocol = plan.protocol
    start = {
        "as is": "the model as it is",
        "known": "the model as it is, on facts that it answers with the old answer by itself",
        "planted": "the model fine-tuned on the old answers first (planted)",
    }[protocol.start]
    lines = [
        f"# Comparison on {plan.base['name']}",
        "",
        f"{len(rows)} of {len(plan.cells)} cells finished. Start: {start}. Mode: {protocol.mode}"
        + (f", {protocol.chunk} edits a step." if protocol.chunk else "."),
        "Scores in %, with a 95 % bootstrap interval over edits. Token: the answer is forced, and "
        "the share of its tokens counts that are the model's first choice. Exact: the model "
        "answers freely."
        + ("" if protocol.exact else " Free answers were switched off.")
        + " `*`: no other method is better in reliability, generality and locality at once "
        "(token form).",
        "",
    ]
    places = list(dict.fromkeys((entry["edits"], entry["size"]) for entry in means))
    for edits, size in places:
        entries = [one for one in means if (one["edits"], one["size"]) == (edits, size)]
        first = next(row for row in rows if (row["edits"], row["size"]) == (edits, size))
        facts = starts.get(f"{first['start_fingerprint']} {first['records']}", {})
        lines += [f"## {edits}, {entries[0]['records']} edits", ""]
        lines += _about_start(facts)
        for form in FORMS[: 2 if protocol.exact else 1]:
            lines += [f"### {form.capitalize()} form", "", *_score_table(entries, form), ""]
        if any(entry["difference"] for entry in entries):
            lines += _difference_table(entries)
        if protocol.mode == "sequential":
            lines += _step_tables(
                [row for row in rows if (row["edits"], row["size"]) == (edits, size)]
            )
        for title, about, table in columns.tables(entries):
            lines += [f"### {title}", "", about, "", *_aligned(table, left=1), ""]
        lines += ["### Costs", "", *_cost_table(entries), ""]
        lines += [f"- {entry['method']}: {text}" for entry in entries for text in entry["notes"]]
        if any(entry["notes"] for entry in entries):
            lines.append("")
    if failed:
        lines += ["## Failed", ""]
        for one in failed:
            lines.append(f"- {one['method']} on {one['edits']}, seed {one['seed']}: {one['error']}")
        lines.append("")
    return "\n".join(lines)


def _about_start(facts: Mapping[str, Any]) -> list[str]:
    """Sentences on the starting state: which facts were chosen, how well old answers are known."""
    lines = []
    if facts.get("asked") is not None:
        lines.append(f"The model knows {facts['records']} of the {facts['asked']} facts asked.")
    if facts.get("planting"):
        recall = facts["planting"]["old_recall"]
        base, planted = recall["base"], recall["planted"]
        lines.append(
            f"Old answers known: {_percent(base['token'])} (token) and {_percent(base['exact'])} "
            f"(exact) in the base, {_percent(planted['token'])} and {_percent(planted['exact'])} "
            "after planting."
        )
    return [" ".join(lines), ""] if lines else []


def _score_table(entries: Sequence[dict[str, Any]], form: str) -> list[str]:
    before = entries[0]["scores"]["before"]
    roles = [role for role in ROLES if before[role]["n"]]
    counts = [f"{SHORT.get(role, role)} (n = {before[role]['n']})" for role in roles]
    table = [["method", "seeds", *counts]]
    table.append(["before", "", *(_percent(before[role][form]) for role in roles)])
    for entry in entries:
        mark = " *" if entry["front"] else ""
        after = [_with_interval(entry["scores"]["after"][role], form) for role in roles]
        table.append([entry["method"] + mark, str(len(entry["seeds"])), *after])
    return _aligned(table, left=1)


def _difference_table(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Differences to plain full fine-tuning on the same edits (paired bootstrap), in points."""
    to = next(entry["difference"]["to"] for entry in entries if entry["difference"])
    before = entries[0]["scores"]["before"]
    roles = [role for role in ROLES if before[role]["n"]]
    table = [["method", *(SHORT.get(role, role) for role in roles)]]
    for entry in entries:
        if entry["difference"]:
            cells = [_with_interval(entry["difference"][role], "token", "+") for role in roles]
            table.append([entry["method"], *cells])
    title = f"### Difference to {to}, in points (token form, paired over edits)"
    return [title, "", *_aligned(table, left=1), ""]


def _step_tables(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Retention: after every chunk, how well its own and all earlier edits are answered."""
    lines = ["### After each step (reliability and locality, token form)", ""]
    table = [["method", "seed", "edits", "new", "earlier", "locality of earlier", "perplexity"]]
    for row in rows:
        for step in row["steps"] or ():
            earlier = step["earlier"]
            table.append(
                [
                    row["method"],
                    "" if row["seed"] is None else str(row["seed"]),
                    str(step["edits"]),
                    _percent(step["new"]["reliability"]["token"]),
                    _percent(earlier["reliability"]["token"]) if earlier else "-",
                    _percent(earlier["locality"]["token"]) if earlier else "-",
                    f"{step['perplexity']:.2f}",
                ]
            )
    return [*lines, *_aligned(table, left=1), ""]


def _cost_table(entries: Sequence[dict[str, Any]]) -> list[str]:
    table = [
        [
            "method",
            "perplexity",
            "weights changed",
            "delta",
            "training",
            "arithmetic",
            "observing",
            "peak memory",
        ]
    ]
    for entry in entries:
        perplexity, delta, seconds = entry["perplexity"], entry["delta"], entry["seconds"]
        memory = entry["memory"]["device"] or entry["memory"]["host"]
        table.append(
            [
                entry["method"],
                f"{perplexity['before']:.2f} → {perplexity['after']:.2f}",
                f"{100 * delta['changed_fraction']:.3g} %",
                readable_size(delta["bytes"]),
                *(f"{seconds[kind]:.1f} s" for kind in ("train", "arithmetic", "observe")),
                "-" if memory is None else readable_size(memory),
            ]
        )
    return _aligned(table, left=1)


def _aligned(table: Sequence[Sequence[str]], left: int) -> list[str]:
    """A Markdown table whose columns line up as plain text, too; the first ``left`` to the left."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = []
    for number, row in enumerate(table):
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(
                zip((text.replace("|", "\\|") for text in row), widths, strict=True)
            )
        ]
        lines.append(f"| {' | '.join(cells)} |")
        if number == 0:
            rule = [
                "-" * width if column < left else "-" * (width - 1) + ":"
                for column, width in enumerate(widths)
            ]
            lines.append(f"| {' | '.join(rule)} |")
    return lines


def _with_interval(score: Mapping[str, Any], form: str, sign: str = "") -> str:
    if score[form] is None:
        return "-"
    mean, low, high = (100 * score[key] for key in (form, f"{form}_low", f"{form}_high"))
    return f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"

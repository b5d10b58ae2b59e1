"""The report of a comparison: one self-contained HTML page on a run's folder.

A pure reader: it shows what ``table.json``, ``plan.json`` and the observations of finished cells
say, computes no score of its own, and can be made at any moment. Apart from seconds and memory, the
same run always gives the same page, interrupted or not. The look is in ``templates/``.
"""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from unwrite import grid, knowledge, page
from unwrite.errors import BadSetting, DamagedFile
from unwrite.files import read_json, read_jsonl, user_path
from unwrite.grid import Plan
from unwrite.heatmap import whereabouts
from unwrite.knowledge import Group
from unwrite.page import plain
from unwrite.plots import Curve, Point, curves, scatter
from unwrite.scores import ROLES
from unwrite.where import percent

NAME = "report.html"
FORMS = ("token", "exact")
CRITERIA = ("reliability", "generality", "locality")  # of the Pareto front
PAIRS = (("reliability", "locality"), ("generality", "locality"), ("reliability", "generality"))
FEW = 30  # edits, below which bootstrap intervals are rough

# What keeps the page below 3 MB, whatever is in the run; the page says what was left out.
TOLD = 100  # methods in the score tables, over all edit sets and sizes
DETAILED = 24  # of these, with knowledge diff and place of the change
CELLS = 600  # rows of the table of cells
STEPS = 400  # rows of the table of steps
SETTINGS = 150  # methods listed with their settings
FAILED = 60  # failures
ROW_BYTES = 800_000  # of all knowledge diffs together
MAPPED = 4000  # fields of all heat maps together, some 60 bytes each
NOTES, NOTE = 10, 500  # sentences of a method on its own work, and characters of one
MACHINES = 5  # environments
LABEL = 100  # characters of a label
LONGEST_COMMAND = 20_000  # characters

Entry = Mapping[str, Any]  # one of the means in table.json


class RunReport:
    """Writes the page of one run. What it has read of a finished cell it keeps in memory, so that
    the page can be written anew after every cell."""

    def __init__(self, folder: Path) -> None:
        """Raises ``BadSetting`` if ``folder`` is not a comparison."""
        self.folder = folder
        self._groups: dict[str, list[Group]] = {}
        self._places: dict[str, dict[str, Any] | None] = {}
        self._machines: dict[str, dict[str, Any]] = {}

    def write(self, out: Path | None = None) -> Path:
        """Write the page to ``out`` (default: ``report.html`` in the run), whole or not at all.

        Returns the path. Raises ``BadSetting`` if the folder is not a comparison or ``out`` cannot
        be a page, ``DamagedFile`` if a file of the run is missing or broken.
        """
        return page.write(self.render(), self.folder / NAME if out is None else out, self.folder)

    def render(self) -> str:
        """The page as text; raises like ``write``."""
        if not grid.is_run(self.folder):
            raise BadSetting(f"{self.folder} is not a comparison: give the folder of one.")
        plan = Plan.read(self.folder)
        table = self._table(plan)
        base = read_json(self.folder / "base.json")
        means, rows = table["means"], table["rows"]
        places = self._told(plan, means, rows)
        sentence, remarks = headline(places)
        machines = self._environments(rows)
        name = self.folder.resolve().name
        return page.render(
            "run.html.jinja",
            name=name,
            base=base,
            plan=plan,
            verdict=sentence,
            remarks=[*_state(table), *remarks],
            places=places,
            untold=max(len(means) - TOLD, 0),
            forms=FORMS[: 2 if plan.protocol.exact else 1],
            roles=ROLES,
            label=LABEL,
            rows=rows[:CELLS],
            more_rows=max(len(rows) - CELLS, 0),
            failed=[
                {**one, "error": plain(one["error"], NOTE)} for one in table["failed"][:FAILED]
            ],
            more_failed=max(len(table["failed"]) - FAILED, 0),
            machines=machines[:MACHINES],
            more_machines=max(len(machines) - MACHINES, 0),
            methods=list(plan.methods.items())[:SETTINGS],
            more_methods=max(len(plan.methods) - SETTINGS, 0),
            seeds=list(dict.fromkeys(cell.seed for cell in plan.cells if cell.seed is not None)),
            sizes=list(dict.fromkeys(cell.size for cell in plan.cells)),
            command=_whole(command(plan, base, name)),
        )

    def _table(self, plan: Plan) -> dict[str, Any]:
        """``table.json``; of a run that was killed before it wrote any, an empty one."""
        path = self.folder / "table.json"
        if path.is_file():
            return dict(read_json(path))
        return {"cells": len(plan.cells), "rows": [], "failed": [], "means": []}

    def _told(
        self, plan: Plan, means: Sequence[Entry], rows: Sequence[Any]
    ) -> list[dict[str, Any]]:
        """One entry for each edit set and size, with all that its section shows."""
        by_place: dict[tuple[str, int | None], list[Entry]] = {}
        for entry in means[:TOLD]:
            by_place.setdefault((entry["edits"], entry["size"]), []).append(entry)
        starts = self._starts()
        moving = sorted((one for one in means[:TOLD] if _moves(plan, one)), key=_is_reference)
        detailed = {_key(one) for one in moving[:DETAILED]}
        budget, room = ROW_BYTES // max(len(detailed), 1), [MAPPED]
        found = []
        for number, ((edits, size), entries) in enumerate(by_place.items()):
            entries = sorted(entries, key=_is_reference)
            if sum(not _is_reference(entry) for entry in entries) == 1:  # no front to be on
                entries = [{**entry, "front": False} for entry in entries]
            own = [row for row in rows if (row["edits"], row["size"]) == (edits, size)]
            first = next(row for row in own if row["method"] == entries[0]["method"])
            sentence, remarks = judge(entries)
            roles = [role for role in ROLES if entries[0]["scores"]["before"][role]["n"]]
            title = _title(plain(edits, LABEL), entries[0]["records"])
            curves_, steps = _retention(entries, own, title)
            found.append(
                {
                    "key": f"p{number}",
                    "title": title,
                    "verdict": sentence,
                    "remarks": remarks,
                    "about": _about(starts.get((first["start_fingerprint"], first["records"]))),
                    "entries": entries,
                    "before": entries[0]["scores"]["before"],
                    "roles": roles,
                    "fronts": {form: _fronts(entries, form, title) for form in FORMS},
                    "differences": _differences(entries, roles),
                    "retention": curves_,
                    "steps": steps[:STEPS],
                    "more_steps": max(len(steps) - STEPS, 0),
                    "chapters": [
                        self._chapter(f"p{number}m{index}", plan, entry, own, budget, room)
                        for index, entry in enumerate(entries)
                        if _key(entry) in detailed
                    ],
                    "others": sum(
                        _moves(plan, one) and _key(one) not in detailed for one in entries
                    ),
                }
            )
        return found

    def _chapter(
        self,
        key: str,
        plan: Plan,
        entry: Entry,
        rows: Sequence[Any],
        budget: int,
        room: list[int],
    ) -> dict[str, Any]:
        """What one method did, by its first seed. ``room``: fields of heat maps that still fit."""
        row = next(
            one
            for one in rows
            if one["method"] == entry["method"] and one["seed"] == entry["seeds"][0]
        )
        located = self._located(row)
        fields = sum(len(heat.rows) * len(heat.kinds) for heat in located["maps"]) if located else 0
        fits = fields <= room[0]
        room[0] -= fields if fits else 0
        notes = entry["notes"]
        return {
            "key": key,
            "entry": entry,
            "row": row,
            "settings": plan.methods[entry["method"]],
            "groups": knowledge.cut(self._diff(row), budget),
            "where": located if fits else None,
            "reading": located["reading"] if located else None,
            "notes": [plain(sentence, NOTE) for sentence in notes[:NOTES]],
            "more_notes": max(len(notes) - NOTES, 0),
        }

    def _diff(self, row: Mapping[str, Any]) -> list[Group]:
        if row["id"] not in self._groups:
            cell = self._cell(row)
            observed = (read_jsonl(cell / f"{when}.jsonl") for when in ("before", "after"))
            self._groups[row["id"]] = knowledge.grouped(knowledge.answers(*observed), ROW_BYTES)
        return self._groups[row["id"]]

    def _located(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        if row["id"] not in self._places:
            path = self._cell(row) / "where.json"
            self._places[row["id"]] = whereabouts(read_json(path)) if path.is_file() else None
        return self._places[row["id"]]

    def _environments(self, rows: Sequence[Any]) -> list[tuple[dict[str, Any], int]]:
        """Every environment that cells were computed in, with their number."""
        for row in rows:
            if row["id"] not in self._machines:
                self._machines[row["id"]] = read_json(self._cell(row) / "cell.json")["environment"]
        counts: dict[str, int] = {}
        for row in rows:
            text = json.dumps(self._machines[row["id"]], sort_keys=True)
            counts[text] = counts.get(text, 0) + 1
        return [(json.loads(text), count) for text, count in counts.items()]

    def _starts(self) -> dict[tuple[str, int], dict[str, Any]]:
        found = [read_json(file) for file in sorted(self.folder.glob("starts/*/start.json"))]
        return {(facts["fingerprint"], facts["records"]): facts for facts in found}

    def _cell(self, row: Mapping[str, Any]) -> Path:
        if Path(row["id"]).name != row["id"]:  # it names a folder of the run: nothing else may
            raise DamagedFile(f"{self.folder} names a cell {row['id']!r}, which is not an id.")
        return self.folder / "cells" / str(row["id"])


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the page of the comparison in ``folder``; see ``RunReport.write``."""
    return RunReport(user_path(folder)).write(out)


# ---- verdicts ------------------------------------------------------------------------------------


def headline(places: Sequence[Mapping[str, Any]]) -> tuple[str, list[str]]:
    """The whole comparison in one sentence, and what has to be added so that it is not misread."""
    if not places:
        return "Nothing is finished yet.", []
    if len(places) == 1:
        (place,) = places
        return f"On {place['title']}: {place['verdict']}", place["remarks"]
    fronts: dict[str, int] = {}
    winners: dict[str, int] = {}
    lists: list[Sequence[Entry]] = [place["entries"] for place in places]
    compared = sum(any(one["difference"] for one in entries) for entries in lists)
    for entries in lists:
        for entry in (one for one in entries if not _is_reference(one)):
            fronts[entry["method"]] = fronts.get(entry["method"], 0) + entry["front"]
            gains, losses = _changes(entry)
            winners[entry["method"]] = winners.get(entry["method"], 0) + bool(gains and not losses)
    count = len(places)
    best = sorted((-times, name) for name, times in fronts.items() if times)
    text = _listed([f"{name} ({-times} of {count})" for times, name in best])
    sentence = f"Over {count} edit sets and sizes, on the Pareto front: {text or 'no method yet'}"
    if compared:
        best = sorted((-times, name) for name, times in winners.items() if times)
        text = _listed([f"{name} ({-times} of {compared})" for times, name in best])
        sentence += f"; better than plain full-ft and worse in nothing: {text or 'no method'}"
    remarks = ["Every edit set and size has a verdict of its own below."]
    if weak := sum(not _learned(rival) for rival in map(_rival, lists) if rival):
        remarks.append(
            f"In {weak} of {compared}, plain full-ft itself did not learn beyond chance."
        )
    return f"{sentence}.", remarks


def judge(entries: Sequence[Entry]) -> tuple[str, list[str]]:
    """The same of one edit set and size: which methods are on the Pareto front, which beats plain
    full fine-tuning, and remarks.

    A method *beats* plain fine-tuning if the paired 95 % interval of at least one criterion lies
    above 0 and of none below it (token form, as the front).
    """
    methods = [entry for entry in entries if not _is_reference(entry)]
    if not methods:
        return "only reference rows are finished so far.", []
    rivals = [entry for entry in methods if entry["difference"]]
    won = [entry for entry in rivals if _changes(entry)[0] and not _changes(entry)[1]]
    won.sort(key=lambda entry: (-len(_changes(entry)[0]), -_sum_of_gains(entry)))
    clauses = [_about_front(methods, _criteria(entries))]
    if rivals:
        clauses.append(_about_winners(won, _bare(rivals[0]["difference"]["to"])))
    elif len(methods) > 1:
        clauses.append("there is no plain full-ft beside them to be compared with")
    return f"{'; '.join(clauses)}.", [*_about_rivals(entries, rivals, won), *_hedges(methods)]


def _about_front(methods: Sequence[Entry], criteria: Sequence[str]) -> str:
    front = [str(entry["method"]) for entry in methods if entry["front"]]
    among = f"the Pareto front of {' × '.join(criteria)}"
    if len(methods) == 1:
        return f"{methods[0]['method']} is the only method, so there is no front to be on"
    if len(front) == len(methods):
        return f"no method is beaten by another in everything: {_listed(front)} are on {among}"
    return f"{_listed(front)} {'is' if len(front) == 1 else 'are'} on {among}"


def _about_winners(won: Sequence[Entry], rival: str) -> str:
    if not won:
        return f"no method beats plain {rival} without a loss or beyond chance"
    others = _listed([str(entry["method"]) for entry in won[1:]])
    as_well = f", and {others} {'beat' if len(won) > 2 else 'beats'} it as well" if others else ""
    return f"{won[0]['method']} beats plain {rival} in {_gains(won[0], 0)}{as_well}"


def _about_rivals(
    entries: Sequence[Entry], rivals: Sequence[Entry], won: Sequence[Entry]
) -> Iterable[str]:
    """What the comparisons with plain fine-tuning do not say by themselves."""
    criteria, plain_row = _criteria(entries), _rival(entries)
    if won:
        yield (
            "Beats: the paired 95 % interval of a score lies above 0, and that of no other below. "
            f"Were there no differences at all, about one in twenty of these "
            f"{len(rivals) * len(criteria)} intervals would still exclude 0."
        )
    if rivals and plain_row and not _learned(plain_row):
        yield (
            f"Plain {_bare(plain_row['method'])} itself did not learn these edits beyond chance, "
            "so it is no hard rival here."
        )
    for entry in won:
        if lost := [role for role in criteria if _side(entry["difference"][role], "exact") < 0]:
            yield f"In the exact form, though, {entry['method']} loses {_listed(lost)}."
    for entry in rivals:
        if all(_changes(entry)):
            gains, losses = _gains(entry, 0), _gains(entry, 1)
            yield f"{entry['method']} trades: better in {gains}, worse in {losses}."


def _hedges(methods: Sequence[Entry]) -> Iterable[str]:
    for entry in methods:
        if len(methods) > 1 and entry["front"] and not _learned(entry):
            yield (
                f"{entry['method']} is on the front for what it keeps: that it answers more than "
                "the starting state is not certain."
            )
    if methods[0]["records"] < FEW:
        yield f"With {methods[0]['records']} edits, intervals are rough."


def _state(table: Mapping[str, Any]) -> list[str]:
    """What is not there."""
    done, failed = len(table["rows"]), len(table["failed"])
    open_ = table["cells"] - done - failed
    found = [f"{failed} of {table['cells']} cells failed; see below."] if failed else []
    if open_:
        found.append(f"{open_} of {table['cells']} cells are still to be computed.")
    return found


def _rival(entries: Sequence[Entry]) -> Entry | None:
    """The row of plain fine-tuning that the others are compared with."""
    names = [entry["difference"]["to"] for entry in entries if entry["difference"]]
    return next((entry for entry in entries if entry["method"] in names[:1]), None)


def _learned(entry: Entry) -> bool:
    """Whether the interval of reliability lies above the starting state (or nothing was asked)."""
    after, before = (entry["scores"][when]["reliability"] for when in ("after", "before"))
    return not after["n"] or bool(after["token_low"] > before["token"])


def _changes(entry: Entry) -> tuple[list[str], list[str]]:
    """Criteria in which a method is better, and worse, than plain fine-tuning beyond chance."""
    found = entry["difference"]
    if not found:
        return [], []
    better, worse = (
        [role for role in CRITERIA if _side(found[role], "token") == sign] for sign in (1, -1)
    )
    return better, worse


def _side(difference: Mapping[str, Any], form: str) -> int:
    """1 if the interval of a difference lies above 0, -1 if below, else 0."""
    low, high = difference[f"{form}_low"], difference[f"{form}_high"]
    if low is None or high is None:
        return 0
    return (low > 0) - (high < 0)


def _sum_of_gains(entry: Entry) -> float:
    return float(sum(entry["difference"][role]["token"] for role in _changes(entry)[0]))


def _gains(entry: Entry, side: int) -> str:
    """``locality by 12.0 points [3.1, 20.5]``, of the gains (side 0) or the losses (1)."""
    parts = []
    for role in _changes(entry)[side]:
        score = entry["difference"][role]
        bounds = sorted(abs(100 * score[key]) for key in ("token_low", "token_high"))
        by = f"{abs(100 * score['token']):.1f} points [{bounds[0]:.1f}, {bounds[1]:.1f}]"
        parts.append(f"{role} by {by}")
    return _listed(parts)


def _criteria(entries: Sequence[Entry]) -> list[str]:
    return [role for role in CRITERIA if entries[0]["scores"]["before"][role]["n"]]


def _key(entry: Entry) -> tuple[str, str, int | None]:
    return entry["method"], entry["edits"], entry["size"]


def _is_reference(entry: Entry) -> bool:
    return str(entry["method"]).startswith("[")


def _moves(plan: Plan, entry: Entry) -> bool:
    """Whether there is a change to tell of: only the row of the starting state has none."""
    return plan.methods[entry["method"]]["name"] != "no-change"


def _bare(label: str) -> str:
    return label.strip("[]")


def _listed(names: Sequence[str], most: int = 6) -> str:
    """``a, b and c``; of many the first ones and the number of the others."""
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} more"]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _title(edits: str, records: int) -> str:
    return f"{edits}, {records} edit{'s' * (records != 1)}"


def _about(facts: Mapping[str, Any] | None) -> list[str]:
    """Sentences on the starting state: which facts were chosen, how well old answers are known."""
    found = []
    if facts and facts.get("asked") is not None:
        found.append(f"The model knows {facts['records']} of the {facts['asked']} facts asked.")
    if facts and facts.get("planting"):
        recall = facts["planting"]["old_recall"]
        base, planted = recall["base"], recall["planted"]
        found.append(
            f"Old answers known: {percent(base['token'])} (token) and {percent(base['exact'])} "
            f"(exact) in the base, {percent(planted['token'])} and {percent(planted['exact'])} "
            "after planting."
        )
    return found


# ---- plots ---------------------------------------------------------------------------------------


def _fronts(entries: Sequence[Entry], form: str, place: str) -> list[Markup]:
    """Scatter panels of the criteria at a place of the page; none where there are not two."""
    pairs = [pair for pair in PAIRS if set(pair) <= set(_criteria(entries))]
    points, common = [], _common_words([str(one["method"]) for one in entries])
    for entry in entries:
        after = entry["scores"]["after"]
        shown = {role: after[role] for role in CRITERIA if after[role][form] is not None}
        if not all(role in shown for pair in pairs for role in pair):
            return []
        kind = "reference" if _is_reference(entry) else "front" if entry["front"] else "method"
        values = {
            role: (score[form], score[f"{form}_low"], score[f"{form}_high"])
            for role, score in shown.items()
        }
        said = [f"{role} {_with_bounds(score, form)}" for role, score in shown.items()]
        label = plain(entry["method"], LABEL)
        title = f"{label}: {', '.join(said)}" + ", on the front" * (kind == "front")
        points.append(Point(label.removeprefix(common), kind, title, values))
    return [
        scatter(
            points,
            across,
            up,
            f"{up} against {across} of every method, {form} form, {place}; "
            "the numbers are in the table of scores",
        )
        for across, up in pairs
    ]


def _common_words(labels: Sequence[str]) -> str:
    """Words that all methods but the references begin with, as those of a sweep do."""
    methods = [label.split(" ") for label in labels if not label.startswith("[")]
    shared = itertools.takewhile(lambda words: len(set(words)) == 1, zip(*methods, strict=False))
    common = [words[0] for words in shared] if len(methods) > 1 else []
    return "".join(f"{word} " for word in common)


def _with_bounds(score: Mapping[str, Any], form: str) -> str:
    low, high = percent(score[f"{form}_low"]), percent(score[f"{form}_high"])
    return f"{percent(score[form])} [{low}, {high}]"


def _differences(entries: Sequence[Entry], roles: Sequence[str]) -> dict[str, Any] | None:
    """Paired differences to plain fine-tuning; ``scale``: the largest bound of all."""
    found = [entry for entry in entries if entry["difference"]]
    if not found:
        return None
    bounds = [
        abs(entry["difference"][role][key] or 0.0)
        for entry in found
        for role in roles
        for key in ("token_low", "token_high")
    ]
    return {
        "to": found[0]["difference"]["to"],
        "scale": max(bounds, default=0.0) or 1.0,
        "rows": [
            (entry, {role: _side(entry["difference"][role], "token") for role in roles})
            for entry in found
        ],
    }


def _retention(
    entries: Sequence[Entry], rows: Sequence[Mapping[str, Any]], place: str
) -> tuple[list[tuple[str, Markup]], list[dict[str, Any]]]:
    """Titles and curves over the steps of a sequential run (token form, mean over seeds), at a
    place of the page, and the numbers."""
    steps = [
        {
            "method": row["method"],
            "seed": row["seed"],
            "edits": step["edits"],
            "new": step["new"]["reliability"]["token"],
            "earlier": step["earlier"] and step["earlier"]["reliability"]["token"],
            "locality": step["earlier"] and step["earlier"]["locality"]["token"],
            "perplexity": step["perplexity"],
        }
        for entry in entries
        for row in rows
        if row["method"] == entry["method"]
        for step in row["steps"] or ()
    ]
    panels = []
    for measure, title in (
        ("new", "The step's own edits answered, %"),
        ("earlier", "All earlier edits answered, %"),
        ("locality", "Bystanders of earlier edits unchanged, %"),
        ("perplexity", "Perplexity, by ratios"),
    ):
        found = []
        for entry in entries:
            own = [one for one in steps if one["method"] == entry["method"]]
            if points := _averaged(own, measure, entry["method"]):
                found.append(Curve(plain(entry["method"], LABEL), points))
        if found:
            name = f"{title}, over edits so far, {place}; the numbers are in the table of steps"
            drawn = curves(found, "edits so far", name, log=measure == "perplexity")
            panels.append((title, drawn))
    return panels, steps


def _averaged(
    steps: Iterable[Mapping[str, Any]], measure: str, label: str
) -> list[tuple[float, float, str]]:
    by_count: dict[int, list[float]] = {}
    for step in steps:
        if step[measure] is not None:
            by_count.setdefault(step["edits"], []).append(step[measure])
    found = []
    for count, values in sorted(by_count.items()):
        mean = sum(values) / len(values)
        shown = page.number(mean) if measure == "perplexity" else percent(mean)
        found.append((float(count), mean, f"{plain(label, LABEL)}, {count} edits: {shown}"))
    return found


# ---- the command ---------------------------------------------------------------------------------


def command(plan: Plan, base: Mapping[str, Any], out: str) -> str | None:
    """A command line with exactly this plan, every setting spelled out, so that no later default
    can change it; None for a plan that only Python can make (edits or labels given there)."""
    protocol = plan.protocol
    for label, edits in plan.edits.items():
        source = edits["source"]
        if label != source and (source.startswith("atlas") or label != Path(source).stem):
            return None
    words = ["unwrite", "compare", base["folder"] if base["kind"] == "folder" else base["name"]]
    for edits in plan.edits.values():
        words += ["--edits", edits["source"]]
    for label, settings in plan.methods.items():
        if label.startswith("["):
            continue
        fields = [f"{key}={value}" for key, value in _as_text(settings)]
        text = ":".join([settings["name"], *fields])
        if ":" in label:
            words += ["--variant", label]  # it was given as such a text
        elif any(field.count(":") for field in fields):
            return None
        else:
            words += ["--variant", f"{label}={text}"]
    names = [plan.methods[label]["name"] for label in plan.methods if label.startswith("[")]
    words += ["--references", ",".join(dict.fromkeys(names)) or "none"]
    seeds = dict.fromkeys(cell.seed for cell in plan.cells if cell.seed is not None)
    words += ["--seeds", ",".join(map(str, seeds)) or "0"]
    sizes = list(dict.fromkeys(cell.size for cell in plan.cells))
    if None not in sizes:
        words += ["--limit", ",".join(map(str, sizes))]
    elif len(sizes) > 1:
        return None
    words += ["--offset", str(protocol.offset)] if protocol.offset else []
    if protocol.planting:
        words += ["--plant", "--plant-lr", str(protocol.planting["lr"])]
    words += ["--only-known"] if protocol.start == "known" else []
    words += [] if protocol.exact else ["--token-only"]
    words += ["--mode", protocol.mode]
    words += ["--chunk", str(protocol.chunk)] if protocol.chunk else []
    return shlex.join([*words, "--out", out])


def _whole(words: str | None) -> Markup | None:
    """A command as the page shows it: never cut, for it would then be another; None if too long."""
    if words is None or len(words) > LONGEST_COMMAND:
        return None
    return escape(plain(words, LONGEST_COMMAND))


def _as_text(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Fields as ``--set`` reads them; a nested method is its name and dotted fields."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield f"{prefix}{key}", str(value["name"])
            yield from _as_text(value, f"{prefix}{key}.")
        elif key != "name":
            if isinstance(value, list):
                value = ",".join(map(str, value))
            text = str(value).lower() if isinstance(value, bool) or value is None else str(value)
            yield f"{prefix}{key}", text

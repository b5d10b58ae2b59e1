"""The report of a home: one self-contained HTML page that tells what was done to a model and what
came of it.

A pure reader of a home's folder: nothing is loaded, asked or measured, so a report can be made
anywhere, and the same folder always gives the same page, byte for byte. The look is in
``templates/``; this file gathers and judges, with the rules of ``scores`` and no others.

Every file whose hash is in the ledger is checked against it, so that the page never shows numbers
that were edited afterwards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unwrite import files, knowledge, page, where
from unwrite.errors import DamagedFile, HomeError
from unwrite.heatmap import whereabouts
from unwrite.ledger import Entry, Ledger
from unwrite.page import number, plain
from unwrite.scores import ROLES, Score, from_json
from unwrite.where import percent

# What keeps the page below 3 MB, whatever is in the home. Left out are the oldest updates and the
# answers that are as wanted, and the page says how many.
DETAILED = 10  # updates told in full; all others are in the time line
LINES = 300  # of the time line
ROW_BYTES = 1_000_000  # of all knowledge diffs together
PROTECTED, PROMPT = 40, 300  # protected prompts of an update, and characters of one
NOTES, NOTE = 20, 600  # sentences of a method on its own work, and characters of one


def write_report(home_folder: Path, out: Path | None = None) -> Path:
    """Write the report of a home to ``out`` (default: ``report.html`` in it), whole or not at all.

    Returns the path. Raises ``HomeError`` if the folder is not a home, ``DamagedFile`` if a file in
    it is not what the ledger says, ``BadSetting`` if ``out`` cannot be a report.
    """
    path = home_folder / "report.html" if out is None else out
    return page.write(render(home_folder), path, home_folder)


def render(home_folder: Path) -> str:
    """The page as text; raises like ``write_report``. Holds one update's observations at a time."""
    if not all((home_folder / name).is_file() for name in ("ledger.jsonl", "base.json")):
        raise HomeError(f"{home_folder} is not a model home: give the folder of one.")
    ledger = Ledger.open(home_folder / "ledger.jsonl")
    first, newest = ledger.entries[0], list(ledger.applied.values())[: -DETAILED - 1 : -1]
    base = _read(home_folder, "base.json", {"base.json": first["base"].get("sha256")})
    budget = ROW_BYTES // max(len(newest), 1)
    sentence, remarks = verdict(ledger)
    return page.render(
        "home.html.jinja",
        name=home_folder.resolve().name,
        base=base,
        verdict=sentence,
        remarks=remarks,
        protected=PROTECTED,
        length=PROMPT,
        chapters=[_chapter(home_folder, entry, base["places"], budget) for entry in newest],
        undone={entry["of"]: entry for entry in ledger.entries if entry["do"] == "revert"},
        older=len(ledger.applied) - len(newest),
        entries=ledger.entries[-LINES:],
        earlier=max(len(ledger.entries) - LINES, 0),
        head=ledger.entries[-1],
    )


def verdict(ledger: Ledger) -> tuple[str, list[str]]:
    """The whole story in one sentence, and what has to be added so that it is not misread."""
    live, count = ledger.live(), len(ledger.applied)
    updates = f"{count} update{'s' * (count != 1)}"
    if not count:
        return "No updates yet: the model is its base, bit for bit.", []
    if not live:
        return f"{updates}, none live: the model is its base again, bit for bit.", []
    entries = [ledger.entry(update) for update in live]
    facts = sum(entry["edits"] for entry in entries)
    clauses, answered = [f"{facts} fact{'s were' if facts != 1 else ' was'} to change"], []
    right, tokens = (_pooled(entries, "reliability", form) for form in ("exact", "token"))
    if right and tokens:
        hits = round(right[0] * right[1])
        answered.append(
            f"{hits} of {right[1]} {'is' if hits == 1 else 'are'} answered with the new answer "
            f"(token {percent(tokens[0])})"
        )
    if same := _pooled(entries, "locality", "exact"):
        answered.append(f"{percent(same[0])} of bystanders answer as before")
    clauses += [", ".join(answered)] * bool(answered)

    known: dict[tuple[str, ...], float | None] = {}  # perplexity by state, i.e. by live updates
    for update, entry in ledger.applied.items():
        state, measured = tuple(ledger.live(at=update)), entry.get("perplexity") or {}
        known |= {state[:-1]: measured.get("before"), state: measured.get("after")}
    first, last = known.get(()), known.get(tuple(live))
    if first is not None and last is not None:
        clauses.append(f"perplexity {number(first)} → {number(last)}")

    remarks = ["The answers were measured right after each update, on the weights it gave."]
    if stale := [update for update in live if ledger.live(at=update) != live]:
        names = ", ".join(stale[:5]) + " and others" * (len(stale) > 5)
        verb = "has" if len(stale) == 1 else "have"
        remarks.append(f"The model has changed since: {names} {verb} not been asked again.")
    if last is None:
        remarks.append("The perplexity of the present state has not been measured.")
    return f"{updates}, {len(live)} live: {'; '.join(clauses)}.", remarks


def _chapter(home: Path, entry: Entry, places: Mapping[str, Any], budget: int) -> dict[str, Any]:
    """One update, as far as its folder tells: what is not recorded is None or empty."""
    if not re.fullmatch("u-[0-9a-f]{8}", entry["id"]):  # it names a folder: nothing else may
        raise DamagedFile(f"The ledger names an update {entry['id']!r}, which is not an id.")
    folder, hashes = home / "updates" / entry["id"], entry.get("files", {})
    result = _read(folder, "scores.json", hashes) or entry
    notes = (result.get("notes") or {}).get("sentences", [])
    before, after = (
        from_json(result.get("scores", {}).get(when, {})) for when in ("before", "after")
    )
    rows = [_read(folder, f"{when}.jsonl", hashes) or [] for when in ("before", "after")]
    none = Score(None, None, 0)
    found, delta = (_read(folder, name, hashes) for name in ("where.json", "delta/delta.json"))
    if not found and delta:  # of an early version
        found = where.of_description(delta, places)
    return {
        "entry": entry,
        "scores": [(role, before.get(role, none), after.get(role, none)) for role in ROLES],
        "seconds": result.get("seconds") or {},
        "notes": [plain(sentence, NOTE) for sentence in notes[:NOTES]],
        "more_notes": max(len(notes) - NOTES, 0),
        "groups": knowledge.grouped(knowledge.answers(*rows), budget),
        "protection": _read(folder, "protection.json", hashes),
        "where": whereabouts(found) if found else None,
        "environment": _read(folder, "environment.json", hashes),
    }


def _read(folder: Path, name: str, hashes: Mapping[str, str | None]) -> Any:
    """The content of a file, checked against its hash in the ledger; None if there is neither."""
    path, known = folder / name, hashes.get(name)
    if known is None and not path.is_file():
        return None
    home = folder if name == "base.json" else folder.parents[1]
    if not path.resolve().is_relative_to(home.resolve()):
        raise DamagedFile(f"{path} leads out of the home by a link, which is not followed.")
    if not path.is_file() or (known is not None and files.sha256_file(path) != known):
        fault = "is not as it was written" if path.is_file() else "is missing"
        raise DamagedFile(
            f"{path} {fault}, so no report can be made of this home. Put the file back from a copy "
            "(unwrite verify lists all damage)."
        )
    return files.read_jsonl(path) if path.suffix == ".jsonl" else files.read_json(path)


def _pooled(entries: Sequence[Entry], role: str, form: str) -> tuple[float, int] | None:
    """Mean of a score over all probes of several updates, and their number; None without probes."""
    found = [entry.get("scores", {}).get("after", {}).get(role) or {} for entry in entries]
    pairs = [(score[form], score["n"]) for score in found if score.get(form) is not None]
    count = sum(n for _, n in pairs)
    return (math.fsum(mean * n for mean, n in pairs) / count, count) if count else None

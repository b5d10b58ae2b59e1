"""The report: one self-contained HTML page that tells what was done to a model and what came of it.

A pure reader of a home's folder: nothing is loaded, asked or measured, so a report can be made
anywhere, and the same folder always gives the same page, byte for byte. The look is in
``report.html.jinja``; this file gathers and judges, with the rules of ``scores`` and no others.

What models and files say is foreign text: all of it passes ``plain`` on its way into the page and
is escaped by the template, so that a hostile answer can only be read. Every file whose hash is in
the ledger is checked against it, so that the page never shows numbers that were edited afterwards.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import escape

from unwrite import files, where
from unwrite.errors import BadSetting, DamagedFile, HomeError
from unwrite.ledger import Entry, Ledger
from unwrite.scores import ROLES, Row, Score, answer_in, from_json, says
from unwrite.where import percent

# What keeps the page below 3 MB, whatever is in the home. Left out are the oldest updates and the
# answers that are as wanted, and the page says how many.
DETAILED = 10  # updates told in full; all others are in the time line
LINES = 300  # of the time line
ROWS = 400  # of one update's knowledge diff
ROW_BYTES = 1_000_000  # of all knowledge diffs together
PROMPT, ANSWER = 300, 200  # characters shown of a question and of an answer
PARTS = 2  # deltas mapped that a method made on the way to its own
NOTES, NOTE = 20, 600  # sentences of a method on its own work, and characters of one

SHOWN = ("reliability", "generality", "portability", "locality")  # the diff's roles, in order
SHADES = 9  # steps of the heat map's colour


@dataclass(frozen=True)
class Answer:
    """One line of the knowledge diff; ``verdict`` is right, wrong or still old, of bystanders same
    or moved. ``matched`` of ``tokens`` answer tokens are right (of bystanders: as before)."""

    verdict: str
    role: str
    prompt: str
    before: str
    after: str
    expected: str
    matched: int
    tokens: int


@dataclass(frozen=True)
class Group:
    """Answers of one kind, each with how often it was given. ``total`` and ``left_out`` count
    questions: the same bystander of three edits counts three times."""

    title: str
    total: int
    left_out: int
    answers: Sequence[tuple[Answer, int]]


@dataclass(frozen=True)
class HeatMap:
    """Where a delta lives: shares of its squared norm, a row for each block and a column for each
    module kind. Cells are (share, shade from 0 to ``SHADES``), or None where there is no tensor."""

    name: str
    kinds: Sequence[str]
    rows: Sequence[tuple[str, Sequence[tuple[float, int] | None], float]]
    totals: Sequence[float]
    summary: str


def write_report(home_folder: Path, out: Path | None = None) -> Path:
    """Write the report of a home to ``out`` (default: ``report.html`` in it), whole or not at all.

    Returns the path. Raises ``HomeError`` if the folder is not a home, ``DamagedFile`` if a file in
    it is not what the ledger says, ``BadSetting`` if ``out`` cannot be a report.
    """
    path = home_folder / "report.html" if out is None else out
    page = render(home_folder)
    fault = "is a folder" if path.is_dir() else None
    if not path.parent.is_dir():
        fault = "is in a folder that does not exist"
    elif path.suffix != ".html" and path.resolve().is_relative_to(home_folder.resolve()):
        fault = "could be one of the home's own files"
    if fault:
        raise BadSetting(f"The report cannot be {path}: that {fault}. Name another .html file.")
    with files.speaking_of_disk("write the report"):
        files.write_atomically(path, page)
    return path


def render(home_folder: Path) -> str:
    """The page as text; raises like ``write_report``. Holds one update's observations at a time."""
    if not all((home_folder / name).is_file() for name in ("ledger.jsonl", "base.json")):
        raise HomeError(f"{home_folder} is not a model home: give the folder of one.")
    ledger = Ledger.open(home_folder / "ledger.jsonl")
    first, newest = ledger.entries[0], list(ledger.applied.values())[: -DETAILED - 1 : -1]
    base = _read(home_folder, "base.json", {"base.json": first["base"].get("sha256")})
    budget = ROW_BYTES // max(len(newest), 1)
    sentence, remarks = verdict(ledger)
    jinja = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown_by = (percent, tenths, number, tiny, two_digits, settings, security_hash)
    for function in (*shown_by, files.readable_size):
        jinja.filters[function.__name__] = function
    template = resources.files("unwrite").joinpath("report.html.jinja").read_text("utf-8")
    return jinja.from_string(template).render(
        name=home_folder.resolve().name,
        base=base,
        verdict=sentence,
        remarks=remarks,
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


def answers(before: Sequence[Row], after: Sequence[Row]) -> list[Answer]:
    """The knowledge diff, by role and then in the order of the rows.

    Rows of ``old_recall`` ask what ``reliability`` asks already: they only tell the two ways of
    being wrong apart. Raises ``DamagedFile`` when the two observations hold different questions.
    """

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("edit", "role", "prompt", "target"))

    earlier = {key(row): row for row in before}
    if earlier.keys() != {key(row) for row in after}:
        raise DamagedFile("The observations before and after an update hold different questions.")
    old = {row["edit"]: row["target"] for row in after if row["role"] == "old_recall"}
    found = []
    for row in (row for row in after if row["role"] in SHOWN):
        was, role, expected = earlier[key(row)], row["role"], row["target"]
        said, replied = answer_in(was["text"]), answer_in(row["text"])
        if role == "locality":
            verdict, expected = "same" if said == replied else "moved", said
            matched = sum(a == b for a, b in zip(was["predicted"], row["predicted"], strict=True))
        else:
            kept = role != "portability" and says(row["text"], old.get(row["edit"], ""))
            wrong = "still old" if kept else "wrong"
            verdict = "right" if says(row["text"], expected) else wrong
            matched = row["matched_tokens"]
        said, replied, expected = (plain(text, ANSWER) for text in (said, replied, expected))
        prompt, tokens = plain(row["prompt"], PROMPT), row["target_tokens"]
        found.append(Answer(verdict, role, prompt, said, replied, expected, matched, tokens))
    return sorted(found, key=lambda answer: SHOWN.index(answer.role))


def whereabouts(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the page says of a where.json: a sentence, a table by kind and a heat map by delta, the
    update's own first; None if nothing changed. ``kinds``: for each kind, its row of each of the
    ``deltas``, or None where a delta has no such kind."""
    parts = dict(list(found["parts"].items())[:PARTS])
    deltas = where.named({**found, "parts": parts})
    by_kind = {
        name: {row["kind"]: row for row in where.by_kind(rows)} for name, rows in deltas.items()
    }
    kinds = sorted({kind for one in by_kind.values() for kind in one}, key=where.in_order)
    own = where.own_name(found)
    maps = [heat_map(deltas[name], name) for name in (own, *parts)]
    if not any(maps):
        return None
    return {
        "reading": where.reading(found["where"], own),
        "deltas": list(deltas),
        "kinds": [(kind, [by_kind[name].get(kind) for name in deltas]) for kind in kinds],
        "maps": [one for one in maps if one],
        "more": len(found["parts"]) - len(parts),
    }


def heat_map(rows: Sequence[where.Row], name: str = "change") -> HeatMap | None:
    """From the rows of one delta in where.json; None if nothing changed."""
    shares = {(row["block"], row["kind"]): row["share"] for row in rows}
    largest = max(shares.values(), default=0.0)
    if not largest > 0.0:
        return None
    kinds = sorted({kind for _, kind in shares}, key=where.in_order)
    lines = []
    for block in dict.fromkeys(row["block"] for row in rows):
        cells = [
            (shares[block, kind], math.ceil(SHADES * shares[block, kind] / largest))
            if (block, kind) in shares
            else None
            for kind in kinds
        ]
        label = "outside" if block is None else str(block)
        lines.append((label, cells, math.fsum(cell[0] for cell in cells if cell)))
    columns = zip(*(cells for _, cells, _ in lines), strict=True)
    totals = [math.fsum(cell[0] for cell in column if cell) for column in columns]
    heaviest = sorted(zip(totals, kinds, strict=True), reverse=True)[:3]
    parts = ", ".join(f"{kind} {percent(share)}" for share, kind in heaviest if share > 0)
    label, _, share = max(lines, key=lambda line: line[2])
    place = "outside the blocks" if label == "outside" else f"in block {label}"
    summary = f"Mostly in {parts}. The largest part, {percent(share)}, lies {place}."
    return HeatMap(name, kinds, lines, totals, summary)


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
        "groups": _grouped(answers(*rows), budget),
        "where": whereabouts(found) if found else None,
        "environment": _read(folder, "environment.json", hashes),
    }


def _grouped(found: Sequence[Answer], budget: int) -> list[Group]:
    """Failures first; as many rows as fit into ``ROWS`` and the budget of bytes."""
    groups, room = [], ROWS
    for title, verdicts in (
        ("Not answered as wanted", ("wrong", "still old")),
        ("Bystanders that moved", ("moved",)),
        ("As wanted", ("right", "same")),
    ):
        members = [answer for answer in found if answer.verdict in verdicts]
        shown: list[tuple[Answer, int]] = []
        for answer, times in Counter(members).items():
            texts = (answer.prompt, answer.before, answer.after, answer.expected)
            budget -= 350 + sum(len(escape(text).encode()) for text in texts)  # 350: the tags
            if budget < 0 or room == 0:
                break
            shown.append((answer, times))
            room -= 1
        if members:
            left_out = len(members) - sum(times for _, times in shown)
            groups.append(Group(title, len(members), left_out, shown))
    return groups


def _read(folder: Path, name: str, hashes: Mapping[str, str | None]) -> Any:
    """The content of a file, checked against its hash in the ledger; None if there is neither."""
    path, known = folder / name, hashes.get(name)
    if known is None and not path.is_file():
        return None
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


# Values as text -----------------------------------------------------------------------------------


def plain(value: Any, limit: int = 2000) -> Any:
    """Foreign text on one line, at most ``limit`` characters, with nothing invisible in it.

    Control and direction-changing characters, lone surrogates and the like are spelled out, as in
    ``[U+202E]``: they neither act nor hide. What is not text, or is markup already, stays as it is.
    """
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    if not value.isprintable():
        value = re.sub(r"\r\n|[\n\r\v\f\x85\u2028\u2029]", " ↵ ", value[: limit + 1])
        value = "".join(map(_visible, value.replace("\t", " ")))
    return value if len(value) <= limit else value[: limit - 1] + "…"


def _visible(character: str) -> str:
    if character in "\u200c\u200d\u00ad":  # joiners, soft hyphen: parts of words in many languages
        return character
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co")
    return f"[U+{ord(character):04X}]" if hidden else character


def tenths(share: float) -> str:
    """A share in percent for a crowded table: ``12.3``, and ``0`` only for nothing at all."""
    return "0" if share == 0 else "<0.1" if share < 0.0005 else f"{100 * share:.1f}"


def number(value: float | None) -> str:
    """A quantity such as a perplexity, in a readable number of digits."""
    return "–" if value is None else f"{value:,.1f}" if value < 1e6 else f"{value:.2e}"


def tiny(value: float | None) -> str:
    """A quantity of any size in two digits: ``1.3e-5``."""
    if value is None:
        return "–"
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits}e{int(power)}" if value else "0"


def two_digits(share: float | None) -> str:
    """``0.00123`` as ``0.12 %``: for shares that are mostly small."""
    if share is None or share >= 1:
        return percent(share)
    return "<0.001\u00a0%" if 0 < share < 1e-5 else f"{100 * share:.2g}\u00a0%"


def settings(method: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """A method's fields as ``--set`` takes them: nested ones dotted, values as JSON."""
    for key, value in method.items():
        if isinstance(value, Mapping):
            yield from settings(value, f"{prefix}{key}.")
        elif prefix or key != "name":  # the name of the method itself stands elsewhere
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield (prefix[:-1] if key == "name" else f"{prefix}{key}"), plain(text, ANSWER)


def security_hash(text: str) -> str:
    """What the page's security policy knows its own style and script by; it allows no others."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()

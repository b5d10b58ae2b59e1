"""The report: one self-contained HTML page that tells what was done to a model and what came of it.

A pure reader of a home's folder: nothing is loaded, asked or measured here, so a report can be made
anywhere and at any time, and the same folder always gives the same page, byte for byte. The look is
in ``report.html.jinja``; this file gathers and judges (with the rules of ``scores``, no others).

What models and files say is foreign text. All of it passes ``plain`` on its way into the page, and
the template escapes it: a hostile answer can only be read. Every file that the ledger holds a hash
of is checked against it first, so the page never shows numbers that were edited afterwards.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import escape

from unwrite.errors import BadSetting, DamagedFile, HomeError
from unwrite.files import (
    read_json,
    read_jsonl,
    readable_size,
    sha256_file,
    speaking_of_disk,
    write_atomically,
)
from unwrite.ledger import Entry, Ledger
from unwrite.scores import ROLES, Row, Score, answer_in, from_json, says

# What keeps the page below 3 MB, whatever is in the home. Left out are always the oldest updates
# and the answers that are as wanted, and the page says how many.
DETAILED = 10  # updates told in full; all others are in the time line
LINES = 300  # of the time line
ROWS = 400  # of one update's knowledge diff
ROW_BYTES = 1_000_000  # of all knowledge diffs together

PROMPT, ANSWER = 300, 200  # characters shown of a question and of an answer
KINDS = "embedding q k v qkv o gate up gate_up down norm head other".split()
SHADES = 9  # steps of the heat map's colour
_ID = re.compile(r"u-[0-9a-f]{8}")  # ids become names of folders: nothing else may
_EMPTY = Score(None, None, 0)


@dataclass(frozen=True)
class Answer:
    """One line of the knowledge diff. ``verdict``: right, wrong, still old; same, moved.

    ``matched`` of ``tokens`` answer tokens are right (bystanders: as before).
    """

    edit: str
    role: str
    prompt: str
    before: str
    now: str
    expected: str
    verdict: str
    matched: int
    tokens: int


@dataclass(frozen=True)
class Group:
    """Answers that belong together in the diff; ``total`` counts those that are left out as well."""

    title: str
    total: int
    answers: Sequence[Answer]


@dataclass(frozen=True)
class HeatMap:
    """Where a change lives: a row for each block, a share of the squared norm for each module kind.

    A cell is None where the model has no tensor. ``shades`` are 0 (untouched) to ``SHADES``.
    """

    kinds: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float | None], float]]
    totals: Sequence[float]
    summary: str
    largest: float

    def shade(self, share: float | None) -> int:
        """The step of colour: 0 for untouched, ``SHADES`` for the largest cell."""
        return math.ceil(SHADES * (share or 0.0) / self.largest)


@dataclass(frozen=True)
class Chapter:
    """One update, as far as its folder tells: what is not recorded is None or empty."""

    entry: Entry
    undone: Entry | None
    scores: Sequence[tuple[str, Score, Score]]
    seconds: Mapping[str, float]
    groups: Sequence[Group]
    heat: HeatMap | None
    environment: Mapping[str, Any] | None


def write_report(home_folder: Path, out: Path | None = None) -> Path:
    """Write the report of a home to ``out`` (default: ``report.html`` in it), whole or not at all.

    Returns the path. Raises ``HomeError`` if the folder is not a home, ``DamagedFile`` if a file in
    it is not what the ledger says, ``BadSetting`` if ``out`` cannot be a report.
    """
    path = home_folder / "report.html" if out is None else out
    if path.is_dir() or not path.parent.is_dir():
        reason = "is a folder" if path.is_dir() else "is in a folder that does not exist"
        raise BadSetting(f"The report cannot be written to {path}: it {reason}. Name a file.")
    inside = path.resolve().is_relative_to(home_folder.resolve())
    if inside and path.suffix not in (".html", ".htm"):
        raise BadSetting(
            f"The report cannot be written to {path}: inside a home it would overwrite the home's "
            "own files. Give it a name that ends in .html."
        )
    page = render(home_folder)
    with speaking_of_disk(f"write the report {path}"):
        write_atomically(path, page)
    return path


def render(home_folder: Path) -> str:
    """The page as text. Holds the observations of one update at a time. Raises like
    ``write_report``."""
    if not (home_folder / "ledger.jsonl").is_file() or not (home_folder / "base.json").is_file():
        raise HomeError(f"{home_folder} is not a model home: it has no ledger.jsonl and base.json.")
    ledger = Ledger.open(home_folder / "ledger.jsonl")
    listed = {"base.json": ledger.entries[0].get("base", {}).get("sha256")}
    base = _read(home_folder, "base.json", listed)
    undone = {entry["of"]: entry for entry in ledger.entries if entry["do"] == "revert"}
    newest = list(reversed(ledger.applied.values()))[:DETAILED]
    budget = ROW_BYTES // max(len(newest), 1)
    chapters = [
        _chapter(home_folder, entry, undone.get(entry["id"]), base, budget) for entry in newest
    ]
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in (percent, number, moment, settings, readable_size, fingerprint):
        environment.filters[name.__name__] = name
    template = resources.files("unwrite").joinpath("report.html.jinja").read_text("utf-8")
    sentence, remarks = verdict(ledger)
    return environment.from_string(template).render(
        name=home_folder.resolve().name,
        base=base,
        verdict=sentence,
        remarks=remarks,
        chapters=chapters,
        older=len(ledger.applied) - len(chapters),
        entries=ledger.entries[-LINES:],
        earlier=max(len(ledger.entries) - LINES, 0),
        undone=undone,
        live=set(ledger.live()),
        head=ledger.entries[-1],
    )


def verdict(ledger: Ledger) -> tuple[str, list[str]]:
    """The whole story in one sentence, and what has to be said so that it is not misread."""
    live, count = ledger.live(), len(ledger.applied)
    updates = f"{count} update{'s' * (count != 1)}"
    if count == 0:
        return "No updates yet: the model is its base, bit for bit.", []
    if not live:
        one = "and it is undone" if count == 1 else "and all are undone"
        return f"{updates}, {one}: the model is its base again, bit for bit.", []
    entries = [ledger.entry(update) for update in live]
    facts = sum(int(entry.get("edits", 0)) for entry in entries)
    clauses = [f"{facts} fact{'s' * (facts != 1)} {'were' if facts != 1 else 'was'} to change"]
    if (right := _pooled(entries, "reliability", "exact")) and (
        tokens := _pooled(entries, "reliability", "token")
    ):
        counted = f"{round(right[0] * right[1])} of {right[1]}"
        verb = "is" if counted.startswith("1 ") else "are"
        clauses.append(
            f"{counted} {verb} answered with the new answer (token {percent(tokens[0])})"
        )
    if same := _pooled(entries, "locality", "exact"):
        clauses.append(f"{percent(same[0])} of bystanders answer as before")
    perplexity = {}  # of every state that was ever measured; a state is the list of its updates
    for update, entry in ledger.applied.items():
        state = tuple(ledger.live(at=update))
        measured = entry.get("perplexity") or {}
        perplexity[state[:-1]] = measured.get("before")
        perplexity[state] = measured.get("after")
    first, last = perplexity.get(()), perplexity.get(tuple(live))
    if first is not None and last is not None:
        clauses.append(f"perplexity {number(first)} → {number(last)}")
    remarks = ["The answers were measured right after each update, on the weights it gave."]
    moved_on = [update for update in live if ledger.live(at=update) != live]
    if moved_on:
        verb = "has" if len(moved_on) == 1 else "have"
        remarks.append(
            f"The model has changed since: {', '.join(moved_on[:5])}"
            f"{' and others' if len(moved_on) > 5 else ''} {verb} not been asked again."
        )
    if last is None:
        remarks.append("The perplexity of the present state has not been measured.")
    sentence = f"{clauses[0]}; {', '.join(clauses[1:3])}" if len(clauses) > 1 else clauses[0]
    sentence += "".join(f"; {clause}" for clause in clauses[3:])
    return f"{updates}, {len(live)} live: {sentence}.", remarks


# From the folder to a chapter ---------------------------------------------------------------------


def _chapter(
    home: Path, entry: Entry, undone: Entry | None, base: Mapping[str, Any], budget: int
) -> Chapter:
    if not _ID.fullmatch(entry["id"]):
        raise DamagedFile(f"The ledger names an update {entry['id']!r}, which is not an id.")
    folder, listed = home / "updates" / entry["id"], entry.get("files", {})
    result = _read(folder, "scores.json", listed) or entry
    tables = [from_json(result.get("scores", {}).get(when, {})) for when in ("before", "after")]
    delta = _read(folder, "delta/delta.json", listed)
    before = _read(folder, "before.jsonl", listed) or []
    after = _read(folder, "after.jsonl", listed) or []
    return Chapter(
        entry=entry,
        undone=undone,
        scores=[(role, *(table.get(role, _EMPTY) for table in tables)) for role in ROLES],
        seconds=result.get("seconds") or {},
        groups=_shown(answers(before, after), budget),
        heat=heat_map(delta["tensors"], base["places"]) if delta else None,
        environment=_read(folder, "environment.json", listed),
    )


def _read(folder: Path, name: str, listed: Mapping[str, str | None]) -> Any:
    """The content of a file, checked against its hash in the ledger; None if there is neither."""
    path, known = folder / name, listed.get(name)
    if known is None and not path.is_file():
        return None
    if not path.is_file() or (known is not None and sha256_file(path) != known):
        reason = "is not as it was written" if path.is_file() else "is missing"
        raise DamagedFile(
            f"{path} {reason}, so no report can be made of it. Put it back from a copy of the home "
            "(unwrite verify lists everything that is damaged)."
        )
    return read_jsonl(path) if path.suffix == ".jsonl" else read_json(path)


def answers(before: Sequence[Row], after: Sequence[Row]) -> list[Answer]:
    """The knowledge diff, in the order of the rows. Raises ``DamagedFile`` where a row has no
    partner.

    Rows of ``old_recall`` ask what ``reliability`` asks already: they only tell the two ways of
    being wrong apart.
    """

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("edit", "role", "prompt", "target"))

    earlier = {key(row): row for row in before}
    if earlier.keys() != {key(row) for row in after}:
        raise DamagedFile("before.jsonl and after.jsonl of an update hold different questions.")
    old = {row["edit"]: row["target"] for row in after if row["role"] == "old_recall"}
    found = []
    for row in after:
        if row["role"] == "old_recall":
            continue
        was, expected = earlier[key(row)], row["target"]
        said, says_now = answer_in(was["text"]), answer_in(row["text"])
        matched = row["matched_tokens"]
        if row["role"] == "locality":
            verdict, expected = "same" if said == says_now else "moved", said
            matched = sum(a == b for a, b in zip(was["predicted"], row["predicted"], strict=True))
        elif says(row["text"], expected):
            verdict = "right"
        else:
            kept = row["role"] != "portability" and says(row["text"], old.get(row["edit"], ""))
            verdict = "still old" if kept else "wrong"
        cut = [plain(said, ANSWER), plain(says_now, ANSWER), plain(expected, ANSWER)]
        question = plain(row["prompt"], PROMPT)
        edit = plain(str(row["edit"]), 60)
        found.append(Answer(edit, row["role"], question, *cut, verdict, matched, row["target_tokens"]))
    return found


def _shown(found: Sequence[Answer], budget: int) -> list[Group]:
    """Failures first, as many rows as fit into the budget of bytes."""
    groups = []
    room = ROWS
    for title, verdicts in (
        ("Not answered as wanted", ("wrong", "still old")),
        ("Bystanders that moved", ("moved",)),
        ("As wanted", ("right", "same")),
    ):
        members = [answer for answer in found if answer.verdict in verdicts]
        shown = []
        for answer in members[:room]:
            text = (answer.edit, answer.prompt, answer.before, answer.now, answer.expected)
            budget -= 350 + sum(len(escape(part).encode()) for part in text)  # 350: the tags
            if budget < 0:
                break
            shown.append(answer)
        room -= len(shown)
        if members:
            groups.append(Group(title, len(members), shown))
    return groups


def heat_map(
    tensors: Mapping[str, Mapping[str, Any]], places: Mapping[str, Mapping[str, Any]]
) -> HeatMap | None:
    """The shares of a change, by block and module kind; None where nothing changed at all."""
    shares: dict[tuple[int | None, str], float] = defaultdict(float)
    shares.update({(place["block"], place["kind"]): 0.0 for place in places.values()})
    for name, facts in tensors.items():
        place = places.get(name, {"block": None, "kind": "other"})
        shares[place["block"], place["kind"]] += float(facts["squared_norm"])
    total = math.fsum(shares.values())
    if not total > 0.0:
        return None
    shares = {place: squared / total for place, squared in shares.items()}
    present = {kind for _, kind in shares}
    kinds = [kind for kind in KINDS if kind in present] + sorted(present.difference(KINDS))
    blocks: list[int | None] = [*sorted({block for block, _ in shares if block is not None})]
    blocks += [None] * any(block is None for block, _ in shares)
    rows = []
    for block in blocks:
        cells = [shares.get((block, kind)) for kind in kinds]
        label = "outside" if block is None else str(block)
        rows.append((label, cells, math.fsum(cell or 0.0 for cell in cells)))
    totals = [math.fsum(row[1][index] or 0.0 for row in rows) for index in range(len(kinds))]
    heaviest = sorted(zip(totals, kinds, strict=True), reverse=True)[:3]
    parts = ", ".join(f"{kind} {percent(share)}" for share, kind in heaviest if share > 0)
    label, _, share = max(rows, key=lambda row: row[2])
    where = "outside the blocks" if label == "outside" else f"in block {label}"
    summary = f"Mostly in {parts}. The largest part, {percent(share)}, lies {where}."
    return HeatMap(kinds, rows, totals, summary, max(shares.values()))


def _pooled(entries: Sequence[Entry], role: str, form: str) -> tuple[float, int] | None:
    """Mean of a score over the probes of several updates, and their number; None without probes."""
    found = [entry.get("scores", {}).get("after", {}).get(role) or {} for entry in entries]
    pairs = [(one[form], one["n"]) for one in found if one.get(form) is not None and one["n"]]
    count = sum(n for _, n in pairs)
    return (math.fsum(mean * n for mean, n in pairs) / count, count) if count else None


# From values to text ------------------------------------------------------------------------------


def plain(value: Any, limit: int = 2000) -> Any:
    """Foreign text on one line, at most ``limit`` characters, with nothing invisible in it.

    Control and direction-changing characters, lone surrogates and the like are spelled out as
    ``[U+202E]``: they neither act nor hide. What is not text, or is markup already, stays as it is.
    """
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    if not value.isprintable():
        lines = re.sub(r"\r\n|[\n\r\v\f\x85\u2028\u2029]", " ↵ ", value[: limit + 1])
        value = "".join(map(_visible, lines.replace("\t", " "))) + value[limit + 1 :]
    return value if len(value) <= limit else value[: limit - 1] + "…"


def _visible(character: str) -> str:
    # The two joiners and the soft hyphen are part of ordinary words in many languages.
    if character in "\u200c\u200d\u00ad":
        return character
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
    return f"[U+{ord(character):04X}]" if hidden else character


def percent(share: float | None) -> str:
    """``0.97`` as ``97 %``, never rounded up to all or down to nothing."""
    if share is None:
        return "–"
    for digits in (0, 1):
        text = f"{100 * share:.{digits}f}"
        if share in (0.0, 1.0) or float(text) not in (0.0, 100.0):
            return f"{text}\u00a0%"
    return "<0.1\u00a0%" if share < 0.5 else ">99.9\u00a0%"


def number(value: float | None) -> str:
    """A quantity such as a perplexity, in a readable number of digits."""
    if value is None:
        return "–"
    return f"{value:,.1f}" if value < 1e6 else f"{value:.2e}"


def moment(time: str) -> str:
    """``2026-11-21T09:40:24Z`` as ``2026-11-21 09:40 UTC``."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(:\d\d)?Z", time)
    return f"{found[1]} {found[2]} UTC" if found else time


def settings(method: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """A method's fields as ``--set`` takes them: nested ones dotted, values as JSON."""
    for key, value in method.items():
        if isinstance(value, Mapping):
            yield from settings(value, f"{prefix}{key}.")
        elif prefix or key != "name":
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{prefix}{key}", plain(text, ANSWER)


def fingerprint(text: str) -> str:
    """The hash by which the page's security policy allows its own style and script, no others."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()

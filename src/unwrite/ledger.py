"""The history of one model: an append-only, hash-chained list of what was done to it.

One JSON object a line. Every line carries the SHA-256 of the line before it (``previous``) and of
itself (``sha256``), so an edited, reordered or damaged line shows, the last one included. A line is
appended by writing the whole file anew and renaming it: readers and crashes see the history with
the line or without it, never a part of it. Anyone can check it with ``jq`` and ``sha256sum``:
``sha256`` is the hash of the line's JSON without that key, as written here (keys in order, no
spaces, UTF-8).

The state of the model is a fold over the lines: base plus the deltas that are applied and not
reverted, in the order in which they were applied.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unwrite.errors import DamagedFile, HomeError
from unwrite.files import sha256_bytes, write_atomically

Entry = dict[str, Any]
START = "0" * 64  # what the first line names as its predecessor


@dataclass(frozen=True)
class Ledger:
    """The entries of a ledger file, checked. A value: ``append`` returns the longer ledger."""

    path: Path
    entries: tuple[Entry, ...]

    @classmethod
    def open(cls, path: Path) -> Ledger:
        """Read and check every line. Raises ``DamagedFile`` naming the first line that is not what
        was written, and what to do."""
        try:
            lines = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            raise HomeError(f"{path.parent} has no {path.name}: it is not a model home.") from None
        if lines.pop() != b"":
            raise _damaged(path, len(lines) + 1, "it does not end with a line break")
        entries: list[Entry] = []
        previous = START
        for number, line in enumerate(lines):
            entry = _parse(path, number + 1, line)
            if entry.get("sha256") != _hash(entry):
                raise _damaged(path, number + 1, "its hash does not match its content")
            if entry.get("previous") != previous or entry.get("n") != number:
                raise _damaged(path, number + 1, "it does not follow the line before it")
            previous = entry["sha256"]
            entries.append(entry)
        if not entries:
            raise _damaged(path, 1, "the ledger is empty")
        _check_fold(path, entries)
        return cls(path, tuple(entries))

    @classmethod
    def create(cls, path: Path, first: Entry) -> Ledger:
        """Begin a ledger with one entry. Raises ``HomeError`` if there is one already."""
        if path.exists():
            raise HomeError(f"{path} exists already; a home is begun only once.")
        return cls(path, ()).append(first)

    @property
    def head(self) -> str:
        """Hash of the last line: it names the whole history."""
        return str(self.entries[-1]["sha256"]) if self.entries else START

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the present state, as it was recorded."""
        last = self.entries[-1]
        return str(last["base"]["fingerprint"] if last["do"] == "init" else last["fingerprint"])

    def append(self, entry: Entry) -> Ledger:
        """Write one more entry durably and return the longer ledger.

        ``n``, ``previous`` and ``sha256`` are filled in. When this returns, the entry survives a
        power cut; until then, the file is as it was. Raises ``HomeError`` where the disk reports an
        error when the entry is there already, and ``OSError`` where it is not.
        """
        entry = {"n": len(self.entries), **entry, "previous": self.head}
        entry["sha256"] = _hash(entry)
        entries = (*self.entries, entry)
        try:
            write_atomically(self.path, "".join(_line(one) + "\n" for one in entries))
        except OSError as error:
            if self.path.is_file() and Ledger.open(self.path).head == entry["sha256"]:
                raise HomeError(
                    f"What was done is in {self.path}, but the disk reported an error afterwards "
                    f"({error.strerror}), so a power cut may still undo it. Check the disk, then "
                    f"run: unwrite verify {self.path.parent}"
                ) from error
            raise
        return Ledger(self.path, entries)

    # ---- the fold ----------------------------------------------------------------------------

    @property
    def applied(self) -> dict[str, Entry]:
        """Every update ever applied, by id, reverted or not."""
        return {entry["id"]: entry for entry in self.entries if entry["do"] == "apply"}

    def live(self, at: str | None = None) -> list[str]:
        """Ids of the updates that make up the state, in the order in which they are added.

        ``at``: the state right after that update was applied; ``"base"``: before all updates.
        Raises ``HomeError`` for an unknown id, listing the known ones.
        """
        if at == "base":
            return []
        if at is not None:
            self.entry(at)
        live: list[str] = []
        for entry in self.entries:
            if entry["do"] == "apply":
                live.append(entry["id"])
                if entry["id"] == at:
                    break
            elif entry["do"] == "revert":
                live.remove(entry["of"])
        return live

    def entry(self, update: str) -> Entry:
        """The line that applied an update. Raises ``HomeError`` for an unknown id."""
        applied = self.applied
        if update not in applied:
            known = ", ".join(applied) or "none yet"
            raise HomeError(f"There is no update {update!r} in this home. Updates: {known}.")
        return applied[update]


def _line(entry: Entry) -> str:
    return json.dumps(entry, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _hash(entry: Entry) -> str:
    content = {key: value for key, value in entry.items() if key != "sha256"}
    return sha256_bytes(_line(content).encode("utf-8"))


def _parse(path: Path, number: int, line: bytes) -> Entry:
    try:
        entry = json.loads(line)
        # A duplicated key or an added space would survive parsing: the line must be what we write.
        same = isinstance(entry, dict) and _line(entry).encode("utf-8") == line
    except (ValueError, RecursionError):  # a not-a-number and half a character cannot be written
        raise _damaged(path, number, "it is not JSON") from None
    if not same:
        raise _damaged(path, number, "it is not as it was written")
    return dict(entry)


def _check_fold(path: Path, entries: Sequence[Entry]) -> None:
    """Refuse lines that are whole but make no history, whoever wrote them."""
    applied: set[str] = set()
    live: set[str] = set()
    for number, entry in enumerate(entries, start=1):
        do = entry.get("do")
        name = entry.get("id" if do == "apply" else "of")
        if (do == "init") != (number == 1) or do not in ("init", "apply", "revert"):
            raise _damaged(path, number, "it is none of init (first of all), apply and revert")
        if do != "init" and not isinstance(name, str):
            raise _damaged(path, number, "it names no update")
        if do == "apply" and name in applied:
            raise _damaged(path, number, "it applies an update for the second time")
        if do == "revert" and name not in live:
            raise _damaged(path, number, "it reverts an update that is not live")
        if do != "init":
            applied.add(str(name))
            live ^= {str(name)}


def _damaged(path: Path, number: int, reason: str) -> DamagedFile:
    return DamagedFile(
        f"{path}, line {number} is damaged: {reason}. Nothing was changed; put back the ledger "
        "from a copy of the home."
    )

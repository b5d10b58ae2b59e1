"""What is kept of one update: its measured result, its files, its line in the ledger."""

from __future__ import annotations

import datetime
import getpass
import json
import math
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from unwrite import scores as scoring
from unwrite.delta import Delta
from unwrite.edits import Edit, write_edits
from unwrite.errors import BadSetting, DamagedFile
from unwrite.files import sha256_bytes, sha256_file, write_json, write_jsonl
from unwrite.ledger import Entry, Ledger
from unwrite.scores import Row, Score, Scores
from unwrite.where import is_measured

_ID = re.compile(r"u-[0-9a-f]{8}")
_FILE = re.compile(r"(?:delta/)?[a-z][a-z0-9-]*\.jsonl?")
REQUIRED = {
    *("edits.jsonl", "before.jsonl", "after.jsonl", "scores.json", "method.json"),
    *("environment.json", "delta/delta.json"),
}
BASE_FACTS = ("name", "fingerprint", "sha256")
DELTA_FACTS = ("tensors", "changed_fraction", "bytes")
SCORE_FACTS = {one.name for one in fields(Score)}
PROTECTION = "protection.json"  # forecast and truth of protected prompts
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy")


@dataclass(frozen=True)
class Update:
    """One update as measured. ``committed`` is false only inside ``RequirementNotMet`` and for
    ``confirm``."""

    id: str
    committed: bool
    method: dict[str, Any]
    edits: int
    before: Scores
    after: Scores
    perplexity: dict[str, float]
    seconds: dict[str, float]
    summary: dict[str, Any]
    fingerprint: str
    folder: Path
    unmet: tuple[str, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)  # what the method says about its delta
    protection: dict[str, Any] | None = None  # forecast and truth of protected prompts

    @property
    def scores(self) -> Scores:
        """The scores of the state after the update."""
        return self.after

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity after divided by perplexity before: the collapse gauge."""
        return self.perplexity["after"] / self.perplexity["before"]

    @property
    def delta(self) -> Delta:
        """The change of weights, read lazily from the home."""
        return Delta.open(self.folder / "delta")

    def as_json(self) -> dict[str, Any]:
        """What ``unwrite update --json`` prints."""
        return {
            "id": self.id,
            "committed": self.committed,
            "method": self.method["name"],
            "settings": self.method,
            "edits": self.edits,
            "seconds": self.seconds,
            "scores": {
                "before": scoring.as_json(self.before),
                "after": scoring.as_json(self.after),
            },
            "perplexity": self.perplexity,
            "delta": self.summary,
            "fingerprint": self.fingerprint,
            "unmet": list(self.unmet),
            "notes": self.notes,
            **({} if self.protection is None else {"protection": self._protection_in_short()}),
        }

    def _protection_in_short(self) -> dict[str, Any]:
        """Forecast and truth without the prompts, which protection.json lists one by one."""
        return {key: value for key, value in (self.protection or {}).items() if key != "prompts"}


@dataclass(frozen=True)
class Undone:
    """What an undo did. ``later`` maps each later live update to the reliability it has now."""

    id: str
    fingerprint: str
    live: tuple[str, ...]
    later: dict[str, Score] = field(default_factory=dict)


def identity(ledger: Ledger, settings: Mapping[str, Any], edits: Sequence[Edit]) -> str:
    """An id for this update in this history. The same work on the same base after the same work has
    the same id, whoever did it and when; no two updates of one history have."""
    past = [
        [entry["do"], entry.get("id") or entry.get("of") or entry["base"]["fingerprint"]]
        for entry in ledger.entries
    ]
    content = [past, settings, [edit.as_dict() for edit in edits]]
    return "u-" + sha256_bytes(json.dumps(content).encode())[:8]


def notes_of(delta: Delta) -> dict[str, Any]:
    """What a method says about its delta, for people and records: ``provenance["notes"]``.

    Raises ``BadSetting`` unless these and ``provenance["parts"]`` are of the form that authors of
    methods agreed to, so that no record holds what cannot be shown.
    """
    notes, parts = (delta.provenance.get(name, {}) for name in ("notes", "parts"))
    try:
        json.dumps([notes, parts], allow_nan=False, ensure_ascii=False).encode()
        kept: dict[str, Any] = json.loads(json.dumps(notes))  # as it will be read again
        sentences = kept.get("sentences", [])
        sound = (
            isinstance(sentences, list)
            and all(isinstance(one, str) for one in sentences)
            and all(is_measured(facts) for part in parts.values() for facts in part.values())
        )
    except (TypeError, ValueError, AttributeError):
        sound = False
    if not sound:
        raise BadSetting(
            "What this method says about its delta cannot be kept: provenance['notes'] must be a "
            "JSON object whose 'sentences' are a list of texts, and provenance['parts'] give the "
            "numbers mean, squared_norm, changed and size of each tensor of each part."
        )
    return kept


def write_files(
    folder: Path,
    edits: Sequence[Edit],
    before: Sequence[Row],
    after: Sequence[Row],
    update: Update,
    where: Mapping[str, Any],
    command: str,
) -> dict[str, str]:
    """Write everything of an update but its delta. Returns the hash of every file, ``delta.json``
    included, which in turn carries the hash of every tensor.

    ``where``: where the change lives, of ``Base.where``. It is kept because its means cannot be had
    without reading the whole delta, and reports never read tensors.
    """
    write_edits(folder / "edits.jsonl", edits)
    write_jsonl(folder / "before.jsonl", [dict(row) for row in before])
    write_jsonl(folder / "after.jsonl", [dict(row) for row in after])
    write_json(folder / "scores.json", update.as_json())
    write_json(folder / "where.json", where)
    write_json(folder / "method.json", update.method)
    write_json(folder / "environment.json", environment(command))
    names = [
        "edits.jsonl",
        "before.jsonl",
        "after.jsonl",
        "scores.json",
        "where.json",
        "method.json",
        "environment.json",
        "delta/delta.json",
    ]
    if update.protection is not None:
        write_json(folder / PROTECTION, update.protection)
        names.append(PROTECTION)
    return {name: sha256_file(folder / name) for name in names}


def init_entry(base_name: str, fingerprint: str, base_sha256: str) -> Entry:
    """The first line of a ledger: which base, and the hash of ``base.json``."""
    base = {"name": base_name, "fingerprint": fingerprint, "sha256": base_sha256}
    return {"do": "init", **_signed(), "base": base}


def apply_entry(update: Update, why: str, files: Mapping[str, str]) -> Entry:
    """The line that commits an update."""
    return {
        "do": "apply",
        "id": update.id,
        **_signed(),
        "why": why,
        "method": update.method,
        "edits": update.edits,
        "scores": {
            "before": scoring.as_json(update.before),
            "after": scoring.as_json(update.after),
        },
        "perplexity": update.perplexity,
        "delta": update.summary,
        "fingerprint": update.fingerprint,
        "files": dict(files),
    }


def revert_entry(update: str, why: str, fingerprint: str) -> Entry:
    """The line that undoes an update."""
    return {"do": "revert", "of": update, **_signed(), "why": why, "fingerprint": fingerprint}


def environment(command: str) -> dict[str, Any]:
    """Where and how an update was made."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "unwrite": metadata.version("unwrite"),
        # A path on the command line may hold bytes that are no text.
        "command": (command or Path(sys.argv[0]).name).encode("utf-8", "backslashreplace").decode(),
    }


def check_entry(entry: Entry, path: Path) -> None:
    """Refuse (``DamagedFile``) a line of the ledger ``path`` that is none of the three above.

    The hash chain says that a line is as it was written, not that a friend wrote it. Ids and names
    of files are parts of paths, so none may lead out of the home.
    """
    try:
        kind = entry["do"]
        sound = all(isinstance(entry[key], str) for key in ("at", "by"))
        if kind == "init":
            sound &= all(isinstance(entry["base"][key], str) for key in BASE_FACTS)
        else:
            sound &= isinstance(entry["fingerprint"], str) and isinstance(entry["why"], str)
        if kind == "apply":
            sound &= (
                _ID.fullmatch(entry["id"]) is not None
                and isinstance(entry["method"]["name"], str)
                and type(entry["edits"]) is int
                and all(set(entry[key]) == {"before", "after"} for key in ("scores", "perplexity"))
                and all(_is_number(value) for value in entry["perplexity"].values())
                and all(_are_scores(entry["scores"][when]) for when in ("before", "after"))
                and isinstance(entry["delta"]["encoding"], str)
                and all(_is_number(entry["delta"][key]) for key in DELTA_FACTS)
                and set(entry["files"]) >= REQUIRED
                and all(_FILE.fullmatch(name) for name in entry["files"])
                and all(isinstance(digest, str) for digest in entry["files"].values())
            )
    except (LookupError, TypeError, AttributeError, OverflowError):  # a number beyond all floats
        sound = False
    if not sound:
        raise DamagedFile(
            f"{path}, line {entry.get('n', 0) + 1} is damaged: it is not what this program writes. "
            "Put back the ledger from a copy of the home."
        )


def _are_scores(scores: Any) -> bool:
    return isinstance(scores, dict) and all(
        set(one) <= SCORE_FACTS
        and {"token", "exact", "n"} <= set(one)
        and all(value is None or _is_number(value) for value in one.values())
        for one in scores.values()
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_text(text: str, name: str) -> None:
    """Refuse (``BadSetting``) text that cannot be written as UTF-8 (broken command-line bytes)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadSetting(f"{name} holds characters that are not valid Unicode.") from None


def _signed() -> dict[str, str]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container user without a name
        user = "unknown"
    return {"at": now.replace("+00:00", "Z"), "by": user, "unwrite": metadata.version("unwrite")}

"""How a delta lies on disk: numbered safetensors files and ``delta.json``.

``delta.json`` is written last and atomically, so its presence means that the delta is complete. It
says of every tensor how it is encoded, in which file it is, how large the change is and the hash of
what is stored; of the whole, the totals and where it came from. Files are read with suspicion: a
delta may come from anywhere.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from unwrite.change import Change
from unwrite.errors import DamagedFile, UnwriteError
from unwrite.files import write_json
from unwrite.tensorfile import (
    TensorFile,
    TensorFileWriter,
    header_room,
    is_plain_name,
    one_ahead,
    tensor_sha256,
)
from unwrite.weights import Progress, listed

FORMAT = "unwrite-delta"
VERSION = 1
DESCRIPTION = "delta.json"
LARGEST_SHARD = 5_000_000_000  # bytes

# What each encoding stores, by suffix to the tensor's name.
STORED = {"dense": ("",), "low-rank": ("a", "b"), "masked": ("bits", "values")}


@dataclass(frozen=True)
class TensorFacts:
    """What a saved delta says of one tensor without reading it."""

    encoding: str
    shape: tuple[int, ...]
    changed: int
    squared_norm: float
    bytes: int

    @property
    def size(self) -> int:
        """Elements of the full tensor."""
        return math.prod(self.shape)

    @classmethod
    def of(cls, change: Change) -> Self:
        """Measure a change (two passes over its stored values)."""
        return cls(change.encoding, change.shape, change.changed, change.squared_norm, change.bytes)


class SavedChanges:
    """The changes in a folder: a validated ``delta.json`` and the open files it speaks of.

    Reads the description and the headers. Raises ``DamagedFile`` unless they are whole and agree.
    ``compared``: see ``Delta.open``.
    """

    def __init__(self, folder: Path, compared: set[str] | None = None) -> None:
        self.folder = folder
        self._compared = compared
        content = _read_description(folder)
        self.provenance: dict[str, Any] = content["provenance"]
        self.facts: dict[str, TensorFacts] = {}
        self._entries: dict[str, dict[str, Any]] = content["tensors"]
        for name, entry in self._entries.items():
            try:
                self.facts[name] = _facts_of(entry)
                sound = (
                    is_plain_name(entry["file"], ".safetensors")
                    and set(entry["sha256"]) == {end for end, _ in _keys(name, entry)}
                    and all(isinstance(digest, str) for digest in entry["sha256"].values())
                )
            except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
                sound = False
            if not sound:
                raise _damaged(folder, f"the entry of {name!r} in {DESCRIPTION} is malformed")
        files = sorted({entry["file"] for entry in self._entries.values()})
        self._files = {file: TensorFile(folder / file) for file in files}
        self._check_headers()

    def change(self, name: str) -> Change:
        """Read one change."""
        entry = self._entries[name]
        file = self._files[entry["file"]]
        try:
            tensors = {end: file.read(key) for end, key in _keys(name, entry)}
            if self._compared is not None and name not in self._compared:
                for end, tensor in tensors.items():
                    self._compare(name, end, tensor_sha256(tensor))
                self._compared.add(name)
            return Change.from_tensors(entry, tensors)
        except ValueError as error:
            raise _damaged(self.folder, f"the tensor {name!r}: {error}") from None

    def verify(self) -> None:
        """Compare every stored tensor with its recorded hash. Holds two tensors."""
        wanted = [
            (name, end, self._files[entry["file"]], key)
            for name, entry in self._entries.items()
            for end, key in _keys(name, entry)
        ]
        with ThreadPoolExecutor(2, thread_name_prefix="hash") as threads:
            found = threads.map(lambda item: tensor_sha256(item[2].read(item[3])), wanted)
            for (name, end, *_), digest in zip(wanted, found, strict=True):
                self._compare(name, end, digest)

    def _compare(self, name: str, end: str, digest: str) -> None:
        if digest != self._entries[name]["sha256"][end]:
            raise _damaged(self.folder, f"the tensor {name!r} is not what was saved")

    def _check_headers(self) -> None:
        """Compare headers and description by building each change without its data."""
        expected: dict[str, set[str]] = {name: set() for name in self._files}
        for name, entry in self._entries.items():
            specs = self._files[entry["file"]].specs
            keys = _keys(name, entry)
            expected[entry["file"]] |= {key for _, key in keys}
            try:
                planned = {
                    end: torch.empty(specs[key].shape, dtype=specs[key].dtype, device="meta")
                    for end, key in keys
                }
                if Change.from_tensors(entry, planned).bytes != entry["bytes"]:
                    raise ValueError("the sizes differ")
            except (ValueError, LookupError) as error:
                raise _damaged(
                    self.folder,
                    f"delta.json and {entry['file']} disagree on the tensor {name!r} ({error})",
                ) from None
        for name, file in self._files.items():
            if extra := sorted(set(file.specs) - expected[name]):
                raise _damaged(
                    self.folder, f"{name} holds {listed(extra)}, which delta.json does not mention"
                )


def save_changes(
    folder: Path,
    changes: Mapping[str, Change],
    provenance: Mapping[str, Any],
    shard_bytes: int,
    on_progress: Progress | None,
    *,
    lasting: bool = True,
) -> None:
    """Write changes into a folder, one at a time; see ``Delta.save``. ``lasting``: see
    ``TensorFileWriter``."""
    if (folder / DESCRIPTION).exists():
        raise UnwriteError(f"{folder} already holds a delta. Name a new folder.")
    json.dumps(provenance, allow_nan=False)  # an error before hours of work, not after
    folder.mkdir(parents=True, exist_ok=True)
    _remove_shards(folder)  # of a run that was cut off
    try:
        entries = _write_shards(folder, changes, shard_bytes, on_progress, lasting)
        description = {
            "format": FORMAT,
            "version": VERSION,
            "provenance": provenance,
            "totals": totals(_facts_of(entry) for entry in entries.values()),
            "tensors": entries,
        }
        write_json(folder / DESCRIPTION, description)
    except BaseException:
        _remove_shards(folder)
        raise


def totals(facts: Iterable[TensorFacts]) -> dict[str, Any]:
    """The fields of a ``DeltaSummary`` that add up."""
    facts = list(facts)
    encodings = {fact.encoding for fact in facts} or {"nothing"}
    return {
        "encoding": encodings.pop() if len(encodings) == 1 else "mixed",
        "tensors": len(facts),
        "parameters": sum(fact.size for fact in facts),
        "changed": sum(fact.changed for fact in facts),
        "bytes": sum(fact.bytes for fact in facts),
        "squared_norm": math.fsum(fact.squared_norm for fact in facts),
    }


def _write_shards(
    folder: Path,
    changes: Mapping[str, Change],
    shard_bytes: int,
    on_progress: Progress | None,
    lasting: bool,
) -> dict[str, dict[str, Any]]:
    """Write the files; return what ``delta.json`` says of each tensor."""

    def measured(name: str) -> tuple[Change, TensorFacts]:
        change = changes[name]
        return change, TensorFacts.of(change)

    entries: dict[str, dict[str, Any]] = {}
    room = header_room(name + end for name in changes for end in (".values", ".bits"))
    with contextlib.ExitStack() as opened:
        file: TensorFileWriter | None = None
        for name, (change, facts) in one_ahead(changes, measured):
            if not math.isfinite(facts.squared_norm):
                raise UnwriteError(
                    f"The change of the tensor {name!r} is not a finite number, so the delta "
                    "was not saved. Train again with a smaller learning rate or strength."
                )
            entry = change.facts()
            stored = dict(_keys(name, entry))
            if file is None or _is_full(file, facts.bytes, stored.values(), shard_bytes):
                opened.close()  # completes the shard before
                number = len({entry["file"] for entry in entries.values()}) + 1
                file = TensorFileWriter(folder / f"{number:05}.safetensors", room, lasting=lasting)
                opened.enter_context(file)
            tensors = change.tensors()
            for end, key in stored.items():
                file.add(key, tensors[end])
            entries[name] = entry | {
                "file": file.path.name,
                "changed": facts.changed,
                "squared_norm": facts.squared_norm,
                "bytes": facts.bytes,
                "sha256": {end: file.hashes[key] for end, key in stored.items()},
            }
            if on_progress is not None:
                on_progress(len(entries), len(changes))
    return entries


def _read_description(folder: Path) -> dict[str, Any]:
    """The contents of ``delta.json``, checked down to, but not into, its entries."""
    try:
        content = json.loads((folder / DESCRIPTION).read_text("utf-8"))
    except OSError:
        raise _damaged(folder, "it has no delta.json, so saving it was never finished") from None
    except (ValueError, RecursionError):
        raise _damaged(folder, "delta.json is not JSON") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _damaged(folder, "delta.json does not describe a delta")
    if content.get("version") != VERSION:
        raise DamagedFile(
            f"The delta in {folder} is of format version {content.get('version')!r}, and this "
            f"program reads version {VERSION}. Use a newer program."
        )
    if not all(isinstance(content.get(part), dict) for part in ("tensors", "provenance")):
        raise _damaged(folder, "delta.json lacks its tensors or its provenance")
    return content


def _facts_of(entry: Mapping[str, Any]) -> TensorFacts:
    """The numbers in an entry of ``delta.json``. ``ValueError`` or the like if they are none."""
    whole = [*entry["shape"], entry["changed"], entry["bytes"]]
    if any(type(number) is not int or number < 0 for number in whole):
        raise ValueError("sizes and counts are whole numbers")
    norm, encoding = entry["squared_norm"], entry["encoding"]
    if not isinstance(norm, (int, float)) or not math.isfinite(norm) or encoding not in STORED:
        raise ValueError("unknown encoding or norm")
    return TensorFacts(encoding, tuple(entry["shape"]), entry["changed"], norm, entry["bytes"])


def _keys(name: str, entry: Mapping[str, Any]) -> list[tuple[str, str]]:
    """``(suffix, name in the file)`` of everything stored for one tensor."""
    return [(end, f"{name}.{end}" if end else name) for end in STORED[entry["encoding"]]]


def _is_full(file: TensorFileWriter, size: int, keys: Iterable[str], shard_bytes: int) -> bool:
    """Whether these tensors belong into a new file: it would be too large, or a name is taken."""
    return (file.bytes > 0 and file.bytes + size > shard_bytes) or any(
        key in file.hashes for key in keys
    )


def _remove_shards(folder: Path) -> None:
    for shard in folder.glob(f"{'[0-9]' * 5}.safetensors"):  # no other file is ours
        shard.unlink()


def _damaged(folder: Path, why: str) -> DamagedFile:
    return DamagedFile(
        f"The delta in {folder} is damaged: {why}. Restore it from a copy, or make it again."
    )

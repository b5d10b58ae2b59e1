"""What a home was made from: which files, which tensors, which bits.

A home does not copy its base. It records the base's files and the hash and norm of every tensor
once (``base.json``), notices when they change, and recomposes every later state from them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch

from unwrite.change import Dense
from unwrite.delta import Delta, compose
from unwrite.errors import DamagedFile, HomeError
from unwrite.files import sha256_file, write_json
from unwrite.model import Skeleton
from unwrite.pretrained import Source, resolve
from unwrite.progress import Advance, Bytes, Reporter, Silent, nobody
from unwrite.tensorfile import tensor_sha256
from unwrite.weights import Weights, fingerprint_of, tensor_hashes
from unwrite.where import located

FORMAT = 1
NAME = "base.json"


@dataclass(frozen=True)
class Base:
    """The recorded identity of a base. ``tensors``: hash by tensor name; ``files``: size, time of
    change and hash by file name; ``aliases``: further names of tied tensors; ``places``: block,
    module kind, size and squared norm of each tensor (homes made by early versions lack the last
    two); ``dtype`` that of the weights."""

    name: str
    kind: Literal["folder", "built-in", "hub"]
    revision: str | None
    folder: str
    dtype: str
    parameters: int
    fingerprint: str
    aliases: dict[str, str]
    places: dict[str, dict[str, Any]]
    files: dict[str, dict[str, Any]]
    tensors: dict[str, str]
    format: int = FORMAT

    @classmethod
    def describe(cls, source: Source, *, trust_remote_code: bool = False) -> Base:
        """Read a base once, whole. Two threads hash and measure: holds two tensors, in fp32.

        Raises ``ModelUnavailable`` if it is not a decoder that can be changed.
        """
        skeleton = Skeleton.of(source, trust_remote_code=trust_remote_code)
        with Weights.from_folder(source.folder) as weights:

            def measure(name: str) -> tuple[str, float | None]:
                tensor = weights[name]
                return tensor_sha256(tensor), _squared_norm(tensor)

            with ThreadPoolExecutor(2, thread_name_prefix="measure") as threads:
                measured = dict(zip(weights, threads.map(measure, weights), strict=True))
            tensors = {name: digest for name, (digest, _) in measured.items()}
            sizes = {name: weights.parameters(name) for name in skeleton.names}
            dtypes = {str(weights.dtype(name)).removeprefix("torch.") for name in skeleton.names}
        anatomy = skeleton.anatomy
        return cls(
            name=source.name,
            kind=source.kind,
            revision=source.revision,
            folder=str(source.folder.resolve()),
            dtype=" and ".join(sorted(dtypes)),
            parameters=sum(sizes.values()),
            fingerprint=fingerprint_of(tensors),
            aliases=skeleton.aliases,
            places={
                file: {
                    "block": anatomy.block_of(name),
                    "kind": anatomy.kind(name),
                    "size": sizes[file],
                    "squared_norm": measured[file][1],
                }
                for file, name in skeleton.names.items()
            },
            files={
                file.name: {
                    "size": file.stat().st_size,
                    "modified": file.stat().st_mtime_ns,
                    "sha256": sha256_file(file),
                }
                for file in sorted(source.folder.iterdir())
                if file.is_file() and _belongs(file.name)
            },
            tensors=tensors,
        )

    @classmethod
    def read(cls, home: Path) -> Base:
        """The base of a home. Raises ``DamagedFile`` when ``base.json`` is not what was written."""
        path = home / NAME
        if not path.is_file():  # a pipe would hold us for ever
            raise HomeError(f"{home} has no {NAME}: it is not a model home.")
        try:
            content = json.loads(path.read_text("utf-8"))
            base = cls(**content)
            base._check_types()
            sound = fingerprint_of(base.tensors) == base.fingerprint
        except (ValueError, TypeError, AttributeError, RecursionError, LookupError):
            raise DamagedFile(f"{path} is damaged. Put it back from a copy of the home.") from None
        if base.format != FORMAT:
            raise HomeError(
                f"{path} is of format {base.format}; this version of Unwrite reads {FORMAT}."
            )
        if not sound:
            raise DamagedFile(f"{path} is damaged: its hashes contradict each other.")
        return base

    def _check_types(self) -> None:
        """``ValueError`` or the like for what ``describe`` would never give: a home may come from
        anywhere."""
        texts = (self.name, self.folder, self.dtype, self.fingerprint)
        sound = (
            all(isinstance(one, str) for one in texts)
            and type(self.parameters) is int
            and self.kind in ("folder", "built-in", "hub")
            and (self.revision is None or isinstance(self.revision, str))
            and all(
                isinstance(one, str) for one in (*self.aliases.values(), *self.tensors.values())
            )
            and all(isinstance(one, dict) for one in self.places.values())
            and all(
                Path(name).name == name
                and type(known["size"]) is int
                and type(known["modified"]) is int
                and isinstance(known["sha256"], str)
                for name, known in self.files.items()
            )
        )
        if not sound or "\0" in self.folder:
            raise ValueError

    def write(self, home: Path) -> str:
        """Write ``base.json``, atomically; returns its hash."""
        write_json(home / NAME, asdict(self))
        return sha256_file(home / NAME)

    def locate(self, progress: Reporter) -> Source:
        """Where the base is now. Raises ``HomeError`` if its files are gone or not the same.

        Sizes and times of change are compared; only a file that differs in them is hashed.
        """
        folder = Path(self.folder)
        if not folder.is_dir():  # the cache was moved or emptied: the name may still lead there
            if self.kind == "folder":
                raise HomeError(
                    f"The base of this home is gone: there is no folder {folder}. Put it back; a "
                    "link to where it is now will do."
                )
            folder = resolve(self.name, on_progress=progress.say).folder
        for name, known in self.files.items():
            file = folder / name
            if not file.is_file():
                raise HomeError(
                    f"The base of this home lost a file: {file} is not there. Put it back."
                )
            status = file.stat()
            same = (status.st_size, status.st_mtime_ns) == (known["size"], known["modified"])
            if not same and sha256_file(file) != known["sha256"]:
                raise HomeError(
                    f"The base of this home changed since the home was made: {file} is different. "
                    "Put the old file back, or make a new home for the changed model."
                )
        return Source(self.name, folder, self.kind, self.revision)

    @property
    def bytes(self) -> int:
        """Size of its files."""
        return sum(known["size"] for known in self.files.values())

    def problems(self, folder: Path, advance: Advance = nobody) -> list[str]:
        """Every file hashed: one sentence for each that is not as it was. ``advance`` hears the
        bytes."""
        found = []
        for name, known in self.files.items():
            if sha256_file(folder / name) != known["sha256"]:
                found.append(
                    f"The base changed: {folder / name} is different from when the home was made."
                )
            advance(known["size"], name)
        return found

    def fingerprint_with(
        self, folder: Path, deltas: Sequence[Delta], progress: Reporter | None = None
    ) -> str:
        """Fingerprint of the state ``base + deltas``: see ``tensors_with``."""
        return fingerprint_of(self.tensors_with(folder, deltas, progress))

    def tensors_with(
        self,
        folder: Path,
        deltas: Sequence[Delta],
        progress: Reporter | None = None,
        known: Mapping[str, str] = MappingProxyType({}),
    ) -> dict[str, str]:
        """Hash of every tensor of the state ``base + deltas``, recomposed one by one where touched;
        hashes that are ``known`` are taken as they are. Two threads compose and hash: holds two
        tensors and what composing them takes."""
        hashes = self.tensors | dict(known)
        changed = {name for delta in deltas for name in delta}
        names = {name: self.changed_as(name) for name in hashes if name not in known}
        touched = [name for name, changes in names.items() if changes in changed]
        if not touched:
            return hashes
        with Weights.from_folder(folder) as weights:
            specs = {name: weights.specs[names[name]] for name in touched}
            state = Weights(specs, lambda name: compose(weights, deltas, names[name]))
            total = Bytes(state.bytes())
            with (progress or Silent()).stage("composing", total) as advance:
                hashes |= tensor_hashes(
                    state, lambda done, _all: advance(specs[touched[done - 1]].bytes, "")
                )
        return hashes

    def changed_as(self, name: str) -> str:
        """The name of a tensor in deltas; a checkpoint may hold a tied one under two names."""
        return self.aliases.get(name, name)

    def where(self, delta: Delta) -> dict[str, Any]:
        """Where a change lives, and where its ``parts`` do: see ``where.located``. Computes the
        delta once, for the means; holds one change."""
        tensors = {
            name: {
                "mean": delta[name].mean_magnitude,
                "squared_norm": facts.squared_norm,
                "changed": facts.changed,
                "size": facts.size,
            }
            for name, facts in delta.facts().items()
        }
        return located(tensors, delta.provenance.get("parts", {}), self.places)


def _squared_norm(tensor: torch.Tensor) -> float | None:
    """In float64. None for what is not of floating-point numbers, or holds one that is none."""
    if not tensor.is_floating_point():
        return None
    squared = Dense(tensor.float()).squared_norm
    return squared if math.isfinite(squared) else None  # infinity is not JSON


def _belongs(name: str) -> bool:
    """Files of a Hugging Face folder that make up the model; not its read-me or other formats."""
    kinds = (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
    return name.endswith(kinds) and name != "complete.json"

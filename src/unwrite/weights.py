"""The tensors of a model, by name, one at a time.

``Weights`` is the one view that everything below a live network takes of a model: a Hugging Face
folder of any size, a single file, or tensors in memory. Names are those of the checkpoint file, so
a tensor that a network uses twice (tied embeddings) is here once. Fingerprints say whether two
sets of weights are the same, bit for bit, without keeping both.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from unwrite.allocator import blocks_stay
from unwrite.errors import DamagedFile, ModelUnavailable, TensorMismatch, UnwriteError
from unwrite.files import write_json
from unwrite.tensorfile import (
    TensorFile,
    TensorFileWriter,
    TensorSpec,
    header_room,
    is_plain_name,
    one_ahead,
    tensor_sha256,
)

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Called after each tensor with the number done and the number of all, for a progress bar.
Progress = Callable[[int, int], None]


class Weights(Mapping[str, torch.Tensor]):
    """Read-only, lazy mapping from tensor name to tensor.

    Shapes, dtypes and sizes are known without reading any data. A tensor is read when its name is
    asked for and is not kept, so a loop over a checkpoint holds one tensor. Do not change a tensor
    in place: it may be the live one (``from_tensors``). Usable as a context manager.
    """

    def __init__(
        self,
        specs: Mapping[str, TensorSpec],
        read: Callable[[str], torch.Tensor],
        *,
        source: str = "weights in memory",
        metadata: Mapping[str, str] | None = None,
        tied: Mapping[str, str] | None = None,
        close: Callable[[], None] | None = None,
    ) -> None:
        self.specs = dict(specs)
        self.source = source  # where they come from, for messages
        self.metadata = dict(metadata or {})
        self.tied = dict(tied or {})  # left-out name -> name of the same tensor
        self._read = read
        self._close = close

    @classmethod
    def from_folder(cls, folder: Path | str) -> Self:
        """The checkpoint in a Hugging Face folder: one safetensors file, or shards with an index.

        Reads headers only. Raises ``ModelUnavailable`` if there is no safetensors checkpoint and
        ``DamagedFile`` if there is one that cannot be trusted.
        """
        blocks_stay()  # a checkpoint is a loop over tensors, and so is a model made of it
        folder = Path(folder)
        if (folder / ONE_FILE).exists():
            return cls.from_file(folder / ONE_FILE)
        if not (folder / INDEX).exists():
            raise _no_checkpoint(folder)
        shard_of = _read_index(folder / INDEX)
        files = {shard: TensorFile(folder / shard) for shard in sorted(set(shard_of.values()))}
        found = {(name, shard) for shard, file in files.items() for name in file.specs}
        if wrong := sorted(set(shard_of.items()) ^ found):
            name, shard = wrong[0]
            place = "is in" if wrong[0] in found else "is not in"
            raise DamagedFile(
                f"{folder / INDEX} and the shards beside it disagree: the tensor {name!r} {place} "
                f"{shard}. Fetch or copy the model again."
            )

        def close() -> None:
            for file in files.values():
                file.close()

        return cls(
            {name: files[shard].specs[name] for name, shard in shard_of.items()},
            lambda name: files[shard_of[name]].read(name),
            source=str(folder),
            metadata=next(iter(files.values())).metadata,
            close=close,
        )

    @classmethod
    def from_file(cls, path: Path | str) -> Self:
        """The tensors of one safetensors file. Raises ``DamagedFile``."""
        file = TensorFile(Path(path))
        source = str(file.path.parent if file.path.name == ONE_FILE else file.path)
        return cls(file.specs, file.read, source=source, metadata=file.metadata, close=file.close)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Self:
        """Tensors in memory, for instance those of a live network; they are not copied.

        Of names that share one tensor (tied weights) the first is kept; ``tied`` lists the others.
        """
        kept: dict[str, torch.Tensor] = {}
        tied: dict[str, str] = {}
        first: dict[tuple[object, ...], str] = {}
        for name, tensor in tensors.items():
            # An empty tensor has no storage to share, so only its name can identify it.
            place = tensor.data_ptr() if tensor.numel() else name
            same = (place, tensor.device, tensor.dtype, tensor.shape, tensor.stride())
            if first.setdefault(same, name) == name:
                kept[name] = tensor.detach()
            else:
                tied[name] = first[same]
        specs = {name: TensorSpec(kept[name].dtype, tuple(kept[name].shape)) for name in kept}
        return cls(specs, kept.__getitem__, tied=tied)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.specs:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self.specs  # Mapping would read the tensor to find out

    # Mapping compares contents, which would read both checkpoints; compare fingerprints instead.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<Weights: {len(self)} tensors, {self.parameters():,} parameters, {self.source}>"

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor; reads no data."""
        return self.specs[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor; reads no data."""
        return self.specs[name].dtype

    def shard(self, name: str) -> str:
        """Name of the file that holds the tensor; empty for tensors in memory."""
        return self.specs[name].shard

    def parameters(self, name: str | None = None) -> int:
        """Number of elements of one tensor, or of all."""
        return sum(self.specs[one].size for one in (self if name is None else [name]))

    def bytes(self, name: str | None = None) -> int:
        """Size of the data of one tensor, or of all."""
        return sum(self.specs[one].bytes for one in (self if name is None else [name]))

    def close(self) -> None:
        """Close the files behind this view now; reading afterwards is an error."""
        if self._close is not None:
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def tensor_hashes(weights: Weights, on_progress: Progress | None = None) -> dict[str, str]:
    """``tensor_sha256`` of every tensor. Two threads read and hash: holds two tensors."""
    hashes: dict[str, str] = {}
    with ThreadPoolExecutor(2, thread_name_prefix="hash") as threads:
        digests = threads.map(lambda name: tensor_sha256(weights[name]), weights)
        for name, digest in zip(weights, digests, strict=True):
            hashes[name] = digest
            if on_progress is not None:
                on_progress(len(hashes), len(weights))
    return hashes


def fingerprint_of(hashes: Mapping[str, str]) -> str:
    """Fingerprint from known tensor hashes: SHA-256 of the sorted lines ``name hash``.

    A state that differs from a known one in a few tensors needs only those hashed again.
    """
    lines = "".join(f"{name} {hashes[name]}\n" for name in sorted(hashes))
    return hashlib.sha256(lines.encode("utf-8")).hexdigest()


def fingerprint(weights: Weights) -> str:
    """One hash of all names, dtypes, shapes and bytes; the files they lie in do not matter."""
    return fingerprint_of(tensor_hashes(weights))


def check_same_tensors(before: Weights, after: Weights) -> None:
    """Refuse (``TensorMismatch``) two sets of weights that differ in names, shapes or dtypes."""
    missing = [name for name in before if name not in after]
    added = [name for name in after if name not in before]
    if missing or added:
        first = "before" if missing else "after"
        raise TensorMismatch(
            f"Before ({before.source}) and after ({after.source}) are not the same model: "
            f"only {first} has {listed(missing or added)}. "
            "Give two checkpoints of one architecture."
        )
    reshaped = [name for name in before if before.shape(name) != after.shape(name)]
    if reshaped:
        grown = all(before.shape(name)[1:] == after.shape(name)[1:] for name in reshaped)
        advice = (
            "did the vocabulary grow? Resize embeddings first, then take the base checkpoint."
            if grown
            else "give two checkpoints of one architecture and size."
        )
        raise TensorMismatch(
            f"{_differ(len(reshaped))} in shape between before and after "
            f"({reshaped[0]}: {before.shape(reshaped[0])} and {after.shape(reshaped[0])}): {advice}"
        )
    recast = [name for name in before if before.dtype(name) != after.dtype(name)]
    if recast:
        dtypes = before.dtype(recast[0]), after.dtype(recast[0])
        raise TensorMismatch(
            f"{_differ(len(recast))} in dtype between before and after "
            f"({recast[0]}: {dtypes[0]} and {dtypes[1]}): the difference would mostly be rounding. "
            f"Save both in {dtypes[0]}."
        )


def save_weights(
    folder: Path | str,
    layout: Weights,
    read: Callable[[str], torch.Tensor] | None = None,
    *,
    on_progress: Progress | None = None,
) -> dict[str, str]:
    """Write the checkpoint of a Hugging Face folder; return the tensor hashes of what was written.

    ``layout`` gives names, dtypes and files: the same shards with an index if there are several,
    one file for tensors from memory. ``read`` gives the tensors (called in a side thread); without
    it, they are those of ``layout``. Streams: holds at most three tensors, and what computing one
    takes. Only weights are written; configuration and tokenizer are the caller's. A folder that
    already holds weights is refused (``UnwriteError``): old and new shards must not mix.
    """
    folder = Path(folder)
    if (folder / ONE_FILE).exists() or (folder / INDEX).exists():
        raise UnwriteError(f"{folder} already holds weights. Name a new folder, or empty this one.")
    folder.mkdir(parents=True, exist_ok=True)
    shards: dict[str, list[str]] = {}
    for name in layout:
        shards.setdefault(layout.shard(name) or ONE_FILE, []).append(name)
    if not shards:
        raise ModelUnavailable(f"There are no tensors to write to {folder}.")
    if len(shards) == 1:
        shards = {ONE_FILE: next(iter(shards.values()))}

    hashes: dict[str, str] = {}
    metadata = layout.metadata or {"format": "pt"}  # transformers refuses files without a format
    for shard, names in shards.items():
        # Falling element size keeps every tensor aligned, whatever dtypes are mixed.
        names.sort(key=lambda name: -layout.dtype(name).itemsize)
        room = header_room(names, metadata)
        with TensorFileWriter(folder / shard, room, metadata=metadata) as file:
            for name, tensor in one_ahead(names, read or layout.__getitem__):
                if (tensor.dtype, tuple(tensor.shape)) != (layout.dtype(name), layout.shape(name)):
                    raise ValueError(f"{name!r} was read in another dtype or shape than laid out")
                file.add(name, tensor)
                if on_progress is not None:
                    on_progress(len(hashes) + len(file.hashes), len(layout))
        hashes |= file.hashes
    if len(shards) > 1:
        weight_map = {name: shard for shard, names in shards.items() for name in names}
        index = {"metadata": {"total_size": layout.bytes()}, "weight_map": weight_map}
        write_json(folder / INDEX, index)
    return hashes


def listed(names: Sequence[str], limit: int = 3) -> str:
    """Names for a message: the first few, then how many more."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more


def _differ(count: int) -> str:
    return "1 tensor differs" if count == 1 else f"{count} tensors differ"


def _no_checkpoint(folder: Path) -> ModelUnavailable:
    if not folder.is_dir():
        return ModelUnavailable(f"{folder} is not a folder. Name the folder of a checkpoint.")
    kinds = Counter(path.suffix for path in folder.iterdir())
    if kinds[".bin"] or kinds[".pt"] or kinds[".pth"] or kinds[".ckpt"]:
        return ModelUnavailable(
            f"{folder} holds its weights only as pickle files, which can run any program when they "
            "are opened and are never read here. Convert them where you trust them: "
            "model.save_pretrained(folder, safe_serialization=True)."
        )
    return ModelUnavailable(
        f"{folder} holds neither {ONE_FILE} nor {INDEX}. Name a folder in Hugging Face layout."
    )


def _read_index(path: Path) -> dict[str, str]:
    try:
        shards = json.loads(path.read_text("utf-8"))["weight_map"]
        if not isinstance(shards, dict) or not shards:
            raise ValueError
    except (ValueError, LookupError, TypeError, RecursionError):
        raise DamagedFile(
            f"{path} is not an index of shards. Fetch or copy the model again."
        ) from None
    for name, shard in shards.items():
        if not is_plain_name(shard, ".safetensors"):
            raise DamagedFile(
                f"{path} puts the tensor {name!r} into {shard!r}, which is not a safetensors file "
                "beside it. Use a checkpoint from a source you trust."
            )
    return shards

"""One safetensors file: read one tensor of it, or write it tensor by tensor.

The format (an 8-byte length, a JSON header, then the bytes of all tensors without gaps) is simple
enough to stream, which the reference library does not do when writing: it wants all tensors at
once. Everything written here opens with that library, and everything it writes opens here.

Large tensors are mapped, each by itself and not with the whole file: a tensor belongs to its
reader alone (writing into it copies pages and never reaches the file), and the memory it takes is
given back as soon as it is dropped, so that a loop over a checkpoint holds one tensor.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import stat
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from unwrite.errors import DamagedFile, ModelUnavailable, UnwriteError
from unwrite.files import sync_folder

CODES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODE_OF = {dtype: code for code, dtype in CODES.items()}

LARGEST_HEADER = 100_000_000  # bytes; the reference library refuses longer ones too
LARGEST_TENSOR = 1 << 56  # elements; beyond that torch cannot even describe an empty one
FLUSH_FROM = 1 << 25  # bytes written before it is worth sending them to the disk
LARGE = 1 << 22  # bytes; a smaller tensor is not worth memory of its own
MAPPED = 1 << 24  # bytes; the same for mapping, which also takes a file descriptor

Result = TypeVar("Result")


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: str = ""  # file name inside the folder; empty for a tensor that lives in memory

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size of the tensor's data."""
        return self.size * self.dtype.itemsize


class TensorFile:
    """A safetensors file open for reading; ``specs`` and ``metadata`` come from its header.

    Raises ``DamagedFile`` if the header is not one (not safetensors, truncated, sizes that do not
    add up). ``read`` may be called from several threads. Holds the header only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Without waiting: a pipe that nobody writes to would hold us for ever.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise DamagedFile(
                f"{path} cannot be opened ({error.strerror}). Fetch or copy it again."
            ) from None
        self._descriptor = descriptor
        self._closed = weakref.finalize(self, os.close, descriptor)
        self._offsets: dict[str, int] = {}
        self.specs: dict[str, TensorSpec] = {}
        self.metadata: dict[str, str] = {}
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor; it belongs to the caller. Raises ``DamagedFile`` if the file shrank."""
        if not self._closed.alive:
            raise ValueError(f"{self.path} was closed before {name!r} was read")
        spec, offset = self.specs[name], self._offsets[name]
        if os.fstat(self._descriptor).st_size < offset + spec.bytes:
            raise self._damaged(f"it was cut off before {name!r} could be read")
        if spec.bytes >= MAPPED and offset % spec.dtype.itemsize == 0:
            with contextlib.suppress(OSError):  # too many mapped already; then it is copied
                return self._map(spec, offset)
        tensor = empty_tensor(spec.shape, spec.dtype)
        room = tensor_bytes(tensor)
        while room:  # the kernel moves at most 2 GB a call
            count = os.preadv(self._descriptor, [room], offset + spec.bytes - len(room))
            if count == 0:
                raise self._damaged(f"it was cut off while {name!r} was read")
            room = room[count:]
        return tensor

    def _map(self, spec: TensorSpec, offset: int) -> torch.Tensor:
        start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        memory = mmap.mmap(
            self._descriptor, offset + spec.bytes - start, access=mmap.ACCESS_COPY, offset=start
        )
        memory.madvise(mmap.MADV_WILLNEED)  # read ahead: all of it is wanted, and soon
        tensor = torch.frombuffer(memory, dtype=spec.dtype, count=spec.size, offset=offset - start)
        return tensor.view(spec.shape)

    def close(self) -> None:
        """Close the file now (it is closed anyway when nobody refers to it)."""
        self._closed()

    def _read_header(self) -> None:
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise self._damaged("it is not a file")
        size = os.fstat(self._descriptor).st_size
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise self._damaged("it is not a safetensors file, or it was cut off")
        try:
            header = json.loads(os.pread(self._descriptor, length, 8).decode("utf-8"))
        except (ValueError, RecursionError):
            raise self._damaged("its header is not JSON") from None
        if not isinstance(header, dict):
            raise self._damaged("its header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise self._damaged("its metadata is not a JSON object")
        self.metadata = {str(key): str(value) for key, value in metadata.items()}

        entries = sorted(
            (self._entry(name, entry) for name, entry in header.items()),
            key=lambda entry: entry[2:],
        )
        position = 0
        for name, spec, start, stop in entries:
            if start != position or stop - start != spec.bytes:
                raise self._damaged(f"the size or the place of the tensor {name!r} is wrong")
            self.specs[name] = spec
            self._offsets[name] = 8 + length + start
            position = stop
        if 8 + length + position != size:
            raise self._damaged(
                f"its header announces {8 + length + position} bytes and it has {size}"
            )

    def _entry(self, name: str, entry: Any) -> tuple[str, TensorSpec, int, int]:
        if (
            not isinstance(entry, dict)
            or any("\ud800" <= letter <= "\udfff" for letter in name)  # half a character
            or not isinstance(entry.get("dtype"), str)
            or not _are_sizes(entry.get("shape"))
            or prod(max(size, 1) for size in entry["shape"]) > LARGEST_TENSOR
            or not _are_sizes(entry.get("data_offsets"))
            or len(entry["data_offsets"]) != 2
        ):
            raise self._damaged(f"the header entry of the tensor {name!r} is malformed")
        if entry["dtype"] not in CODES:
            raise ModelUnavailable(
                f"{self.path} stores the tensor {name!r} in the number format "
                f"{entry['dtype']!r}, which cannot be read. Use a checkpoint in fp32 or bf16."
            )
        spec = TensorSpec(CODES[entry["dtype"]], tuple(entry["shape"]), self.path.name)
        return name, spec, *entry["data_offsets"]

    def _damaged(self, why: str) -> DamagedFile:
        return DamagedFile(f"{self.path} is damaged: {why}. Fetch or copy it again.")


class TensorFileWriter:
    """Write one safetensors file by streaming: ``with TensorFileWriter(path, room) as file: ...``.

    ``add`` tensors one after another; nothing but the header is held. The file gets its name when
    the block ends without an error, whole and flushed to disk; after an error nothing is left.

    ``room`` is the number of bytes kept free for the header, which is only known at the end:
    ``header_room`` gives a number that is always enough. The unused rest is filled with spaces,
    as the format allows. ``hashes`` maps each name to its ``tensor_sha256``. Hashing and flushing
    run in side threads: at the end of a large file little is left to wait for. A file that is not
    ``lasting`` may be lost with the machine, and is not flushed.
    """

    def __init__(
        self,
        path: Path,
        room: int,
        *,
        metadata: Mapping[str, str] | None = None,
        lasting: bool = True,
    ) -> None:
        self.path, self._lasting = path, lasting
        self.hashes: dict[str, str] = {}
        self.bytes = 0  # of tensor data so far
        self._entries: dict[str, dict[str, Any]] = {}
        self._room = (room + 7) // 8 * 8
        self._metadata = dict(metadata or {})
        descriptor, self._temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        self._file.seek(8 + self._room)
        self._beside = ThreadPoolExecutor(2, thread_name_prefix="write")
        self._flushing: Future[None] | None = None
        self._flushed = 0  # bytes of tensor data when flushing last began

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor (copied to the CPU if it lives elsewhere). Holds no copy of it.

        Tensors must come in an order that keeps each aligned to its element size, for instance
        falling element size; otherwise, or if the name was used before, ``ValueError``.
        """
        if name in self._entries or name == "__metadata__":
            raise ValueError(f"the tensor name {name!r} cannot be used (again) in {self.path}")
        if self.bytes % tensor.dtype.itemsize:
            raise ValueError(f"{name!r} would not be aligned: add larger element sizes first")
        tensor = tensor.detach().cpu().contiguous()
        data = tensor_bytes(tensor)
        hashing = self._beside.submit(tensor_sha256, tensor)
        try:
            self._write(data)
        finally:
            digest = hashing.result()  # the caller may change the tensor when this returns
        self.hashes[name] = digest
        self._entries[name] = {
            "dtype": CODE_OF[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.bytes, self.bytes + len(data)],
        }
        self.bytes += len(data)
        self._flush_beside()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._beside.shutdown()
            with self._file:
                if kind is None:
                    self._finish()
            if kind is None:
                os.chmod(self._temporary, 0o644)  # mkstemp makes 0600
                os.replace(self._temporary, self.path)
                sync_folder(self.path.parent)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary)

    def _finish(self) -> None:
        about = {"__metadata__": self._metadata} if self._metadata else {}
        header = json.dumps(about | self._entries, ensure_ascii=False).encode("utf-8")
        if len(header) > self._room:
            raise ValueError(f"the header of {self.path} needs more than {self._room} bytes")
        self._file.seek(0)
        padded = header.ljust(self._room, b" ")
        self._write(memoryview(self._room.to_bytes(8, "little") + padded))
        with _speaking_of_disk(self.path):
            if self._flushing is not None:
                self._flushing.result()
            if self._lasting:
                os.fsync(self._file.fileno())

    def _write(self, data: memoryview) -> None:
        with _speaking_of_disk(self.path):
            while data:  # the kernel moves at most 2 GB a call
                data = data[os.write(self._file.fileno(), data) :]

    def _flush_beside(self) -> None:
        busy = self._flushing is not None and not self._flushing.done()
        if self._lasting and not busy and self.bytes - self._flushed >= FLUSH_FROM:
            if self._flushing is not None:
                with _speaking_of_disk(self.path):
                    self._flushing.result()  # the system reports a failed write only once
            self._flushed = self.bytes
            self._flushing = self._beside.submit(os.fsync, self._file.fileno())


def header_room(names: Iterable[str], metadata: Mapping[str, str] | None = None) -> int:
    """Bytes that the header of a file with these tensors cannot exceed (up to 10 dimensions)."""
    entries = sum(len(json.dumps(name)) + 300 for name in names)
    return entries + len(json.dumps(dict(metadata or {}))) + 64


def empty_tensor(shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised CPU tensor, in huge pages when it is large and the system has them.

    Touching new memory in ordinary 4 KB pages takes longer than reading a cached file or
    subtracting two tensors; with 2 MB pages it vanishes (64 MB filled: 25 ms before, 6 ms after).
    """
    shape = tuple(shape)
    size = prod(shape) * dtype.itemsize
    if size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without huge pages; ordinary ones serve
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without copying them."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def tensor_sha256(tensor: torch.Tensor) -> str:
    """Hexadecimal SHA-256 of a tensor: of a line with its dtype and shape, then of its bytes."""
    tensor = tensor.detach().cpu().contiguous()
    shape = ",".join(str(size) for size in tensor.shape)
    digest = hashlib.sha256(f"{CODE_OF[tensor.dtype]} {shape}\n".encode())
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def one_ahead(names: Iterable[str], read: Callable[[str], Result]) -> Iterator[tuple[str, Result]]:
    """Yield ``(name, read(name))``, reading the next in a side thread while one is being used.

    Holds at most two results besides the one in use; their errors appear where they are due.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        waiting: tuple[str, Future[Result]] | None = None
        for name in names:
            following = (name, reader.submit(read, name))
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def is_plain_name(name: object, suffix: str) -> bool:
    """Whether this is the name of a file right here: nothing that could lead out of the folder."""
    return (
        isinstance(name, str)
        and name.endswith(suffix)
        and not name.startswith(".")
        and name.isprintable()
        and not any(mark in name for mark in ("/", "\\", ":"))
    )


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


@contextlib.contextmanager
def _speaking_of_disk(path: Path) -> Iterator[None]:
    """Turn a full or failing disk into a sentence."""
    try:
        yield
    except OSError as error:
        raise UnwriteError(
            f"Writing {path} failed ({error.strerror}) and nothing of it was kept. "
            "Make room on that disk, or choose another folder, and run this again."
        ) from error

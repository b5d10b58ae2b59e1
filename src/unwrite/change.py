"""What happens to one tensor: ``Dense``, ``LowRank`` or ``Masked``.

Three ways to write down the same thing, an fp32 tensor to be added to the weights. Which one is
declared by whoever made the change, never guessed from its values. All three describe themselves
by ``blocks``, runs of the full fp32 tensor in row-major order, and every sum is made from those;
so a state does not depend on how its changes were encoded, not in the last bit.

Changes are values: arithmetic gives new ones and leaves its operands alone. What arithmetic keeps:
low rank plus low rank stays low rank, masked plus masked stays masked, anything else is dense.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from unwrite.errors import BadSetting, TensorMismatch
from unwrite.tensorfile import empty_tensor

# Elements worked on at a time. Fits the processor's cache, and lies just below the size from which
# torch spreads an operation over all processors: they are busy reading, hashing and writing, and
# threads waiting for each other cost more than they give (measured: up to five times the processor
# time). A multiple of 64, the granularity of masks.
PIECE = 32_704
MATRIX_PIECE = 1 << 20  # the same for products of matrices, which need larger ones to be fast
# The same for masks, whose pieces take several steps each: where two threads work on tensors,
# Python is handed from one to the other at every step, and small pieces are slower than one thread.
MASK_PIECE = 8 * PIECE
MANY = 7  # a share of one in so many flags is many to numpy, which draws the line at a tenth

Block = tuple[slice, torch.Tensor]


class Change(ABC):
    """What is to be added to one tensor. Tensors inside are fp32 (masks: uint8), on any device."""

    encoding: ClassVar[str]

    if TYPE_CHECKING:  # not at run time: Masked has it as a field, which a property would hide

        @property
        def shape(self) -> tuple[int, ...]:
            """Shape of the tensor that is changed."""

    @property
    @abstractmethod
    def changed(self) -> int:
        """Number of elements that move (low rank: all)."""

    @property
    @abstractmethod
    def squared_norm(self) -> float:
        """Sum of squares of the full tensor, in float64 and without building it."""

    @property
    def mean_magnitude(self) -> float:
        """Mean of the absolute values of all elements, in float64; 0 without elements."""
        runs = (values.reshape(-1).cpu().numpy() for _, values in self.blocks())
        total = math.fsum(float(np.abs(run).sum(dtype=np.float64)) for run in runs)
        return total / max(1, math.prod(self.shape))

    @abstractmethod
    def blocks(self) -> Iterator[Block]:
        """The full tensor in consecutive flat runs: ``(slice, fp32 values)``. Holds one run."""

    def add_to(self, flat: torch.Tensor) -> None:
        """Add the full tensor to a flat fp32 one in place; see ``add_into``."""
        for place, values in self.blocks():
            for part, piece in in_step(flat[place], values.to(flat.device)):
                part += piece

    @abstractmethod
    def scaled(self, strength: float) -> Change:
        """The same change, ``strength`` times as strong."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """What is stored, by suffix to the tensor's name; see ``facts`` for the rest."""

    def facts(self) -> dict[str, Any]:
        """What is stored besides ``tensors``, for JSON; ``from_tensors`` takes both."""
        return {"encoding": self.encoding, "shape": list(self.shape)}

    @staticmethod
    def from_tensors(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Change:
        """The change that gave these ``facts`` and ``tensors``. ``ValueError`` if they clash."""
        try:
            shape = tuple(facts["shape"])
            match facts["encoding"]:
                case "dense":
                    change: Change = Dense(tensors[""])
                case "low-rank":
                    change = LowRank(tensors["b"], tensors["a"], float(facts["scale"]))
                case "masked":
                    change = Masked(shape, tensors["bits"], tensors["values"])
                case unknown:
                    raise ValueError(f"unknown encoding {unknown!r}")
        except (LookupError, TypeError) as error:
            raise ValueError(f"missing or malformed: {error}") from None
        if change.shape != shape or set(tensors) != set(change.tensors()):
            raise ValueError("the shape or the stored tensors do not belong to the encoding")
        return change

    @property
    def bytes(self) -> int:
        """Size of what is stored."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def dense(self) -> torch.Tensor:
        """The full tensor in fp32, fresh. Holds one tensor."""
        device = next(iter(self.tensors().values())).device
        full = (
            empty_tensor(self.shape, torch.float32)
            if device.type == "cpu"
            else torch.empty(self.shape, dtype=torch.float32, device=device)
        )
        flat = full.view(-1)
        for place, values in self.blocks():
            for part, piece in in_step(flat[place], values):
                part.copy_(piece)
        return full

    def __add__(self, other: Change) -> Change:
        """The sum of two changes of one tensor. ``TensorMismatch`` if their shapes differ."""
        if not isinstance(other, Change):
            return NotImplemented
        if self.shape != other.shape:
            raise TensorMismatch(
                f"Changes of shapes {self.shape} and {other.shape} cannot be added. "
                "Add changes that were made for the same model."
            )
        if isinstance(self, LowRank) and isinstance(other, LowRank):
            return _add_low_rank(self, other)
        if isinstance(self, Masked) and isinstance(other, Masked):
            return _add_masked(self, other)
        total = self.dense()
        add_into(total, other)
        return Dense(total)

    def __neg__(self) -> Change:
        return self.scaled(-1.0)

    def __sub__(self, other: Change) -> Change:
        return self + -other

    def __mul__(self, strength: float) -> Change:
        return self.scaled(strength)

    __rmul__ = __mul__


@dataclass(frozen=True, eq=False)
class Dense(Change):
    """Every element moves: full fine-tuning."""

    values: torch.Tensor  # fp32, the shape of the tensor

    encoding: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        _require_plain(self.values)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def changed(self) -> int:
        return _count_nonzero(self.values)

    @property
    def squared_norm(self) -> float:
        return _squared_norm(self.values)

    def blocks(self) -> Iterator[Block]:
        yield slice(None), self.values.reshape(-1)

    def scaled(self, strength: float) -> Dense:
        return Dense(_scaled(self.values, strength))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"": self.values}


@dataclass(frozen=True, eq=False)
class LowRank(Change):
    """``scale * b @ a`` of a matrix: LoRA, ROME (rank 1), MEMIT (rank up to the number of edits).

    The product is summed in float64 and rounded once, so that processors whose matrix kernels sum
    in different orders practically always agree on every bit of a composed state.
    """

    b: torch.Tensor  # fp32 (out, rank)
    a: torch.Tensor  # fp32 (rank, in)
    scale: float = 1.0  # for LoRA: alpha / rank

    encoding: ClassVar[str] = "low-rank"

    def __post_init__(self) -> None:
        fits = self.b.dim() == self.a.dim() == 2 and self.b.shape[1] == self.a.shape[0]
        _require(fits, f"factors {tuple(self.b.shape)} and {tuple(self.a.shape)} do not fit")
        _require_plain(self.b)
        _require_plain(self.a)
        _require(math.isfinite(self.scale), "the scale must be a finite number")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """Number of terms; at least the rank of the full matrix."""
        return self.a.shape[0]

    @property
    def changed(self) -> int:
        return math.prod(self.shape)

    @property
    def squared_norm(self) -> float:
        # |b a|^2 = trace((b'b)(a a')), two matrices of rank x rank.
        b, a = self.b.double(), self.a.double()
        return self.scale**2 * float(((b.T @ b) * (a @ a.T)).sum())

    def blocks(self) -> Iterator[Block]:
        rows, columns = self.shape
        step = max(1, MATRIX_PIECE // max(1, columns))
        a = self.a.double()
        for start in range(0, rows, step):
            run = (self.b[start : start + step].double() @ a).mul_(self.scale).float()
            yield slice(start * columns, start * columns + run.numel()), run.view(-1)

    def scaled(self, strength: float) -> LowRank:
        return LowRank(self.b, self.a, self.scale * finite(strength))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"a": self.a, "b": self.b}

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"scale": self.scale}


@dataclass(frozen=True, eq=False)
class Masked(Change):
    """Only some elements move, all others are exactly zero. Made by ``mask``.

    Bits, not indices: they cost an eighth of a byte per element of the tensor whatever is kept,
    never overflow, and the overlap of two changes is one ``&``.
    """

    shape: tuple[int, ...]
    bits: torch.Tensor  # uint8: one bit per element in row-major order, low bit first, then zeros
    values: torch.Tensor  # fp32 (kept,), in row-major order

    encoding: ClassVar[str] = "masked"

    def __post_init__(self) -> None:
        elements = math.prod(self.shape)
        size = _packed_size(elements)
        _require_plain(self.values)
        _require(self.values.dim() == 1, "values must be one row")
        _require(self.bits.dtype == torch.uint8, "bits must be uint8")
        _require(tuple(self.bits.shape) == (size,), f"the mask must have {size} bytes")
        if not self.bits.is_meta:  # only a plan, without data: see ``Delta.open``
            counted = int(np.bitwise_count(_words(self.bits)).sum())
            _require(counted == self.kept, f"{counted} bits are set for {self.kept} values")
            past_end = self.bits[elements // 8 :].cpu().numpy()
            spill = np.unpackbits(past_end, bitorder="little")[elements % 8 :]
            _require(not spill.any(), "bits are set past the end of the tensor")

    @property
    def kept(self) -> int:
        """Number of elements inside the mask."""
        return self.values.shape[0]

    @property
    def changed(self) -> int:
        return _count_nonzero(self.values)

    @property
    def squared_norm(self) -> float:
        return _squared_norm(self.values)

    @property
    def mean_magnitude(self) -> float:
        """As of every change, without the zeros being written out first."""
        total = float(np.abs(self.values.cpu().numpy()).sum(dtype=np.float64))
        return total / max(1, math.prod(self.shape))

    def keep(self) -> torch.Tensor:
        """The mask as a bool tensor of the full shape, on the CPU."""
        flags = np.unpackbits(
            self.bits.cpu().numpy(), count=math.prod(self.shape), bitorder="little"
        )
        return torch.from_numpy(flags).view(torch.bool).view(self.shape)

    def blocks(self) -> Iterator[Block]:
        for place, inside, used in self._runs():
            count = place.stop - place.start
            run = torch.zeros(count, dtype=torch.float32, device=self.values.device)
            where = torch.from_numpy(inside).to(run.device)
            yield place, run.index_copy_(0, where, self.values[used])

    def add_to(self, flat: torch.Tensor) -> None:
        """As of every change, without the zeros being written out first."""
        for place, inside, used in self._runs():
            part, where = flat[place], torch.from_numpy(inside).to(flat.device)
            sums = part.index_select(0, where).add_(self.values[used].to(flat.device))
            part += 0.0  # as outside the mask: it takes the minus sign from a zero
            part.index_copy_(0, where, sums)

    def _runs(self) -> Iterator[tuple[slice, np.ndarray[Any, np.dtype[np.intp]], slice]]:
        """Consecutive flat runs of the full tensor: where each lies, which of its elements are
        inside the mask (rising), and where their values are."""
        size, used = math.prod(self.shape), 0
        packed = self.bits.cpu().numpy()
        # numpy looks for few true flags one after the other and for many without branching, which
        # is faster for few as well. So there are many: behind the run, and cut off again.
        flags = np.empty(MASK_PIECE + MASK_PIECE // MANY, dtype=np.bool_)
        for start in range(0, size, MASK_PIECE):
            count = min(MASK_PIECE, size - start)
            flags[:count] = np.unpackbits(packed[start // 8 :], count=count, bitorder="little")
            flags[count:] = True
            inside = np.flatnonzero(flags)[: count - flags.size]
            yield slice(start, start + count), inside, slice(used, used + inside.size)
            used += inside.size

    def scaled(self, strength: float) -> Masked:
        return Masked(self.shape, self.bits, _scaled(self.values, strength))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"bits": self.bits, "values": self.values}


def mask(values: torch.Tensor, keep: torch.Tensor) -> Masked:
    """The change that moves only the elements where ``keep`` is true, by those of ``values``.

    ``values`` (any float dtype) and ``keep`` (bool) have the shape of the tensor. Holds a byte per
    element besides the result.
    """
    _require(keep.dtype == torch.bool, "keep must be bool")
    _require(keep.shape == values.shape, "keep and values must have the same shape")
    return Masked(tuple(values.shape), _packed(keep), values.detach().masked_select(keep).float())


def add_into(target: torch.Tensor, change: Change) -> None:
    """Add a change to a contiguous fp32 tensor in place. Holds a block besides the change.

    For every encoding this is the same expression, ``target + change.dense()``, bit for bit.
    """
    _require(target.dtype == torch.float32, "the target must be fp32")
    if tuple(target.shape) != change.shape:
        raise TensorMismatch(
            f"A change of shape {change.shape} does not fit a tensor of shape "
            f"{tuple(target.shape)}. Use the model that the change was made for."
        )
    change.add_to(target.view(-1))


def in_step(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Flat pieces of tensors of one size, side by side; tensors not on the CPU come whole.

    Pieces of a contiguous tensor are views: writing into them writes into the tensor.
    """
    size = PIECE if tensors[0].device.type == "cpu" else max(1, tensors[0].numel())
    return zip(*(tensor.reshape(-1).split(size) for tensor in tensors), strict=True)


def _add_low_rank(one: LowRank, two: LowRank) -> LowRank:
    """Concatenate the factors: exact, the rank grows.

    The smaller scale is folded into its ``b``. If both are equal up to sign (or a power of two),
    that is exact too; otherwise it rounds each element of that ``b`` once.
    """
    scale = max(one.scale, two.scale, key=abs)
    b = [part.b * (part.scale / scale) if scale else part.b for part in (one, two)]
    return LowRank(torch.cat(b, dim=1), torch.cat([one.a, two.a]), scale)


def _add_masked(one: Masked, two: Masked) -> Masked:
    keep = one.keep() | two.keep()
    total = one.dense()
    add_into(total, two)
    return mask(total, keep.to(total.device))


def _scaled(values: torch.Tensor, strength: float) -> torch.Tensor:
    strength = finite(strength)
    if values.device.type != "cpu":
        return values * strength
    scaled = empty_tensor(values.shape, torch.float32)
    for part, piece in in_step(scaled, values):
        torch.mul(piece, strength, out=part)
    return scaled


def finite(strength: float) -> float:
    """``strength``, if a change can be scaled by it; ``BadSetting`` otherwise."""
    if not math.isfinite(strength):
        raise BadSetting(f"A change cannot be scaled by {strength}. Use a finite number.")
    return float(strength)


def _squared_norm(values: torch.Tensor) -> float:
    """Sum of squares in float64, without a float64 copy of the values."""
    flat = values.reshape(-1).cpu().numpy()
    return float(np.einsum("i,i->", flat, flat, dtype=np.float64))


def _count_nonzero(values: torch.Tensor) -> int:
    # Comparing first: counting floats directly branches on each, ten times slower on sparse values.
    pieces = values.reshape(-1).cpu().split(PIECE)
    return sum(int(np.count_nonzero(piece.numpy() != 0)) for piece in pieces)


def _packed_size(elements: int) -> int:
    """Bytes of a mask: whole groups of eight bytes, so that what follows in a file is aligned."""
    return (elements + 63) // 64 * 8


def _packed(keep: torch.Tensor) -> torch.Tensor:
    packed = np.packbits(keep.detach().cpu().reshape(-1).numpy(), bitorder="little")
    bits = torch.zeros(_packed_size(keep.numel()), dtype=torch.uint8)
    bits[: packed.size] = torch.from_numpy(packed)
    return bits.to(keep.device)


def _words(bits: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return bits.cpu().contiguous().numpy().view(np.uint64)


def _require_plain(tensor: torch.Tensor) -> None:
    _require(tensor.dtype == torch.float32, "a change must be fp32")
    _require(not tensor.requires_grad, "a change must not be part of a graph: detach it")


def _require(fact: bool, sentence: str) -> None:
    if not fact:
        raise ValueError(sentence)

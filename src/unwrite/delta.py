"""A difference between two sets of weights, tensor by tensor, and the states made of it.

    state = round once ( base + delta 1 + delta 2 + ... )

A ``Delta`` is a lazy mapping from tensor name to ``Change``. Operators build views: ``a - 0.5 * b``
reads nothing until a tensor is asked for, so a 7B difference needs memory for one tensor and not
for seven billion numbers. A name that is absent is a tensor that does not change.

Undo is exact because nothing is ever subtracted: ``compose`` makes a state from the base and the
deltas that are live. Leave one out and you have, bit for bit, the weights without it.

How a delta lies on disk is the business of ``deltafile``.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self, overload

import torch

from unwrite import scratch
from unwrite.change import Change, Dense, add_into, finite, in_step
from unwrite.deltafile import LARGEST_SHARD, SavedChanges, TensorFacts, save_changes, totals
from unwrite.errors import TensorMismatch
from unwrite.files import readable_size
from unwrite.tensorfile import empty_tensor
from unwrite.weights import Progress, Weights, check_same_tensors, listed

SCRATCH = "unwrite-delta"  # see ``Delta.stored``
CHANGEABLE = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class DeltaSummary:
    """A delta in a few numbers."""

    encoding: str  # "dense", "low-rank", "masked", "mixed"; "nothing" without tensors
    tensors: int
    parameters: int  # of the model where it was given, else of the tensors touched
    changed: int  # elements that move
    bytes: int  # as stored
    squared_norm: float
    heaviest: str  # name of the tensor with the largest norm; "" without tensors

    @property
    def changed_fraction(self) -> float:
        """Share of ``parameters`` that move."""
        return self.changed / self.parameters if self.parameters else 0.0

    def as_json(self, parameters: int | None = None) -> dict[str, Any]:
        """All numbers, ``changed_fraction`` among them; ``parameters`` as in ``Delta.summary``."""
        summary = self if parameters is None else replace(self, parameters=parameters)
        return asdict(summary) | {"changed_fraction": summary.changed_fraction}

    def __str__(self) -> str:
        if not self.tensors:
            return "nothing changes"
        plural = "" if self.tensors == 1 else "s"
        return (
            f"{self.encoding}, {self.tensors:,} tensor{plural}, "
            f"{100 * self.changed_fraction:.3g} % of weights, {readable_size(self.bytes)}, "
            f"norm {math.sqrt(self.squared_norm):.3g}, heaviest: {self.heaviest}"
        )


class Delta(Mapping[str, Change]):
    """Lazy mapping *tensor name -> Change*, with where it came from in ``provenance``.

    ``provenance`` is a JSON object; its entries ``base`` (fingerprint) and ``base_name`` say which
    model the delta belongs to, and deltas of different bases cannot be added. A sum keeps the
    entries on which both sides agree.
    """

    def __init__(
        self,
        names: Iterable[str],
        read: Callable[[str], Change],
        provenance: Mapping[str, Any] | None = None,
        *,
        saved: SavedChanges | None = None,
    ) -> None:
        self.names = tuple(dict.fromkeys(names))
        self.provenance = dict(provenance or {})
        self._known = frozenset(self.names)
        self._read = read
        self._saved = saved

    @classmethod
    def from_changes(
        cls, changes: Mapping[str, Change], provenance: Mapping[str, Any] | None = None
    ) -> Self:
        """A delta of changes in memory."""
        changes = dict(changes)
        return cls(changes, changes.__getitem__, provenance)

    @classmethod
    def nothing(cls) -> Self:
        """The delta that changes no tensor."""
        return cls.from_changes({})

    @staticmethod
    def between(
        before: Weights, after: Weights, provenance: Mapping[str, Any] | None = None
    ) -> Delta:
        """What turns ``before`` into ``after``: ``after - before`` in fp32, tensor by tensor.

        Raises ``TensorMismatch`` unless names, shapes and dtypes agree. Tensors of other than
        floating-point numbers must be equal and are left out. Reading one tensor holds an fp32 copy
        of it and both originals.
        """
        check_same_tensors(before, after)
        names = [name for name in before if before.dtype(name).is_floating_point]
        _check_changeable(before, names)
        for name in before:
            if not before.dtype(name).is_floating_point and not before[name].equal(after[name]):
                raise TensorMismatch(
                    f"The tensor {name!r} ({before.dtype(name)}) differs between before and after, "
                    "and only floating-point tensors can be changed. Give a checkpoint in which "
                    "it is the same."
                )
        return _Between(before, after, names, provenance)

    @classmethod
    def open(cls, folder: Path | str, *, compared: set[str] | None = None) -> Self:
        """A saved delta; reads its description and the headers, and a tensor when asked.

        Raises ``DamagedFile`` unless the folder holds a complete delta whose description and files
        agree. The contents are checked by ``verify``; or, with ``compared``, when they are read: a
        tensor whose name is not in this set is compared with its recorded hash and its name added,
        or ``DamagedFile`` raised.
        """
        saved = SavedChanges(Path(folder), compared)
        return cls(saved.facts, saved.change, saved.provenance, saved=saved)

    def __getitem__(self, name: str) -> Change:
        if name not in self._known:
            raise KeyError(name)
        return self._read(name)

    def add_to(self, total: torch.Tensor, name: str, base: Weights) -> None:
        """Add the change of one tensor of ``base`` to a contiguous fp32 sum in place, as
        ``add_into`` does. Raises ``TensorMismatch`` for a change of another shape."""
        add_into(total, _fitting(self, name, base))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._known  # Mapping would compute the change to find out

    # Mapping compares contents, which would compute both deltas in full.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @overload
    def get(self, name: str) -> Change | None: ...
    @overload
    def get(self, name: str, default: Any) -> Any: ...
    def get(self, name: str, default: Any = None) -> Any:
        """The change, or ``default`` where the tensor does not change.

        Unlike ``Mapping.get`` it does not take a ``KeyError`` inside a computation for "unchanged".
        """
        if name in self:
            return self[name]
        return default

    def __repr__(self) -> str:
        return f"<Delta: {len(self)} tensors, base {self.base}>"

    @property
    def base(self) -> str | None:
        """Fingerprint of the weights this delta belongs to, if recorded."""
        return self.provenance.get("base")

    def __add__(self, other: Delta) -> Delta:
        if not isinstance(other, Delta):
            return NotImplemented
        if self.base is not None and other.base is not None and self.base != other.base:
            raise TensorMismatch(
                f"One delta was made for {_model(self.provenance)}, the other for "
                f"{_model(other.provenance)}. Add only deltas of one base."
            )

        def read(name: str) -> Change:
            if name in self and name in other:
                return self[name] + other[name]
            return self[name] if name in self else other[name]

        return Delta((*self.names, *other.names), read, _agreed(self.provenance, other.provenance))

    def __mul__(self, strength: float) -> Delta:
        strength = finite(strength)
        return Delta(self.names, lambda name: self[name].scaled(strength), self.provenance)

    __rmul__ = __mul__

    def __neg__(self) -> Delta:
        return self * -1.0

    def __sub__(self, other: Delta) -> Delta:
        return self + -other

    def in_memory(self) -> Delta:
        """The same delta, computed now and held in memory as a whole."""
        return Delta.from_changes({name: self[name] for name in self}, self.provenance)

    def stored(self) -> Delta:
        """The same delta, computed now into scratch files that live as long as the result.

        A lazy view keeps everything it was made of; storing it lets that go.
        """
        folder, remove = scratch.temporary(SCRATCH)
        try:
            save_changes(folder, self, self.provenance, LARGEST_SHARD, None, lasting=False)
            delta = Delta.open(folder)
        except BaseException:
            remove()
            raise
        # Views made of the delta keep its files in use as long as they need them.
        weakref.finalize(delta._saved, remove)
        return delta

    def save(
        self,
        folder: Path | str,
        *,
        provenance: Mapping[str, Any] | None = None,
        shard_bytes: int = LARGEST_SHARD,
        on_progress: Progress | None = None,
    ) -> Delta:
        """Write the delta into a folder and open it there.

        Streams: holds at most three changes, and what computing one takes. ``provenance`` is added
        to the delta's own. A folder with a complete delta is refused; after an error nothing
        is left. Raises ``UnwriteError`` if a change holds a not-a-number or an infinity.
        """
        origin = self.provenance | dict(provenance or {})
        save_changes(Path(folder), self, origin, shard_bytes, on_progress)
        return Delta.open(folder)

    def facts(self) -> dict[str, TensorFacts]:
        """Encoding, size and norm of every tensor: known for a saved delta, else computed now."""
        if self._saved is not None:
            return dict(self._saved.facts)
        return {name: TensorFacts.of(self[name]) for name in self}

    def summary(self, parameters: int | None = None) -> DeltaSummary:
        """Totals of ``facts``. ``parameters``: size of the model, if it should be the whole."""
        facts = self.facts()
        numbers = totals(facts.values())
        if parameters is not None:
            numbers["parameters"] = parameters
        heaviest = max(facts, key=lambda name: facts[name].squared_norm, default="")
        return DeltaSummary(heaviest=heaviest, **numbers)

    def verify(self) -> None:
        """Read a saved delta in full and compare every tensor with its recorded hash.

        Raises ``DamagedFile`` naming the first tensor that is not what was saved. Holds two.
        """
        if self._saved is None:
            raise ValueError("only a delta that was saved can be verified")
        self._saved.verify()

    def check_base(self, fingerprint: str, name: str) -> None:
        """Refuse (``TensorMismatch``) weights that this delta was not made for.

        ``fingerprint`` and ``name`` are those of the weights at hand.
        """
        if self.base is None:
            raise TensorMismatch(
                f"This delta does not record the base it was made for, so it cannot be trusted "
                f"with {name!r}. Save it again with its base in the provenance."
            )
        if self.base != fingerprint:
            raise TensorMismatch(
                f"This delta was made for {_model(self.provenance)}, but the model is {name!r} "
                f"(fingerprint {fingerprint[:4]}…). "
                "Deltas only fit the base they were computed from."
            )

    def check_fits(self, weights: Weights) -> None:
        """Refuse (``TensorMismatch``) weights that lack a tensor of this delta, or cannot take it.

        Shapes are compared where they are known without computing; ``compose`` checks the others.
        """
        if unknown := [name for name in self if name not in weights]:
            tied = [name for name in unknown if name in weights.tied]
            advice = (
                f"{tied[0]!r} is the same tensor as {weights.tied[tied[0]]!r} there; use that name."
                if tied
                else "Use the model that the delta was made for."
            )
            raise TensorMismatch(
                f"This delta changes tensors that {weights.source} does not have: "
                f"{listed(unknown)}. {advice}"
            )
        for name, facts in (self._saved.facts if self._saved else {}).items():
            if facts.shape != weights.shape(name):
                raise TensorMismatch(
                    f"This delta changes {name!r} in shape {facts.shape}, and in {weights.source} "
                    f"it has shape {weights.shape(name)}. "
                    "Use the model that the delta was made for."
                )
        _check_changeable(weights, self.names)


class _Between(Delta):
    """``after - before``. Multiplied while it is computed: a scaled one holds no second tensor."""

    def __init__(
        self,
        before: Weights,
        after: Weights,
        names: Iterable[str],
        provenance: Mapping[str, Any] | None,
        strengths: tuple[float, ...] = (),
    ) -> None:
        def read(name: str) -> Change:
            return Dense(_difference(before[name], after[name], strengths))

        super().__init__(names, read, provenance)
        self._sides, self._strengths = (before, after), strengths

    def __mul__(self, strength: float) -> Delta:
        # One after the other, and not their product: the same bits as of a scaled tensor.
        strengths = (*self._strengths, finite(strength))
        return _Between(*self._sides, self.names, self.provenance, strengths)

    __rmul__ = __mul__

    def add_to(self, total: torch.Tensor, name: str, base: Weights) -> None:
        """The same bits piece by piece: the difference is never held as a whole."""
        before, after = (weights[name].detach().cpu() for weights in self._sides)
        _check_shape(tuple(after.shape), name, base)
        for piece, start, end in in_step(total, before, after):
            piece += _subtracted(torch.empty_like(piece), start, end, self._strengths)


class Prefix(Delta):
    """Not a change, but what the base and the first changes of a state add up to: fp32, before it
    is rounded. First in a list of deltas, it stands for the base and for them (``compose``)."""


def compose(
    base: Weights, deltas: Sequence[Delta], name: str, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """One tensor of the state ``base + deltas``: summed in fp32, rounded once to the base's dtype
    (or to ``dtype``).

    The sum runs in the order given: ``((base + first) + second) + ...``, each term being the
    full fp32 tensor of a change whatever its encoding. So equal bases and equal lists of live
    deltas give equal bits, and a delta that was left out was never there. A tensor that no delta
    names is the base's own, untouched; one that is named may have its zeros lose their minus sign.

    Raises ``TensorMismatch`` for a change of the wrong shape or of a tensor that is not
    fp32, bf16 or fp16. Holds the fp32 sum, and the base tensor or one change beside it.
    """
    live = [delta for delta in deltas if name in delta]
    tensor = base[name]
    if not live:
        return tensor
    _check_changeable(base, [name])
    dtype = dtype or tensor.dtype
    if isinstance(live[0], Prefix):  # it has the base in it
        tensor = _fitting(live.pop(0), name, base).dense()
    total = _cast(tensor, torch.float32)
    del tensor  # the changes are as large
    for delta in live:
        delta.add_to(total, name, base)
    return total if dtype == torch.float32 else _cast(total, dtype)


def _fitting(delta: Delta, name: str, base: Weights) -> Change:
    """The delta's change of a tensor of ``base``; ``TensorMismatch`` if it is of another shape."""
    change = delta[name]
    _check_shape(change.shape, name, base)
    return change


def _check_shape(shape: tuple[int, ...], name: str, base: Weights) -> None:
    if shape != base.shape(name):
        raise TensorMismatch(
            f"A delta changes {name!r} in shape {shape}, and in {base.source} it has "
            f"shape {base.shape(name)}. Use the model that the delta was made for."
        )


def _difference(
    before: torch.Tensor, after: torch.Tensor, strengths: Sequence[float]
) -> torch.Tensor:
    result = empty_tensor(after.shape, torch.float32)
    for piece, start, end in in_step(result, before.detach().cpu(), after.detach().cpu()):
        _subtracted(piece, start, end, strengths)
    return result


def _subtracted(
    piece: torch.Tensor, start: torch.Tensor, end: torch.Tensor, strengths: Sequence[float]
) -> torch.Tensor:
    """``end - start`` in fp32, times one strength after the other, written into ``piece``."""
    piece.copy_(end).sub_(start.float())
    for strength in strengths:
        piece *= strength
    return piece


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A fresh copy, rounded to nearest even where ``dtype`` is narrower."""
    result = empty_tensor(tensor.shape, dtype)
    for part, piece in in_step(result, tensor.detach().cpu()):
        part.copy_(piece)
    return result


def _check_changeable(weights: Weights, names: Iterable[str]) -> None:
    for name in names:
        if weights.dtype(name) not in CHANGEABLE:
            raise TensorMismatch(
                f"The tensor {name!r} of {weights.source} is {weights.dtype(name)}, which fp32 "
                "arithmetic cannot change exactly. Use a checkpoint in fp32, bf16 or fp16."
            )


def _agreed(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of two provenances that do not contradict each other, for what was made of both."""
    agreed = {key: value for key, value in one.items() if two.get(key) == value}
    # A delta that does not say its base has none to contradict.
    for side, other in ((one, two), (two, one)):
        if "base" in side and "base" not in other:
            agreed |= {key: side[key] for key in ("base", "base_name") if key in side}
    return agreed


def _model(provenance: Mapping[str, Any]) -> str:
    """The base of a delta, for a message."""
    name = repr(provenance["base_name"]) if "base_name" in provenance else "a model"
    return f"{name} (fingerprint {str(provenance.get('base'))[:4]}…)"

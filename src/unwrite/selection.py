"""Which elements of a change are the knowledge: equation 6 of Delicate Fine-Tuning.

Two fine-tunes start from the same weights: one on the old answers, one on the new. What both
learned alike, such as the structure of the sentences, moved elements in the same direction; where
they contradict each other, elements moved in opposite directions. ``select`` drops the former and
keeps, of the latter (the survivors), those whose two values lie furthest apart.

The largest of billions are found exactly, without sorting them and in one pass. A thin sample of
the tensors read so far brackets the score of the last element to keep. Of each tensor, survivors
above the bracket are kept, those inside it are kept in doubt, and at the end the doubtful scores
of all tensors tell the exact threshold. A tensor whose bracket turns out not to contain it is read
once more, with a wider one, until none is left; tensors come in random order, so that those read
stand for those to come and this is rare. To read a ``LowRank`` change means to multiply it out.
"""

from __future__ import annotations

import hashlib
import math
import random
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from unwrite.change import PIECE, Change, Dense, Masked
from unwrite.delta import Delta
from unwrite.errors import BadSetting, TensorMismatch

THREADS = 2  # tensors worked on at the same time
STEP = 2 * PIECE  # elements; numpy, unlike torch, does not spread larger steps over processors
RUN = 8  # elements that are sampled together: half a cache line
SAMPLED = 509  # one run in so many; a prime, so as not to fall into step with rows
GROWTH = 1.2  # of the sample, until the bracket is computed anew
DEVIATIONS = 8.0  # half the width of a bracket, in standard deviations of a sampled rank
CHOICES = {"scope": ("model", "tensor"), "of": ("survivors", "all"), "keep": ("new", "difference")}

Array = np.ndarray[Any, np.dtype[Any]]
Bracket = tuple[float, float]
Map = Callable[[Callable[[str], "_Scan"], Iterable[str]], Iterable["_Scan"]]


@dataclass(frozen=True)
class Selection:
    """What ``select`` kept, and of how much."""

    delta: Delta  # ``Masked`` changes; tensors of which nothing was kept are absent
    parameters: int  # elements compared: of all tensors in either delta
    survivors: int  # elements of opposite signs; without the sign filter, all
    kept: int
    threshold: float  # |new - old| of the last element kept; 0 if there is none


def select(
    old: Delta,
    new: Delta,
    top: float,
    *,
    scope: Literal["model", "tensor"] = "model",
    of: Literal["survivors", "all"] = "survivors",
    keep: Literal["new", "difference"] = "new",
    conflict: bool = True,
    scratch: Path | None = None,
) -> Selection:
    """The part of ``new`` that contradicts ``old`` most: ``f(D_new, D_old, T)``, METHODS 3.1 (6).

    An element survives where ``old`` and ``new`` have strictly opposite signs; a zero in either, or
    a tensor that only one of them has, does not. With ``conflict=False`` every element survives
    (an absent tensor counts as zeros). Of the survivors, those with the largest ``|new - old|`` in
    fp32 are kept: exactly ``round(top * survivors)``, or ``round(top * all elements)`` but no more
    than survive, and one at least if any does. Among equals, the first in the order of the tensors
    in ``new`` (then of those only in ``old``) and in row-major order inside a tensor.

    ``top``: T, a fraction in (0, 1]. ``scope``: count and rank over the whole model, or in every
    tensor by itself. ``of``: what ``top`` is a fraction of. ``keep``: the values of ``new``, or
    ``new - old``. A not-a-number never survives.

    Raises ``BadSetting`` for a setting that does not exist, ``TensorMismatch`` for deltas of
    different bases or shapes. Holds two tensors of each delta and the result (a bit an element and
    4 bytes an element kept); besides, 16 bytes for each survivor in doubt, which are a fraction of
    the kept ones unless almost all scores are equal. With ``scratch``, a folder, the result waits
    in files there, which its delta reads one tensor at a time: they must stay as long as it.
    """
    task = _Task(old, new, top, scope, of, keep, conflict, scratch)
    provenance = (new - old).provenance  # refuses deltas of different bases
    names = tuple(dict.fromkeys((*new.names, *old.names)))
    with ThreadPoolExecutor(THREADS, thread_name_prefix="select") as threads:
        if scope == "model":
            parts = [_select_among(names, task, threads.map)]
        else:
            parts = list(threads.map(lambda name: _select_among([name], task, map), names))
    owner = {name: part.delta for part in parts for name in part.delta}
    return Selection(
        Delta(owner, lambda name: owner[name][name], provenance),
        sum(part.parameters for part in parts),
        sum(part.survivors for part in parts),
        sum(part.kept for part in parts),
        min((part.threshold for part in parts if part.kept), default=0.0),
    )


@dataclass(frozen=True)
class _Task:
    """The arguments of ``select``."""

    old: Delta
    new: Delta
    top: float
    scope: str
    of: str
    keep: str
    conflict: bool
    scratch: Path | None = None

    def __post_init__(self) -> None:
        if not 0 < self.top <= 1:
            raise BadSetting(f"top is a fraction greater than 0 and at most 1, not {self.top}.")
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise BadSetting(f"{name} is {choices[0]!r} or {choices[1]!r}, not {value!r}.")

    def wanted(self, size: int, survivors: int) -> int:
        """How many of ``survivors`` among ``size`` elements are to be kept."""
        whole = survivors if self.of == "survivors" else size
        return min(survivors, max(1, round(self.top * whole)))

    def read(self, name: str) -> tuple[tuple[int, ...], Array, Array]:
        """Shape and flat fp32 values of one tensor in both deltas, zeros where it is absent."""
        old, new = self.old.get(name), self.new.get(name)
        shapes = [change.shape for change in (old, new) if change is not None]
        if shapes[0] != shapes[-1]:
            raise TensorMismatch(
                f"The old change of {name!r} has shape {shapes[0]} and the new one {shapes[1]}. "
                "Compare changes that were made for the same model."
            )
        if self.conflict and len(shapes) == 1:
            old = new = None  # nothing survives, so nothing need be multiplied out
        return shapes[0], _flat(old, shapes[0]), _flat(new, shapes[0])


def _flat(change: Change | None, shape: tuple[int, ...]) -> Array:
    if change is None:
        return np.broadcast_to(np.float32(0), math.prod(shape))
    full = change.values if isinstance(change, Dense) else change.dense()
    return full.reshape(-1).cpu().numpy()


def _select_among(names: Sequence[str], task: _Task, spread: Map) -> Selection:
    """``select`` among the tensors of these names, which ``spread`` may read at the same time."""
    sample = _Sample(task)

    def first(name: str) -> _Scan:
        shape, old, new = task.read(name)
        return _put_away(name, _scan(shape, old, new, sample.add(old, new), task), task)

    def again(name: str) -> _Scan:
        return _put_away(name, _scan(*task.read(name), bracket, task), task)

    order = random.Random(0).sample(names, len(names))
    scans = dict(zip(order, spread(first, order), strict=True))
    parameters = sum(math.prod(scan.shape) for scan in scans.values())
    survivors = sum(scan.survivors for scan in scans.values())
    wanted = task.wanted(parameters, survivors)
    deviations = DEVIATIONS
    threshold = _threshold(scans.values(), wanted)
    while missed := [name for name, scan in scans.items() if not scan.covers(threshold)]:
        deviations *= 2
        bracket = sample.bracket(deviations)
        scans |= zip(missed, spread(again, missed), strict=True)
        threshold = _threshold(scans.values(), wanted)

    spare = wanted - sum(scan.above(threshold) for scan in scans.values())  # for ties
    tied: dict[str, int] = {}
    for name in names:
        scan = scans[name]
        ties = min(spare, int(np.count_nonzero(scan.scores == threshold)))
        spare -= ties
        if scan.above(threshold) + ties:
            tied[name] = ties
    if task.scratch is None:  # a scan is let go as soon as it is made into its change
        chosen = Delta.from_changes({n: scans.pop(n).masked(threshold, tied[n]) for n in tied})
    else:
        chosen = Delta(tied, lambda name: scans[name].masked(threshold, tied[name]))
    return Selection(chosen, parameters, survivors, wanted, threshold)


def _put_away(name: str, scan: _Scan, task: _Task) -> _Scan:
    """The same with its large parts in files, if there is a place for them."""
    folder = task.scratch
    if folder is None:
        return scan
    stem = hashlib.sha256(name.encode("utf-8")).hexdigest()[:32]

    def stored(part: str, kept: _Kept) -> _Kept:
        file = folder / f"{stem}.{part}.npy"
        np.save(file, kept.get())
        return _Kept(kept.size, file)

    return replace(scan, bits=stored("bits", scan.bits), values=stored("values", scan.values))


class _Sample:
    """The scores of a few elements of every tensor read so far."""

    def __init__(self, task: _Task) -> None:
        self._task = task
        self._size = self._used = 0
        self._scores: list[Array] = []
        self._bracket: Bracket = (0.0, math.inf)
        self._lock = threading.Lock()

    @np.errstate(over="ignore", invalid="ignore")
    def add(self, *sides: Array) -> Bracket:
        """Take one more tensor into account. Returns the bracket as far as it is known."""
        runs = sides[0].size // RUN
        old, new = (side[: runs * RUN].reshape(runs, RUN)[::SAMPLED].ravel() for side in sides)
        scores, survives, _ = _Comparison(old.size, self._task.conflict).of(old, new)
        with self._lock:
            self._size += scores.size
            self._scores.append(scores[survives])
            if self._size > GROWTH * self._used:
                self._used = self._size
                self._bracket = self.bracket(DEVIATIONS)
            return self._bracket

    def bracket(self, deviations: float) -> Bracket:
        """Two scores between which that of the last element to keep lies, most probably."""
        scores = np.sort(np.concatenate(self._scores))
        count = len(scores)
        kept = self._task.wanted(self._size, count)
        spread = math.ceil(deviations * (1 + math.sqrt(kept * (1 - kept / max(1, count)))))
        low, high = count - kept - spread, count - kept + spread
        return float(scores[low]) if low >= 0 else 0.0, (
            float(scores[high]) if high < count else math.inf
        )


@dataclass(frozen=True)
class _Kept:
    """An array in memory, or in a file from which it is mapped anew whenever it is asked for: a
    mapping that is held goes on counting what was ever read of it."""

    size: int
    place: Array | Path

    def get(self) -> Array:
        if not isinstance(self.place, Path):
            return self.place
        mode: Literal["c"] | None = "c" if self.size else None
        found: Array = np.load(self.place, mmap_mode=mode, allow_pickle=False)
        return found


@dataclass(frozen=True)
class _Scan:
    """What one tensor showed. Its candidates are the survivors with a score of ``low`` or more."""

    shape: tuple[int, ...]
    low: float
    high: float
    survivors: int
    bits: _Kept  # which elements are candidates, packed as in ``Masked``
    values: _Kept  # of the candidates, in row-major order
    scores: Array  # of the candidates in doubt, which are not above ``high``
    ranks: Array  # their places among the candidates
    places: Array  # their places in the tensor

    def covers(self, threshold: float) -> bool:
        """Whether it is known what lies above the threshold."""
        return self.low <= threshold <= self.high

    @property
    def sure(self) -> int:
        """Number of candidates not in doubt."""
        return self.values.size - len(self.scores)

    def above(self, threshold: float) -> int:
        """Number of candidates with a larger score than this, one that it covers."""
        return self.sure + int(np.count_nonzero(self.scores > threshold))

    def masked(self, threshold: float, ties: int) -> Masked:
        """The candidates above the threshold, and the first ``ties`` of those at it."""
        gone = self.scores < threshold
        gone[np.flatnonzero(self.scores == threshold)[ties:]] = True
        bits, values = self.bits.get(), self.values.get()
        if gone.any():
            stays = np.ones(len(values), np.bool_)
            stays[self.ranks[gone]] = False
            values = values.compress(stays)
            places = self.places[gone]
            bits = np.array(bits)  # asked again, the candidates are still all there
            np.subtract.at(bits, places // 8, np.left_shift(1, places % 8).astype(np.uint8))
        return Masked(self.shape, torch.from_numpy(bits), torch.from_numpy(values))


def _threshold(scans: Iterable[_Scan], wanted: int) -> float:
    """The score of the last element to keep; not a number if that is not among those in doubt."""
    if not wanted:
        return 0.0
    scans = list(scans)
    scores = np.concatenate([scan.scores for scan in scans])
    place = len(scores) - (wanted - sum(scan.sure for scan in scans))
    if not 0 <= place < len(scores):
        return math.nan
    scores.partition(place)
    return float(scores[place])


@np.errstate(over="ignore", invalid="ignore")
def _scan(shape: tuple[int, ...], old: Array, new: Array, bracket: Bracket, task: _Task) -> _Scan:
    """Go through one tensor, step by step."""
    low, high = bracket
    bits = np.zeros((old.size + 63) // 64 * 8, np.uint8)
    places, scores = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    survivors = 0
    comparison = _Comparison(min(old.size, STEP), task.conflict)
    for start in range(0, old.size, STEP):
        stop = start + STEP
        score, survives, flags = comparison.of(old[start:stop], new[start:stop])
        survivors += int(np.count_nonzero(survives))
        survives &= np.greater_equal(score, low, out=flags)
        packed = np.packbits(survives, bitorder="little")
        bits[start // 8 : start // 8 + packed.size] = packed  # steps are multiples of 64
        place = _places(survives)
        scores.append(score.take(place))
        places.append(place + start)
    place, score = np.concatenate(places), np.concatenate(scores)
    values = new.take(place)
    if task.keep == "difference":
        values -= old.take(place)
    index = np.int32 if old.size < 1 << 31 else np.int64
    rank = _places(score <= high)
    doubtful = score.take(rank), rank.astype(index), place.take(rank).astype(index)
    kept = _Kept(bits.size, bits), _Kept(values.size, values)
    return _Scan(shape, low, high, survivors, *kept, *doubtful)


def _places(flags: Array) -> Array:
    """Where ``flags`` are true.

    Numpy branches on each flag if few are true, which costs more than all the rest. They are less
    few among the groups of eight that have any.
    """
    if flags.size % 8 or 10 * np.count_nonzero(flags) > flags.size:
        return flags.nonzero()[0]
    groups = flags.view(np.uint64)
    some = (groups != 0).nonzero()[0]
    inside = groups.take(some).view(np.bool_).nonzero()[0]
    return (some << 3).take(inside >> 3) + (inside & 7)


class _Comparison:
    """Compares up to ``size`` elements at a time, always in the same memory."""

    def __init__(self, size: int, conflict: bool) -> None:
        self._conflict = conflict
        self._floats = np.empty((2, size), np.float32)
        self._flags = np.empty((2, size), np.bool_)

    def of(self, old: Array, new: Array) -> tuple[Array, Array, Array]:
        """``|new - old|``, which elements survive, and room for as many flags; until called again.

        Opposite signs show in the lesser and the greater of the two, which takes fewer steps than
        looking at each, and which their product does not tell: that of small numbers is zero.
        """
        (least, most), (survives, flags) = self._floats[:, : old.size], self._flags[:, : old.size]
        np.minimum(old, new, out=least)
        np.maximum(old, new, out=most)
        np.less(least, 0, out=survives)
        survives &= np.greater(most, 0, out=flags)
        scores = np.subtract(most, least, out=most)
        if not self._conflict:
            np.greater_equal(scores, 0, out=survives)
        return scores, survives, flags

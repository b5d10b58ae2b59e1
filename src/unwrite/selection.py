"""Which elements of a change are the knowledge: equation 6 of Delicate Fine-Tuning.

Two fine-tunes start from the same weights: one on the old answers, one on the new. What both
learned alike, such as the structure of the sentences, moved elements in the same direction; where
they contradict each other, elements moved in opposite directions. ``select`` drops the former and
keeps, of the latter (the survivors), those whose two values lie furthest apart.

The largest of billions are found exactly, without sorting them and in one pass. A thin sample of
the tensors read so far brackets the score of the last element to keep. Of each tensor, survivors
above the bracket are kept, those inside it are kept in doubt, and at the end the doubtful scores
of all tensors tell the exact threshold. A tensor whose bracket turns out not to contain it is read
once more, with a wider bracket, until none is left; tensors come in random order, so that those
read stand for those to come and this hardly happens. To read a ``LowRank`` change means to
multiply it out.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from unwrite.change import PIECE, Change, Dense, Masked, in_step
from unwrite.delta import Delta
from unwrite.errors import BadSetting, TensorMismatch

THREADS = 2  # tensors worked on at the same time
RUN = 8  # elements that are sampled together: half a cache line
SAMPLED = 509  # one run in so many; a prime, so as not to fall into step with rows
DEVIATIONS = 8.0  # half the width of a bracket, in standard deviations of a sampled rank
GROWTH = 1.2  # of the sample, until the bracket is computed anew
CHOICES = {"scope": ("model", "tensor"), "of": ("survivors", "all"), "keep": ("new", "difference")}

Array = np.ndarray[Any, np.dtype[Any]]
Map = Callable[[Callable[[str], "_Scan"], Iterable[str]], Iterable["_Scan"]]


@dataclass(frozen=True)
class Selection:
    """What ``select`` kept, and of how much."""

    delta: Delta  # ``Masked`` changes in memory; tensors of which nothing was kept are absent
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
    different bases or shapes. Holds the result (a bit an element, 4 bytes an element kept), as
    much again at most for what is in doubt, and two tensors of each delta.
    """
    rule = _Rule(top, scope, of, keep, conflict)
    provenance = (new - old).provenance  # refuses deltas of different bases
    names = tuple(dict.fromkeys((*new.names, *old.names)))

    def read(name: str) -> _Pair:
        return _read(old, new, name, conflict)

    with ThreadPoolExecutor(THREADS, thread_name_prefix="select") as threads:
        if scope == "model":
            parts = [_select_among(names, read, rule, threads.map)]
        else:
            parts = list(threads.map(lambda name: _select_among([name], read, rule, map), names))
    return Selection(
        Delta.from_changes(dict(item for part in parts for item in part.delta.items()), provenance),
        sum(part.parameters for part in parts),
        sum(part.survivors for part in parts),
        sum(part.kept for part in parts),
        min((part.threshold for part in parts if part.kept), default=0.0),
    )


@dataclass(frozen=True)
class _Rule:
    """The settings of ``select``."""

    top: float
    scope: str
    of: str
    keep: str
    conflict: bool

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


@dataclass(frozen=True)
class _Pair:
    """One tensor of both deltas: flat, fp32, on the CPU."""

    shape: tuple[int, ...]
    old: torch.Tensor
    new: torch.Tensor


@dataclass(frozen=True)
class _Scan:
    """What reading one tensor showed. Candidates are the survivors that ``low`` does not exclude."""

    shape: tuple[int, ...]
    low: float
    high: float
    survivors: int
    bits: Array  # which elements are candidates, packed as in ``Masked``
    values: Array  # of the candidates, in row-major order
    scores: Array  # of the candidates in doubt, which are not above ``high``
    ranks: Array  # their places among the candidates
    places: Array  # their places in the tensor

    @property
    def sure(self) -> int:
        """Number of candidates above ``high``."""
        return len(self.values) - len(self.scores)

    def above(self, threshold: float) -> int:
        """Number of candidates with a larger score than this, which is inside the bracket."""
        return self.sure + int(np.count_nonzero(self.scores > threshold))


class _Sample:
    """The scores of a few elements of every tensor read so far."""

    def __init__(self, rule: _Rule) -> None:
        self._rule = rule
        self._size = self._used = 0
        self._scores: list[Array] = []
        self._bracket = (0.0, math.inf)
        self._lock = threading.Lock()

    def add(self, pair: _Pair) -> tuple[float, float]:
        """Take one more tensor into account. Returns the bracket as far as it is known."""
        runs = pair.new.numel() // RUN
        old, new = (
            side[: runs * RUN].view(runs, RUN)[::SAMPLED].reshape(-1).numpy()
            for side in (pair.old, pair.new)
        )
        scores, survives, _ = _Comparison(old.size, self._rule.conflict).of(old, new)
        with self._lock:
            self._size += old.size
            self._scores.append(scores[survives])
            if self._size > GROWTH * self._used:
                self._used = self._size
                self._bracket = self.bracket(DEVIATIONS)
            return self._bracket

    def bracket(self, deviations: float) -> tuple[float, float]:
        """Two scores between which that of the last element to keep lies, most probably."""
        scores = np.sort(np.concatenate(self._scores))
        count = len(scores)
        kept = self._rule.wanted(self._size, count)
        spread = math.ceil(deviations * (1 + math.sqrt(kept * (1 - kept / max(1, count)))))
        low, high = count - kept - spread, count - kept + spread
        return float(scores[low]) if low >= 0 else 0.0, (
            float(scores[high]) if high < count else math.inf
        )


def _select_among(
    names: Sequence[str], read: Callable[[str], _Pair], rule: _Rule, spread: Map
) -> Selection:
    """``select`` among the tensors of these names, which ``spread`` may read at the same time."""
    sample = _Sample(rule)

    def first(name: str) -> _Scan:
        pair = read(name)
        return _scan(pair, sample.add(pair), rule)

    def again(name: str) -> _Scan:
        return _scan(read(name), bracket, rule)

    order = random.Random(0).sample(names, len(names))
    scans = dict(zip(order, spread(first, order), strict=True))
    parameters = sum(math.prod(scan.shape) for scan in scans.values())
    survivors = sum(scan.survivors for scan in scans.values())
    wanted = rule.wanted(parameters, survivors)
    deviations = DEVIATIONS
    while missed := _missed(scans, threshold := _threshold(scans.values(), wanted)):
        deviations *= 2
        bracket = sample.bracket(deviations)
        scans |= zip(missed, spread(again, missed), strict=True)

    spare = wanted - sum(scan.above(threshold) for scan in scans.values())  # for ties
    changes = {}
    for name in names:
        scan = scans.pop(name)
        ties = min(spare, np.count_nonzero(scan.scores == threshold))
        spare -= ties
        if scan.above(threshold) + ties:
            changes[name] = _masked(scan, threshold, ties)
    return Selection(Delta.from_changes(changes), parameters, survivors, wanted, threshold)


def _read(old: Delta, new: Delta, name: str, conflict: bool) -> _Pair:
    """One tensor of both; zeros where it is absent from one, or nothing can survive for that."""
    one, two = old.get(name), new.get(name)
    shape = (one if two is None else two).shape
    if one is not None and two is not None and one.shape != two.shape:
        raise TensorMismatch(
            f"The old change of {name!r} has shape {one.shape} and the new one {two.shape}. "
            "Compare changes that were made for the same model."
        )
    if conflict and (one is None or two is None):
        one = two = None
    return _Pair(shape, _flat(one, shape), _flat(two, shape))


def _flat(change: Change | None, shape: tuple[int, ...]) -> torch.Tensor:
    if change is None:
        return torch.zeros(()).expand(math.prod(shape))
    full = change.values if isinstance(change, Dense) else change.dense()
    return full.reshape(-1).cpu()


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
        np.greater(most, 0, out=flags)
        survives &= flags
        with np.errstate(over="ignore", invalid="ignore"):
            scores = np.subtract(most, least, out=most)
        if not self._conflict:
            np.greater_equal(scores, 0, out=survives)
        return scores, survives, flags


def _scan(pair: _Pair, bracket: tuple[float, float], rule: _Rule) -> _Scan:
    low, high = bracket
    size = math.prod(pair.shape)
    bits = np.zeros((size + 63) // 64 * 8, np.uint8)
    values, scores, ranks, places = [], [], [], []
    start = survivors = candidates = 0
    comparison = _Comparison(min(size, PIECE), rule.conflict)
    for old, new in ((o.numpy(), n.numpy()) for o, n in in_step(pair.old, pair.new)):
        score, survives, flags = comparison.of(old, new)
        survivors += int(np.count_nonzero(survives))
        survives &= np.greater_equal(score, low, out=flags)
        packed = np.packbits(survives, bitorder="little")
        bits[start // 8 : start // 8 + packed.size] = packed  # pieces are multiples of 64
        place = np.flatnonzero(survives)
        value, score = new.take(place), score.take(place)
        values.append(value - old.take(place) if rule.keep == "difference" else value)
        doubtful = np.flatnonzero(score <= high)
        scores.append(score.take(doubtful))
        ranks.append(doubtful + candidates)
        places.append(place.take(doubtful) + start)
        start += old.size
        candidates += place.size
    parts = (np.concatenate(part) for part in (values, scores, ranks, places))
    return _Scan(pair.shape, low, high, survivors, bits, *parts)


def _threshold(scans: Collection[_Scan], wanted: int) -> float | None:
    """The score of the last element to keep; ``None`` if it is not among those in doubt."""
    if not wanted:
        return 0.0
    scores = np.concatenate([scan.scores for scan in scans])
    rank = wanted - sum(scan.sure for scan in scans)
    if not 1 <= rank <= len(scores):
        return None
    scores.partition(len(scores) - rank)
    return float(scores[len(scores) - rank])


def _missed(scans: dict[str, _Scan], threshold: float | None) -> list[str]:
    """Tensors of which too little is known to tell what lies above the threshold."""
    return [
        name
        for name, scan in scans.items()
        if threshold is None or not scan.low <= threshold <= scan.high
    ]


def _masked(scan: _Scan, threshold: float, ties: int) -> Masked:
    """The candidates above the threshold, and the first ``ties`` of those at it."""
    stays = scan.scores > threshold
    stays[np.flatnonzero(scan.scores == threshold)[:ties]] = True
    values = np.delete(scan.values, scan.ranks[~stays])
    gone = scan.places[~stays]
    np.subtract.at(scan.bits, gone // 8, np.left_shift(1, gone % 8).astype(np.uint8))
    return Masked(scan.shape, torch.from_numpy(scan.bits), torch.from_numpy(values))

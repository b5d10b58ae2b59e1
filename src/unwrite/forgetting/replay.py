"""Replay: old examples mixed into the training of a new task, those in danger first.

A ``ReplayPolicy`` turns forecast forgetting into a choice of examples, without replacement
(METHODS 5.5; arXiv 2406.14026, section 5). ``Mixture`` is the data set of a training run with the
chosen examples in it, for ``transformers.Trainer`` or a plain ``DataLoader``; ``ReplaySampler``
draws anew in every epoch. What is held out for measuring is never replayed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset, Sampler

from unwrite.errors import BadSetting
from unwrite.forgetting.matrix import Array

Positions = npt.NDArray[np.intp]


@dataclass(frozen=True)
class ReplayPolicy:
    """How endangered examples are preferred, and how many are replayed.

    ``kind``: "uniform"; "softmax", without replacement by exp(score / ``temperature``); or "top",
    the highest scores. Temperature infinity is uniform and 0 is top, exactly. Scores are in the
    units of the matrix (log perplexity). ``ratio``: replayed examples per example of the new task.
    """

    kind: Literal["uniform", "softmax", "top"] = "softmax"
    temperature: float = 0.1
    ratio: float = 1 / 32

    def __post_init__(self) -> None:
        if self.kind not in ("uniform", "softmax", "top"):
            raise BadSetting(f"A policy is uniform, softmax or top, not {self.kind!r}.")
        if not self.temperature >= 0 or not 0 < self.ratio <= 1:
            raise BadSetting(
                f"A policy needs a temperature of at least 0 and a ratio in (0, 1], not "
                f"{self.temperature} and {self.ratio}."
            )

    @classmethod
    def uniform(cls, ratio: float = 1 / 32) -> Self:
        """Every example alike."""
        return cls("uniform", ratio=ratio)

    @classmethod
    def softmax(cls, temperature: float = 0.1, ratio: float = 1 / 32) -> Self:
        """The endangered more often."""
        return cls("softmax", temperature, ratio)

    @classmethod
    def top(cls, ratio: float = 1 / 32) -> Self:
        """The most endangered only."""
        return cls("top", ratio=ratio)

    def count(self, examples: int) -> int:
        """How many examples are replayed beside so many of the new task (published: n m + 1)."""
        return int(examples * self.ratio) + 1

    def probabilities(
        self, scores: npt.ArrayLike, held_out: Collection[int] = (), taken: Collection[int] = ()
    ) -> Array:
        """Chance of each example to be drawn first, (examples,); 0 for ``held_out`` and ``taken``.

        Raises ``BadSetting`` for a score that is not a number, or when nothing may be drawn.
        """
        values, free = _free(scores, held_out, taken)
        chances = np.zeros(len(values))
        if self._is_uniform:
            chances[free] = 1 / len(free)
        elif self._is_top:
            highest = free[values[free] == values[free].max()]
            chances[highest] = 1 / len(highest)
        else:
            raised = np.exp((values[free] - values[free].max()) / self.temperature)
            chances[free] = raised / raised.sum()
        return chances

    def choose(
        self,
        scores: npt.ArrayLike,
        count: int,
        *,
        held_out: Collection[int] = (),
        taken: Collection[int] = (),
        seed: int = 0,
    ) -> Positions:
        """Positions of ``count`` different examples in random order, none of them held out.

        ``scores``: (examples,), larger is more endangered. ``taken``: positions replayed already.
        The same seed gives the same choice. Raises ``BadSetting`` when too few are left.
        """
        values, free = _free(scores, held_out, taken)
        if not 0 <= count <= len(free):
            raise BadSetting(
                f"{count} examples are to be replayed, but only {len(free)} may be: the others are "
                "held out or replayed already. Lower the ratio or add examples."
            )
        random = np.random.default_rng(seed)
        # The largest of score / temperature + Gumbel noise are a draw without replacement by
        # softmax; at the two ends of the temperature one of the terms is all there is.
        noise = random.gumbel(size=len(free))
        keys = values[free]
        if self._is_uniform:
            keys = noise
        elif not self._is_top:
            keys = keys + self.temperature * noise
        chosen = free[np.argsort(-keys, kind="stable")[:count]]
        assert not set(chosen.tolist()) & set(held_out), "a held-out example was about to be seen"
        return cast("Positions", random.permutation(chosen))

    @property
    def _is_uniform(self) -> bool:
        return self.kind == "uniform" or (self.kind == "softmax" and math.isinf(self.temperature))

    @property
    def _is_top(self) -> bool:
        return self.kind == "top" or (self.kind == "softmax" and self.temperature == 0)


class Mixture(Dataset[Any]):
    """A new task with upstream examples in it: one after every 1 / ratio examples of the task.

    ``task`` and ``upstream`` are map-style data sets of the same form of items; ``chosen`` are
    positions in ``upstream``, spread evenly over the task. ``served`` lists the positions replayed
    so far; ``refill`` changes what is still to come, which is how online replay works (with
    ``dataloader_num_workers=0``: worker processes hold copies).
    """

    def __init__(self, task: Any, upstream: Any, chosen: Sequence[int] | Positions) -> None:
        self.task, self.upstream = task, upstream
        self.chosen = [int(position) for position in chosen]
        self.served: list[int] = []
        self._slots = _slots(len(task), len(self.chosen))
        self._open = dict.fromkeys(range(len(self.chosen)))  # slots whose example was not seen yet

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, index: int) -> Any:
        kind, number = self._slots[index]
        if kind == "task":
            return self.task[number]
        position = self.chosen[number]
        if number in self._open:
            del self._open[number]
            self.served.append(position)
        return self.upstream[position]

    @property
    def waiting(self) -> int:
        """How many replay slots have not been read yet."""
        return len(self._open)

    def refill(self, chosen: Sequence[int] | Positions) -> None:
        """Put other examples into the slots that have not been read yet, ``waiting`` of them."""
        if len(chosen) != self.waiting:
            raise BadSetting(f"{len(chosen)} examples were given for {self.waiting} open slots.")
        for number, position in zip(self._open, chosen, strict=True):
            self.chosen[number] = int(position)


class ReplaySampler(Sampler[int]):
    """Indices into ``ConcatDataset([task, upstream])``: every epoch the task in a new random order,
    with ``policy.count(task)`` upstream examples drawn anew and spread evenly.

    ``scores``: (upstream examples,). Until all have had their turn, none is drawn twice.
    """

    def __init__(
        self,
        task_size: int,
        scores: npt.ArrayLike,
        policy: ReplayPolicy,
        *,
        held_out: Collection[int] = (),
        seed: int = 0,
    ) -> None:
        self.task_size, self.policy, self.seed = task_size, policy, seed
        self.scores, free = _free(scores, held_out, ())
        self.held_out = frozenset(held_out)
        self.count = policy.count(task_size)
        if self.count > len(free):
            raise BadSetting(
                f"An epoch replays {self.count} examples, but only {len(free)} may be replayed. "
                "Lower the ratio or add examples."
            )
        self._epoch = 0
        self._taken: set[int] = set()

    def __len__(self) -> int:
        return self.task_size + self.count

    def __iter__(self) -> Iterator[int]:
        seed = int(np.random.SeedSequence([self.seed, self._epoch]).generate_state(1)[0])
        self._epoch += 1
        left = len(self.scores) - len(self.held_out | self._taken)
        if left < self.count:
            self._taken = set()
        chosen = self.policy.choose(
            self.scores, self.count, held_out=self.held_out, taken=self._taken, seed=seed
        )
        self._taken |= set(chosen.tolist())
        order = np.random.default_rng(seed).permutation(self.task_size)
        for kind, number in _slots(self.task_size, self.count):
            yield int(order[number]) if kind == "task" else self.task_size + int(chosen[number])


def _slots(task: int, replayed: int) -> list[tuple[str, int]]:
    """("task", i) and ("replay", k) in turn: replay k after (k + 1) / (replayed + 1) of the task,
    rounded up to whole examples."""
    slots: list[tuple[str, int]] = []
    done = 0
    for index in range(task):
        slots.append(("task", index))
        while done < replayed and (done + 1) * task <= (index + 1) * (replayed + 1):
            slots.append(("replay", done))
            done += 1
    return slots + [("replay", number) for number in range(done, replayed)]


def _free(
    scores: npt.ArrayLike, held_out: Collection[int], taken: Collection[int]
) -> tuple[Array, Positions]:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or np.isnan(values).any():
        raise BadSetting("Replay needs one score for every example, and each a number.")
    out = {int(position) for position in held_out} | {int(position) for position in taken}
    if out and not (min(out) >= 0 and max(out) < len(values)):
        raise BadSetting(f"A held-out position lies outside the {len(values)} examples.")
    free = np.array([p for p in range(len(values)) if p not in out], dtype=np.intp)
    if not len(free):
        raise BadSetting("No example may be replayed: all are held out or replayed already.")
    return values, free

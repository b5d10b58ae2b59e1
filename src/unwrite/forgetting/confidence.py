"""Forgetting confidence: how much a piece of the model's own knowledge stands in a task's way.

    FC(x) = 1/2 sum_i F_i (theta_base,i - alpha g_i(x) - theta*_i)^2

``theta*`` is the optimum of the task, ``F`` the diagonal Fisher information of the task there, and
``g(x)`` the gradient of the loss of the self-generated text ``x`` at the base. One step that learns
``x`` leads to ``theta_base - alpha g(x)``; where that is far from the task's optimum, in
coordinates that matter to the task, ``x`` is to be forgotten (Learning With Forgetting, arXiv
2505.19715; METHODS 4.1). With ``delta = theta* - theta_base``, which is what a fine-tune gives:

    FC(x) = 1/2 <F, delta^2> + alpha <F delta, g(x)> + alpha^2 / 2 <F, g(x)^2>

The first term is the same for all x, the second is a derivative of x's loss along ``F delta``, and
only the third needs the gradient of x itself. No gradient is ever stored.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from unwrite.anatomy import Anatomy
from unwrite.delta import Delta
from unwrite.errors import BadEdits, BadSetting, TensorMismatch
from unwrite.forgetting.per_example import EXAMPLES_PER_BATCH, Gradients, visit_gradients
from unwrite.model import Model
from unwrite.training import Pair

Selection = Literal["top", "bottom", "random", "all"]


@dataclass(frozen=True)
class Confidence:
    """The forgetting confidence of some examples and what it is made of.

    ``first`` and ``second`` (examples, tensors): ``<F delta, g>`` and ``<F, g^2>`` of every tensor,
    fp64 (``second`` is zero after a first-order computation). ``step`` is alpha, ``constant`` the
    term that all examples share, ``losses`` (examples,) the mean negative log-likelihood per answer
    token at the base.
    """

    tensors: tuple[str, ...]
    first: np.ndarray
    second: np.ndarray
    constant: float
    step: float
    losses: np.ndarray

    @property
    def parts(self) -> np.ndarray:
        """What every tensor adds to the confidence, (examples, tensors), the constant left out."""
        return self.step * self.first + self.step**2 / 2 * self.second

    @property
    def values(self) -> np.ndarray:
        """FC(x) of every example, (examples,)."""
        return self.constant + self.parts.sum(axis=1)

    def explain(self, example: int, anatomy: Anatomy) -> list[tuple[int | None, str, float]]:
        """Which layers speak for forgetting one example: block (``None`` outside of the blocks),
        kind of module, and what it adds to the confidence; the largest amount first."""
        sums: dict[tuple[int | None, str], float] = {}
        for name, part in zip(self.tensors, self.parts[example], strict=True):
            place = (anatomy.block_of(name), anatomy.kind(name))
            sums[place] = sums.get(place, 0.0) + float(part)
        rows = [(block, kind, amount) for (block, kind), amount in sums.items()]
        return sorted(rows, key=lambda row: -abs(row[2]))


def forgetting_confidence(
    model: Model,
    examples: Sequence[Pair],
    optimum: Delta,
    fisher: Delta,
    *,
    step: float | Literal["matched"] = "matched",
    order: Literal[1, 2] = 2,
    batch_size: int = EXAMPLES_PER_BATCH,
) -> Confidence:
    """FC of every example at the model's present weights, which are to be the base.

    ``optimum`` is what a fine-tune on the task changes, ``fisher`` the task's Fisher diagonal; a
    tensor takes part when both have it. ``step`` is alpha; "matched" takes the one at which the
    median step of an example is as long as the whole change of the task, so that neither term
    vanishes. ``order=1`` leaves out the third term and costs no gradient of a single example: the
    forward and backward pass with respect to the activations, and one more product a layer.

    Holds ``optimum`` and ``fisher`` in memory (8 bytes a weight) on top of ``visit_gradients``.
    Raises ``TensorMismatch`` for tensors the model lacks, ``BadEdits`` without examples,
    ``BadSetting`` for a step that is not positive, or "matched" with ``order=1``.
    """
    if not examples:
        raise BadEdits("There are no examples to compute the forgetting confidence of.")
    if step != "matched" and not step > 0:
        raise BadSetting(f"The step of the confidence must be greater than 0, not {step}.")
    if step == "matched" and order == 1:
        raise BadSetting("A matched step needs the second order; give a number for the step.")
    for one in (optimum, fisher):
        one.check_fits(model.weights)
    names = [name for name in optimum if name in fisher]
    if not names:
        raise TensorMismatch(
            "The fine-tune and the Fisher information have no tensor in common, so there is no "
            "confidence. Compute both for the same tensors."
        )
    place = {name: number for number, name in enumerate(names)}
    device = model.device
    importance = {name: fisher[name].dense().to(device) for name in names}
    towards: dict[str, torch.Tensor] = {}
    constant = length = 0.0
    for name in names:
        delta = optimum[name].dense().to(device)
        length += float(delta.double().square().sum())
        towards[name] = importance[name] * delta
        constant += float((towards[name].double() * delta).sum()) / 2
    first = torch.zeros((len(examples), len(names)), dtype=torch.float64)
    second = torch.zeros_like(first)
    squares = torch.zeros(len(examples), dtype=torch.float64)

    def visit(name: str, gradients: Gradients, batch: Sequence[int]) -> None:
        column, rows = place[name], list(batch)
        if order == 1:
            first[rows, column] = gradients.first_products(towards[name]).cpu()
            return
        one, two, three = gradients.products(towards[name], importance[name])
        first[rows, column], second[rows, column] = one.cpu(), two.cpu()
        squares[rows] += three.cpu()

    sequences = [model.tokens(pair.prompt, pair.answer) for pair in examples]
    losses = visit_gradients(
        model,
        sequences,
        visit,
        tensors=place.__contains__,
        batch_size=batch_size,
        title="forgetting confidence",
    )
    if step == "matched":
        norm = float(squares.sqrt().median())
        step = math.sqrt(length) / norm if norm > 0 and length > 0 else 1.0
    return Confidence(
        tuple(names), first.numpy(), second.numpy(), constant, float(step), np.array(losses)
    )


def select(
    values: Sequence[float] | np.ndarray, how: Selection, count: int, seed: int = 0
) -> list[int]:
    """Indices of the examples to forget: the ``count`` with the highest or lowest confidence, as
    many at random, or all. Ties go to the earlier example; the order is that of the selection.

    Raises ``BadSetting`` for another ``how`` or a negative count.
    """
    if count < 0:
        raise BadSetting(f"The number of examples to forget cannot be {count}.")
    indices = range(len(values))
    if how == "all":
        return list(indices)
    if how == "top":
        return sorted(indices, key=lambda index: -values[index])[:count]
    if how == "bottom":
        return sorted(indices, key=lambda index: values[index])[:count]
    if how == "random":
        return random.Random(seed).sample(indices, min(count, len(values)))
    raise BadSetting(f"Examples are selected top, bottom, random or all, not {how!r}.")

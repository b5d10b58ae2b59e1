"""Products in bf16 over fp32 weights, without casting all of them in every step.

Under autocast a step reads every fp32 weight to write a bf16 copy of it, and turns every bf16
gradient into an fp32 one before the norm of all is known. On a processor, where a step of a few
rows is bound by what it moves, that takes as long as the products save (docs/notes/training.md).

Here the copies stay from step to step, and gradients stay bf16 until the optimiser comes to their
weights: it takes a few tensors at a time, whose fp32 gradients the processor's cache holds. The
numbers are autocast's: operands of a product are rounded to bf16, and so is what comes out; weights
and moments are fp32. What lies between the products, attention too, is fp32 (autocast has part of
it in bf16).
"""

from __future__ import annotations

import contextlib
import math
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from unwrite import optimizers, products
from unwrite.optimizers import OptimizerName

AT_ONCE = 1 << 21  # elements whose gradients are made fp32 together: 8 MB


class Halves:
    """bf16 copies of the weights of a network's linear layers (2 bytes a weight, and as much for
    their gradients), the head excepted: a tied one is the table of tokens as well, and it sees few
    positions."""

    def __init__(self, network: Any) -> None:
        head = network.get_output_embeddings()
        self._layers = [one for one in _linear_layers(network) if one is not head]
        self.of: dict[torch.Tensor, torch.nn.Parameter] = {}
        for layer in self._layers:
            weight = layer.weight
            if weight not in self.of:
                copy = weight.detach().to(torch.bfloat16)
                self.of[weight] = torch.nn.Parameter(copy, requires_grad=weight.requires_grad)

    @staticmethod
    def suit(network: Any) -> bool:
        """Whether all products with weights of a network are those of linear layers in fp32; GPT-2
        has another kind, and mixtures of experts keep theirs together."""
        tables = [one for one in network.modules() if isinstance(one, torch.nn.Embedding)]
        known = {one.weight for one in (*tables, *_linear_layers(network))}
        return all(one.ndim < 2 or one in known for one in network.parameters())

    @contextlib.contextmanager
    def multiplying(self) -> Iterator[None]:
        """Within the block, the layers multiply by the copies, whose gradients a backward pass
        fills instead of the weights'."""
        for layer in self._layers:
            # In front of the class's own, which stays.
            vars(layer)["forward"] = partial(_forward, layer, self.of[layer.weight])
        try:
            yield
        finally:
            for layer in self._layers:
                del vars(layer)["forward"]

    @torch.no_grad()
    def follow(self, weights: Iterable[torch.nn.Parameter]) -> None:
        """Bring the copies of these weights to where the weights are."""
        for weight in weights:
            if weight in self.of:
                self.of[weight].copy_(weight)


def _linear_layers(network: Any) -> list[torch.nn.Linear]:
    return [
        one
        for one in network.modules()
        if type(one) in (torch.nn.Linear, products.Linear) and one.weight.dtype == torch.float32
    ]


def _forward(layer: torch.nn.Linear, copy: torch.nn.Parameter, input: torch.Tensor) -> torch.Tensor:
    product = torch.nn.functional.linear(input.to(torch.bfloat16), copy).float()
    return product if layer.bias is None else product + layer.bias


class Optimizer:
    """Clips and steps as an optimiser of all parameters does, a few tensors at a time. Each of
    ``groups`` is clipped by its own norm. Raises as ``optimizers.check`` does."""

    def __init__(
        self,
        halves: Halves,
        name: OptimizerName,
        groups: Sequence[Iterable[torch.nn.Parameter]],
        lr: float,
        max_norm: float,
    ) -> None:
        self.max_norm = max_norm
        room = torch.empty(AT_ONCE)
        self._groups = [
            [_Bunch(bunch, halves, name, lr, room) for bunch in _bunches(group, halves)]
            for group in groups
        ]

    @property
    def state(self) -> Mapping[torch.Tensor, Mapping[str, Any]]:
        """What is kept of each parameter, as in ``torch.optim.Optimizer``."""
        return ChainMap(*(one.optimizer.state for group in self._groups for one in group))

    @torch.no_grad()
    def step(self) -> None:
        """One step on the gradients that are there, which are gone afterwards."""
        for group in self._groups:
            norm = math.sqrt(sum(bunch.squared_norm() for bunch in group))
            factor = min(1.0, self.max_norm / (norm + 1e-6))  # as torch's ``clip_grad_norm_``
            for bunch in group:
                bunch.step(factor)


class _Bunch:
    """Parameters that are stepped together, and where those with copies get fp32 gradients:
    ``room`` is every bunch's, one after the other."""

    def __init__(
        self,
        weights: Sequence[torch.nn.Parameter],
        halves: Halves,
        name: OptimizerName,
        lr: float,
        room: torch.Tensor,
    ) -> None:
        self.optimizer = optimizers.build(name, [weights], lr)
        copies = [(one, halves.of[one]) for one in weights if one in halves.of]
        sizes = [one.numel() for one, _ in copies]
        self._room = room[: sum(sizes)] if sum(sizes) <= len(room) else torch.empty(sum(sizes))
        self._copied = [
            (weight, copy, part.view_as(weight))
            for (weight, copy), part in zip(copies, self._room.split(sizes), strict=True)
        ]
        self._others = [one for one in weights if one not in halves.of]

    def squared_norm(self) -> float:
        """Of the gradients that are there."""
        self._bring()
        return sum(
            float(torch.dot(one, one)) for one in (self._room, *map(torch.flatten, self._own()))
        )

    def step(self, factor: float) -> None:
        """Step on the gradients times ``factor``."""
        self._bring()
        if factor < 1:
            for one in (self._room, *self._own()):
                one.mul_(factor)
        for weight, copy, room in self._copied:
            if copy.grad is not None or weight.grad is not None:
                weight.grad, copy.grad = room, None
        self.optimizer.step()
        self.optimizer.zero_grad()
        for weight, copy, _ in self._copied:
            copy.copy_(weight)

    def _bring(self) -> None:
        """The gradients of weights with copies in fp32, zeros where there are none. A weight has
        one of its own where something else than its layer reads it, as adapters are read."""
        for weight, copy, room in self._copied:
            room.zero_() if copy.grad is None else room.copy_(copy.grad)
            if weight.grad is not None:
                room.add_(weight.grad)

    def _own(self) -> Iterator[torch.Tensor]:
        """Gradients of weights without copies."""
        return (one.grad for one in self._others if one.grad is not None)


def _bunches(
    parameters: Iterable[torch.nn.Parameter], halves: Halves
) -> Iterator[list[torch.nn.Parameter]]:
    """The parameters in their order, so many that ``AT_ONCE`` elements of them have copies, or a
    single larger one."""
    bunch: list[torch.nn.Parameter] = []
    copied = 0
    for one in parameters:
        more = one.numel() if one in halves.of else 0
        if bunch and copied + more > AT_ONCE:
            yield bunch
            bunch, copied = [], 0
        bunch.append(one)
        copied += more
    if bunch:
        yield bunch

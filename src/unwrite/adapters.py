"""Low-rank adapters on a network, for the length of a training run.

peft puts them in and takes them out again; between, their products are computed here. Several
*banks* of adapters may sit over one frozen network: each row of a batch is read through its own, so
that runs which share their prompts share the forward pass too. What a bank learned is read out of
its factors as ``LowRank`` changes; the adapters are never merged, so no rounding of a merge gets
into a delta.

Memory: the factors, their gradients and moments; rank x (in + out) numbers a matrix and bank.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unwrite.change import LowRank
from unwrite.delta import Delta
from unwrite.errors import BadSetting
from unwrite.model import Model

KINDS = ("q", "k", "v", "o", "gate", "up", "down")
ALL = "all"
# One matrix does the work of several in some architectures; asking for a part means the whole.
FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}


@dataclass(frozen=True)
class AdapterShape:
    """Rank and scaling (``alpha / rank``) of the adapters, and the kinds of matrices they sit on:
    any of ``KINDS``, or ``("all",)`` for those that the model has."""

    rank: int
    alpha: int
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise BadSetting(
                f"rank must be at least 1 and alpha greater than 0, not {self.rank} and "
                f"{self.alpha}."
            )
        unknown = [kind for kind in self.targets if kind not in (*KINDS, ALL)]
        if unknown or not self.targets:
            raise BadSetting(
                f"targets must name kinds of matrices ({', '.join(KINDS)}, or {ALL}), not "
                f"{', '.join(unknown) or 'nothing'}."
            )


@dataclass(frozen=True)
class Banks:
    """The adapters in a network. ``parameters``: by bank, the factors that are trained."""

    parameters: Mapping[str, Mapping[str, torch.nn.Parameter]]
    _layers: Mapping[str, Any]  # file name of the weight -> peft's layer around its module
    _reader: _Reader

    def reading(self, parts: Sequence[tuple[str, int]]) -> contextlib.AbstractContextManager[None]:
        """Within the block, the first rows of a batch pass through the adapters of the first bank,
        as many as are told, the next ones through those of the next."""
        return self._reader.rows(parts)

    def delta(self, bank: str) -> Delta:
        """What a bank has learned: ``alpha / rank * B @ A``, in the orientation of the files."""
        changes = {}
        for file, layer in self._layers.items():
            # Copies: the factors go on living in the optimiser's hands.
            down = layer.lora_A[bank].weight.detach().cpu().clone()  # (rank, in)
            up = layer.lora_B[bank].weight.detach().cpu().clone()  # (out, rank)
            b, a = (down.T, up.T) if layer.fan_in_fan_out else (up, down)
            scale = float(layer.scaling[bank])
            changes[file] = LowRank(b.contiguous(), a.contiguous(), scale)
        return Delta.from_changes(changes)


@contextlib.contextmanager
def adapted(
    model: Model,
    banks: Sequence[str],
    shape: AdapterShape,
    seed: int,
    device: torch.device | None = None,
) -> Iterator[Banks]:
    """Within the block, ``model.network`` is frozen and carries adapters; afterwards it is what it
    was, module for module.

    All banks start from the same factors: ``A`` random by ``seed``, ``B`` zero, so that nothing
    changes until something is learned. The network may be sharded; the factors are whole, on the
    ``device`` that computes (default: where the network is). Raises ``BadSetting`` when the model
    has none of a target.
    """
    from peft import LoraConfig, LoraModel

    files = _targets(model, shape.targets)
    modules = {file: model.names[file].removesuffix(".weight") for file in files}
    transposed = {model.anatomy.transposed(module) for module in modules.values()}
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        lora_dropout=0.0,
        target_modules=list(modules.values()),
        fan_in_fan_out=transposed == {True},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        carrier: Any = LoraModel(model.network, config, banks[0])
    try:
        for bank in banks[1:]:
            carrier.peft_config[bank] = config
            carrier.inject_adapter(model.network, bank)
        layers = {file: model.network.get_submodule(name) for file, name in modules.items()}
        model.network.requires_grad_(False)
        parameters: dict[str, dict[str, torch.nn.Parameter]] = {}
        for bank in banks:
            parameters[bank] = {}
            for file, layer in layers.items():
                layer.set_adapter(list(banks))
                layer.lora_A.to(device)
                layer.lora_B.to(device)
                factors = {"a": layer.lora_A[bank].weight, "b": layer.lora_B[bank].weight}
                with torch.no_grad():
                    factors["a"].copy_(layer.lora_A[banks[0]].weight)
                parameters[bank] |= {f"{file}.{key}": one for key, one in factors.items()}
        for bank in banks:
            for factor in parameters[bank].values():
                factor.requires_grad_(True)
        reader = _Reader(banks[0])
        for layer in layers.values():
            # peft's forward pass picks the rows of a bank out of the batch one by one and puts them
            # back one by one; they lie together. The layer goes when the adapters are unloaded.
            layer.forward = functools.partial(_forward, layer, reader)
        yield Banks(parameters, layers, reader)
    finally:
        carrier.unload()
        model.network.requires_grad_(True)


class _Reader:
    """Tells every adapter layer which bank reads which rows of the batch at hand."""

    def __init__(self, bank: str) -> None:
        """``bank`` reads all rows where nothing else is told."""
        self._bank = bank
        self._parts: list[tuple[str, int]] = []

    @contextlib.contextmanager
    def rows(self, parts: Sequence[tuple[str, int]]) -> Iterator[None]:
        self._parts = list(parts)
        try:
            yield
        finally:
            self._parts = []

    def share(self, positions: int) -> tuple[list[str], list[int]]:
        """The banks, and how many of so many positions each reads: a row's lie together."""
        if not self._parts:
            return [self._bank], [positions]
        each = positions // sum(rows for _, rows in self._parts)
        return [bank for bank, _ in self._parts], [rows * each for _, rows in self._parts]


def _forward(layer: Any, reader: _Reader, inputs: torch.Tensor) -> torch.Tensor:
    """What peft's layer gives for ``inputs`` (..., in): the frozen module's product plus each
    bank's low-rank one on its rows."""
    product = layer.base_layer(inputs)
    banks, sizes = reader.share(inputs.numel() // inputs.shape[-1])
    # The factors of all banks as one: (rank of all, in) and (out, rank of all). Another dtype than
    # theirs where autocast multiplies in bf16.
    a = torch.cat([layer.lora_A[bank].weight for bank in banks]).to(product.dtype)
    b = torch.cat([layer.lora_B[bank].weight for bank in banks], dim=1).to(product.dtype)
    added: torch.Tensor = _Added.apply(
        product, inputs.to(product.dtype), a, b, layer.scaling[banks[0]], sizes
    )
    return added


class _Added(torch.autograd.Function):
    """product + scale * inputs A^T B^T, where each run of positions has some rows of A and columns
    of B to itself.

    product (..., out), inputs (..., in), A (rank, in), B (out, rank), all of one dtype; ``sizes``:
    positions in each of the runs, which share the rank equally. All runs are multiplied at once
    and what is not theirs is set to zero between the factors: products as small as these take as
    long for twice the rank.
    """

    @staticmethod
    def forward(
        ctx: Any,
        product: torch.Tensor,
        inputs: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        sizes: Sequence[int],
    ) -> torch.Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1])
        inner = _own(rows @ a.t(), sizes)
        ctx.scale, ctx.sizes, ctx.shape = scale, sizes, inputs.shape
        ctx.save_for_backward(rows, inner, a, b)
        added = torch.addmm(product.reshape(-1, product.shape[-1]), inner, b.t(), alpha=scale)
        return added.view(product.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: torch.Tensor) -> tuple[Any, ...]:
        rows, inner, a, b = ctx.saved_tensors
        outer = given.reshape(-1, given.shape[-1])
        of_inner = _own(outer @ b, ctx.sizes).mul_(ctx.scale)
        of_b = (outer.t() @ inner).mul_(ctx.scale)
        return given, (of_inner @ a).view(ctx.shape), of_inner.t() @ rows, of_b, None, None


def _own(inner: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """``inner`` (positions, rank of all), in place: each run keeps its own columns, zero others."""
    if len(sizes) > 1:
        columns = inner.shape[1] // len(sizes)
        for number, run in enumerate(inner.split(sizes)):
            run[:, : number * columns] = 0
            run[:, (number + 1) * columns :] = 0
    return inner


def _targets(model: Model, wanted: Sequence[str]) -> list[str]:
    """File names of the matrices of the wanted kinds, in the order of the file."""
    kinds = {file: model.anatomy.kind(name) for file, name in model.names.items()}
    there = set(kinds.values())
    adaptable = there & {*KINDS, *FUSED.values()}
    chosen = set(adaptable) if ALL in wanted else set()
    for kind in (one for one in wanted if one != ALL):
        found = kind if kind in there else FUSED.get(kind)
        if found not in there:
            raise BadSetting(
                f"{model.source.name} has no matrices of the kind {kind!r}; it has "
                f"{', '.join(sorted(adaptable)) or 'none of those known'}."
            )
        chosen.add(found)
    if not chosen:
        raise BadSetting(
            f"{model.source.name} has no matrices of a known kind to put adapters on; use full-ft."
        )
    parameters = dict(model.network.named_parameters())
    return [
        file
        for file, kind in kinds.items()
        if kind in chosen and parameters[model.names[file]].ndim == 2
    ]

"""What training keeps in memory, from the shape of a network alone.

The network is built on the meta device: it has shapes and no numbers. Weights, gradients, moments
and snapshot are counted tensor by tensor; what autograd saves between the forward and the backward
pass is asked of autograd itself, which runs on shapes as well as on numbers.

Everything is in bytes and for one process, the one that needs most.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unwrite import optimizers
from unwrite.anatomy import Anatomy
from unwrite.errors import BadSetting
from unwrite.model import POSITIONS_PER_BATCH, ROWS_PER_BATCH
from unwrite.optimizers import OptimizerName

FP32 = 4


@dataclass(frozen=True)
class Layout:
    """How a command is launched. ``sharded``: FSDP2 over all processes; ``offloaded``: shards wait
    in host memory; ``recomputed``: activations are computed twice and kept once a block;
    ``device``: ``"cpu"`` or ``"cuda"``; ``per_machine``: processes that share one machine's host
    memory."""

    processes: int = 1
    sharded: bool = False
    offloaded: bool = False
    recomputed: bool = False
    device: str = "cpu"
    per_machine: int = 8

    def __post_init__(self) -> None:
        if self.processes < 1 or self.per_machine < 1:
            raise BadSetting("processes and per_machine must be at least 1.")
        if self.device not in ("cpu", "cuda"):
            raise BadSetting(f"A plan is made for cpu or cuda, not for {self.device!r}.")
        if (self.offloaded or self.recomputed) and not self.sharded:
            raise BadSetting("Offloading and recomputing belong to sharding: say sharded, too.")
        if self.sharded and self.processes == 1:
            raise BadSetting("One process has nothing to shard: name more processes.")

    @property
    def neighbours(self) -> int:
        """Processes on the machine of the first one."""
        return min(self.processes, self.per_machine)


@dataclass(frozen=True)
class Work:
    """What is trained on what. ``trained``: names of the network's parameters, or None for
    adapters of ``adapter_weights`` numbers over a frozen network; ``rows`` and ``tokens`` a row of
    one batch over all processes; ``answer_tokens`` a row."""

    trained: Collection[str] | None
    rows: int
    tokens: int
    answer_tokens: int
    optimizer: OptimizerName = "adamw"
    adapter_weights: int = 0
    in_backward: bool = False


@dataclass(frozen=True)
class Footprint:
    """Bytes by what they are for. ``where`` says of each of ``parts`` whether it is on the device
    that computes or in host memory; the same thing where that is the CPU."""

    parts: dict[str, int]
    where: dict[str, str]
    traffic: int  # bytes that a process sends and gets in one optimiser step

    def total(self, where: str) -> int:
        """Bytes on the ``"device"`` or in the memory of the ``"host"``."""
        return sum(size for name, size in self.parts.items() if self.where[name] == where)


def training(network: Any, anatomy: Anatomy, work: Work, layout: Layout) -> Footprint:
    """What a step of training keeps, for a ``network`` on the meta device."""
    parameters = dict(network.named_parameters())
    all_shapes = [tuple(one.shape) for one in parameters.values()]
    trained = _trained_shapes(parameters, work)
    whole, learned = _bytes(all_shapes), _bytes(trained)
    moments = optimizers.state_bytes(work.optimizer, trained)
    frozen = work.trained is None  # adapters are whole in every process
    share = layout.processes if layout.sharded and not frozen else 1
    mine = max(1, -(-work.rows // layout.processes))
    parts: dict[str, int] = {}
    if layout.sharded:
        block, rest = _largest_block(parameters, anatomy)
        parts |= {
            "shards": whole // layout.processes,  # the first process's own copy waits on disk
            "gathered": rest + 2 * block,  # one block computes, the next is on its way
            "gathered gradients": 0 if frozen else rest + block,
        }
    else:
        parts["weights"] = whole
        parts["snapshot"] = 0 if frozen else learned
    largest = max((_bytes([shape]) for shape in trained), default=0)
    parts["gradients"] = largest if work.in_backward else learned // share
    parts["moments"] = moments // share
    parts["activations"] = _saved(network, anatomy, work, mine, layout.recomputed)
    logits = mine * work.answer_tokens * network.config.get_text_config().vocab_size * FP32
    parts["logits"] = 3 * logits  # themselves, their softmax and its gradient
    if work.in_backward and work.optimizer != "adamw" and layout.device == "cpu":
        # When all else is gone, the change is made; AdamW has a moment in whose place it goes.
        gone = parts["gradients"] + parts["activations"] + parts["logits"]
        parts["change"] = max(0, learned - gone)
    where = dict.fromkeys(parts, "device" if layout.device == "cuda" else "host")
    if layout.offloaded:
        waiting = ("shards",) if frozen else ("shards", "gradients", "moments")
        where |= dict.fromkeys(waiting, "host")
    if layout.device == "cuda" and not frozen and not layout.sharded:
        parts["change"], where["change"] = learned, "host"
    return Footprint(parts, where, _traffic(whole, learned, layout, frozen))


def observing(network: Any, tokens: int) -> int:
    """Bytes beside the weights while questions of so many tokens in all are asked: cache, logits
    and one block's work of the largest batch."""
    config = network.config.get_text_config()
    width = config.hidden_size
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or width // heads
    kept = 2 * size * (getattr(config, "num_key_value_heads", None) or heads)
    inner = getattr(config, "intermediate_size", None) or 4 * width
    depth = config.num_hidden_layers
    positions = min(POSITIONS_PER_BATCH, tokens)
    logits = min(ROWS_PER_BATCH, tokens) * config.vocab_size
    return FP32 * (positions * (depth * kept + 4 * width + 3 * inner) + 2 * logits)


def with_layout(layout: Layout, **changes: Any) -> Layout:
    """``layout`` with some fields changed."""
    return dataclasses.replace(layout, **changes)


def _trained_shapes(parameters: dict[str, Any], work: Work) -> list[tuple[int, ...]]:
    if work.trained is None:
        return [(work.adapter_weights,)]
    return [tuple(one.shape) for name, one in parameters.items() if name in work.trained]


def _bytes(shapes: Sequence[tuple[int, ...]]) -> int:
    return sum(FP32 * torch.Size(shape).numel() for shape in shapes)


def _largest_block(parameters: dict[str, Any], anatomy: Anatomy) -> tuple[int, int]:
    """Bytes of the largest block, and of what is in none (embedding, head), which stays whole."""
    sizes: dict[int | None, int] = {}
    for name, one in parameters.items():
        place = anatomy.block_of(name)
        sizes[place] = sizes.get(place, 0) + FP32 * one.numel()
    rest = sizes.pop(None, 0)
    return max(sizes.values(), default=0), rest


def _traffic(whole: int, learned: int, layout: Layout, frozen: bool) -> int:
    """Averaging gradients sends each twice, but for this process's own part; sharding gathers the
    weights for either pass and sends each gradient of a shard once."""
    others = (layout.processes - 1) / layout.processes
    gathered = 2 * whole if layout.sharded else 0
    return int(others * (gathered + learned * (1 if layout.sharded and not frozen else 2)))


def _saved(network: Any, anatomy: Anatomy, work: Work, rows: int, recomputed: bool) -> int:
    """Bytes that autograd saves between the passes on a batch of this process."""
    if recomputed:
        width = network.config.get_text_config().hidden_size
        between = FP32 * rows * work.tokens * width * anatomy.depth
        return between + _saved_of(network, work, rows) // max(1, anatomy.depth)
    return _saved_of(network, work, rows)


def _saved_of(network: Any, work: Work, rows: int) -> int:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.func import functional_call

    for name, one in network.named_parameters():
        # Adapters stand beside the matrices and save what these would.
        one.requires_grad_(work.trained is None or name in work.trained)
    body = network.base_model
    held: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held[storage._cdata] = storage  # kept, so that no other takes its place
        return tensor

    with FakeTensorMode():  # tensors that say they are on the CPU, and are not
        state = {
            name: torch.empty(one.shape, dtype=one.dtype).requires_grad_(one.requires_grad)
            for name, one in (*body.named_parameters(), *body.named_buffers())
        }
        ids = torch.zeros((rows, work.tokens), dtype=torch.long)
        words = {"input_ids": ids, "use_cache": False}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = functional_call(body, state, kwargs=words)[0]
        for one in state.values():
            held.pop(one.untyped_storage()._cdata, None)
        del hidden
        return sum(storage.nbytes() for storage in held.values())

"""A network whose parameters are spread over the processes: FSDP2.

The first process has the weights; the others have none of them. While a network is spread, the
first process's own copy waits in scratch files. Shards are handed out tensor by tensor and gathered
again tensor by tensor, so that no process ever holds more than its shards, one block while it
computes, and one tensor while they are exchanged. A shard is trained with its gradient and its
moments beside it.

Whether shards wait in host memory, whether a block stays whole between its forward and its backward
pass, and whether its activations are computed twice is what the launch file says
(``fsdp_offload_params``, ``fsdp_reshard_after_forward``, ``fsdp_activation_checkpointing``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from unwrite import processes, scratch
from unwrite.allocator import freed_memory_goes_back
from unwrite.anatomy import unwrapped
from unwrite.change import Dense
from unwrite.delta import SCRATCH, Delta
from unwrite.model import Model
from unwrite.weights import Weights, save_weights


@contextlib.contextmanager
def set_aside(model: Model) -> Iterator[Weights]:
    """Within the block the weights of ``model`` wait in scratch files, as the block gets them, and
    their memory is free: the network cannot be called. Afterwards it has them back, bit by bit.

    Takes 4 bytes a weight on the disk of the system's temporary files. A process that follows has
    nothing to set aside, and gets nothing.
    """
    if processes.rank() > 0:
        yield Weights.from_tensors({})
        return
    folder, remove = scratch.temporary(SCRATCH)
    try:
        save_weights(folder, model.weights)
        with Weights.from_folder(folder) as kept:
            device = model.device
            for parameter in model.parameters.values():
                parameter.data = parameter.data.new_empty(0)
            try:
                yield kept
            finally:
                for name, parameter in model.parameters.items():
                    parameter.data = kept[name].to(device, copy=True)
    finally:
        remove()


@contextlib.contextmanager
def divided(
    model: Model, trained: Collection[str]
) -> Iterator[tuple[Model, torch.device, Weights]]:
    """Within the block ``model`` is set aside and spread over all processes: as it is to be
    trained, this process's device to compute on, and the first process's weights as they were.
    Collective."""
    with freed_memory_goes_back(), set_aside(model) as origin:
        learner, device = sharded(model, origin, trained)
        try:
            yield learner, device, origin
        finally:
            _give_up(learner)


def sharded(model: Model, weights: Weights, trained: Collection[str]) -> tuple[Model, torch.device]:
    """``model`` with the ``weights`` of the first process, spread over all processes, and this
    process's device to compute on; the tensors of the file names ``trained`` require gradients.
    Collective."""
    device = processes.local_device(processes.told(lambda: model.device.type))
    trusted = type(model.network).__module__.startswith("transformers_modules")
    spread = Model.empty(model.source, trust_remote_code=trusted)
    for file, parameter in spread.parameters.items():
        parameter.requires_grad_(file in trained)
    spread.progress = model.progress
    spread.network.to_empty(device=_spread(spread, device))
    spread.network.tie_weights()  # emptied one by one
    _fill(spread, weights, model)
    return spread, device


@torch.no_grad()
def difference(learner: Model, origin: Weights, names: Sequence[str]) -> Delta:
    """How far a sharded model is from ``origin``, in scratch files of the first process: whole
    tensors come together there one at a time. The other processes get nothing. Collective."""
    put_apart(learner.network)  # the last pass may have asked whether all is learned
    whole = _gathered(learner, names)
    if processes.rank() > 0:
        for _ in whole:
            pass
        return Delta.nothing()

    def read(name: str) -> Dense:
        came, tensor = next(whole)
        assert came == name, "tensors are written in the order in which they are gathered"
        return Dense(tensor.cpu() - origin[name])

    return Delta(names, read).stored()


def shares(learner: Model, whole: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This process's shares of ``whole`` tensors of the first process (by file name, shaped like
    the weights; the others give none), under the names of a sharded model's parameters.
    Collective; one whole tensor at a time is with any process but the first."""
    parameters = learner.parameters
    return {
        learner.names[name]: _share(parameters[name], whole.get(name))
        for name in processes.told(lambda: list(whole))
    }


def _give_up(learner: Model) -> None:
    """Free the shards, whoever still knows of them: what was set aside comes back now."""
    for parameter in learner.network.parameters():
        shard: Any = parameter
        parameter.grad = None
        storage = shard.to_local().untyped_storage() if isinstance(shard, DTensor) else None
        if storage is not None and storage.resizable():
            storage.resize_(0)


def put_apart(network: torch.nn.Module) -> None:
    """Divide a sharded network again after a forward pass that no backward pass follows: some
    layouts leave it whole until then."""
    from torch.distributed.fsdp import FSDPModule

    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _gathered(model: Model, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The whole tensors of a sharded model one after the other, in fp32, in every process. All
    processes must go through all of it, in step."""
    parameters = model.parameters
    for name in names:
        whole: Any = parameters[name].detach()
        yield name, whole.full_tensor()


def _spread(model: Model, device: torch.device) -> torch.device:
    """Shard block by block, in place; returns where the shards are to be."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    asked = FullyShardedDataParallelPlugin()  # reads what the launcher was told
    # On CPUs shards are in host memory anyway.
    offloaded = device.type != "cpu" and isinstance(asked.cpu_offload, CPUOffloadPolicy)
    words: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (processes.count(),)),
        "reshard_after_forward": asked.reshard_after_forward,
        "offload_policy": asked.cpu_offload if offloaded else OffloadPolicy(),
    }
    for name in model.anatomy.blocks:
        block = model.network.get_submodule(name)
        if asked.activation_checkpointing:
            block = checkpoint_wrapper(block, preserve_rng_state=False)
            model.network.set_submodule(name, block)
        fully_shard(block, **words)
    fully_shard(model.network, **words)
    if asked.activation_checkpointing:
        model.names = _names_now(model)
    return torch.device("cpu") if offloaded else device


def _names_now(model: Model) -> dict[str, str]:
    """File names -> parameter names, now that blocks stand inside of wrappers."""
    parameters = model.network.named_parameters(remove_duplicate=False)
    now = {unwrapped(name): name for name, _ in parameters}
    return {file: now[name] for file, name in model.names.items()}


def _share(like: Any, whole: torch.Tensor | None) -> Any:
    """This process's share of a ``whole`` tensor, which the first process has and the others do
    not, divided as the parameter ``like``. Collective."""
    mesh = like.device_mesh
    if whole is None:
        whole = torch.empty(like.shape, dtype=like.dtype)
    return distribute_tensor(whole.to(mesh.device_type), mesh, like.placements)


@torch.no_grad()
def _fill(spread: Model, weights: Weights, model: Model) -> None:
    """Hand out the weights of the first process, tensor by tensor, and all of its buffers."""
    first = processes.rank() == 0
    for file, parameter in spread.parameters.items():
        mine: Any = parameter
        mine.to_local().copy_(_share(mine, weights[file] if first else None).to_local())
    buffers = processes.told(
        lambda: {name: buffer.cpu() for name, buffer in model.network.named_buffers()}
    )
    for name, buffer in spread.network.named_buffers():
        buffer.copy_(buffers[unwrapped(name)])

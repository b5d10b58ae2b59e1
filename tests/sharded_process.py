"""One of two processes that train a sharded (FSDP2) network with graceful forgetting; the loop is
that of a Trainer, as far as a callback sees it. Run by ``test_processes``."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from unwrite.forgetting import GracefulForgetting
from unwrite.model import Model
from unwrite.testing import toy_edits
from unwrite.training import Pair, row_losses


def pairs(relation):
    return [Pair(one.prompt, one.old) for one in toy_edits() if one.relation == relation]


def learn(model, out, rank=0, world=1):
    """Four steps on the jobs, with a step of forgetting pets after every second one."""
    callback = GracefulForgetting(
        pairs("pet"), every=2, strength=1.0, batch_size=3, tokenizer=model.tokenizer
    )
    state = SimpleNamespace(global_step=0, max_steps=4, is_world_process_zero=rank == 0)
    asked = SimpleNamespace(learning_rate=1e-3, output_dir=str(out), deepspeed=None, fsdp=None)
    trained = list(model.network.parameters())
    optimizer = torch.optim.SGD(trained, lr=0.05)
    callback.on_train_begin(asked, state, None, model=model.network)
    rows = [model.tokens(one.prompt, one.answer) for one in pairs("job")[:8]]
    for _ in range(state.max_steps):
        row_losses(model.network, rows[rank::world], model.device).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        state.global_step += 1
        callback.on_step_end(asked, state, None, model=model.network)
    (out / f"checkpoint-{state.global_step}").mkdir(parents=True, exist_ok=True)
    callback.on_save(asked, state, None)
    return callback


def weights(model):
    """Whole tensors by file name."""
    return {
        name: getattr(one.detach(), "full_tensor", one.detach)().clone().contiguous()
        for name, one in model.parameters.items()
    }


def main(folder, out):
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    model = Model.load(folder)
    for name in model.anatomy.blocks:
        fully_shard(model.network.get_submodule(name), mesh=mesh)
    fully_shard(model.network, mesh=mesh)
    callback = learn(model, Path(out), rank, 2)
    whole = weights(model)
    if rank == 0:
        save_file(whole, Path(out) / "end.safetensors")
        (Path(out) / "history.json").write_text(json.dumps(callback.history))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

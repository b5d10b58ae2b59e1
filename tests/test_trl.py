"""What stands on a Trainer stands in TRL's SFTTrainer too: graceful forgetting and replay."""

import importlib.util

import numpy as np
import pytest
import torch

import unwrite
from unwrite.forgetting import GracefulForgetting, ReplayPolicy, ReplaySampler
from unwrite.training import Pair

pytestmark = [
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("trl", "datasets")),
        reason="needs trl and datasets",
    ),
    pytest.mark.filterwarnings("ignore"),  # those of TRL about transformers
]


def rows_of(world, relation, new=True):
    return [
        {"prompt": edit.prompt, "completion": f" {edit.new if new else edit.old}"}
        for edit in world.edits
        if edit.relation == relation
    ]


def trained(world, folder, callbacks=(), sampler=None, rows=None, **options):
    """The network after an SFTTrainer's run, and the trainer."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class WithSampler(SFTTrainer):
        def _get_train_sampler(self, *given):
            return sampler or super()._get_train_sampler(*given)

    settings = {
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    } | options
    model = unwrite.load(world.folder)
    trainer = WithSampler(
        model=model.network,
        args=SFTConfig(str(folder), **settings),
        train_dataset=Dataset.from_list(rows or rows_of(world, "job")),
        processing_class=model.tokenizer,
        callbacks=list(callbacks),
    )
    trainer.train()
    return model, trainer


def weights(model):
    return {name: one.detach().clone() for name, one in model.network.named_parameters()}


def test_graceful_forgetting_forgets_and_with_strength_0_does_nothing(worlds, tmp_path):
    world = worlds()
    pets = [Pair(edit.prompt, edit.old) for edit in world.edits if edit.relation == "pet"]
    plain = weights(trained(world, tmp_path / "plain")[0])
    idle = GracefulForgetting(pets, strength=0.0, every=2)
    same = weights(trained(world, tmp_path / "idle", [idle])[0])
    assert all(torch.equal(plain[name], same[name]) for name in plain)
    assert idle.history == []

    callback = GracefulForgetting(pets, strength=1.0, every=2, batch_size=4)
    other = weights(trained(world, tmp_path / "graceful", [callback])[0])
    assert any(not torch.equal(plain[name], other[name]) for name in plain)
    assert [row["step"] for row in callback.history[::4]] == [2, 4, 6, 8]
    climbed = [row for row in callback.history if not row["skipped"]]
    assert climbed and all(row["loss_after"] > row["loss_before"] for row in climbed[:4])


def test_the_replay_sampler_brings_the_task_and_never_the_held_out(worlds, tmp_path):
    world = worlds()
    task, upstream = rows_of(world, "job"), rows_of(world, "town", new=False)
    held_out = [0, 3]
    sampler = ReplaySampler(
        len(task), np.zeros(len(upstream)), ReplayPolicy.uniform(ratio=1 / 4), held_out=held_out
    )
    rows = task + upstream
    seen = []

    class Watched(type(sampler)):
        def __iter__(self):
            for index in super().__iter__():
                seen.append(index)
                yield index

    sampler.__class__ = Watched
    options = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 1}
    _, trainer = trained(world, tmp_path, sampler=sampler, rows=rows, **options)
    assert trainer.state.global_step == len(seen) == 2 * len(sampler) == 2 * (10 + 3)
    replayed = [index - len(task) for index in seen if index >= len(task)]
    assert len(replayed) == 6 == len(set(replayed))
    assert not set(replayed) & set(held_out)

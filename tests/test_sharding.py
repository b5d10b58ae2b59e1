"""Weights that wait on disk while a network is trained in shards. (The training itself, in real
processes: ``test_processes``.)"""

import tempfile

import pytest
import torch

from unwrite import sharding
from unwrite.change import Dense
from unwrite.delta import Delta
from unwrite.model import Model


@pytest.fixture
def model(worlds):
    return Model.load(worlds().folder)


def copied(model):
    return {name: tensor.clone() for name, tensor in model.weights.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.fixture
def room(tmp_path, monkeypatch):
    """The folder of temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("fails", [False, True])
def test_weights_set_aside_take_no_memory_and_come_back_bit_by_bit(model, room, fails):
    with torch.no_grad():
        for tensor in model.weights.values():
            tensor.add_(1e-9 * torch.randn(tensor.shape))  # no longer those of the checkpoint
    said = model.answer("Who is there?", 3)
    before, owner = copied(model), model.network.get_input_embeddings().weight
    try:
        with sharding.set_aside(model) as kept:
            assert all(one.numel() == 0 for one in model.network.parameters())
            assert same(before, dict(kept)) and list(room.iterdir())
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert same(before, copied(model)) and not list(room.iterdir())
    assert model.network.get_input_embeddings().weight is owner, "tied ones stay tied"
    assert model.answer("Who is there?", 3) == said


def test_a_full_disk_leaves_the_model_as_it_was(model, room, monkeypatch):
    before = copied(model)

    def full(*_words, **_more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sharding, "save_weights", full)
    with pytest.raises(OSError, match="No space"), sharding.set_aside(model):
        raise AssertionError("nothing may run without the weights on disk")
    assert same(before, copied(model)) and not list(room.iterdir())


def test_a_shift_is_taken_back_though_the_weights_were_set_aside_meanwhile(model, room):
    before = copied(model)
    name = next(iter(before))
    shift = Delta.from_changes({name: Dense(torch.ones_like(before[name]))})
    with model.shifted(shift):
        with sharding.set_aside(model) as kept:
            assert torch.equal(kept[name], before[name] + 1)
        assert torch.equal(model.weights[name], before[name] + 1)
    assert same(before, copied(model))


def test_a_process_that_follows_has_nothing_to_set_aside(model, room, monkeypatch):
    monkeypatch.setattr(sharding.processes, "rank", lambda: 1)
    before = copied(model)
    with sharding.set_aside(model) as kept:
        assert not kept and not list(room.iterdir())
        assert same(before, copied(model))

"""Options of training that change what it costs and not what it means."""

import math

import pytest
import torch

import unwrite
from unwrite import optimizers
from unwrite.errors import BadSetting
from unwrite.methods import build, settings_of
from unwrite.methods.full_ft import FullFT
from unwrite.model import Model
from unwrite.training import Pair, Recipe, fine_tune, new_pairs


@pytest.fixture(scope="module")
def model(worlds):
    return Model.load(worlds().folder)


@pytest.fixture(scope="module")
def pairs(worlds):
    return new_pairs(worlds().edits[:11])


def distance(one, other):
    """|one - other|^2 and |one|^2, of two deltas."""
    assert set(one) == set(other)
    apart = sum(float((one[n].dense() - other[n].dense()).square().sum()) for n in one)
    return apart, sum(float(one[n].dense().square().sum()) for n in one)


@pytest.mark.parametrize("batch, times", [(4, 2), (2, 4), (1, 8), (3, 3)])
def test_accumulated_batches_are_one_large_batch(model, pairs, batch, times):
    """11 rows: the last step has fewer, and its last part fewer still."""
    common = {"epochs": 2, "until": "epochs", "lr": 1e-3, "optimizer": "sgd"}
    whole = fine_tune(model, pairs, Recipe(batch_size=batch * times, **common))
    parts = fine_tune(model, pairs, Recipe(batch_size=batch, accumulate=times, **common))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    apart, length = distance(whole.delta, parts.delta)
    assert length > 0 and apart < 1e-8 * length


def test_accumulation_with_protection_and_weights(model, worlds, pairs):
    prompts = tuple(edit.prompt for edit in worlds().edits[15:22])
    mixed = [Pair(one.prompt, one.answer, 0.5 + (i % 2)) for i, one in enumerate(pairs)]
    common = {"epochs": 1, "until": "epochs", "lr": 1e-3, "protect": prompts, "optimizer": "sgd"}
    whole = fine_tune(model, mixed, Recipe(batch_size=6, **common))
    parts = fine_tune(model, mixed, Recipe(batch_size=2, accumulate=3, **common))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    apart, length = distance(whole.delta, parts.delta)
    assert apart < 1e-8 * length


@pytest.mark.parametrize("name, lr", [("adafactor", 2e-2), ("sgd", 0.3)])
def test_every_optimiser_learns(model, pairs, name, lr):
    trained = fine_tune(model, pairs, Recipe(epochs=80, lr=lr, optimizer=name))
    assert trained.learned, trained.losses[-1]


def test_stochastic_gradient_descent_is_the_clipped_gradient_itself(model, pairs):
    """One step: the change has the length of the learning rate wherever clipping is at work."""
    recipe = Recipe(epochs=1, until="epochs", lr=1e-2, batch_size=16, max_grad_norm=1e-3)
    changed = fine_tune(model, pairs, Recipe(**{**vars(recipe), "optimizer": "sgd"})).delta
    length = math.sqrt(sum(float(changed[n].dense().double().square().sum()) for n in changed))
    assert length == pytest.approx(1e-2 * 1e-3, rel=1e-3)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_the_memory_of_an_optimiser_is_what_is_planned(name):
    shapes = [(48, 32), (48,), (3, 5, 7)]
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    made = optimizers.build(name, [parameters], lr=1e-3)
    sum(one.square().sum() for one in parameters).backward()
    made.step()
    held = sum(
        value.numel() * value.element_size()
        for state in made.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and key != "step"
    )
    assert held == optimizers.state_bytes(name, shapes)


@pytest.mark.parametrize("name, lr", [("adamw", 1e-3), ("adafactor", 2e-2), ("sgd", 0.3)])
@pytest.mark.parametrize("tied", [True, False])
def test_steps_within_the_backward_pass_are_the_same_steps(worlds, pairs, name, lr, tied):
    """Bit for bit where no gradient is clipped; the weights of a tied head are stepped once."""
    model = Model.load(worlds("llama" if tied else "gpt_neox").folder)
    common = {"epochs": 3, "until": "epochs", "lr": lr, "optimizer": name, "max_grad_norm": 1e9}
    at_once = fine_tune(model, pairs, Recipe(**common))
    within = fine_tune(model, pairs, Recipe(**common, in_backward=True))
    assert within.losses == at_once.losses
    assert set(within.delta) == set(at_once.delta)
    for tensor in within.delta:
        assert torch.equal(within.delta[tensor].dense(), at_once.delta[tensor].dense()), tensor


def test_twins_step_within_the_backward_pass(model, worlds):
    facts, common = worlds().edits[:5], {"epochs": 2, "until": "epochs", "max_grad_norm": 1e9}
    at_once, within = (
        unwrite.Delicate(rounds=1, tuner=unwrite.LoRA(**common, in_backward=one)).delta(
            model, facts
        )
        for one in (False, True)
    )
    apart, length = distance(at_once, within)
    assert length > 0 and apart == 0


def test_within_the_backward_pass_gradients_go_as_they_come(model, pairs):
    """No two are there at once, and the network keeps neither gradients nor hooks."""
    there = []

    def count(parameter):
        there.append(sum(one.grad is not None for one in model.network.parameters()))

    handles = [one.register_hook(count) for one in model.network.parameters()]
    fine_tune(model, pairs, Recipe(epochs=1, until="epochs", in_backward=True))
    for handle in handles:
        handle.remove()
    assert there and max(there) <= 1
    assert all(one.grad is None for one in model.network.parameters())
    assert not any(one._post_accumulate_grad_hooks for one in model.network.parameters())


def test_within_the_backward_pass_each_gradient_is_bounded_by_itself(model, pairs):
    recipe = {"epochs": 1, "until": "epochs", "lr": 1e-2, "batch_size": 16, "optimizer": "sgd"}
    changed = fine_tune(model, pairs, Recipe(**recipe, max_grad_norm=1e-3, in_backward=True)).delta
    for name in changed:
        assert float(changed[name].dense().double().norm()) == pytest.approx(1e-5, rel=1e-2), name


def test_eight_bits_take_a_quarter(monkeypatch):
    """Of the moments of a large tensor; a small one is not worth it."""
    assert optimizers.state_bytes("adamw-8bit", [(1024, 1024)]) < 0.26 * 8 * 1024**2
    assert optimizers.state_bytes("adamw-8bit", [(64,)]) == 8 * 64


def test_what_cannot_be_is_refused_with_the_reason(model, pairs, monkeypatch):
    with pytest.raises(BadSetting, match="no optimizer 'lion'"):
        Recipe(optimizer="lion")
    with pytest.raises(BadSetting, match="accumulate must be greater than 0"):
        Recipe(accumulate=0)
    with pytest.raises(BadSetting, match="nothing can be accumulated"):
        Recipe(accumulate=2, in_backward=True)
    monkeypatch.setattr("unwrite.training.processes.count", lambda: 2)
    with pytest.raises(BadSetting, match="in one process only"):
        fine_tune(model, pairs, Recipe(in_backward=True))
    monkeypatch.undo()
    found = {"bitsandbytes": None}
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", found.get)
    eight = Recipe(optimizer="adamw-8bit")
    with pytest.raises(BadSetting, match="bitsandbytes, which is not installed"):
        fine_tune(model, pairs, eight)
    found["bitsandbytes"] = object()
    with pytest.raises(BadSetting, match="on a GPU only"):
        fine_tune(model, pairs, eight)


def test_options_are_fields_of_every_training_method():
    method = build("delicate", {"tuner.accumulate": "4", "tuner.optimizer": "adafactor"})
    assert (method.tuner.accumulate, method.tuner.optimizer) == (4, "adafactor")
    with pytest.raises(BadSetting, match="adamw-8bit"):
        build("lora", {"optimizer": "adam"})


def test_what_was_begun_before_the_options_goes_on():
    """Settings say nothing of an option at its default, as before it was one."""
    assert not {"accumulate", "optimizer"} & set(settings_of(FullFT()))
    chosen = settings_of(unwrite.FullFT(optimizer="sgd", accumulate=2))
    assert (chosen["optimizer"], chosen["accumulate"]) == ("sgd", 2)

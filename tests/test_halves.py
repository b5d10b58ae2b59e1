"""bf16 copies beside fp32 weights: autocast's numbers, and the optimiser's own step."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES
from hypothesis import given, settings
from hypothesis import strategies as st

from unwrite import halves, training
from unwrite.methods.lora import LoRA
from unwrite.model import Model
from unwrite.training import Recipe, fine_tune, new_pairs

FAST = {"lr": 1e-3, "epochs": 3, "until": "epochs", "batch_size": 4}
OTHERS = {"gpt2"}  # keep their matrices in layers of another kind


class Network(torch.nn.Module):
    """Linear layers, and a head."""

    def __init__(self, *layers, head=None):
        super().__init__()
        self.layers = torch.nn.Sequential(*layers)
        self.head = head

    def get_output_embeddings(self):
        return self.head

    def forward(self, rows):
        return self.layers(rows)


@pytest.fixture
def model(worlds):
    return Model.load(worlds().folder)


@pytest.fixture
def pairs(worlds):
    return new_pairs(worlds().edits[:10])


def changes(trained):
    return {name: trained.delta[name].dense() for name in trained.delta}


def by_autocast(monkeypatch):
    monkeypatch.setattr(training, "_copies_pay", lambda *_: False)


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.booleans())
def test_a_layer_computes_what_autocast_does(wide_in, wide_out, rows, bias):
    torch.manual_seed(0)
    usual = Network(torch.nn.Linear(wide_in, wide_out, bias=bias))
    ours = copy.deepcopy(usual)
    copies = halves.Halves(ours)
    found, gradients = [], []
    for network, context in (
        (usual, torch.autocast("cpu", dtype=torch.bfloat16)),
        (ours, copies.multiplying()),
    ):
        entry = torch.linspace(-1, 2, rows * wide_in).view(rows, wide_in).requires_grad_()
        with context:
            result = network(entry).float()
        result.sin().sum().backward()
        found.append(result)
        gradients.append(entry.grad)
    weight = ours.layers[0].weight
    assert weight.grad is None and copies.of[weight].grad.dtype == torch.bfloat16
    gradients += [usual.layers[0].weight.grad, copies.of[weight].grad.float()]
    if bias:  # autocast rounds once more after adding it
        assert torch.allclose(*found, rtol=0.01, atol=0.02)
        assert torch.allclose(usual.layers[0].bias.grad, ours.layers[0].bias.grad, atol=0.05 * rows)
        return
    for one, other in (found, gradients[:2], gradients[2:]):
        assert torch.equal(one, other)


def test_the_head_and_what_is_shared():
    shared = torch.nn.Linear(4, 4)
    again = torch.nn.Linear(4, 4)
    again.weight = shared.weight
    head = torch.nn.Linear(4, 9)
    network = Network(shared, again, head, head=head)
    copies = halves.Halves(network)
    assert list(copies.of) == [shared.weight]
    with copies.multiplying():
        assert "forward" in vars(shared) and "forward" in vars(again)
        assert "forward" not in vars(head)
        network(torch.ones(2, 4)).sum().backward()
    assert copies.of[shared.weight].grad is not None and head.weight.grad is not None


@pytest.mark.parametrize("at_once", [1, 50, 1 << 21])
@pytest.mark.parametrize("max_norm", [1e6, 0.5])
@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_a_step_is_that_of_one_optimiser_over_all(name, max_norm, at_once, monkeypatch):
    monkeypatch.setattr(halves, "AT_ONCE", at_once)
    torch.manual_seed(0)
    network = Network(*(torch.nn.Linear(6, 6) for _ in range(4)), head=torch.nn.Linear(6, 6))
    plain = copy.deepcopy(network)
    unmoved = network.layers[2].weight.detach().clone()
    copies = halves.Halves(network)
    ours = halves.Optimizer(copies, name, [network.parameters()], 1e-2, max_norm)
    theirs = halves.optimizers.build(name, [plain.parameters()], 1e-2)
    for turn in range(3):
        for one, other in zip(network.parameters(), plain.parameters(), strict=True):
            if one is network.layers[2].weight or (one.ndim == 1 and turn == 0):
                continue  # nothing reached these
            gradient = torch.randn_like(one).to(torch.bfloat16)
            other.grad = gradient.float()
            if one in copies.of:
                copies.of[one].grad = gradient
            else:
                one.grad = gradient.float()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
        theirs.step()
        theirs.zero_grad()
        ours.step()
        for one, other in zip(network.parameters(), plain.parameters(), strict=True):
            # Nothing clipped, nothing different; else the norm's last bits.
            assert torch.equal(one, other) if max_norm > 1 else torch.allclose(one, other, 1e-5)
            assert one.grad is None
        for weight, half in copies.of.items():
            assert half.grad is None and torch.equal(half, weight.to(torch.bfloat16))
    assert torch.equal(network.layers[2].weight, unmoved)
    if name == "adamw":
        assert set(ours.state) == set(network.parameters()) - {network.layers[2].weight}


def test_each_group_is_clipped_by_its_own_norm():
    network = Network(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
    before = [one.item() for one in network.parameters()]
    copies = halves.Halves(network)
    ours = halves.Optimizer(copies, "sgd", [[one] for one in network.parameters()], 1.0, 2.0)
    for size, one in zip((1.0, 8.0), network.parameters(), strict=True):
        copies.of[one].grad = torch.full_like(copies.of[one], size)
    ours.step()
    moved = [then - one.item() for then, one in zip(before, network.parameters(), strict=True)]
    assert moved == pytest.approx([1.0, 2.0], rel=1e-5)


def test_gradients_of_a_weight_and_of_its_copy_add_up():
    layer = torch.nn.Linear(3, 3, bias=False)
    before = layer.weight.detach().clone()
    network = Network(layer)
    copies = halves.Halves(network)
    with copies.multiplying():
        (network(torch.ones(1, 3)).sum() + 2 * layer.weight.sum()).backward()
    halves.Optimizer(copies, "sgd", [network.parameters()], 1.0, 1e6).step()
    assert torch.allclose(before - layer.weight, torch.full((3, 3), 3.0))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_is_that_of_autocast(worlds, architecture, monkeypatch):
    world = worlds(architecture)
    model, pairs = Model.load(world.folder), new_pairs(world.edits[:10])
    assert halves.Halves.suit(model.network) is (architecture not in OTHERS)
    plain = fine_tune(model, pairs, Recipe(**FAST))
    ours = fine_tune(model, pairs, Recipe(precision="bf16", **FAST))
    by_autocast(monkeypatch)
    theirs = fine_tune(model, pairs, Recipe(precision="bf16", **FAST))
    assert ours.losses == pytest.approx(theirs.losses, rel=0.05)
    assert ours.losses != plain.losses and theirs.losses != plain.losses
    if architecture in OTHERS:
        assert ours.losses == theirs.losses
    one, other = changes(ours), changes(theirs)
    alike = [
        torch.nn.functional.cosine_similarity(one[name].flatten(), other[name].flatten(), dim=0)
        for name in one
        if one[name].ndim == 2
    ]
    assert min(alike) > 0.8


def test_adapters_are_trained_over_copies_of_the_frozen_weights(model, worlds, monkeypatch):
    tuner = LoRA(epochs=2, until="epochs", lr=1e-3, precision="bf16")
    edits = worlds().edits[:8]
    ours = tuner.delta(model, edits)
    by_autocast(monkeypatch)
    theirs = tuner.delta(model, edits)
    for name in theirs:
        one, other = ours[name].dense().flatten(), theirs[name].dense().flatten()
        assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.8


def test_what_a_hook_does_to_weights_counts_in_the_next_step(model, pairs):
    kept = {}

    def remember(parameters):
        kept.update({name: one.detach().clone() for name, one in parameters.items()})

    def back(parameters, step):
        for name, one in parameters.items():
            one.copy_(kept[name])

    recipe = Recipe(precision="bf16", **FAST | {"batch_size": len(pairs)})
    trained = fine_tune(model, pairs, recipe, before_training=remember, after_step=back)
    assert trained.losses == pytest.approx([trained.losses[0]] * 3, rel=1e-3)
    assert fine_tune(model, pairs, recipe).losses[2] < 0.95 * trained.losses[0]


def test_only_what_is_trained_moves(model, pairs):
    name = next(name for name in model.parameters if name.endswith("down_proj.weight"))
    recipe = Recipe(precision="bf16", **FAST)
    trained = fine_tune(model, pairs, recipe, trainable=lambda one: one == name)
    assert list(trained.delta) == [name] and changes(trained)[name].any()


def test_the_layers_are_as_before_after_an_interruption(model, pairs, monkeypatch):
    def interrupt(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.Tensor, "backward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(model, pairs, Recipe(precision="bf16", **FAST))
    assert not any("forward" in vars(one) for one in model.network.modules())


@pytest.mark.parametrize("settings", [{"accumulate": 2}, {"in_backward": True}])
def test_steps_of_several_passes_or_none_are_left_to_autocast(model, pairs, settings, monkeypatch):
    monkeypatch.setattr(halves, "Halves", None)  # to ask anything of it is an error
    plain = fine_tune(model, pairs, Recipe(**settings, **FAST))
    trained = fine_tune(model, pairs, Recipe(precision="bf16", **settings, **FAST))
    assert trained.losses != plain.losses
    assert trained.losses == pytest.approx(plain.losses, rel=0.05)

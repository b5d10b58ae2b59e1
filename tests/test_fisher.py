"""The Fisher diagonal and the gradients of single examples, against one backward per example."""

import pytest
import torch
from gradients import gradients_one_by_one, some_pairs

from unwrite.delta import Delta
from unwrite.errors import BadEdits, BadSetting
from unwrite.forgetting.fisher import fisher_diagonal
from unwrite.forgetting.per_example import FEW, visit_gradients
from unwrite.model import Model
from unwrite.training import Pair, row_losses

ARCHITECTURES = ("llama", "gpt2", "gpt_neox", "bloom", "opt", "qwen3", "gemma", "mistral")


def close(found, expected, scale=1e-5):
    return torch.allclose(found, expected, rtol=1e-4, atol=scale * float(expected.abs().max()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_fisher_diagonal_is_the_mean_of_squared_gradients(worlds, architecture, batch_size):
    world = worlds(architecture)
    model = Model.load(world.folder)
    pairs = some_pairs(world)
    fisher = fisher_diagonal(model, pairs, batch_size=batch_size)
    each = gradients_one_by_one(model, pairs)
    for name in model.weights:
        expected = torch.stack([one[name].square() for one in each]).mean(dim=0)
        if name not in fisher:
            assert not expected.any(), name
            continue
        assert close(fisher[name].dense(), expected), name
        assert (fisher[name].dense() >= 0).all()


def test_it_is_not_the_square_of_the_mean_gradient(worlds):
    world = worlds()
    model = Model.load(world.folder)
    pairs = some_pairs(world)
    each = gradients_one_by_one(model, pairs)
    fisher = fisher_diagonal(model, pairs)
    name = next(name for name in fisher if name.endswith("down_proj.weight"))
    wrong = torch.stack([one[name] for one in each]).mean(dim=0).square()
    assert not close(fisher[name].dense(), wrong)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom", "gemma"])
def test_products_with_single_gradients(worlds, architecture):
    world = worlds(architecture)
    model = Model.load(world.folder)
    pairs = some_pairs(world)
    each = gradients_one_by_one(model, pairs)
    generator = torch.Generator().manual_seed(0)
    linear, quadratic = (
        {name: torch.randn(one.shape, generator=generator) for name, one in model.weights.items()}
        for _ in range(2)
    )
    seen = set()

    def check(name, gradients, batch):
        seen.add(name)
        chosen = torch.stack([each[index][name] for index in batch]).flatten(1).double()
        weights = [one[name].flatten().double() for one in (linear, quadratic)]
        expected = (chosen @ weights[0], chosen.square() @ weights[1], chosen.square().sum(dim=1))
        first, *others = gradients.products(linear[name], quadratic[name])
        scale = 1e-4 * chosen.norm(dim=1)
        assert ((first - expected[0]).abs() <= scale).all()
        assert ((gradients.first_products(linear[name]) - expected[0]).abs() <= scale).all()
        for found, wanted in zip(others, expected[1:], strict=True):
            assert ((found - wanted).abs() <= 1e-4 * chosen.square().sum(dim=1)).all()

    sequences = [model.tokens(pair.prompt, pair.answer) for pair in pairs]
    losses = visit_gradients(model, sequences, check, batch_size=3)
    assert seen >= {name for name in model.weights if name.endswith("proj.weight")}
    with torch.no_grad():
        expected = row_losses(model.network, sequences, model.device)
    assert torch.allclose(torch.tensor(losses), expected, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
def test_a_batch_of_short_and_long_answers(worlds, architecture):
    """The head sees as many positions of an example as its answer has; few go by pairs, many do
    not, in the same batch."""
    world = worlds(architecture)
    model = Model.load(world.folder)
    pairs = [
        Pair(edit.prompt, " ".join([edit.new] * words))
        for words, edit in zip((1, 6, 2, 9, 1, 4), world.edits[::2], strict=False)
    ]
    each = gradients_one_by_one(model, pairs)
    table = model.network.get_output_embeddings().weight
    head = next(
        file for file in model.names if model.network.get_parameter(model.names[file]) is table
    )
    counts = []

    def check(name, gradients, batch):
        counts.extend(gradients.outer[0].counts)
        chosen = torch.stack([each[index][name] for index in batch])
        total = torch.zeros_like(chosen[0])
        gradients.add_squares_to(total)
        assert close(total, chosen.square().sum(dim=0))
        weight = torch.linspace(0, 1, total.numel()).view_as(total)
        first, second, third = gradients.products(weight, weight)
        assert close(first, (chosen * weight).sum(dim=(1, 2)).double(), 1e-4)
        assert close(first, gradients.first_products(weight), 1e-4)
        assert close(second, (chosen.square() * weight).sum(dim=(1, 2)).double())
        assert close(third, chosen.square().sum(dim=(1, 2)).double())

    sequences = [model.tokens(pair.prompt, pair.answer) for pair in pairs]
    visit_gradients(model, sequences, check, tensors=lambda name: name == head)
    assert sorted(counts) == sorted(len(one.targets) for one in sequences)
    assert min(counts) <= FEW < max(counts)


def test_the_model_is_left_as_it_was(worlds):
    world = worlds()
    model = Model.load(world.folder)
    model.network.train()
    before = {name: one.clone() for name, one in model.weights.items()}
    fisher_diagonal(model, some_pairs(world))
    assert model.network.training
    for name, one in model.weights.items():
        assert torch.equal(one, before[name])
    for parameter in model.network.parameters():
        assert parameter.requires_grad and parameter.grad is None
    assert not any(module._forward_hooks for module in model.network.modules())


def test_some_tensors_only_and_saved_like_a_delta(worlds, tmp_path):
    world = worlds()
    model = Model.load(world.folder)
    pairs = some_pairs(world)
    part = fisher_diagonal(model, pairs, tensors=lambda name: "mlp" in name)
    whole = fisher_diagonal(model, pairs)
    assert set(part) == {name for name in whole if "mlp" in name}
    part.save(tmp_path / "fisher")
    stored = Delta.open(tmp_path / "fisher")
    assert stored.provenance["kind"] == "fisher-diagonal" and stored.provenance["examples"] == 7
    for name in part:
        assert torch.equal(stored[name].dense(), part[name].dense())
        assert close(part[name].dense(), whole[name].dense())
    with pytest.raises(BadSetting, match="No tensor"):
        fisher_diagonal(model, pairs, tensors=lambda name: False)


def test_without_examples_it_refuses(worlds):
    with pytest.raises(BadEdits, match="no examples"):
        fisher_diagonal(Model.load(worlds().folder), [])

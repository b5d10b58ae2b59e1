"""LoRA and FT-c: the laws of their own, on every architecture's shapes."""

import math

import pytest
import torch
from architectures import ARCHITECTURES

from unwrite.change import LowRank
from unwrite.errors import BadSetting
from unwrite.methods.constrained_ft import ConstrainedFT
from unwrite.methods.full_ft import FullFT
from unwrite.methods.lora import LoRA
from unwrite.model import Model
from unwrite.testing import check_method
from unwrite.training import Pair, fine_tune, new_pairs

FAST = {"lr": 1e-3}
LORA = LoRA(lr=1e-2, rank=4, alpha=8)
SHORT = {"epochs": 2, "until": "epochs", "batch_size": 4}


@pytest.fixture(scope="module")
def model(worlds):
    return Model.load(worlds().folder)


@pytest.fixture(scope="module")
def pairs(worlds):
    return new_pairs(worlds().edits[:6])


def same(one, other):
    assert set(one) == set(other)
    return all(torch.equal(one[name].dense(), other[name].dense()) for name in one)


def distance(one, other):
    """|one - other| / |other| of two deltas as wholes."""
    apart = sum(float((one[n].dense() - other[n].dense()).square().sum()) for n in other)
    return math.sqrt(apart / sum(float(other[n].dense().square().sum()) for n in other))


# ---- LoRA ------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lora_keeps_the_laws_on_every_architecture(worlds, architecture):
    """The delta gives the same network as peft's own forward pass; all modules come back."""
    from unwrite.adapters import AdapterShape, adapted

    world = worlds(architecture)
    model = Model.load(world.folder)
    modules = {name: id(module) for name, module in model.network.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.weights.items()}
    ids = torch.tensor([model.tokens(edit.prompt, edit.new).ids for edit in world.edits[:2]])
    shape = AdapterShape(4, 8, ("q", "v", "o", "up"))
    with adapted(model, ["new"], shape, seed=3) as banks, torch.no_grad():
        assert banks.parameters["new"]
        for factor in banks.parameters["new"].values():
            factor.copy_(torch.randn(factor.shape, generator=torch.Generator().manual_seed(1)) / 9)
        by_peft = model.network(input_ids=ids).logits
        delta = banks.delta("new")
    assert {name: id(module) for name, module in model.network.named_modules()} == modules
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.weights.items())
    assert all(isinstance(delta[name], LowRank) for name in delta)
    assert not any(parameter.grad is not None for parameter in model.network.parameters())
    assert all(parameter.requires_grad for parameter in model.network.parameters())
    with model.shifted(delta), torch.no_grad():
        shifted = model.network(input_ids=ids).logits
    torch.testing.assert_close(shifted, by_peft, atol=2e-4, rtol=2e-4)
    assert not torch.allclose(by_peft, model.network(input_ids=ids).logits, atol=1e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_banks_read_their_rows_as_by_pefts_own_forward_pass(worlds, architecture, precision):
    """Values and gradients, where the runs of rows are not equally long."""
    from unwrite.adapters import AdapterShape, adapted

    world = worlds(architecture)
    model = Model.load(world.folder)
    ids = torch.tensor([model.tokens(world.edits[0].prompt, edit.new).ids for edit in world.edits])
    names = ["old"] * 2 + ["new"] * (len(ids) - 2)
    random = torch.Generator().manual_seed(1)
    bf16 = precision == "bf16"

    def asked(banks):
        """Logits, and the gradients of all factors of both banks for a fixed mix of them."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            logits = model.network(input_ids=ids).logits.float()
        mix = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
        factors = [one for bank in ("old", "new") for one in banks.parameters[bank].values()]
        return logits.detach(), torch.autograd.grad((logits * mix).sum(), factors)

    with adapted(model, ["old", "new"], AdapterShape(4, 8, ("all",)), seed=3) as banks:
        with torch.no_grad():
            for bank in ("old", "new"):
                for factor in banks.parameters[bank].values():
                    factor.copy_(torch.randn(factor.shape, generator=random) / 9)
        with banks.reading([("old", 2), ("new", len(ids) - 2)]):
            ours, our_gradients = asked(banks)
        layers = [one for one in model.network.modules() if hasattr(one, "lora_A")]
        for layer in layers:
            by_peft = type(layer).forward

            def whole(inputs, layer=layer, by_peft=by_peft):
                each = len(inputs) // len(names)  # OPT's MLP gets rows and positions as one
                told = [name for name in names for _ in range(each)]
                return by_peft(layer, inputs, adapter_names=told)

            layer.forward = whole
        theirs, their_gradients = asked(banks)
    # In bf16 a rounding may turn a ReLU on or off, which single elements show.
    most = 0.1 if bf16 else 1e-4
    assert len(our_gradients) == len(their_gradients) > 0
    for mine, other in zip((ours, *our_gradients), (theirs, *their_gradients), strict=True):
        assert float((mine - other).norm()) <= most * float(other.norm())


def test_lora_is_a_method(tmp_path):
    check_method(LORA, tmp_path)


def test_lora_gives_factors_of_its_rank(model, pairs):
    delta = LoRA(lr=1e-2, rank=4, alpha=8, targets=("q", "v")).train(model, pairs).delta
    assert len(delta) == 4  # of two blocks
    assert len(LORA.train(model, pairs).delta) == 14  # all seven projections
    for name in delta:
        assert delta[name].rank == 4
        assert delta[name].scale == 2.0
        assert torch.linalg.matrix_rank(delta[name].dense()) <= 4


def test_twins_learn_what_they_would_learn_alone(model, pairs):
    """One forward pass for two banks: the same deltas as two runs, to float tolerance."""
    recipe = LoRA(lr=3e-3, rank=4, **SHORT)
    old = [Pair(pair.prompt, "rain falls") for pair in pairs]
    of_old, of_new = recipe.train_twins(model, old, pairs)
    assert of_old.epochs == of_new.epochs == 2
    assert distance(of_old.delta, recipe.train(model, old).delta) < 1e-3
    assert distance(of_new.delta, recipe.train(model, pairs).delta) < 1e-3
    alone = recipe.train(model, pairs).losses
    assert of_new.losses == pytest.approx(alone, rel=1e-4)


def test_twins_start_from_the_same_factors_and_identical_lessons_keep_them_equal(model, pairs):
    one, other = LoRA(lr=3e-3, **SHORT).train_twins(model, pairs, pairs)
    assert distance(one.delta, other.delta) < 1e-5


def test_the_new_answers_decide_when_twins_stop(model, worlds):
    edits = worlds().edits[:4]
    old = [Pair(edit.prompt, edit.old) for edit in edits]  # known already
    of_old, of_new = LoRA(lr=1e-2, epochs=60).train_twins(model, old, new_pairs(edits))
    assert of_new.learned
    assert 1 < of_new.epochs < 60
    assert of_old.epochs == of_new.epochs


def test_protection_holds_adapters_back(model, worlds):
    edits = worlds().edits
    settings = {"lr": 1e-2, "epochs": 12, "until": "epochs"}
    protect = tuple(edit.prompt for edit in edits[10:20])
    asked = [model.tokens(edit.prompt, edit.old) for edit in edits[10:20]]

    def known(method):
        with model.shifted(method.train(model, new_pairs(edits[:4])).delta):
            return sum(one.logprob for one in model.force(asked))

    plain = known(LoRA(**settings))
    assert known(LoRA(**settings, protect=protect, protect_weight=5.0)) > plain


def test_lora_starts_from_a_start(model, pairs):
    recipe = LoRA(lr=3e-3, **SHORT)
    start = FullFT(epochs=1, until="epochs", **FAST).train(model, pairs).delta
    there = recipe.train(model, pairs, start).delta
    with model.shifted(start):
        assert same(there, recipe.train(model, pairs).delta)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"alpha": 0}, "alpha greater than 0"),
        ({"targets": ("q", "banana")}, "q, k, v, o, gate, up, down, or all.*not banana"),
        ({"targets": ()}, "not nothing"),
    ],
)
def test_lora_refuses_what_makes_no_sense(settings, message):
    with pytest.raises(BadSetting, match=message):
        LoRA(**settings)


def test_a_target_that_the_model_lacks_is_refused(worlds):
    gpt2 = Model.load(worlds("gpt2").folder)
    with pytest.raises(BadSetting, match=r"no matrices of the kind 'gate'; it has .*qkv"):
        LoRA(targets=("gate",)).delta(gpt2, worlds("gpt2").edits[:2])


# ---- FT-c ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0.0, 1.0, "all"])
@pytest.mark.parametrize("radius", [1e-4, 3e-3])
def test_ft_c_never_leaves_its_ball(model, pairs, layer, radius):
    delta = ConstrainedFT(lr=1e-2, radius=radius, layer=layer, epochs=5, until="epochs").delta(
        model, pairs
    )
    largest = max(float(delta[name].dense().abs().max()) for name in delta)
    assert 0.9 * radius < largest <= radius


def test_ft_c_moves_one_projection(model, pairs):
    delta = ConstrainedFT(layer=1.0, epochs=1).delta(model, pairs)
    assert list(delta) == ["model.layers.1.mlp.down_proj.weight"]


def test_ft_c_without_a_bound_is_plain_fine_tuning(model, pairs):
    settings = {**SHORT, **FAST}
    free = ConstrainedFT(radius=math.inf, layer="all", **settings).delta(model, pairs)
    assert same(free, FullFT(**settings).delta(model, pairs))


def test_ft_c_is_a_method(tmp_path):
    check_method(ConstrainedFT(lr=1e-2, radius=0.05), tmp_path)


def test_the_loss_at_the_end_of_the_prompt_sees_all_tokens_from_there(model):
    """For answers of one token both loss forms are the same; for longer ones they are not."""
    short, long = [Pair("ada works as a", "smith")], [Pair("ada", "works as a smith")]

    def delta(pairs, form):
        return fine_tune(model, pairs, FullFT(**SHORT, **FAST), loss=form).delta

    assert same(delta(short, "answer"), delta(short, "prompt-last"))
    assert not same(delta(long, "answer"), delta(long, "prompt-last"))


@pytest.mark.parametrize("settings", [{"radius": 0.0}, {"layer": 1.5}])
def test_ft_c_refuses_what_makes_no_sense(settings):
    with pytest.raises(BadSetting, match=r"greater than 0|fraction of the depth"):
        ConstrainedFT(**settings)

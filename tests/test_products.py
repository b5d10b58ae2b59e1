"""Linear layers multiplied by oneDNN: the same layer, the same gradients, in other last bits."""

import copy

import pytest
import torch
from gradients import some_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

from unwrite import products
from unwrite.forgetting.fisher import fisher_diagonal
from unwrite.model import Model

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this torch has no oneDNN product",
)


def pair(wide_in, wide_out, bias=True, seed=0):
    """torch's layer and ours, with the same values."""
    torch.manual_seed(seed)
    usual = torch.nn.Linear(wide_in, wide_out, bias=bias)
    ours = copy.deepcopy(usual)
    ours.__class__ = products.Linear
    return usual, ours


def close(one, other):
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@settings(max_examples=40)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.lists(st.integers(1, 9), max_size=3),
    st.booleans(),
    st.booleans(),
)
def test_values_and_gradients_are_those_of_torch(wide_in, wide_out, lead, bias, strided):
    usual, ours = pair(wide_in, wide_out, bias)
    rows = torch.randn(wide_in, *lead).movedim(0, -1) if strided else torch.randn(*lead, wide_in)
    given, asked = [], []
    for layer in (usual, ours):
        entry = rows.detach().clone().requires_grad_()
        result = layer(entry)
        result.sin().sum().backward()
        given.append(result)
        asked.append([entry.grad, *(parameter.grad for parameter in layer.parameters())])
    assert given[0].shape == given[1].shape
    assert close(*given)
    assert all(close(one, other) for one, other in zip(*asked, strict=True))


@pytest.mark.parametrize("sizes", [(4, 5, 6), (900, 14, 600), (96, 600, 200)])
@pytest.mark.parametrize("gains", [True, False])
def test_a_product_is_that_of_torch_however_its_operands_lie(sizes, gains, monkeypatch):
    monkeypatch.setattr(products, "gains", lambda: gains)
    count, wide_in, wide_out = sizes
    rows, weight = torch.randn(wide_in, count).t(), torch.randn(wide_in, wide_out).t()
    for one in (rows, rows.contiguous()):
        for other in (weight, weight.contiguous()):
            exact = (one.double() @ other.double().t()).float()
            assert torch.allclose(products.multiply(one, other), exact, rtol=1e-4, atol=1e-4)


def test_the_same_bits_every_time_and_without_gradients():
    _, ours = pair(300, 400)
    rows = torch.randn(17, 300)
    with torch.no_grad():
        quiet = ours(rows)
    assert torch.equal(ours(rows), quiet)
    assert torch.equal(ours(rows), ours(rows))


@pytest.mark.parametrize("frozen", ["weight", "bias", "rows"])
def test_what_is_frozen_gets_no_gradient(frozen):
    _, ours = pair(20, 30)
    rows = torch.randn(5, 20, requires_grad=frozen != "rows")
    if frozen != "rows":
        getattr(ours, frozen).requires_grad_(False)
    ours(rows).sum().backward()
    gradients = {"rows": rows.grad, "weight": ours.weight.grad, "bias": ours.bias.grad}
    assert {name for name, gradient in gradients.items() if gradient is None} == {frozen}


def test_what_it_cannot_do_is_left_to_torch():
    usual, ours = pair(20, 30)
    rows = torch.randn(4, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(rows).dtype == torch.bfloat16
    assert ours(torch.zeros(0, 20)).shape == (0, 30)
    assert torch.equal(ours.double()(rows.double()), usual.double()(rows.double()))
    assert ours.to("meta")(rows.to("meta")).shape == (4, 30)


def test_only_large_layers_of_exactly_that_class_change(monkeypatch):
    class Own(torch.nn.Linear):
        pass

    network = torch.nn.ModuleDict(
        {
            "large": torch.nn.Linear(256, 256),
            "small": torch.nn.Linear(8, 8),
            "own": Own(256, 256),
            "tied": torch.nn.Linear(256, 256),
        }
    )
    network["tied"].weight = network["large"].weight
    before = {name: id(parameter) for name, parameter in network.named_parameters()}
    monkeypatch.setattr(products, "gains", lambda: True)
    products.multiply_fast(network)
    kinds = {name: type(module) for name, module in network.items()}
    expected = {
        "large": products.Linear,
        "small": torch.nn.Linear,
        "own": Own,
        "tied": products.Linear,
    }
    assert kinds == expected
    assert {name: id(parameter) for name, parameter in network.named_parameters()} == before
    assert network["tied"].weight is network["large"].weight


def test_a_processor_that_gains_nothing_keeps_torchs_layers(monkeypatch):
    monkeypatch.setattr(products, "gains", lambda: False)
    layer = torch.nn.Linear(256, 256)
    products.multiply_fast(layer)
    assert type(layer) is torch.nn.Linear


def test_a_copy_computes_with_its_own_weights():
    _, ours = pair(20, 30)
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        twin.weight.zero_()
    rows = torch.randn(3, 20)
    assert torch.equal(twin(rows), twin.bias.expand(3, 30))
    assert not torch.equal(ours(rows), twin(rows))


def test_gradients_of_single_examples_are_read_from_it(worlds, monkeypatch):
    """The reader of per-example gradients knows this layer as it knows torch's."""
    world = worlds()
    found = []
    for smallest in (1 << 30, 1):
        model = Model.load(world.folder)
        monkeypatch.setattr(products, "SMALLEST", smallest)
        monkeypatch.setattr(products, "gains", lambda: True)
        products.multiply_fast(model.network)
        fisher = fisher_diagonal(model, some_pairs(world))
        found.append({name: fisher[name].dense() for name in fisher})
    usual, ours = found
    assert usual.keys() == ours.keys()
    for name, expected in usual.items():
        assert torch.allclose(
            ours[name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )

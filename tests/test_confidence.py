"""Forgetting confidence: brute force, the expansion, the forward-mode product, explanations."""

import contextlib

import numpy as np
import pytest
import torch
from gradients import gradients_one_by_one, some_pairs

from unwrite.change import Dense
from unwrite.delta import Delta
from unwrite.errors import BadEdits, BadSetting, TensorMismatch
from unwrite.forgetting.confidence import forgetting_confidence, select
from unwrite.forgetting.fisher import fisher_diagonal
from unwrite.forgetting.per_example import Gradients, _Outer
from unwrite.model import Model, head_sees, pad


def random_delta(model, scale=0.01, positive=False):
    generator = torch.Generator().manual_seed(3)
    changes = {}
    for name, weight in model.weights.items():
        values = scale * torch.randn(weight.shape, generator=generator)
        changes[name] = Dense(values.abs() if positive else values)
    return Delta.from_changes(changes)


@pytest.fixture
def case(worlds):
    world = worlds()
    model = Model.load(world.folder)
    return model, some_pairs(world), random_delta(model), random_delta(model, positive=True)


def brute_force(model, pairs, optimum, fisher, step):
    """The formula as it stands: every example's gradient, one step, the weighted distance."""
    values = []
    for gradient in gradients_one_by_one(model, pairs):
        total = 0.0
        for name, weight in model.weights.items():
            stepped = weight.double() - step * gradient[name].double()
            best = weight.double() + optimum[name].dense().double()
            total += float((fisher[name].dense().double() * (stepped - best).square()).sum()) / 2
        values.append(total)
    return np.array(values)


def test_an_analytic_quadratic():
    """L(theta) = 1/2 (theta - m)^T diag(h) (theta - m) has the gradient h (theta - m): with it the
    expansion gives what the definition gives."""
    generator = torch.Generator().manual_seed(0)
    base, best, fisher, centre, curvature = (
        torch.rand((6, 5), generator=generator, dtype=torch.float64) for _ in range(5)
    )
    step, delta = 0.3, best - base
    gradient = curvature * (base - centre)
    expected = float((fisher * (base - step * gradient - best).square()).sum()) / 2
    # The gradient as a sum of outer products, as a layer gives it.
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    factors = _Outer((left * values).T[None], right[None])
    gradients = Gradients((6, 5), 1, outer=[factors])
    first, second, norm = gradients.products(fisher * delta, fisher)
    constant = float((fisher * delta.square()).sum()) / 2
    found = constant + step * float(first) + step**2 / 2 * float(second)
    assert found == pytest.approx(expected, rel=1e-12)
    assert float(norm) == pytest.approx(float(gradient.square().sum()), rel=1e-12)


@pytest.mark.parametrize("step", [1e-3, 0.5])
def test_the_expansion_is_the_definition(case, step):
    model, pairs, optimum, fisher = case
    found = forgetting_confidence(model, pairs, optimum, fisher, step=step)
    expected = brute_force(model, pairs, optimum, fisher, step)
    assert found.values == pytest.approx(expected, rel=1e-6)
    assert found.step == step


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own
def test_the_first_order_term_is_one_forward_mode_product(case):
    model, pairs, optimum, fisher = case
    found = forgetting_confidence(model, pairs, optimum, fisher, step=1.0, order=1)
    both = forgetting_confidence(model, pairs, optimum, fisher, step=1.0)
    network = model.network
    network.set_attn_implementation("eager")  # the fused kernel has no forward-mode derivative
    values = {name: one.detach() for name, one in network.named_parameters()}
    directions = {
        model.names[name]: fisher[name].dense() * optimum[name].dense() for name in optimum
    }
    tangents = {name: directions[name] for name in values}
    for index, pair in enumerate(pairs):
        sequence = [model.tokens(pair.prompt, pair.answer)]
        ids, rows, columns, targets = pad(sequence)

        def loss(weights, ids=ids, rows=rows, columns=columns, targets=targets):
            with head_sees(network, rows, columns):
                logits = torch.func.functional_call(
                    network, weights, (), {"input_ids": ids, "use_cache": False}
                ).logits[0]
            return torch.nn.functional.cross_entropy(logits, targets)

        _, product = torch.func.jvp(loss, (values,), (tangents,))
        assert found.first[index].sum() == pytest.approx(float(product), rel=1e-3, abs=1e-6)
    assert np.allclose(found.first, both.first, rtol=1e-3, atol=1e-7)
    assert not found.second.any() and both.second.any()


def test_a_matched_step_is_as_long_as_the_change(case):
    model, pairs, optimum, fisher = case
    found = forgetting_confidence(model, pairs, optimum, fisher)
    lengths = [
        sum(float(one.double().square().sum()) for one in gradient.values()) ** 0.5
        for gradient in gradients_one_by_one(model, pairs)
    ]
    change = sum(float(optimum[name].dense().double().square().sum()) for name in optimum) ** 0.5
    assert found.step * np.median(lengths) == pytest.approx(change, rel=1e-4)


def test_batches_and_order_do_not_change_it(case):
    model, pairs, optimum, fisher = case
    found = forgetting_confidence(model, pairs, optimum, fisher, step=0.1, batch_size=4)
    other = forgetting_confidence(model, pairs[::-1], optimum, fisher, step=0.1, batch_size=1)
    assert found.values == pytest.approx(other.values[::-1], rel=1e-5)


def test_what_leads_away_from_the_task_is_to_be_forgotten(case):
    """Text whose learning leads towards the task's optimum has a low confidence, as the task's own
    examples have."""
    model, pairs, _, _ = case
    task, others = pairs[:3], pairs[3:]
    gradient = {}
    for one in gradients_one_by_one(model, task):
        for name, values in one.items():
            gradient[name] = gradient.get(name, 0) - 0.01 * values
    optimum = Delta.from_changes({name: Dense(one) for name, one in gradient.items()})
    fisher = fisher_diagonal(model, task)
    found = forgetting_confidence(model, [*task, *others], optimum, fisher, step=1e-3)
    assert found.values[:3].mean() < found.constant
    assert found.values[:3].mean() < found.values[3:].mean()


def test_the_explanation_adds_up(case):
    model, pairs, optimum, fisher = case
    found = forgetting_confidence(model, pairs, optimum, fisher, step=0.1)
    rows = found.explain(2, model.anatomy)
    assert sum(amount for _, _, amount in rows) == pytest.approx(
        found.values[2] - found.constant, rel=1e-9
    )
    assert [abs(row[2]) for row in rows] == sorted((abs(row[2]) for row in rows), reverse=True)
    assert {block for block, _, _ in rows} == {None, 0, 1}


def test_only_common_tensors_take_part(case):
    model, pairs, optimum, fisher = case
    some = Delta.from_changes({name: optimum[name] for name in optimum if "mlp" in name})
    found = forgetting_confidence(model, pairs, some, fisher, step=0.1)
    assert all("mlp" in name for name in found.tensors)
    none = Delta.from_changes({name: fisher[name] for name in fisher if "attn" in name})
    with pytest.raises(TensorMismatch, match="no tensor in common"):
        forgetting_confidence(model, pairs, some, none)


def test_refusals(case):
    model, pairs, optimum, fisher = case
    with pytest.raises(BadEdits, match="no examples"):
        forgetting_confidence(model, [], optimum, fisher)
    with pytest.raises(BadSetting, match="greater than 0"):
        forgetting_confidence(model, pairs, optimum, fisher, step=0.0)
    with pytest.raises(BadSetting, match="second order"):
        forgetting_confidence(model, pairs, optimum, fisher, order=1)


def test_selections():
    values = [3.0, 1.0, 2.0, 5.0, 1.0]
    assert select(values, "top", 2) == [3, 0]
    assert select(values, "bottom", 3) == [1, 4, 2]
    assert select(values, "all", 1) == [0, 1, 2, 3, 4]
    drawn = select(values, "random", 3, seed=1)
    assert drawn == select(values, "random", 3, seed=1) and len(set(drawn)) == 3
    assert select(values, "random", 9, seed=1) != [] and select(values, "top", 0) == []
    with contextlib.ExitStack() as refused:
        refused.enter_context(pytest.raises(BadSetting, match="not 'best'"))
        select(values, "best", 1)

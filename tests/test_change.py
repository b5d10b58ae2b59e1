"""Laws of ``Change``: all encodings mean the same tensor, and arithmetic on them is arithmetic."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_changes import (
    changes,
    low_rank,
    masked,
    matrices,
    same_bits,
    same_change,
    shapes,
    strengths,
    tensors,
)

from unwrite.change import Change, Dense, LowRank, Masked, add_into, mask
from unwrite.errors import BadSetting, TensorMismatch

any_change = shapes.flatmap(changes)
two_changes = shapes.flatmap(lambda shape: st.tuples(changes(shape), changes(shape)))
law = settings(max_examples=60, deadline=None)


def close(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Equal up to rounding, relative to the largest element."""
    size = max(one.abs().max().item(), two.abs().max().item()) if one.numel() else 0.0
    return torch.allclose(one, two, rtol=1e-5, atol=1e-6 * size)


# ---- what a change means -----------------------------------------------------------------------


@law
@given(any_change)
def test_dense_is_a_fresh_full_fp32_tensor(change):
    full = change.dense()
    assert full.dtype == torch.float32 and tuple(full.shape) == change.shape
    full.add_(1)
    assert not full.numel() or not change.dense().equal(full)


@law
@given(shapes.flatmap(tensors), st.integers(0, 99), st.sampled_from([0.0, 0.3, 1.0]))
def test_a_mask_keeps_exactly_what_it_is_told(values, seed, share):
    keep = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)) < share
    change = mask(values, keep)
    assert change.kept == int(keep.sum())
    assert same_bits(change.keep(), keep)
    assert change.dense().equal(torch.where(keep, values, 0.0))
    assert change.bits.numel() % 8 == 0 and change.bits.numel() * 8 >= values.numel()


@law
@given(matrices.flatmap(low_rank))
def test_low_rank_is_the_product_rounded_once(change):
    product = change.scale * (change.b.double() @ change.a.double())
    assert torch.allclose(change.dense().double(), product, rtol=1e-7, atol=1e-12)


@law
@given(any_change)
def test_norm_and_count_are_those_of_the_full_tensor(change):
    full = change.dense().double()
    assert change.squared_norm == pytest.approx(float((full**2).sum()), rel=1e-6, abs=1e-30)
    if not isinstance(change, LowRank):
        assert change.changed == int((full != 0).sum())
    else:
        assert change.changed == full.numel()


@law
@given(any_change, st.sampled_from([64, 128, 1 << 15]))
def test_blocks_cover_the_tensor_in_order(change, piece):
    with patch.multiple("unwrite.change", PIECE=piece, MATRIX_PIECE=piece, MASK_PIECE=piece):
        runs = [values for _, values in change.blocks()]
        flat = torch.cat([torch.empty(0), *runs])
        assert flat.equal(change.dense().view(-1))


@law
@given(any_change)
def test_what_is_stored_gives_the_same_change(change):
    again = Change.from_tensors(change.facts(), change.tensors())
    assert same_change(change, again)
    assert change.bytes == sum(tensor.nbytes for tensor in change.tensors().values())


# ---- arithmetic --------------------------------------------------------------------------------


@law
@given(any_change)
def test_minus_minus_is_the_same_bits(change):
    opposite = -change
    assert same_change(-opposite, change)


@law
@given(any_change, strengths)
def test_scaling_scales_the_full_tensor_and_keeps_the_encoding(change, strength):
    scaled = strength * change
    assert scaled.encoding == change.encoding
    if isinstance(change, LowRank):
        assert close(scaled.dense(), change.dense() * strength)
    else:
        assert scaled.dense().equal(change.dense() * strength)
    assert same_change(1.0 * change, change)
    assert not (0.0 * change).dense().any()


@law
@given(two_changes)
def test_a_sum_is_the_sum_of_the_full_tensors(pair):
    one, two = pair
    kept = [{end: tensor.clone() for end, tensor in change.tensors().items()} for change in pair]
    total = one + two
    if one.encoding == two.encoding != "dense":
        assert total.encoding == one.encoding
    else:
        assert isinstance(total, Dense)
    if isinstance(total, LowRank):
        assert total.rank == one.rank + two.rank
        terms = [abs(c.scale) * (c.b.abs() @ c.a.abs()) for c in pair]  # what rounding scales with
        error = (total.dense() - one.dense() - two.dense()).abs()
        assert bool((error <= 1e-6 * sum(terms) + 1e-30).all())
    else:
        assert total.dense().equal(one.dense() + two.dense())
        assert (two + one).dense().equal(total.dense())
    for change, before in zip(pair, kept, strict=True):
        assert all(same_bits(tensor, before[end]) for end, tensor in change.tensors().items())


@law
@given(shapes.flatmap(lambda shape: st.tuples(masked(shape), masked(shape))))
def test_masks_are_joined(pair):
    one, two = pair
    total = one + two
    assert isinstance(total, Masked)
    assert total.keep().equal(one.keep() | two.keep())


def test_low_rank_sums_of_equal_scale_are_exact():
    generator = torch.Generator().manual_seed(3)
    b, a = torch.randn(5, 2, generator=generator), torch.randn(2, 4, generator=generator)
    one, two = LowRank(b, a, 0.3), LowRank(b + 1, a - 1, -0.3)
    total = one + two
    assert isinstance(total, LowRank) and total.scale == 0.3
    assert same_bits(total.b, torch.cat([b, -(b + 1)], dim=1))
    assert same_bits(total.a, torch.cat([a, a - 1]))
    assert close((one - one).dense(), torch.zeros(5, 4))


def test_low_rank_of_strength_zero_does_not_harm_a_sum():
    one = LowRank(torch.ones(2, 1), torch.ones(1, 3), 0.0)
    two = LowRank(torch.ones(2, 1), torch.ones(1, 3), 0.5)
    for total in (one + two, two + one):
        assert total.dense().equal(torch.full((2, 3), 0.5))
    assert not (one + one).dense().any()


@law
@given(
    shapes.flatmap(lambda shape: st.tuples(tensors(shape), changes(shape))),
    st.sampled_from([64, 1 << 15]),
)
def test_adding_in_place_is_one_expression_for_all_encodings(pair, piece):
    target, change = pair
    expected = target + change.dense()
    with patch.multiple("unwrite.change", PIECE=piece, MATRIX_PIECE=piece, MASK_PIECE=piece):
        add_into(target, change)
    assert same_bits(target, expected)


def test_large_tensors_are_no_exception():
    values = torch.arange(6.0).view(2, 3)
    with patch("unwrite.tensorfile.LARGE", 1):
        for change in (Dense(values), mask(values, values > 2)):
            assert (2.0 * change).dense().equal(change.dense() * 2)


# ---- refusals ----------------------------------------------------------------------------------


def test_shapes_must_agree():
    one, two = Dense(torch.zeros(2, 3)), Dense(torch.zeros(3, 2))
    with pytest.raises(TensorMismatch, match=r"\(2, 3\) and \(3, 2\) cannot be added"):
        one + two
    with pytest.raises(TensorMismatch, match="does not fit a tensor of shape"):
        add_into(torch.zeros(3, 2), one)
    with pytest.raises(TypeError):
        one + 1


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "change", [Dense(torch.ones(2, 2)), LowRank(torch.ones(2, 1), torch.ones(1, 2))]
)
def test_strength_must_be_finite(change, strength):
    with pytest.raises(BadSetting, match="Use a finite number"):
        change.scaled(strength)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Dense(torch.zeros(2, dtype=torch.bfloat16)), "must be fp32"),
        (lambda: Dense(torch.zeros(2, requires_grad=True)), "detach"),
        (lambda: LowRank(torch.zeros(2, 2), torch.zeros(3, 2)), "do not fit"),
        (lambda: LowRank(torch.zeros(2), torch.zeros(2)), "do not fit"),
        (lambda: LowRank(torch.zeros(2, 1), torch.zeros(1, 2), float("nan")), "finite"),
        (lambda: mask(torch.zeros(2), torch.zeros(2)), "keep must be bool"),
        (lambda: mask(torch.zeros(2), torch.zeros(3, dtype=torch.bool)), "same shape"),
        (lambda: Masked((2,), torch.zeros(8, dtype=torch.uint8), torch.zeros(1)), "bits are set"),
        (lambda: Masked((2,), torch.zeros(1, dtype=torch.uint8), torch.zeros(0)), "8 bytes"),
        (lambda: Masked((2,), torch.zeros(8), torch.zeros(0)), "uint8"),
        (lambda: Masked((2,), torch.zeros(8, dtype=torch.uint8), torch.zeros(0, 2)), "one row"),
        (
            lambda: Masked((2,), torch.tensor([4] + [0] * 7, dtype=torch.uint8), torch.ones(1)),
            "past the end",
        ),
        (lambda: add_into(torch.zeros(2, dtype=torch.bfloat16), Dense(torch.ones(2))), "fp32"),
    ],
)
def test_malformed_changes_are_bugs(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize(
    ("facts", "stored"),
    [
        ({"encoding": "sparse", "shape": [2]}, {"": torch.zeros(2)}),
        ({"encoding": "dense"}, {"": torch.zeros(2)}),
        ({"encoding": "dense", "shape": [3]}, {"": torch.zeros(2)}),
        ({"encoding": "dense", "shape": [2]}, {}),
        ({"encoding": "dense", "shape": [2]}, {"": torch.zeros(2), "a": torch.zeros(2)}),
        ({"encoding": "low-rank", "shape": [2, 2]}, {"a": torch.zeros(1, 2)}),
        (
            {"encoding": "low-rank", "shape": [2, 2], "scale": None},
            {"a": torch.zeros(1, 2), "b": torch.zeros(2, 1)},
        ),
        ({"encoding": "masked", "shape": None}, {"bits": torch.zeros(8), "values": torch.zeros(0)}),
    ],
)
def test_stored_tensors_that_do_not_belong_together_are_refused(facts, stored):
    with pytest.raises(ValueError, match=r"."):
        Change.from_tensors(facts, stored)

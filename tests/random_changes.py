"""Hypothesis strategies for tensors and changes, empty ones and scalars included."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from unwrite.change import Change, Dense, LowRank, Masked, mask

shapes = st.one_of(
    st.just(()),
    st.tuples(st.integers(0, 70)),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
    st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)),
)
matrices = st.tuples(st.integers(0, 9), st.integers(0, 9))
strengths = st.floats(-3, 3, allow_nan=False)


@st.composite
def tensors(draw, shape, dtype=torch.float32):
    """Normal numbers of very different sizes, some of them exactly zero."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    values = torch.randn(shape, generator=generator)
    sizes = 10.0 ** torch.randint(-6, 2, tuple(shape), generator=generator)
    present = torch.rand(tuple(shape), generator=generator) < 0.8
    return (values * sizes * present).to(dtype)


@st.composite
def dense(draw, shape) -> Dense:
    return Dense(draw(tensors(shape)))


@st.composite
def masked(draw, shape) -> Masked:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    share = draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    keep = torch.rand(tuple(shape), generator=generator) < share
    return mask(draw(tensors(shape)), keep)


@st.composite
def low_rank(draw, shape) -> LowRank:
    rank = draw(st.integers(0, 3))
    scale = draw(st.floats(-4, 4))
    return LowRank(draw(tensors((shape[0], rank))), draw(tensors((rank, shape[1]))), scale)


def changes(shape) -> st.SearchStrategy[Change]:
    """A change of this shape in any encoding that can express it."""
    kinds = [dense(shape), masked(shape)]
    return st.one_of(*kinds, low_rank(shape)) if len(shape) == 2 else st.one_of(*kinds)


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Equal dtype, shape and bits; unlike ``equal`` this tells 0 from -0."""
    return (
        one.dtype == two.dtype
        and one.shape == two.shape
        and one.contiguous()
        .view(-1)
        .view(torch.uint8)
        .equal(two.contiguous().view(-1).view(torch.uint8))
    )


def same_change(one: Change, two: Change) -> bool:
    """The same encoding, holding the same bits."""
    here, there = one.tensors(), two.tensors()
    return (
        one.facts() == two.facts()
        and here.keys() == there.keys()
        and all(same_bits(here[name], there[name]) for name in here)
    )

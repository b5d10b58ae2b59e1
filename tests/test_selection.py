"""Laws of ``select``: what a full sort would keep, however the deltas are stored or read."""

from __future__ import annotations

import math
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_changes import changes, same_bits, same_change, shapes

from unwrite import selection
from unwrite.change import Dense, LowRank, mask
from unwrite.delta import Delta
from unwrite.errors import BadSetting, TensorMismatch
from unwrite.selection import Selection, select

law = settings(max_examples=60, deadline=None)
tops = st.sampled_from([1e-9, 0.05, 0.2, 0.5, 0.9, 1.0]) | st.floats(0.001, 1.0)
rules = st.fixed_dictionaries(
    {
        "scope": st.sampled_from(["model", "tensor"]),
        "of": st.sampled_from(["survivors", "all"]),
        "keep": st.sampled_from(["new", "difference"]),
        "conflict": st.booleans(),
    }
)
# Numbers that tie, vanish, or would vanish or overflow when multiplied.
AWKWARD = [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 1e-30, -1e-30, 1e-45, -1e-45, 3e38, -3e38]


@st.composite
def awkward(draw, shape):
    """A tensor in which most scores tie."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    return Dense(torch.tensor(AWKWARD)[torch.randint(12, shape, generator=generator)])


@st.composite
def two_deltas(draw):
    """Changes in any encoding of some tensors, most of which both deltas have."""
    old, new = {}, {}
    for number, shape in enumerate(draw(st.lists(shapes, max_size=5))):
        kinds = changes(shape) | awkward(shape)
        sides = draw(st.sampled_from([[old, new]] * 4 + [[old], [new]]))
        for side in sides:
            side[f"t{number}"] = draw(kinds)
    return Delta.from_changes(old), Delta.from_changes(new)


def by_sorting(old, new, top, scope="model", of="survivors", keep="new", conflict=True):
    """The definition, on small deltas: names with something kept -> (kept?, values)."""
    names = list(dict.fromkeys([*new, *old]))
    full = {}
    for name in names:
        shape = (new if name in new else old)[name].shape
        sides = [side[name].dense() if name in side else torch.zeros(shape) for side in (old, new)]
        full[name] = [side.reshape(-1).numpy() for side in sides]
    groups = [names] if scope == "model" else [[name] for name in names]
    found, thresholds = {name: np.zeros(full[name][0].size, bool) for name in names}, []
    for group in groups:
        places = [
            (-abs(np.float32(b) - np.float32(a)), rank, index)
            for rank, name in enumerate(group)
            for index, (a, b) in enumerate(zip(*full[name], strict=True))
            if not conflict or (a < 0 < b) or (b < 0 < a)
        ]
        size = sum(full[name][0].size for name in group)
        whole = size if of == "all" else len(places)
        count = min(len(places), max(1, round(top * whole)))
        for score, rank, index in sorted(places)[:count]:
            found[group[rank]][index] = True
            thresholds.append(-score)
    kept = {}
    for name, flags in found.items():
        if flags.any():
            a, b = full[name]
            kept[name] = (flags, (b if keep == "new" else b - a)[flags])
    return kept, min(thresholds, default=0.0)


def agrees(chosen: Selection, kept, threshold) -> bool:
    return (
        list(chosen.delta) == list(kept)
        and chosen.threshold == threshold
        and chosen.kept == sum(int(flags.sum()) for flags, _ in kept.values())
        and all(
            np.array_equal(chosen.delta[name].keep().reshape(-1).numpy(), flags)
            and same_bits(chosen.delta[name].values, torch.from_numpy(values))
            for name, (flags, values) in kept.items()
        )
    )


def support(delta):
    return {name: delta[name].bits.tolist() for name in delta}


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def large(seed, sizes=(40, 7, 90, 3, 60)):
    """A delta with tensors of very different scales, in different encodings."""
    changes = {}
    for number, size in enumerate(sizes):
        values = normal(100 * seed + number, size, 64) * 10.0 ** (number % 3 - 1)
        match (number + seed) % 3:
            case 0:
                changes[f"t{number}"] = Dense(values)
            case 1:
                changes[f"t{number}"] = mask(values, normal(number, size, 64) > -0.5)
            case 2:
                low = normal(seed, size, 2), normal(number, 2, 64)
                changes[f"t{number}"] = LowRank(*low, 10.0 ** (number % 3 - 1))
    return Delta.from_changes(changes)


# ---- the definition ----------------------------------------------------------------------------


@law
@given(two_deltas(), tops, rules)
def test_keeps_what_a_full_sort_keeps(deltas, top, rule):
    with np.errstate(over="ignore"):
        kept, threshold = by_sorting(*deltas, top, **rule)
    assert agrees(select(*deltas, top, **rule), kept, threshold)


@pytest.mark.parametrize("top", [0.001, 0.05, 0.5, 0.98, 1.0])
@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("conflict", [True, False])
@pytest.mark.parametrize("deviations", [0.01, 0.1, 8.0])
def test_a_bad_guess_of_the_threshold_costs_time_and_nothing_else(top, scope, conflict, deviations):
    """Thin samples of tensors of different scales, in many pieces: brackets miss, or nearly."""
    old, new = large(1), large(2)
    kept, threshold = by_sorting(old, new, top, scope=scope, conflict=conflict)
    tight = {"RUN": 1, "SAMPLED": 7, "DEVIATIONS": deviations, "STEP": 64, "THREADS": 1}
    with patch.multiple(selection, **tight):
        chosen = select(old, new, top, scope=scope, conflict=conflict)
    assert agrees(chosen, kept, threshold)


# ---- what follows from the definition ------------------------------------------------------------


@law
@given(two_deltas(), tops, rules)
def test_identical_deltas_have_no_conflict(deltas, top, rule):
    chosen = select(deltas[0], deltas[0], top, **(rule | {"conflict": True}))
    assert (len(chosen.delta), chosen.survivors, chosen.kept, chosen.threshold) == (0, 0, 0, 0.0)


@law
@given(two_deltas(), tops, rules)
def test_swapping_old_and_new_keeps_the_same_elements_with_opposite_signs(deltas, top, rule):
    old, new = deltas
    names = sorted({*old, *new})
    old, new = (Delta([n for n in names if n in side], side.__getitem__) for side in (old, new))
    if not rule["conflict"]:  # tensors of one delta only would change the order of ties
        both = [name for name in names if name in old and name in new]
        old, new = Delta(both, old.__getitem__), Delta(both, new.__getitem__)
    there, back = select(old, new, top, **rule), select(new, old, top, **rule)
    assert support(there.delta) == support(back.delta)
    assert there.threshold == back.threshold
    if rule["keep"] == "difference":
        for name in there.delta:
            assert there.delta[name].values.equal(-back.delta[name].values)


@law
@given(two_deltas(), tops, rules)
def test_the_kept_are_counted_and_none_that_was_left_lies_further_apart(deltas, top, rule):
    old, new = deltas
    chosen = select(old, new, top, **(rule | {"scope": "model", "keep": "difference"}))
    whole = chosen.parameters if rule["of"] == "all" else chosen.survivors
    assert chosen.kept == min(chosen.survivors, max(1, round(top * whole)))
    assert chosen.kept == sum(chosen.delta[name].kept for name in chosen.delta)
    sizes = {name: change.shape for side in (old, new) for name, change in side.items()}
    assert chosen.parameters == sum(math.prod(shape) for shape in sizes.values())
    if chosen.kept:
        values = torch.cat([chosen.delta[name].values for name in chosen.delta])
        assert values.abs().min() == chosen.threshold


@law
@given(two_deltas(), st.sampled_from(["model", "tensor"]))
def test_keeping_all_of_all_without_the_filter_is_the_new_delta(deltas, scope):
    old, new = deltas
    chosen = select(old, new, 1.0, scope=scope, of="all", conflict=False)
    assert chosen.kept == chosen.parameters == chosen.survivors
    for name, change in chosen.delta.items():
        wanted = new[name].dense() if name in new else torch.zeros(change.shape)
        assert same_bits(change.dense(), wanted)
    assert all(new[name].dense().numel() == 0 for name in new if name not in chosen.delta)


@law
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 99)), max_size=4), tops, rules)
def test_the_unit_of_the_weights_does_not_matter(parts, top, rule):
    def at_scale(scale: float) -> Selection:
        old, new = (
            Delta.from_changes(
                {
                    f"t{number}": Dense(scale * normal(side + seed, size))
                    for number, (size, seed) in enumerate(parts)
                }
            )
            for side in (0, 1000)
        )
        return select(old, new, top, **rule)

    one = at_scale(1.0)
    for scale in (2.0**-30, 2.0**20):
        other = at_scale(scale)
        assert support(other.delta) == support(one.delta)
        assert other.threshold == scale * one.threshold


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_the_order_of_tensors_does_not_matter_where_nothing_ties(scope):
    old, new = large(3), large(4)
    turned = [Delta(reversed(list(side)), side.__getitem__) for side in (old, new)]
    one, two = select(old, new, 0.3, scope=scope), select(*turned, 0.3, scope=scope)
    assert support(one.delta) == support(two.delta)
    assert list(two.delta) == list(reversed(list(one.delta)))


def test_ties_go_to_the_first_tensors_in_the_order_of_new():
    ones = {name: Dense(torch.ones(4)) for name in "abc"}
    old = Delta.from_changes(ones)
    new = Delta.from_changes({name: Dense(-torch.ones(4)) for name in "cab"})
    chosen = select(old, new, 0.5)
    kept = {name: chosen.delta[name].keep().tolist() for name in chosen.delta}
    assert kept == {"c": [True] * 4, "a": [True, True, False, False]}
    assert chosen == Selection(chosen.delta, 12, 12, 6, 2.0)


def test_small_numbers_of_opposite_sign_survive():
    for small in (1e-30, 1e-45):  # their product is zero in fp32
        chosen = select(of(x=[small, small]), of(x=[-small, small]), 1.0)
        assert chosen.delta["x"].keep().tolist() == [True, False]


def test_zeros_absent_tensors_and_what_is_not_a_number_do_not_survive():
    old = of(x=[0.0, -0.0, 1.0, 1.0, math.nan, 1.0], only_old=[1.0])
    new = of(x=[1.0, 1.0, 0.0, -0.0, -1.0, math.nan], only_new=[1.0])
    assert select(old, new, 1.0).survivors == 0
    chosen = select(old, new, 1.0, conflict=False)
    assert (chosen.parameters, chosen.survivors) == (8, 6)
    assert chosen.delta["only_old"].values.tolist() == [0.0]
    assert chosen.delta["only_new"].values.tolist() == [1.0]
    difference = select(old, new, 1.0, conflict=False, keep="difference").delta
    assert difference["only_old"].values.tolist() == [-1.0]


def of(**values: list[float]) -> Delta:
    return Delta.from_changes({name: Dense(torch.tensor(row)) for name, row in values.items()})


# ---- how the deltas are stored and read ----------------------------------------------------------


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("top", [0.1, 1.0])
def test_storage_encoding_and_threads_do_not_matter(tmp_path, scope, top):
    old, new = large(5), large(6)
    wanted = select(old, new, top, scope=scope)
    dense = [Delta(side, lambda name, side=side: Dense(side[name].dense())) for side in (old, new)]
    saved = [old.save(tmp_path / "old"), new.save(tmp_path / "new")]
    for pair in (dense, saved):
        for threads in (1, 3):
            with patch.object(selection, "THREADS", threads):
                found = select(*pair, top, scope=scope)
            assert list(found.delta) == list(wanted.delta)
            assert all(same_change(found.delta[n], wanted.delta[n]) for n in found.delta)
            assert found.threshold == wanted.threshold
    again = found.delta.save(tmp_path / "kept")
    assert all(same_change(again[name], wanted.delta[name]) for name in wanted.delta)


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_every_tensor_is_read_once_if_all_are_alike(scope):
    """A thousand tensors of one kind: the first bracket already covers the threshold."""
    read = []

    def change(name):
        read.append(name)
        return Dense(normal(int(name), 1000))

    old, new = (Delta([str(2 * n + side) for n in range(300)], change) for side in (0, 1))
    renamed = Delta(old.names, lambda name: new[str(int(name) + 1)])
    select(old, renamed, 0.1, scope=scope)
    assert sorted(read) == sorted((*old.names, *new.names))


def test_the_operands_are_left_alone_and_the_base_is_kept():
    about = {"base": "abc", "base_name": "toy"}
    old = Delta.from_changes({"x": Dense(torch.tensor([1.0, 2.0]))}, about | {"side": "old"})
    new = Delta.from_changes({"x": Dense(torch.tensor([-1.0, -2.0]))}, about | {"side": "new"})
    chosen = select(old, new, 1.0)
    chosen.delta["x"].values.zero_()
    assert new["x"].values.tolist() == [-1.0, -2.0]
    assert chosen.delta.provenance == about


@pytest.mark.parametrize(
    "wrong",
    [
        {"top": 0.0},
        {"top": -0.1},
        {"top": 1.01},
        {"top": math.nan},
        {"scope": "layer"},
        {"of": "none"},
        {"keep": "old"},
    ],
)
def test_settings_that_do_not_exist_are_refused(wrong):
    with pytest.raises(BadSetting, match=next(iter(wrong))):
        select(of(x=[1.0]), of(x=[-1.0]), **({"top": 0.5} | wrong))


def test_deltas_of_different_models_are_refused():
    with pytest.raises(TensorMismatch, match="shape"):
        select(of(x=[1.0]), of(x=[1.0, 2.0]), 0.5)
    bases = [Delta.from_changes({}, {"base": base}) for base in ("abc", "xyz")]
    with pytest.raises(TensorMismatch, match="base"):
        select(*bases, 0.5)


def test_nothing_from_nothing():
    assert len(select(Delta.nothing(), Delta.nothing(), 0.5).delta) == 0


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("top", [0.1, 1.0])
def test_a_result_that_waits_in_files_is_the_same(tmp_path, scope, top):
    old, new = large(7), large(8)
    wanted = select(old, new, top, scope=scope)
    found = select(old, new, top, scope=scope, scratch=tmp_path)
    assert list(found.delta) == list(wanted.delta)
    for _ in range(2):  # it can be read again
        assert all(same_change(found.delta[n], wanted.delta[n]) for n in found.delta)
    assert (found.kept, found.threshold) == (wanted.kept, wanted.threshold)
    assert any(tmp_path.iterdir())
    # What is mapped counts as memory of the process, however long ago it was read.
    assert str(tmp_path) not in Path("/proc/self/maps").read_text("utf-8")

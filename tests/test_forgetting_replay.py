"""Replay: which examples come back, how often, and what never does."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader

from unwrite.errors import BadSetting
from unwrite.forgetting import Mixture, ReplayPolicy, ReplaySampler

SCORES = np.random.default_rng(0).normal(size=50)
POLICIES = [ReplayPolicy.uniform(), ReplayPolicy.softmax(0.3), ReplayPolicy.top()]


# ---- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_infinite_temperature_is_uniform_exactly(seed):
    hot = ReplayPolicy.softmax(float("inf"))
    np.testing.assert_array_equal(
        hot.choose(SCORES, 20, seed=seed), ReplayPolicy.uniform().choose(SCORES, 20, seed=seed)
    )
    np.testing.assert_array_equal(hot.probabilities(SCORES), np.full(50, 1 / 50))


@pytest.mark.parametrize("temperature", [0.0, 1e-12])
def test_zero_temperature_is_the_top_exactly(temperature):
    cold = ReplayPolicy.softmax(temperature)
    expected = set(np.argsort(-SCORES)[:20].tolist())
    assert set(cold.choose(SCORES, 20, seed=1).tolist()) == expected
    assert set(ReplayPolicy.top().choose(SCORES, 20, seed=1).tolist()) == expected
    assert cold.probabilities(SCORES).argmax() == SCORES.argmax()


def test_draws_follow_the_softmax():
    scores = np.array([0.0, 0.1, 0.2, 0.5])
    policy = ReplayPolicy.softmax(0.2)
    first = np.zeros(4)
    for seed in range(4000):
        first[policy.choose(scores, 1, seed=seed)[0]] += 1 / 4000
    expected = np.exp(scores / 0.2) / np.exp(scores / 0.2).sum()
    np.testing.assert_allclose(policy.probabilities(scores), expected)
    np.testing.assert_allclose(first, expected, atol=0.03)


def test_only_differences_of_scores_count():
    policy = ReplayPolicy.softmax(0.1)
    np.testing.assert_allclose(
        policy.probabilities(SCORES + 1000), policy.probabilities(SCORES), rtol=1e-9
    )


# ---- laws ----------------------------------------------------------------------------------------


@given(
    data=st.data(),
    scores=st.lists(st.floats(-5, 5), min_size=4, max_size=30),
    policy=st.sampled_from([*POLICIES, ReplayPolicy.softmax(0.0), ReplayPolicy.softmax(1e9)]),
)
@settings(max_examples=60, deadline=None)
def test_nothing_held_out_or_taken_is_ever_chosen(data, scores, policy):
    size = len(scores)
    out = data.draw(st.sets(st.integers(0, size - 1), max_size=size // 2))
    taken = data.draw(st.sets(st.integers(0, size - 1), max_size=size // 3))
    free = size - len(out | taken)
    count = data.draw(st.integers(0, free))
    chosen = policy.choose(scores, count, held_out=out, taken=taken, seed=7).tolist()
    assert len(set(chosen)) == count
    assert not set(chosen) & (out | taken)
    chances = policy.probabilities(scores, out, taken)
    assert chances.sum() == pytest.approx(1)
    assert not chances[sorted(out | taken)].any()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_seed_gives_the_same_choice_and_another_another(policy):
    one, other, third = (policy.choose(SCORES, 10, seed=seed).tolist() for seed in (0, 0, 1))
    assert one == other != third


def test_how_many_are_replayed():
    assert ReplayPolicy.uniform(1 / 32).count(320) == 11
    assert ReplayPolicy.uniform(1 / 8).count(7) == 1


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: ReplayPolicy("best"), "uniform, softmax or top"),
        (lambda: ReplayPolicy(temperature=-1.0), "temperature of at least 0"),
        (lambda: ReplayPolicy(ratio=0.0), "ratio in"),
        (lambda: POLICIES[0].choose([1.0, np.nan], 1), "one score for every example"),
        (lambda: POLICIES[0].choose([1.0, 2.0], 2, held_out=[1]), "only 1 may be"),
        (lambda: POLICIES[0].choose([1.0], 1, held_out=[0]), "No example may be replayed"),
        (lambda: POLICIES[0].choose([1.0], 1, held_out=[4]), "outside the 1 examples"),
        (lambda: ReplaySampler(64, [1.0, 2.0], POLICIES[0]), "replays 3 examples"),
    ],
)
def test_what_cannot_be_is_refused(act, said):
    with pytest.raises(BadSetting, match=said):
        act()


# ---- mixtures ------------------------------------------------------------------------------------

TASK = [f"task {number}" for number in range(20)]
UPSTREAM = [f"old {number}" for number in range(50)]


def test_a_mixture_holds_the_task_once_and_in_order_and_the_chosen_spread_evenly():
    mixture = Mixture(TASK, UPSTREAM, [7, 3, 9, 1])
    items = [mixture[index] for index in range(len(mixture))]
    assert [item for item in items if item.startswith("task")] == TASK
    places = [index for index, item in enumerate(items) if item.startswith("old")]
    assert [items[place] for place in places] == ["old 7", "old 3", "old 9", "old 1"]
    assert np.diff([-1, *places, len(items)]).tolist() == [5, 5, 5, 5, 5]
    assert mixture.served == [7, 3, 9, 1]


def test_a_mixture_of_nothing_old_is_the_task():
    assert list(DataLoader(Mixture(TASK, UPSTREAM, []), batch_size=None)) == TASK


def test_only_what_is_still_to_come_is_refilled():
    mixture = Mixture(TASK, UPSTREAM, [7, 3, 9])
    seen = [mixture[index] for index in range(len(mixture) // 2)]
    assert [item for item in seen if item.startswith("old")] == ["old 7"]
    assert mixture.waiting == 2
    mixture.refill([11, 12])
    rest = [mixture[index] for index in range(len(mixture) // 2, len(mixture))]
    assert [item for item in rest if item.startswith("old")] == ["old 11", "old 12"]
    assert mixture.served == [7, 11, 12]
    assert mixture[5] == "old 7"  # a second epoch repeats what was served
    assert mixture.served == [7, 11, 12]
    with pytest.raises(BadSetting, match="0 open slots"):
        mixture.refill([1])


def test_a_sampler_brings_the_whole_task_and_never_the_held_out():
    policy = ReplayPolicy.softmax(0.5, ratio=1 / 4)
    sampler = ReplaySampler(len(TASK), SCORES, policy, held_out=range(10), seed=3)
    loader = DataLoader(ConcatDataset([TASK, UPSTREAM]), batch_size=None, sampler=sampler)
    epochs = [list(loader) for _ in range(6)]
    for items in epochs:
        assert len(items) == len(sampler) == 26
        assert sorted(item for item in items if item.startswith("task")) == sorted(TASK)
    old = [{item for item in items if item.startswith("old")} for items in epochs]
    assert all(len(one) == 6 for one in old)
    assert len(set.union(*old)) == 36  # six epochs of six: nothing twice while there is more
    assert not set.union(*old) & {f"old {number}" for number in range(10)}
    assert epochs[0] != epochs[1]
    again = ReplaySampler(len(TASK), SCORES, policy, held_out=range(10), seed=3)
    assert list(again) == [
        int(item.split()[1]) + (0 if item.startswith("task") else 20) for item in epochs[0]
    ]


def test_a_sampler_begins_again_when_all_have_had_their_turn():
    sampler = ReplaySampler(8, np.arange(3.0), ReplayPolicy.top(1 / 8), held_out=[2])
    assert [sorted(i - 8 for i in sampler if i >= 8) for _ in range(2)] == [[0, 1], [0, 1]]

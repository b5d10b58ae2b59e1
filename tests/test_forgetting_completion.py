"""Forecasting: laws that every model keeps, and what each is exact on."""

import numpy as np
import pytest

from unwrite.errors import BadSetting
from unwrite.forgetting import (
    Additive,
    ExampleMean,
    Factorization,
    ForgettingMatrix,
    LogisticFactorization,
    Neighbours,
    NuclearNorm,
    PublishedFactorization,
    PublishedLogistic,
    PublishedNeighbours,
    Random,
    TaskMean,
    d_optimal,
)
from unwrite.forgetting.published import descend

REAL = {
    "additive": Additive(),
    "factorization": Factorization(rank=3),
    "neighbours": Neighbours(),
    "nuclear norm": NuclearNorm(),
    "published factorization": PublishedFactorization(rank=2, epochs=5),
    "published neighbours": PublishedNeighbours(epochs=5),
    "example mean": ExampleMean(),
    "task mean": TaskMean(),
    "random": Random(),
}
BINARY = {
    "logistic": LogisticFactorization(rank=2),
    "logistic additive": LogisticFactorization(rank=0),
    "published logistic": PublishedLogistic(rank=2, iterations=50),
    "published logistic additive": PublishedLogistic(additive=True, iterations=50),
}
ALL = REAL | BINARY
# The published models are fitted in absolute units, on purpose.
SCALE_FREE = [name for name in REAL if not name.startswith("published")]


def matrix(values):
    tasks, examples = np.asarray(values).shape
    return ForgettingMatrix(
        values, tuple(f"t{n}" for n in range(tasks)), tuple(f"e{n}" for n in range(examples))
    )


def low_rank(seed=0, tasks=20, examples=80, rank=1, noise=0.0, scale=1.0):
    """Past tasks (tasks, examples) and one new task's row, of exact rank but for the noise."""
    random = np.random.default_rng(seed)
    values = random.normal(size=(tasks + 1, rank)) @ random.normal(size=(rank, examples))
    values += noise * random.normal(size=values.shape)
    return scale * values[:-1], scale * values[-1]


def revealed(row, count, seed=0):
    """The row with ``count`` entries left, and where the others are."""
    at = np.random.default_rng(seed).choice(len(row), count, replace=False)
    seen = np.full(len(row), np.nan)
    seen[at] = row[at]
    return seen, np.isnan(seen)


def relative_error(model, past, row, count=30, seed=0):
    seen, hidden = revealed(row, count, seed)
    predicted = model.fit(matrix(past)).predict(seen).values
    return np.sqrt(((predicted - row)[hidden] ** 2).mean() / (row[hidden] ** 2).mean())


# ---- laws of all models --------------------------------------------------------------------------


def data_for(name):
    past, row = low_rank(rank=2, noise=0.3, tasks=12, examples=40)
    if name in BINARY:
        past, row = (past > 0.8).astype(float), (row > 0.8).astype(float)
    return past, row


@pytest.mark.parametrize("name", ALL)
def test_a_forecast_has_the_promised_shape_and_is_finite(name):
    past, row = data_for(name)
    prediction = ALL[name].fit(matrix(past)).predict(revealed(row, 10)[0])
    for values in (prediction.values, prediction.std):
        assert values.shape == row.shape
        assert values.dtype == np.float64
        assert np.isfinite(values).all()
    assert (prediction.std >= 0).all()


# Not those that start from factors drawn column by column.
@pytest.mark.parametrize(
    "name", [name for name in REAL if name != "random"] + ["logistic additive"]
)
def test_the_order_of_the_examples_plays_no_part(name):
    past, row = data_for(name)
    order = np.random.default_rng(1).permutation(len(row))
    seen, _ = revealed(row, 10)
    model = ALL[name]
    straight = model.fit(matrix(past)).predict(seen).values
    permuted = model.fit(matrix(past[:, order])).predict(seen[order]).values
    # Factors that start at random, or visit entries in their order, agree but for that.
    enough = {"published factorization": 2e-2, "published neighbours": 2e-2}.get(name, 1e-6)
    np.testing.assert_allclose(permuted, straight[order], atol=enough)


@pytest.mark.parametrize("name", SCALE_FREE)
def test_scale_does_not_matter(name):
    past, row = data_for(name)
    seen, _ = revealed(row, 10)
    large = REAL[name].fit(matrix(past)).predict(seen)
    small = REAL[name].fit(matrix(0.01 * past)).predict(0.01 * seen)
    np.testing.assert_allclose(small.values, 0.01 * large.values, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(small.std, 0.01 * large.std, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_entries_nobody_has_seen_are_never_read(name):
    """What stands behind NaN is not there to be read: the array that is passed says NaN, and
    every way of touching it would show in the forecast."""
    past, row = data_for(name)
    past = past.copy()
    past[0, :5] = np.nan
    past[3, 7] = np.nan
    prediction = ALL[name].fit(matrix(past)).predict(revealed(row, 10)[0])
    assert np.isfinite(prediction.values).all()
    assert np.isfinite(prediction.std).all()


@pytest.mark.parametrize("name", ALL)
def test_the_past_is_left_as_it_was(name):
    past, row = data_for(name)
    made = matrix(past)
    seen, _ = revealed(row, 10)
    kept = seen.copy()
    ALL[name].fit(made).predict(seen)
    np.testing.assert_array_equal(made.values, past)
    np.testing.assert_array_equal(seen, kept)


@pytest.mark.parametrize("name", ALL)
def test_the_same_forecast_twice_is_the_same(name):
    past, row = data_for(name)
    seen, _ = revealed(row, 10)
    one, other = (ALL[name].fit(matrix(past)).predict(seen).values for _ in range(2))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ALL)
def test_a_task_that_nobody_looked_at_can_be_forecast(name):
    past, row = data_for(name)
    prediction = ALL[name].fit(matrix(past)).predict(np.full(len(row), np.nan))
    assert np.isfinite(prediction.values).all()


@pytest.mark.parametrize("name", ALL)
def test_a_row_of_another_length_is_refused(name):
    past, row = data_for(name)
    with pytest.raises(BadSetting, match="fitted on 40 examples"):
        ALL[name].fit(matrix(past)).predict(row[:-1])


@pytest.mark.parametrize("name", ALL)
def test_no_past_is_refused(name):
    with pytest.raises(BadSetting, match="empty"):
        ALL[name].fit(ForgettingMatrix.empty(["a", "b"]))
    with pytest.raises(BadSetting, match="Nothing was observed of the task 't1'"):
        ALL[name].fit(matrix([[1.0, 0.0], [np.nan, np.nan]]))


# ---- exactness -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [Additive(), Factorization(), Neighbours(), NuclearNorm()])
def test_additive_data_are_forecast_exactly(model):
    random = np.random.default_rng(0)
    values = random.normal(size=(9, 1)) + random.normal(size=(1, 60))
    assert relative_error(model, values[:-1], values[-1], count=4) < 1e-6


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_exact_low_rank_is_forecast_exactly(rank, scale):
    past, row = low_rank(rank=rank, scale=scale)
    assert relative_error(Factorization(rank=rank), past, row) < 1e-5
    assert relative_error(Factorization(rank=5), past, row) < 1e-5
    assert relative_error(Additive(), past, row) > 0.3


def test_the_error_goes_to_zero_with_the_noise():
    errors = [
        np.mean([relative_error(Factorization(3), *low_rank(s, rank=3, noise=n)) for s in range(5)])
        for n in (0.3, 0.03, 0.003)
    ]
    assert errors[0] > 5 * errors[1] > 25 * errors[2]


def test_less_shrinking_brings_the_nuclear_norm_to_the_exact_answer():
    past, row = low_rank(rank=2)
    strict, loose = (relative_error(NuclearNorm(s), past, row) for s in (0.3, 1e-4))
    assert loose < 1e-3 < strict


def test_the_published_factorization_finds_exact_rank_one_at_unit_scale_only():
    """METHODS 5.4, scale warning: on small numbers the factors stay near zero, unless scaled."""
    large, small = (low_rank(seed=3, examples=50, scale=scale) for scale in (1.0, 0.05))
    published = PublishedFactorization(epochs=500)
    additive = relative_error(Additive(), *large)
    assert relative_error(published, *large) < 0.02
    assert relative_error(published, *small) > 0.7 * additive
    assert relative_error(PublishedFactorization(epochs=500, scaled=True), *small) < 0.02


def test_the_fast_way_is_no_worse_than_the_published_one():
    """Pooled over 16 new tasks that the published way fits side by side. As in real matrices, some
    examples are noisier than others."""
    everything, _ = low_rank(1, tasks=36, rank=3)
    random = np.random.default_rng(1)
    noise = 0.5 * np.exp(0.7 * random.normal(size=everything.shape[1]))
    everything = everything + noise * random.normal(size=everything.shape)
    past, new = everything[:20], everything[20:]
    seen = np.stack([revealed(row, 30, seed)[0] for seed, row in enumerate(new)])
    hidden = np.isnan(seen)
    fitted = Factorization(5).fit(matrix(past))
    fast = np.stack([fitted.predict(row).values for row in seen])
    published = PublishedFactorization(epochs=150, lr=0.01).fit(matrix(past)).predict_all(seen)
    slow = np.stack([one.values for one in published])
    fast_error, slow_error = (((one - new)[hidden] ** 2).mean() ** 0.5 for one in (fast, slow))
    assert fast_error < 1.02 * slow_error
    assert slow_error < 0.8 * new[hidden].std()  # the published way is no straw man


def test_descent_side_by_side_is_descent_entry_by_entry():
    """Against three plain loops in the published order, gaps and all."""
    past, row = low_rank(rank=2, tasks=6, examples=9)
    past = past.copy()
    past[2, 4] = past[0, 0] = np.nan
    rows = np.stack([revealed(row, 4, 0)[0], revealed(row, 5, 1)[0]])
    model = PublishedFactorization(rank=3, epochs=7, lr=0.05, decay=0.02, spread=0.1)
    together = descend(past, rows, model)
    for run, new in enumerate(rows):
        np.testing.assert_allclose(together.new[run], plainly(past, new, model), rtol=1e-12)


@pytest.mark.parametrize("tasks", [4, 12])
def test_descent_works_on_matrices_taller_than_wide(tasks):
    past, row = low_rank(rank=1, tasks=tasks, examples=5)
    seen, _ = revealed(row, 3)
    model = PublishedFactorization(rank=1, epochs=3, lr=0.05, spread=0.1)
    (found,) = descend(past, seen[None], model).new
    np.testing.assert_allclose(found, plainly(past, seen, model), rtol=1e-12)


def plainly(past, new, model):
    values = np.vstack([past, new])
    rows, columns = values.shape
    random = np.random.default_rng(model.seed)
    p = random.normal(0, model.spread, (rows, model.rank))
    q = random.normal(0, model.spread, (columns, model.rank))
    mean = values[~np.isnan(values)].mean()
    b, c = np.zeros(rows), np.zeros(columns)
    for _ in range(model.epochs):
        for t in range(rows):
            for j in range(columns):
                if np.isnan(values[t, j]):
                    continue
                e = values[t, j] - (mean + b[t] + c[j] + p[t] @ q[j])
                b[t] += model.lr * (e - model.decay * b[t])
                c[j] += model.lr * (e - model.decay * c[j])
                p_old = p[t].copy()
                p[t] += model.lr * (e * q[j] - model.decay * p[t])
                q[j] += model.lr * (e * p_old - model.decay * q[j])
    return mean + b[-1] + c + q @ p[-1]


def test_neighbours_recognise_a_twin():
    """A new task that repeats a past one is forecast as that one, at any scale."""
    past, _ = low_rank(rank=8, tasks=15)
    for scale in (1.0, 0.01):
        assert relative_error(Neighbours(), scale * past, scale * past[4]) < 0.2
    assert relative_error(PublishedNeighbours(epochs=200), 0.01 * past, 0.01 * past[4]) > 0.5


def test_gaps_in_the_past_are_bridged():
    past, row = low_rank(rank=2, tasks=25, examples=60)
    past = past.copy()
    past[np.random.default_rng(5).random(past.shape) < 0.2] = np.nan
    assert relative_error(Factorization(2), past, row) < 0.05
    assert relative_error(Additive(), past, row) > 0.3


# ---- uncertainty ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [Additive(), Factorization(3), NuclearNorm(), TaskMean()])
def test_the_stated_uncertainty_is_the_one_met(model):
    """Root mean square of error / std is near 1 over many new tasks."""
    ratios = []
    for seed in range(25):
        past, row = low_rank(seed, tasks=40, rank=3, noise=0.5)
        seen, hidden = revealed(row, 15, seed)
        prediction = model.fit(matrix(past)).predict(seen)
        ratios.append(((row - prediction.values)[hidden] / prediction.std[hidden]) ** 2)
    assert 0.7 < np.sqrt(np.mean(ratios)) < 1.4


def test_more_observations_make_a_forecast_surer():
    past, row = low_rank(rank=3, noise=0.3)
    fitted = Factorization(3).fit(matrix(past))
    sure = [fitted.predict(revealed(row, count)[0]).std.mean() for count in (0, 5, 40)]
    assert sure[0] > sure[1] > sure[2]


def test_the_number_of_forgotten_examples_is_forecast_with_its_uncertainty():
    hits, stated = [], []
    for seed in range(30):
        past, row = low_rank(seed, tasks=40, examples=200, rank=3, noise=0.5)
        seen, _ = revealed(row, 15, seed)
        count, std = Factorization(3).fit(matrix(past)).predict(seen).count_above(1.0)
        hits.append((row > 1.0).sum() - count)
        stated.append(std)
    assert 0.6 < np.sqrt(np.mean(np.square(hits)) / np.mean(np.square(stated))) < 1.6


def test_certain_forecasts_are_counted_exactly():
    past = np.array([[1.0, -1.0, 2.0], [1.0, -1.0, 2.0], [1.0, -1.0, 2.0]])
    prediction = Factorization().fit(matrix(past)).predict([np.nan] * 3)
    count, std = prediction.count_above()
    assert count == pytest.approx(2)
    assert std == pytest.approx(0, abs=1e-6)
    assert prediction.ranking.tolist() == [2, 0, 1]


# ---- binary --------------------------------------------------------------------------------------


def test_logistic_models_beat_chance_on_binary_data_and_find_the_odds():
    random = np.random.default_rng(0)
    logits = 1.5 * random.normal(size=(61, 2)) @ random.normal(size=(2, 60)) - 1
    values = (random.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(float)
    seen, hidden = revealed(values[-1], 30)
    probabilities = LogisticFactorization(rank=2).fit(matrix(values[:-1])).predict(seen).values
    constant = values[:-1].mean()
    truth = values[-1][hidden]
    assert ((probabilities[hidden] - truth) ** 2).mean() < 0.8 * ((constant - truth) ** 2).mean()
    assert ((probabilities > 0) & (probabilities < 1)).all()


def test_separable_data_stay_finite():
    values = np.repeat([[0.0, 1.0]], 6, axis=0)
    prediction = LogisticFactorization().fit(matrix(values)).predict([0.0, np.nan])
    assert prediction.values[1] > 0.9
    count, _ = prediction.count_above()
    assert 0.9 < count < 1.3


@pytest.mark.parametrize("name", BINARY)
def test_logistic_models_refuse_other_values(name):
    with pytest.raises(BadSetting, match=r"0 .kept. and 1 .forgotten. only"):
        BINARY[name].fit(matrix([[0.0, 0.5], [1.0, 0.0]]))
    fitted = BINARY[name].fit(matrix([[0.0, 1.0], [1.0, 0.0]]))
    with pytest.raises(BadSetting, match=r"forgotten. only"):
        fitted.predict([0.3, np.nan])


# ---- which to observe ----------------------------------------------------------------------------


def test_d_optimal_choice_is_the_best_single_step_and_never_repeats():
    past, _ = low_rank(rank=3, noise=0.4, tasks=30)
    fitted = Factorization(3).fit(matrix(past))
    chosen = d_optimal(fitted, 12)
    assert len(set(chosen.tolist())) == 12
    scaled = fitted.space.basis / fitted.space.weights[:, None]

    def information(at):
        return np.linalg.slogdet(
            fitted.ridge * np.eye(scaled.shape[1]) + scaled[at].T @ scaled[at]
        )[1]

    for count in (1, 4, 12):
        before = list(chosen[: count - 1])
        rest = [j for j in range(scaled.shape[0]) if j not in before]
        best = max(information([*before, j]) for j in rest)
        assert information(list(chosen[:count])) == pytest.approx(best, rel=1e-9)


def test_d_optimal_choice_forecasts_better_than_chance():
    chance, chosen = [], []
    for seed in range(12):
        past, row = low_rank(seed, rank=3, noise=0.4, tasks=40)
        fitted = Factorization(3).fit(matrix(past))
        for found, at in (
            (chosen, d_optimal(fitted, 6)),
            (chance, np.random.default_rng(seed).choice(len(row), 6, replace=False)),
        ):
            seen = np.full(len(row), np.nan)
            seen[at] = row[at]
            hidden = np.isnan(seen)
            found.append(((fitted.predict(seen).values - row)[hidden] ** 2).mean())
    assert np.mean(chosen) < 0.9 * np.mean(chance)


def test_d_optimal_choice_keeps_to_what_is_allowed():
    past, _ = low_rank(rank=2)
    fitted = Factorization(2).fit(matrix(past))
    assert set(d_optimal(fitted, 3, allowed=[5, 9, 11]).tolist()) == {5, 9, 11}
    with pytest.raises(BadSetting, match="4 examples cannot be chosen from 3"):
        d_optimal(fitted, 4, allowed=[5, 9, 11])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Factorization(rank=-1),
        lambda: Factorization(ridge=0.0),
        lambda: NuclearNorm(strength=1.0),
        lambda: Neighbours(k=0),
        lambda: Neighbours(width=0.0),
        lambda: LogisticFactorization(ridge=0.0),
    ],
)
def test_settings_without_sense_are_refused(make):
    with pytest.raises(BadSetting):
        make()

"""The published test of forecasts: who may see what, and what the scores mean."""

import numpy as np
import pytest

from unwrite.errors import BadSetting
from unwrite.forgetting import (
    Additive,
    Factorization,
    ForgettingMatrix,
    Prediction,
    Random,
    Trial,
    evaluate,
)
from unwrite.forgetting.protocol import average_precision, lift, score, summary


@pytest.fixture
def matrix():
    random = np.random.default_rng(0)
    values = random.normal(size=(20, 3)) @ random.normal(size=(3, 60))
    values += 0.2 * random.normal(size=values.shape)
    return ForgettingMatrix(
        values, tuple(f"t{n}" for n in range(20)), tuple(f"e{n}" for n in range(60))
    )


class Spy:
    """Keeps what it is shown, and forecasts zeros."""

    def __init__(self):
        self.training, self.rows = None, []

    def fit(self, matrix):
        self.training = matrix
        return self

    def predict(self, seen):
        self.rows.append(seen)
        zeros = np.zeros(len(seen))
        return Prediction(zeros, zeros, np.zeros((len(seen), 1)))


def test_a_model_sees_past_tasks_and_the_revealed_entries_only(matrix):
    spy = Spy()
    evaluate(matrix, {"spy": spy}, [3, 7], trial=Trial(revealed=10, seeds=(0, 1)))
    assert not {"t3", "t7"} & set(spy.training.tasks)
    assert len(spy.training.tasks) == 18
    assert len(spy.rows) == 4
    for row, task in zip(spy.rows, [3, 7, 3, 7], strict=True):
        shown = ~np.isnan(row)
        assert shown.sum() == 10
        np.testing.assert_array_equal(row[shown], matrix.values[task][shown])
    same_seed = [np.flatnonzero(~np.isnan(row)).tolist() for row in spy.rows]
    assert same_seed[0] == same_seed[1] != same_seed[2] == same_seed[3]


def test_what_is_hidden_cannot_change_a_forecast(matrix):
    """The rest of the new tasks' rows is replaced by nonsense: every forecast stays bit for bit."""

    class Recorded(Factorization):
        def fit(self, matrix):
            fitted, kept = super().fit(matrix), forecasts[-1]

            class Recording:
                def predict(self, seen):
                    kept.append(fitted.predict(seen))
                    return kept[-1]

            return Recording()

    forecasts: list[list] = []
    random = np.random.default_rng(0)
    shown = random.choice(60, 30, replace=False)
    spoiled = matrix.values.copy()
    for task in (3, 7):
        hidden = np.setdiff1d(np.arange(60), shown)
        spoiled[task, hidden] = 1e6 * random.normal(size=len(hidden))
    for values in (matrix.values, spoiled):
        forecasts.append([])
        changed = ForgettingMatrix(values, matrix.tasks, matrix.examples)
        evaluate(changed, {"model": Recorded(3)}, [3, 7], trial=Trial(seeds=(0,)))
    for one, other in zip(*forecasts, strict=True):
        np.testing.assert_array_equal(one.values, other.values)


def test_scores_are_taken_on_hidden_observed_entries_only(matrix):
    values = matrix.values.copy()
    values[3, :20] = np.nan
    gappy = ForgettingMatrix(values, matrix.tasks, matrix.examples)
    (row,) = evaluate(gappy, {"spy": Spy()}, [3], trial=Trial(revealed=10, seeds=(0,)))
    shown = np.random.default_rng(0).choice(60, 10, replace=False)
    assert row["n"] == 60 - len(set(range(20)) | set(shown.tolist()))


def test_a_model_that_knows_beats_chance_on_every_score(matrix):
    models = {"factorization": Factorization(3), "additive": Additive(), "chance": Random()}
    rows = evaluate(matrix, models, [0, 5, 10, 15], trial=Trial(revealed=20, seeds=(0, 1, 2)))
    assert len(rows) == 9
    found = summary(rows)
    for metric in ("f1", "pr_auc", "lift", "precision", "recall"):
        assert found["factorization"][metric]["mean"] > found["chance"][metric]["mean"]
    assert found["factorization"]["rmse"]["mean"] < 0.6 * found["additive"]["rmse"]["mean"]
    assert found["factorization"]["rmse"]["std"] > 0


def test_drawing_with_replacement_reveals_fewer(matrix):
    spy = Spy()
    evaluate(matrix, {"spy": spy}, [0], trial=Trial(seeds=(0,), replace=True))
    assert (~np.isnan(spy.rows[0])).sum() < 30


def test_chosen_observations_do_not_depend_on_the_seed(matrix):
    spy = Spy()
    evaluate(matrix, {"spy": spy}, [0], trial=Trial(seeds=(0, 1), choose="d-optimal"))
    np.testing.assert_array_equal(*spy.rows)


@pytest.mark.parametrize(
    ("new", "past", "trial", "said"),
    [
        ([], None, Trial(), "past tasks and new tasks"),
        ([1], [1, 2], Trial(), "none may be both"),
        ([1], None, Trial(revealed=60), "none is left"),
    ],
)
def test_a_test_without_sense_is_refused(matrix, new, past, trial, said):
    with pytest.raises(BadSetting, match=said):
        evaluate(matrix, {"additive": Additive()}, new, past, trial)


@pytest.mark.parametrize("wrong", [{"choose": "best"}, {"seeds": ()}, {"top": 0.0}])
def test_settings_without_sense_are_refused(wrong):
    with pytest.raises(BadSetting):
        Trial(**wrong)


# ---- scores --------------------------------------------------------------------------------------


def test_scores_of_a_small_case_by_hand():
    truth = np.array([1.0, 1.0, -1.0, -1.0, 2.0])
    predicted = np.array([0.5, -0.5, 0.5, -0.5, 3.0])
    found = score(truth, predicted, top=0.2)
    assert found["n"] == 5
    assert found["rmse"] == pytest.approx(np.sqrt((0.25 + 2.25 + 2.25 + 0.25 + 1) / 5))
    assert (found["precision"], found["recall"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert found["f1"] == pytest.approx(2 / 3)
    # First the 3.0 (right), then two tied at 0.5 (one right), then two tied (one right).
    assert found["pr_auc"] == pytest.approx((1 / 1 + 2 / 3 + 3 / 5) / 3)
    assert found["lift"] == pytest.approx(1 / 0.6)


def test_a_perfect_forecast_has_perfect_scores():
    truth = np.array([1.0, -1.0, 2.0, -2.0])
    found = score(truth, truth, top=0.5)
    assert (found["rmse"], found["f1"], found["pr_auc"], found["lift"]) == (0, 1, 1, 2)


def test_a_constant_forecast_scores_the_base_rate():
    truth = np.arange(10) < 3
    assert average_precision(truth, np.zeros(10)) == pytest.approx(0.3)
    assert lift(truth, np.zeros(10), 0.2) == pytest.approx(1)


def test_scores_without_cases_are_none():
    found = score(np.array([-1.0, -2.0]), np.array([1.0, -1.0]))
    assert [found[key] for key in ("f1", "recall", "pr_auc", "lift")] == [None] * 4

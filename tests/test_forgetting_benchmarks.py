"""The forgetting benchmarks run, in tiny: their figures come from elsewhere."""

import numpy as np
import pytest

import unwrite
from benchmarks import forecast_speed, forgetting_matrix, measuring_examples
from unwrite.forgetting import UpstreamExample, measure
from unwrite.testing import toy_edits
from unwrite.training import Pair


def test_a_matrix_is_collected_and_measured(worlds, tmp_path):
    edits = toy_edits()
    learned = {
        f"{kind}/{number}": [Pair(edit.prompt, edit.new) for edit in edits[start : start + 2]]
        for kind, first in (("bank", 0), ("atlas", 12))
        for number, start in enumerate(range(first, first + 8, 2))
    }
    watched = [UpstreamExample(str(edit.id), edit.prompt, edit.old) for edit in edits]
    result = forgetting_matrix.run(
        str(worlds().folder),
        tmp_path,
        learned,
        watched,
        tuner=unwrite.LoRA(epochs=1, until="epochs"),
    )
    assert (result["tasks"], result["examples"]) == (8, 30)
    assert result["rank_profile"]["rank"][-1] == pytest.approx(1)
    assert result["rank_profile_of_updates"]["tasks"] == 4


def test_bundled_text_is_enough_for_the_matrix_that_is_wanted():
    examples = forgetting_matrix.examples_of_bundled_text()
    tasks = forgetting_matrix.tasks_of_bundled_text(None, 48)
    assert len({one.name for one in examples}) == len(examples) >= 1000
    assert len(tasks) >= 60
    assert all(3 < len(pairs) <= 48 for pairs in tasks.values())


def test_the_plain_loop_measures_the_same_also_of_plain_text(worlds):
    model = unwrite.load(worlds().folder)
    examples = [UpstreamExample(str(edit.id), edit.prompt, edit.old) for edit in toy_edits()]
    examples.append(UpstreamExample("text", None, "the capital of the land"))
    plain = measuring_examples.slowly(model, examples)
    np.testing.assert_allclose(plain, measure(model, examples), rtol=1e-5)


def test_made_up_matrices_are_easier_than_chance():
    past, new = forecast_speed.made_up(20, 60, 2)
    seen = forecast_speed.revealed(new[0], 0)
    forecast = unwrite.forgetting.Factorization(5).fit(forecast_speed.labelled(past)).predict(seen)
    hidden = np.isnan(seen)
    assert ((forecast.values - new[0])[hidden] ** 2).mean() < new[0][hidden].var()

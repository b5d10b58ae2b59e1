"""The arithmetic of the study of graceful forgetting: what is compared with what."""

import numpy as np
import pytest

from benchmarks.graceful_study import FORGET, LEARN, difference, summarise
from unwrite.tasks import task_names


def row(variant, forget, rights, seed=0, perplexity=10.0):
    return {
        "learn": "a",
        "forget": forget,
        "variant": variant,
        "seed": seed,
        "right": rights,
        "perplexity": perplexity,
        "train_seconds": 1.0,
    }


def test_runs_are_compared_with_the_plain_run_of_their_task_and_seed():
    plain = [["a", True], ["a", False], ["b", True], ["b", True], ["c", False]]
    better = [["a", True], ["a", True], ["b", False], ["b", True], ["c", True]]
    rows = [row("plain", "", plain), row("top", "b", better, perplexity=11.0)]
    rows.append(row("top", "b", better, seed=1))  # its plain run is missing: left out
    found = summarise(rows)
    assert found["plain_accuracy"] == {"a, seed 0": 0.5}
    assert found["learned"]["top"]["difference"] == 0.5
    assert found["learned"]["top"]["runs"] == 1
    assert found["forgotten"]["top"]["difference"] == -0.5  # of b alone
    assert found["perplexity_ratio"]["top"] == pytest.approx(1.1)
    mixed = summarise([rows[0], row("top", "mixed", better)])
    assert mixed["forgotten"]["top"]["difference"] == pytest.approx(0.0)  # of b and c


def test_the_interval_is_paired():
    plain = np.array([0.0, 1.0] * 50)
    same = difference([(plain, plain)])
    assert same["difference"] == same["low"] == same["high"] == 0.0
    up = difference([(np.ones(100), plain)])
    assert up["low"] < up["difference"] == 0.5 < up["high"]


def test_parameters_are_chosen_on_other_tasks_than_reported():
    chosen = {*LEARN["develop"], *FORGET["develop"]}
    reported = {*LEARN["report"], *FORGET["report"]}
    assert not chosen & reported
    assert chosen | reported <= set(task_names())
    assert len(LEARN["report"]) >= 5 and len(FORGET["report"]) >= 5

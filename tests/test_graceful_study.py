"""The study of graceful forgetting: what is compared with what, and that it goes on."""

import json
import sys

import pytest

from benchmarks import graceful_study, measure
from benchmarks.graceful_study import FORGET, LEARN, PUBLIC, Chosen, Gaps, of_whole_seeds, summarise
from unwrite.tasks import Example, Task, task_names


def row(variant, forget, rights, seed=0, perplexity=10.0, loss=(1.0, 2.0)):
    return {
        "learn": "a",
        "forget": forget,
        "variant": variant,
        "seed": seed,
        "right": rights,
        "loss": list(loss),
        "perplexity": perplexity,
        "train_seconds": 1.0,
    }


def test_runs_are_compared_with_the_plain_run_of_their_task_and_seed():
    plain, better = {"a": "10", "b": "11", "c": "0"}, {"a": "11", "b": "01"}
    rows = [row("plain", "", plain), row("top", "b", better, perplexity=11.0, loss=(0.5, 2.0))]
    rows.append(row("top", "b", better, seed=1))  # its plain run is missing: left out
    found = summarise(rows)
    assert found["plain_accuracy"] == {"a, seed 0": 0.5}
    assert found["learned"]["top"]["difference"] == 0.5
    assert found["learned"]["top"]["runs"] == 1
    assert found["forgotten"]["top"]["difference"] == -0.5  # of b alone
    assert found["plain_loss"] == {"a, seed 0": 1.5}
    assert found["loss"]["top"]["difference"] == -0.25
    assert found["perplexity_ratio"]["top"] == pytest.approx(1.1)
    assert found["by_learned"]["a"] == found["by_forgotten"]["b"] == found["learned"]["top"]
    assert found["loss_by_learned"]["a"] == found["loss_by_forgotten"]["b"] == found["loss"]["top"]
    mixed = summarise([rows[0], row("top", "mixed", better | {"c": "1"})])
    assert mixed["forgotten"]["top"]["difference"] == pytest.approx(0.0)  # of b and c


def test_only_finished_seeds_are_reported():
    runs = [(0, "a"), (0, "b"), (1, "a")]
    rows = [{"seed": seed, "learn": learn} for seed, learn in runs for _ in range(2)]
    assert of_whole_seeds(rows) == rows[:4]
    assert of_whole_seeds(rows[:2]) == rows[:2], "one task is as much as there is"
    with pytest.raises(SystemExit, match="No seed is finished"):
        of_whole_seeds(rows[:3])


def test_the_interval_is_paired():
    plain = {number: number % 2.0 for number in range(100)}
    same, up = Gaps(), Gaps()
    same.add("plain run", plain, plain)
    found = same.summary()
    assert found["difference"] == found["low"] == found["high"] == 0.0
    up.add("plain run", dict.fromkeys(plain, 1.0), plain)
    found = up.summary()
    assert found["low"] < found["difference"] < found["high"]
    assert found["difference"] == pytest.approx(0.5)


def test_runs_against_one_plain_run_are_no_evidence_of_their_own():
    """Ten equal runs against one plain run say as much as one; against ten, more."""
    plain = {number: number % 2.0 for number in range(100)}
    better = dict.fromkeys(plain, 1.0)
    once, repeated, ten = Gaps(), Gaps(), Gaps()
    once.add(0, better, plain)
    for number in range(10):
        repeated.add(0, better, plain)
        ten.add(number, better, plain)

    def width(gaps):
        found = gaps.summary()
        return found["high"] - found["low"]

    assert width(repeated) == pytest.approx(width(once))
    assert width(ten) < width(once) / 2
    assert repeated.summary()["runs"] == 10


def test_every_run_counts_the_same_however_many_examples_it_asks():
    gaps = Gaps()
    gaps.add(0, dict.fromkeys(range(10), 1.0), dict.fromkeys(range(10), 0.0))
    gaps.add(0, {"other": 0.0}, {"other": 0.0})
    assert gaps.summary()["difference"] == pytest.approx(0.5)


def test_parameters_are_chosen_on_other_tasks_than_reported():
    chosen = {*LEARN["develop"], *FORGET["develop"]}
    reported = {*LEARN["report"], *FORGET["report"]}
    assert not chosen & reported
    assert chosen | reported <= set(task_names())
    assert len(LEARN["report"]) >= 5 and len((*FORGET["report"], *PUBLIC)) >= 5


def test_both_stages_run_and_go_on_where_they_were(worlds, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(graceful_study, "read_task", lambda name, limit: toy(worlds, name))
    few = ("--tasks", "1", "--epochs", "1", "--seeds", "1", "--fisher", "4")

    def study(*words):
        given = [str(word) for word in ("", "--base", worlds().folder, *few, *words)]
        monkeypatch.setattr(sys, "argv", given)
        graceful_study.main()

    with pytest.raises(SystemExit, match="develop first"):
        study()
    for lone in (("--strength", "0.1"), ("--every", "2"), ("--stage", "develop", "--every", "2")):
        with pytest.raises(SystemExit, match="2"):
            study(*lone)
    study("--stage", "develop")
    study()
    path = tmp_path / "graceful_study.jsonl"
    found = json.loads((tmp_path / "graceful_study.json").read_text("utf-8"))
    rows = measure.lines(path)
    assert found["runs"] == len(rows) == 1 + 2 * len(graceful_study.variants(Chosen(0.1, 2)))
    assert found["settings"]["strength"] in graceful_study.STRENGTHS
    assert found["settings"]["every"] in graceful_study.INTERVALS
    learn, let_go = LEARN["report"][0], FORGET["report"][0]
    assert all(set(row["right"]) == {learn, let_go} for row in rows)
    measure.write_jsonl(path, rows[:-1])
    monkeypatch.setattr(graceful_study.Study, "_callback", _counted(monkeypatch))
    study()
    assert [row["key"] for row in measure.lines(path)] == [row["key"] for row in rows]
    assert _counted.calls == 1, "only what was missing"
    with pytest.raises(SystemExit, match="other settings"):
        study("--share", "0.5")


def toy(worlds, name):
    """A task of that name in the few words that the toy model knows."""
    relation = (
        "job" if name.removeprefix("bank:") in {*LEARN["develop"], *LEARN["report"]} else "pet"
    )
    rows = [one for one in worlds().edits if one.relation == relation]
    made = [Example(one.prompt, one.old, task=name.removeprefix("bank:")) for one in rows]
    return Task(name.removeprefix("bank:"), tuple(made[:8]), tuple(made[8:12]))


def _counted(monkeypatch):
    real = graceful_study.Study._callback
    _counted.calls = 0

    def called(self, *given):
        _counted.calls += 1
        return real(self, *given)

    return called

"""The forgetting studies run, in tiny; what they say of statistics and held-out examples holds."""

import json

import numpy as np
import pytest

import unwrite
from benchmarks import (
    forgetting_matrix,
    forgetting_prediction,
    forgetting_replay,
    forgetting_sequence,
    forgetting_updates,
    protected_stop,
    protection,
    tables,
)
from unwrite.forgetting import ForgettingMatrix, UpstreamExample, collect, measure
from unwrite.forgetting.similarity import Features, Similarity
from unwrite.model import Model
from unwrite.prompts import Protected
from unwrite.testing import toy_edits
from unwrite.training import Pair

TUNER = unwrite.LoRA(epochs=1, until="epochs", lr=5e-3)


@pytest.fixture(scope="module")
def model(worlds):
    return Model.load(worlds().folder)


@pytest.fixture(scope="module")
def watched():
    return [UpstreamExample(str(edit.id), edit.prompt, edit.old) for edit in toy_edits()]


def made(tasks=14, examples=60):
    random = np.random.default_rng(0)
    values = random.normal(size=(tasks, 2)) @ random.normal(size=(2, examples)) + 0.3
    values += 0.1 * random.normal(size=values.shape)
    names = [f"{'bank' if n < tasks - 4 else 'atlas'}/{n}" for n in range(tasks)]
    examples = tuple(f"e{n}" for n in range(examples))
    details = {name: {"prompt": f"{name}?", "answer": name} for name in examples}
    return ForgettingMatrix(values, names, examples, {"base_name": "toy"}, example_details=details)


def test_all_models_are_tried_in_and_out_of_domain(monkeypatch):
    matrix = made()
    random = np.random.default_rng(1)
    features = Features(
        {name: random.normal(size=5) for name in matrix.tasks},
        {name: random.normal(size=5) for name in matrix.examples},
        "noise",
    )
    result = forgetting_prediction.run(matrix, {"similarity": Similarity(features)}, seeds=2)
    assert result["tasks"] == {"bank": 10, "updates": 4}
    for split in ("in_domain", "out_of_domain"):
        table = result[split]
        assert {"random", "similarity", "factorization, chosen"} <= set(table)
        assert table["factorization"]["rmse"]["mean"] < table["additive"]["rmse"]["mean"]
        assert table["similarity"]["rmse"]["mean"] > table["factorization"]["rmse"]["mean"]
    json.dumps(result, allow_nan=False)
    monkeypatch.setattr(tables, "measured", lambda _name: result)
    lines = tables.forecasts("forgetting_prediction")
    assert len(lines) == 2 + len(result["in_domain"]) + 4
    best = min(result["in_domain"], key=lambda one: result["in_domain"][one]["rmse"]["mean"])
    assert lines[2].startswith(f"| {best} | {result['in_domain'][best]['rmse']['mean']:.3f}")
    half = forgetting_prediction.run(matrix.select(tasks=range(8)), seeds=1)
    assert "in_domain" in half and "out_of_domain" not in half  # still being collected


def test_what_an_update_changes_is_not_forecast():
    capital = next(edit for edit in unwrite.read_edits("atlas") if edit.relation == "capital")
    examples = {"own": capital.prompt, "again": capital.paraphrases[0], "other": "Who?"}
    matrix = ForgettingMatrix(
        np.ones((2, 3)),
        ("atlas/capital", "bank/a"),
        tuple(examples),
        example_details={name: {"prompt": prompt} for name, prompt in examples.items()},
    )
    left = forgetting_prediction.collateral(matrix)
    np.testing.assert_array_equal(np.isnan(left.values), [[True, True, False], [False] * 3])
    assert left.tasks == matrix.tasks and left.examples == matrix.examples


def test_folds_are_new_once_and_never_their_own_past():
    parts = forgetting_prediction.folds(list(range(17)))
    assert sorted(task for new, _ in parts for task in new) == list(range(17))
    assert all(not set(new) & set(past) and len(new) + len(past) == 17 for new, past in parts)


def test_replay_is_run_once_and_never_shows_what_is_held_out(model, watched, tmp_path, monkeypatch):
    edits = toy_edits()
    tasks = {
        f"bank/{n}": [Pair(edit.prompt, edit.new) for edit in edits[n : n + 4]] for n in (0, 10)
    }
    random = np.random.default_rng(0)
    matrix = ForgettingMatrix(
        random.normal(size=(6, 30)),
        (*tasks, "bank/a", "bank/b", "bank/c", "bank/d"),
        tuple(one.name for one in watched),
        example_details={one.name: one.details() for one in watched},
    )
    held_out, pool = forgetting_replay.split(watched, 10, 0)
    assert not set(held_out) & set(pool) and len(held_out) == 10 and len(pool) == 15
    shown = []
    mix = forgetting_replay.mix

    def spy(pairs, replayed):
        shown.append([one.name for one in replayed])
        return mix(pairs, replayed)

    monkeypatch.setattr(forgetting_replay, "mix", spy)
    rows = forgetting_replay.run(model, matrix, tasks, tmp_path, TUNER, measured=10)
    assert [(row["task"], row["arm"]) for row in rows] == [
        (task, arm) for task in tasks for arm in forgetting_replay.ARMS
    ]
    assert not {watched[at].name for at in held_out} & {name for some in shown for name in some}
    assert {len(some) for some in shown} == {0, 2}
    assert forgetting_replay.run(model, matrix, tasks, tmp_path, TUNER, measured=10) == rows
    assert len(shown) == len(rows)
    found = forgetting_replay.summary(rows)["arms"]
    assert found["random"]["minus_random"] == 0 and found["random"]["p"] is None
    monkeypatch.setattr(tables, "measured", lambda _name: {"arms": found})
    assert [line.split(" | ")[0] for line in tables.replay()[2:]] == [f"| {arm}" for arm in found]
    assert 0 < found["truth"]["p"] <= 1


def test_what_an_update_changes_is_neither_replayed_nor_held_out(model, tmp_path, monkeypatch):
    capitals = [edit for edit in unwrite.read_edits("atlas") if edit.relation == "capital"]
    own = forgetting_matrix.changed_by("atlas/capital")
    assert {capitals[0].prompt, capitals[0].paraphrases[0]} <= own
    assert forgetting_matrix.changed_by("bank/capital") == set()
    others = [edit for edit in unwrite.read_edits("atlas") if edit.relation != "capital"]
    assert not own & {edit.prompt for edit in others}
    watched = [
        UpstreamExample(str(edit.id), edit.prompt, edit.old)
        for edit in (*capitals[:6], *toy_edits()[:10])
    ]
    matrix = ForgettingMatrix(
        np.random.default_rng(0).normal(size=(3, 16)),
        ("atlas/capital", "bank/a", "bank/b"),
        tuple(one.name for one in watched),
        example_details={one.name: one.details() for one in watched},
    )
    shown, seen = [], []
    monkeypatch.setattr(
        forgetting_replay, "mix", lambda pairs, replayed: shown.extend(replayed) or pairs
    )
    tasks = {"atlas/capital": [Pair(one.prompt, one.old) for one in toy_edits()[:4]] * 6}
    monkeypatch.setattr(forgetting_replay, "ARMS", ("random", "truth"))

    def measured(_model, examples):
        seen.append([one.prompt in own for one in examples])
        return np.array(seen[-1]) * 100.0 * len(seen)  # only what is changed moves

    monkeypatch.setattr(forgetting_replay, "measure", measured)
    rows = forgetting_replay.run(model, matrix, tasks, tmp_path, TUNER)
    assert any(seen[0]) and [row["held_out"] for row in rows] == [0.0, 0.0]
    assert shown and not own & {one.prompt for one in shown}


def test_forecasts_of_replay_do_not_read_what_is_not_revealed():
    matrix = made()
    pool = list(range(50))
    changed = matrix.values.copy()
    seen = set(np.random.default_rng(0).choice(50, 16, replace=False).tolist())
    for column in range(50):
        if column not in seen:
            changed[3, column] = 1e9
    trapped = ForgettingMatrix(changed, matrix.tasks, matrix.examples)
    for arm in forgetting_replay.FORECASTS:
        one, two = (
            forgetting_replay.scores_of(given, matrix.tasks[3], arm, pool, 0)
            for given in (matrix, trapped)
        )
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("differences", "p"),
    [([1.0, 1.0, 1.0], 0.25), ([1.0, -1.0], 1.0), ([0.0, 0.0], 1.0), ([2.0, 1.0], 0.5)],
)
def test_the_sign_flip_test_counts_what_it_should(differences, p):
    assert forgetting_replay.sign_flip(np.array(differences)) == p
    many = np.random.default_rng(0).normal(1.0, 1.0, 40)
    assert forgetting_replay.sign_flip(many) < 0.001


def test_a_sequence_goes_on_where_it_was_and_adds_up(model, watched, tmp_path, monkeypatch):
    edits = toy_edits()
    tasks = {
        f"bank/{n}": [Pair(edit.prompt, edit.new) for edit in edits[n : n + 2]]
        for n in range(0, 14, 2)
    }
    first = dict(list(tasks.items())[:3])
    forgetting_sequence.collect_sequence(model, first, watched, TUNER, tmp_path / "a")
    whole = forgetting_sequence.collect_sequence(model, tasks, watched, TUNER, tmp_path / "a")
    again = forgetting_sequence.collect_sequence(model, tasks, watched, TUNER, tmp_path / "b")
    np.testing.assert_array_equal(whole.values, again.values)
    total = unwrite.Delta.nothing()
    for number in range(len(tasks)):
        total = total + unwrite.Delta.open(tmp_path / "a" / f"delta-{number}")
    before = measure(model, watched)
    with model.shifted(total):
        after = measure(model, watched)
    np.testing.assert_allclose(whole.values.sum(axis=0), after - before, atol=1e-5)
    result = forgetting_sequence.tested(whole, whole)
    monkeypatch.setattr(tables, "measured", lambda _name: result)
    lines = tables.sequence()
    assert len(lines) == 2 + 2 * len(forgetting_sequence.FORECASTS) + 1 + 4
    assert sum("| tasks learned apart |" in line for line in lines) == 5
    del result["from_apart"], result["rank_profile_apart"]
    assert len(tables.sequence()) == 2 + len(forgetting_sequence.FORECASTS) + 1 + 3
    result = forgetting_sequence.tested(whole, whole)
    assert set(result["from_before"]) == set(result["from_apart"])
    assert result["from_before"]["additive"]["n"] == 3 * 20
    json.dumps(result, allow_nan=False)
    other = {"bank/x": tasks["bank/2"]}
    with pytest.raises(ValueError, match="another sequence"):
        forgetting_sequence.collect_sequence(model, other, watched, TUNER, tmp_path / "a")


def test_forecasts_of_a_sequence_know_only_what_came_before(watched):
    matrix = made(tasks=9)
    changed = matrix.values.copy()
    changed[8] = 1e6  # the last row may not change the forecasts of those before
    later = ForgettingMatrix(changed, matrix.tasks, matrix.examples)
    ahead = [
        forgetting_sequence.forecasts(given.select(tasks=range(8)), None, 0)
        for given in (matrix, later)
    ]
    assert ahead[0] == ahead[1]
    everything = forgetting_sequence.forecasts(matrix, None, 0)
    assert everything["additive"]["n"] == 5 * 40


def test_protection_is_measured_with_and_without(model, tmp_path, monkeypatch):
    edits = toy_edits()
    method = unwrite.FullFT(lr=2e-3, epochs=3, until="epochs")
    asked = [Protected(edit.prompt, n % 4 == 0) for n, edit in enumerate(edits[18:])]
    updates = [edits[n : n + 2] for n in (0, 10, 14, 16)]
    protection.run(model, updates[:2], asked, method, tmp_path)
    rows = protection.run(model, updates, asked, method, tmp_path)
    assert [row["by"] for row in rows] == ["mean of the observed"] * 3 + ["factorization"]
    result = protection.summary(rows)
    monkeypatch.setattr(tables, "measured", lambda _name: result)
    assert len(tables.protection()) == 2 + 4 + 1 + 2 + len(protection.ARMS)
    again = json.loads(json.dumps(rows))
    for row in again[1:3]:
        del row["changed"][protection.SLOWLY]
    (tmp_path / "updates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in again))
    assert protection.run(model, updates, asked, method, tmp_path) == rows  # the missing arm only
    assert result["asked"] == {"held_out": 12, "others": 36}
    for row in rows:
        free = [one for one in row["record"]["prompts"] if one["held_out"]]
        changed = sum(one["lost"] > one["margin"] for one in free)
        assert changed == row["changed"]["none"]["held_out"]
    assert result["changed"]["all"]["others"] <= result["changed"]["none"]["others"]
    json.dumps(result, allow_nan=False)


def test_waiting_for_what_is_protected_is_measured(model, monkeypatch):
    edits = toy_edits()
    kept = tuple(edit.prompt for edit in edits[20:24])
    found = {}
    for way, method, waits in protected_stop.ways(unwrite.FullFT(lr=1e-3, epochs=12), kept):
        found[way] = protected_stop.measured(model, edits[:3], kept, method, waits)
    assert found["weight 2"]["epochs"] >= found["weight 2, not waiting"]["epochs"]
    assert found["nothing protected"]["reliability"] == 1
    assert all(0 <= one["protected"] <= 1 for one in found.values())
    runs = [{"way": way, "seed": 0} | one for way, one in found.items()]
    monkeypatch.setattr(tables, "measured", lambda _name: {"runs": runs})
    assert len(tables.stop()) == 2 + len(runs)
    assert protected_stop.made(-1, -1) == []


def test_updates_are_tasks_and_their_bystanders_examples(model, tmp_path):
    edits = toy_edits()
    tasks = {
        **forgetting_updates.tasks_of("atlas", edits[:10], 2),
        **forgetting_updates.tasks_of("counterfact", edits[10:20], 2),
    }
    assert len(tasks) == 10
    assert tasks["atlas/1"] == [Pair(edit.prompt, edit.new) for edit in edits[2:4]]
    examples = forgetting_updates.bystanders_of(edits[:20])
    prompts = {one.prompt for one in examples}
    assert prompts == {probe.prompt for edit in edits[:20] for probe in edit.bystanders}
    assert len(prompts) == len(examples)
    matrix = collect(model, tasks, examples, TUNER, tmp_path / "matrix").matrix
    result = forgetting_updates.run(matrix, seeds=2)
    assert result["tasks"] == {"atlas": 5, "counterfact": 5}
    for split in ("in_domain", "out_of_domain"):
        assert result[split]["factorization"]["rmse"]["mean"] >= 0
    forgotten = (matrix.values > np.log(2)).mean()
    assert result["forgotten_share"] == pytest.approx(forgotten)
    json.dumps(result, allow_nan=False)

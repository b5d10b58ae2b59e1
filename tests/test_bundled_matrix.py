"""The real forgetting matrix that comes with the package."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import unwrite
from unwrite.cli import app
from unwrite.forgetting import Additive, Factorization
from unwrite.forgetting.collection import base_numbers
from unwrite.forgetting.matrix import ForgettingMatrix
from unwrite.tasks import read_tasks


@pytest.fixture(scope="module")
def matrix():
    return ForgettingMatrix.load("bundled")


def ask(*words):
    result = CliRunner().invoke(app, ["forgetting", *map(str, words), "--json"])
    return result.exit_code, json.loads(result.stdout)


def test_it_is_whole_and_made_of_bundled_text_only(matrix):
    assert len(matrix.tasks) >= 40 and len(matrix.examples) >= 1000
    assert np.isfinite(matrix.values).all()
    assert np.isfinite(base_numbers("bundled", matrix)).all()
    tasks = {f"bank/{task.name}" for task in read_tasks("bank")}
    tasks |= {f"atlas/{edit.relation}" for edit in unwrite.read_edits("atlas")}
    assert set(matrix.tasks) <= tasks
    assert matrix.provenance["base_name"] == "smollm2-135m"


def test_it_is_nearly_of_low_rank(matrix):
    profile = matrix.rank_profile()
    assert profile["rank"][2] > 0.7
    assert profile["rank"][2] > profile["additive"] + 0.2


def test_a_few_observations_tell_more_than_the_means(matrix):
    """Bundled tasks from bundled tasks, thirty examples seen; errors on the unseen ones only."""
    bank = [n for n, name in enumerate(matrix.tasks) if name.startswith("bank/")]
    new, past = bank[::5], [n for n in bank if n not in bank[::5]]
    fitted = {
        model: model.fit(matrix.select(tasks=past)) for model in (Factorization(), Additive())
    }
    errors = {model: [] for model in fitted}
    for task in new:
        row = matrix.values[task]
        shown = np.random.default_rng(task).permutation(len(row))[:30]
        seen = np.full(len(row), np.nan)
        seen[shown] = row[shown]
        rest = np.isnan(seen)
        for model, one in fitted.items():
            errors[model].append(np.mean((one.predict(seen).values - row)[rest] ** 2))
    factorization, additive = (np.sqrt(np.mean(found)) for found in errors.values())
    assert factorization < additive


def test_it_is_shown_fitted_and_asked_by_name(matrix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, shown = ask("show", "bundled")
    assert code == 0 and shown["tasks"] == len(matrix.tasks)
    code, chosen = ask("forecast", "bundled", "--choose", "--count", 5)
    assert code == 0 and len(chosen["observe"]) == 5
    at = [matrix.examples.index(name) for name in chosen["observe"]]
    lines = [
        json.dumps({"example": name, "change": float(matrix.values[0, n])})
        for name, n in zip(chosen["observe"], at, strict=True)
    ]
    (tmp_path / "seen.jsonl").write_text("\n".join(lines))
    code, found = ask("forecast", "bundled", "--seen", "seen.jsonl")
    assert code == 0 and found["expected"] > 0
    code, drawn = ask("replay", "bundled", "--task", matrix.tasks[0], "--number", 7, "--out", "r")
    assert code == 0 and len(drawn["examples"]) == 7
    code, tried = ask("fit", "bundled", "--seeds", 1, "--models", "additive,task-mean")
    assert code == 0 and tried["best"] in ("additive", "task-mean")
    assert {one.name for one in tmp_path.iterdir()} == {"seen.jsonl", "r"}


def test_it_is_never_written_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(
        app, ["forgetting", "features", "bundled", "--base", "smollm2-135m", "--tasks", "bank"]
    )
    assert result.exit_code == 2
    assert "not written to" in result.stderr


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = ForgettingMatrix(np.ones((1, 2)), ("a",), ("x", "y"))
    own.save(tmp_path / "bundled")
    assert ForgettingMatrix.load("bundled").tasks == ("a",)

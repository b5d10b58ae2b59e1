"""The examples do what they say, on a toy model."""

import importlib.util
import json
import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import unwrite
from unwrite import methods
from unwrite.cli import app
from unwrite.testing import check_method
from unwrite.weights import Weights

EXAMPLES = Path(__file__).parent.parent / "examples"
PACKAGE = EXAMPLES / "new_method"


@pytest.fixture
def facts(worlds, tmp_path):
    path = tmp_path / "facts.jsonl"
    unwrite.write_edits(path, worlds().edits[:3])
    return path


def run(script, *words):
    runpy.run_path(str(EXAMPLES / script))["main"]([str(word) for word in words])


def test_the_facts_of_the_examples_can_be_read():
    assert len(unwrite.read_edits(EXAMPLES / "facts.jsonl")) == 3


def test_update_facts(worlds, facts, tmp_path, capsys):
    words = ("--model", worlds().folder, "--facts", facts, "--home", tmp_path / "home")
    run("update_facts.py", *words, "--lr", 1e-3, "--locality", 0)
    said = capsys.readouterr().out
    assert "knows 3 of 3" in said
    for edit in worlds().edits[:3]:
        assert f"{edit.prompt} {edit.old!r} -> {edit.new!r}" in said
    assert "bits of the base again" in said
    assert (tmp_path / "home" / "report.html").is_file()
    assert unwrite.open(tmp_path / "home").ledger.live() == []


def test_update_facts_commits_nothing_that_moved_too_much(worlds, facts, tmp_path, capsys):
    words = ("--model", worlds().folder, "--facts", facts, "--home", tmp_path / "home")
    run("update_facts.py", *words, "--lr", 1e-3, "--locality", 1.1)
    assert "Nothing was committed: " in capsys.readouterr().out
    assert not unwrite.open(tmp_path / "home").ledger.applied


def test_compare_methods(worlds, facts, tmp_path, capsys):
    words = ("--model", worlds().folder, "--facts", facts, "--out", tmp_path / "run")
    run("compare_methods.py", *words, "--rate-times", 30)
    said = capsys.readouterr().out
    for label in ("full-ft", "bounded", "forget-first"):
        assert f"| {label}" in said or f"{label} |" in said
    assert "Best balanced on these facts: " in said


# ---- forgetting in other people's trainers -------------------------------------------------------


@pytest.fixture
def tasks(worlds, tmp_path):
    """A file for every relation of the toy world, each a task of new answers."""
    found = {}
    for relation in ("job", "town", "pet"):
        edits = [edit for edit in worlds().edits if edit.relation == relation]
        rows = [{"prompt": edit.prompt, "completion": edit.new} for edit in edits]
        found[relation] = tmp_path / f"{relation}.jsonl"
        found[relation].write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return found


def test_forecast_and_replay(worlds, tasks, tmp_path, capsys):
    facts = [{"prompt": edit.prompt, "answer": edit.old} for edit in worlds().edits]
    watched = tmp_path / "watched.jsonl"
    watched.write_text("".join(json.dumps(row) + "\n" for row in facts), "utf-8")
    words = ("--model", worlds().folder, "--task", tasks["town"], "--examples", watched)
    words += ("--past", tasks["job"], "--past", tasks["pet"], "--out", tmp_path / "out")
    run("forecast_and_replay.py", *words, "--seeds", 6, "--lr", 1e-3, "--epochs", 3, "--rank", 1)
    said = capsys.readouterr().out
    assert "Forecast against the truth of the first run: correlation " in said
    assert "Replayed last: watched-" in said
    pattern = r"(with\w* replay): log perplexity of held-out examples ([+-][\d.]+)"
    lost = dict(re.findall(pattern, said))
    assert float(lost["without replay"]) > 0
    assert lost.keys() == {"without replay", "with replay"}
    assert (tmp_path / "out" / "matrix" / "matrix.npz").is_file()


needs_trl = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("trl", "datasets")),
    reason="needs trl and datasets",
)


@needs_trl
@pytest.mark.filterwarnings("ignore")  # those of TRL about transformers
def test_graceful_sft(worlds, tasks, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("UNWRITE_CACHE", str(tmp_path / "cache"))
    words = ("--model", worlds().folder, "--task", tasks["job"], "--forget", tasks["pet"])
    words += ("--out", tmp_path / "out", "--lr", 1e-3, "--epochs", 6, "--every", 2)
    run("graceful_sft.py", *words, "--strength", 0.5)
    said = capsys.readouterr().out
    assert re.search(r"Of 8 own answers, 1 are let go", said)
    (steps,) = re.findall(r"(\d+) unlearning steps", said)
    assert int(steps) > 0
    assert set(re.findall(r"^(\w+): [\d.]+ % of 2 test questions", said, re.M)) == {
        "before",
        "plain",
        "graceful",
    }
    plain, graceful = (
        Weights.from_folder(tmp_path / "out" / name) for name in ("plain", "graceful")
    )
    assert any(not torch.equal(plain[name], graceful[name]) for name in plain)


# ---- a method in a package of its own ------------------------------------------------------------


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The package as an installer leaves it: its source, and what its metadata says."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text("utf-8"))["project"]
    record = tmp_path / "site" / "unwrite_seed_average-0.1.0.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["unwrite.methods"]
    lines = ["[unwrite.methods]", *(f"{name} = {where}" for name, where in points.items())]
    (record / "entry_points.txt").write_text("\n".join(lines))
    for path in (PACKAGE / "src", tmp_path / "site"):
        monkeypatch.syspath_prepend(str(path))
    yield
    sys.modules.pop("seed_average", None)


def test_the_command_finds_the_method(installed, worlds, facts, tmp_path):
    assert methods.method_names() == [*methods.METHODS, "seed-average"]
    described = methods.describe("seed-average")
    assert described["advice"] and described["fields"]["seeds"]["default"] == 3
    words = ["update", tmp_path / "home", facts, "--base", worlds().folder, "--limit", 1]
    words += ["--method", "seed-average", "--set", "seeds=2", "--set", "tuner.lr=1e-3"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.stderr
    assert "The mean of 2 fine-tunes." in result.stderr
    (entry,) = unwrite.open(tmp_path / "home").ledger.applied.values()
    assert entry["method"]["name"] == "seed-average" and entry["method"]["seeds"] == 2


def test_the_method_keeps_the_laws(installed, tmp_path):
    built = methods.build("seed-average", {"seeds": "2", "tuner.lr": "1e-3"})
    check_method(built, tmp_path)


def test_it_is_the_mean(installed, worlds):
    model = unwrite.load(worlds().folder)
    tuner = {"tuner.epochs": "2", "tuner.until": "epochs"}
    both = methods.build("seed-average", {"seeds": "2", **tuner}).delta(model, worlds().edits[:9])
    one, two = (
        unwrite.FullFT(epochs=2, until="epochs", seed=seed).delta(model, worlds().edits[:9])
        for seed in (0, 1)
    )
    assert any(not torch.equal(one[name].dense(), two[name].dense()) for name in one)
    for name in one:
        mean = (one[name].dense() + two[name].dense()) / 2
        torch.testing.assert_close(both[name].dense(), mean, rtol=1e-6, atol=1e-12)

"""``unwrite forgetting``: every verb once, and every way of giving it the wrong thing."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import unwrite
from unwrite.cli import app
from unwrite.forgetting import ForgettingMatrix
from unwrite.testing import toy_edits

QUICK = ["--method", "full-ft", "--set", "epochs=2", "--set", "until=epochs", "--set", "lr=2e-3"]


def run(*words, code=0):
    found = CliRunner().invoke(app, ["forgetting", *map(str, words)])
    assert found.exit_code == code, found.output
    return found


def as_json(*words, code=0):
    return json.loads(run(*words, "--json", code=code).stdout)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    unwrite.write_edits(folder / "edits.jsonl", toy_edits()[:24])
    lines = [{"id": e.id, "prompt": e.prompt, "answer": e.old} for e in toy_edits()]
    (folder / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def collected(worlds, files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix") / "m"
    result = as_json(
        "collect",
        folder,
        "--base",
        worlds().folder,
        "--edits",
        files / "edits.jsonl",
        "--examples",
        files / "examples.jsonl",
        *QUICK,
    )
    assert (result["tasks"], result["examples"], result["observed"]) == (3, 30, 1.0)
    assert result["added"] == ["job", "town", "pet"]
    return folder


@pytest.fixture
def made(tmp_path):
    """A matrix of low rank that nobody collected."""
    random = np.random.default_rng(0)
    values = random.normal(size=(12, 2)) @ random.normal(size=(2, 45))
    examples = tuple(f"e{n}" for n in range(45))
    details = {name: {"prompt": f"What is {name}?", "answer": name} for name in examples}
    matrix = ForgettingMatrix(
        values + 0.05 * random.normal(size=values.shape),
        tuple(f"t{n}" for n in range(12)),
        examples,
        {"quantity": "log-perplexity"},
        example_details=details,
    )
    matrix.save(tmp_path / "made")
    return tmp_path / "made"


def test_collecting_again_adds_nothing(collected, worlds, files):
    words = ["collect", collected, "--base", worlds().folder, "--edits", files / "edits.jsonl"]
    again = as_json(*words, "--examples", files / "examples.jsonl", *QUICK)
    assert again["added"] == []


def test_show_names_what_destroys_and_what_suffers(collected):
    shown = as_json("show", collected, "--top", 2)
    assert len(shown["worst_tasks"]) == len(shown["worst"]) == 2
    assert shown["worst"][0]["mean"] >= shown["worst"][1]["mean"]
    assert shown["profile"]["rank"][-1] == pytest.approx(1)
    assert shown["provenance"]["tuner"]["name"] == "full-ft"
    assert "rank 1" in run("show", collected).stderr


def test_fit_compares_and_forecast_uses_the_best(made):
    found = as_json("fit", made, "--models", "factorization,additive,random", "--seeds", 2)
    assert found["best"] == "factorization"
    scores = found["scores"]
    assert scores["factorization"]["rmse"]["mean"] < scores["additive"]["rmse"]["mean"]
    truth = ForgettingMatrix.load(made).values[3]
    seen = made / "seen.jsonl"
    named = as_json("forecast", made, "--choose", "--count", 8)["observe"]
    assert len(named) == 8
    rows = [{"example": name, "change": truth[int(name[1:])]} for name in named]
    seen.write_text("".join(json.dumps(row) + "\n" for row in rows))
    forecast = as_json("forecast", made, "--seen", seen, "--top", 5, "--out", made / "all.jsonl")
    assert (forecast["model"], forecast["observed"]) == ("factorization", 8)
    assert abs(forecast["expected"] - (truth > 0).sum()) < 3 * forecast["std"] + 1
    worst = [one["example"] for one in forecast["endangered"]]
    assert len(set(worst) & {f"e{n}" for n in np.argsort(-truth)[:10]}) >= 4
    assert forecast["endangered"][0]["prompt"] == f"What is {worst[0]}?"
    written = [json.loads(line) for line in (made / "all.jsonl").read_text().splitlines()]
    assert [row["example"] for row in written] == [f"e{n}" for n in range(45)]


def test_forecast_measures_a_model_after_a_task(collected, worlds):
    """Nothing was learned since: nothing is forecast to be measured as changed."""
    found = as_json("forecast", collected, "--after", worlds().folder, "--count", 6)
    assert found["observed"] == 6


def test_an_update_of_a_home_is_added(collected, worlds, tmp_path):
    home = unwrite.open(tmp_path / "home", base=worlds().folder)
    done = home.update(toy_edits()[:1], unwrite.FullFT(epochs=1, until="epochs"))
    folder = tmp_path / "copy"
    ForgettingMatrix.load(collected).save(folder)
    (folder / "base.json").write_bytes((collected / "base.json").read_bytes())
    result = as_json("collect", folder, "--home", home.folder, "--update", done.id)
    assert (result["tasks"], result["added"]) == (4, [done.id])
    measured = as_json("forecast", folder, "--after", home.folder, "--count", 5)
    assert measured["observed"] == 5


@pytest.mark.parametrize("policy", ["uniform", "softmax", "top"])
def test_replay_writes_what_to_mix_in(made, policy):
    held_out = made / "held.txt"
    held_out.write_text("e0\ne1\n")
    out = made / f"{policy}.jsonl"
    words = ["replay", made, "--out", out, "--task", "t3", "--policy", policy, "--number", 10]
    found = as_json(*words, "--held-out", held_out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == found["examples"]
    assert len(set(found["examples"])) == 10
    assert not {"e0", "e1"} & set(found["examples"])
    assert rows[0]["answer"] == rows[0]["id"]
    if policy == "top":
        truth = ForgettingMatrix.load(made).values[3][2:]
        assert set(found["examples"]) == {f"e{n + 2}" for n in np.argsort(-truth)[:10]}


def test_replay_counts_one_in_thirty_two(made):
    words = ["replay", made, "--out", made / "r.jsonl", "--policy", "uniform", "--beside", 320]
    assert len(as_json(*words)["examples"]) == 11


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show", "{empty}"], "holds no forgetting matrix"),
        (["collect", "{empty}"], "--base MODEL and --tasks or --edits"),
        (["collect", "{empty}", "--home", "x"], "belong together"),
        (["collect", "{empty}", "--home", "x", "--update", "y", "--base", "z"], "not both"),
        (["collect", "{empty}", "--base", "x", "--tasks", "bank:nonsense"], "no bundled task"),
        (["fit", "{made}", "--models", "magic"], "no model 'magic'"),
        (["forecast", "{made}"], "Say what is known"),
        (["forecast", "{made}", "--seen", "{bad}"], "line 1: needs `example`"),
        (["replay", "{made}", "--out", "x"], "Say how many"),
        (["replay", "{made}", "--out", "x", "--number", "3", "--task", "t99"], "no task 't99'"),
        (
            ["replay", "{made}", "--out", "x", "--number", "99", "--task", "t1"],
            "only 45 may be",
        ),
        (
            ["replay", "{made}", "--out", "x", "--number", "1", "--task", "t1", "--policy", "new"],
            "uniform, softmax or top",
        ),
    ],
)
def test_mistakes_end_with_a_sentence_and_code_2(made, tmp_path, words, said):
    (tmp_path / "bad.jsonl").write_text('{"example": "nobody", "change": 1}\n')
    places = {"empty": tmp_path / "none", "made": made, "bad": tmp_path / "bad.jsonl"}
    found = run(*[word.format(**places) for word in words], "--json", code=2)
    assert said in json.loads(found.stdout)["error"]
    assert "Traceback" not in found.output

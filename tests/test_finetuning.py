"""Fine-tuning on a task as a whole: its command, its limits, resuming, and the cheap baselines."""

import json
import random

import pytest
import torch
from typer.testing import CliRunner

from unwrite import finetuning
from unwrite.cli import app
from unwrite.errors import BadSetting, BadTask
from unwrite.files import read_jsonl
from unwrite.finetuning import Course, Letting, finetune, learn_task
from unwrite.model import Model
from unwrite.tasks import read_task


def write_task(path, world, relation, *, answered=True):
    rows = []
    for edit in world.edits:
        if edit.relation == relation:
            for prompt in (edit.prompt, *edit.paraphrases):
                answer = {"completion": edit.new} if answered else {}
                rows.append({"task": relation, "prompt": prompt, **answer})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def case(worlds, tmp_path, monkeypatch):
    """A shared world, a task to learn and two to let go of."""
    monkeypatch.setenv("UNWRITE_CACHE", str(tmp_path / "cache"))
    world = worlds()
    jobs = write_task(tmp_path / "jobs.jsonl", world, "job")
    pets = write_task(tmp_path / "pets.jsonl", world, "pet", answered=False)
    return world.folder, jobs, [pets, write_task(tmp_path / "towns.jsonl", world, "town")]


QUICK = Course(epochs=4, lr=2e-3)
LETTING = Letting(every=2, strength=0.2, share=0.5, fisher_examples=8)


def weights_of(folder):
    return {name: one.clone() for name, one in Model.load(folder).weights.items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in other)


def test_the_whole_command(case, tmp_path):
    base, jobs, others = case
    out = tmp_path / "tuned"
    words = ["finetune", str(base), "--task", str(jobs), "--out", str(out), "--method", "lwf"]
    for other in others:
        words += ["--forget", str(other)]
    for setting in ("epochs=4", "lr=2e-3", "every=2", "strength=0.2", "share=0.5"):
        words += ["--set", setting]
    done = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["method"] == "graceful" and result["forget"] == ["pet", "town"]
    assert set(result["accuracy"]) == {"job", "town"}  # pets have no answers to measure
    job = result["accuracy"]["job"]
    assert job["n"] == 5 and set(job) == {"n", "before", "plain", "after"}
    assert job["before"] == 0.0 and job["plain"] > 0
    assert result["forgotten"]["chosen"] == 8 and result["forgotten"]["steps"] == 4
    rows = read_jsonl(out / "run" / "confidence.jsonl")
    assert {row["task"] for row in rows} == {"pet", "town"} and len(rows) == 30
    chosen = {row["prompt"] for row in read_jsonl(out / "run" / "forgotten.jsonl")}
    best = sorted(rows, key=lambda row: -row["confidence"])[:8]
    assert chosen == {row["prompt"] for row in best}
    assert "| job | 5 |" in (out / "run" / "report.md").read_text()
    # What was measured is what can be loaded.
    found = finetuning.answers(Model.load(out), read_task(jobs).test)
    assert sum(row["right"] for row in found) / len(found) == job["after"]


def test_without_json_it_says_where_the_model_is(case, tmp_path):
    base, jobs, _ = case
    words = ["finetune", str(base), "--task", str(jobs), "--out", str(tmp_path / "m")]
    done = CliRunner().invoke(app, [*words, "--set", "epochs=1"], catch_exceptions=False)
    assert done.exit_code == 0 and done.stdout.strip() == str(tmp_path / "m")
    assert "job" in done.stderr and "Perplexity" in done.stderr


def test_strength_0_is_the_plain_run_bitwise(case, tmp_path):
    base, jobs, others = case
    none = Letting(every=2, strength=0.0, fisher_examples=8)
    finetune(base, jobs, tmp_path / "a", course=QUICK)
    finetune(
        base, jobs, tmp_path / "b", forget=others, method="graceful", course=QUICK, letting=none
    )
    assert same(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))
    forgetting = finetune(
        base, jobs, tmp_path / "c", forget=others, method="graceful", course=QUICK, letting=LETTING
    )
    assert not same(weights_of(tmp_path / "a"), weights_of(tmp_path / "c"))
    assert forgetting.result["forgotten"]["loss_after"] > 0


def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(case, tmp_path, monkeypatch):
    base, jobs, others = case
    options = {"forget": others, "method": "graceful", "course": QUICK, "letting": LETTING}
    finetune(base, jobs, tmp_path / "whole", **options)
    calls = []
    real = finetuning.learn_task

    def learn(*given):
        calls.append(given[3].name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(finetuning, "learn_task", learn)
    with pytest.raises(KeyboardInterrupt):
        finetune(base, jobs, tmp_path / "parts", **options)
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    finetune(base, jobs, tmp_path / "parts", **options)
    assert calls == ["plain-training", "graceful-training", "graceful-training"]
    assert same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))
    again = finetune(base, jobs, tmp_path / "parts", **options)
    assert len(calls) == 3 and again.result["method"] == "graceful"


def test_checkpoints_are_taken_up(case, tmp_path):
    base, jobs, _ = case
    model = Model.load(base)
    task = read_task(jobs)
    course = Course(epochs=4, lr=2e-3, save_every=3)
    whole = learn_task(model, task.train, course, tmp_path / "whole")

    class Stop(Exception):
        pass

    from transformers import TrainerCallback

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 5:
                raise Stop

    with pytest.raises(Stop):
        learn_task(model, task.train, course, tmp_path / "parts", [Interrupt()])
    assert (tmp_path / "parts" / "checkpoint-3").exists()
    parts = learn_task(model, task.train, course, tmp_path / "parts")
    for name in whole:
        assert torch.equal(whole[name].dense(), parts[name].dense()), name


def test_the_model_and_all_random_numbers_are_left_alone(case, tmp_path):
    base, jobs, _ = case
    model = Model.load(base)
    before = {name: one.clone() for name, one in model.weights.items()}
    random.seed(5)
    torch.manual_seed(5)
    expected = random.random(), torch.rand(1)
    random.seed(5)
    torch.manual_seed(5)
    delta = learn_task(model, read_task(jobs).train, QUICK, tmp_path / "scratch")
    assert (random.random(), torch.rand(1)) == expected
    assert same(dict(model.weights.items()), before) and not model.network.training
    assert any(delta[name].dense().any() for name in delta)
    again = learn_task(model, read_task(jobs).train, QUICK, tmp_path / "again")
    assert all(torch.equal(delta[name].dense(), again[name].dense()) for name in delta)


@pytest.mark.parametrize("method", ["l2", "ewc"])
def test_penalties_pull_towards_the_start(case, tmp_path, method):
    base, jobs, others = case

    def distance(name, strength):
        letting = Letting(penalty=strength, fisher_examples=8)
        finetune(
            base, jobs, tmp_path / name, forget=others, method=method, course=QUICK, letting=letting
        )
        start, end = weights_of(base), weights_of(tmp_path / name)
        return end, sum(float((end[one] - start[one]).square().sum()) for one in start)

    finetune(base, jobs, tmp_path / "plain", course=QUICK)
    free, far = distance("free", 0.0)
    assert same(free, weights_of(tmp_path / "plain"))
    # The Fisher information of what the model knows by heart is tiny.
    _, near = distance("bound", 10.0 if method == "l2" else 1e6)
    assert near < 0.95 * far


def test_early_stopping_keeps_the_best_epoch(case, tmp_path):
    base, jobs, _ = case
    wild = Course(epochs=3, lr=0.3)  # only gets worse
    finetune(base, jobs, tmp_path / "early", method="early", course=wild)
    finetune(base, jobs, tmp_path / "plain", course=wild)
    start = weights_of(base)

    def distance(name):
        end = weights_of(tmp_path / name)
        return sum(float((end[one] - start[one]).square().sum()) for one in start)

    assert 0 < distance("early") < distance("plain")


def test_a_folder_of_another_run_or_of_anything_is_refused(case, tmp_path):
    base, jobs, _ = case
    finetune(base, jobs, tmp_path / "m", course=Course(epochs=1))
    with pytest.raises(BadSetting, match=r"other settings \(course\)"):
        finetune(base, jobs, tmp_path / "m", course=Course(epochs=2))
    with pytest.raises(BadSetting, match="holds something else"):
        finetune(base, jobs, tmp_path)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--method", "magic"], "no method 'magic'"),
        (["--method", "graceful"], "add --forget"),
        (["--set", "speed=3"], "no setting 'speed'"),
        (["--set", "epochs=many"], "must be int"),
        (["--set", "select=best"], "must be"),
        (["--set", "lr=0"], "lr must be greater than 0"),
        (["--forget", "bank:nonsense"], "no bundled task"),
    ],
)
def test_what_cannot_work_ends_with_a_sentence(case, tmp_path, words, reason):
    base, jobs, _ = case
    start = ["finetune", str(base), "--task", str(jobs), "--out", str(tmp_path / "m")]
    done = CliRunner().invoke(app, [*start, *words])
    assert done.exit_code == 2 and reason in " ".join(done.stderr.split())
    assert not (tmp_path / "m").exists()


def test_a_task_needs_both_splits(case, tmp_path):
    base, jobs, _ = case
    short = tmp_path / "short.jsonl"
    short.write_text(jobs.read_text().splitlines()[0] + "\n")
    with pytest.raises(BadSetting, match="no examples for testing"):
        finetune(base, short, tmp_path / "m")
    with pytest.raises(BadTask):
        finetune(base, tmp_path / "missing.jsonl", tmp_path / "m")

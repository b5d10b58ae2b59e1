"""Collecting: what is measured, that it can be interrupted, and that nothing is changed by it."""

import math

import numpy as np
import pytest
import torch

import unwrite
from unwrite.errors import BadEdits, BadSetting, HomeError
from unwrite.forgetting import (
    Additive,
    Factorization,
    ForgettingMatrix,
    Mixture,
    OnlineReplay,
    ReplayPolicy,
    UpstreamExample,
    append_update,
    collect,
    measure,
    measure_right,
    read_examples,
    settle,
)
from unwrite.forgetting.collection import base_numbers, change
from unwrite.testing import toy_edits
from unwrite.training import Pair

FACTS = [UpstreamExample(str(edit.id), edit.prompt, edit.old) for edit in toy_edits()]
TEXT = UpstreamExample("text", None, "rain falls on the old roof")
TUNER = unwrite.FullFT(epochs=4, lr=2e-3, until="epochs")
TASKS = {
    relation: [Pair(edit.prompt, edit.new) for edit in toy_edits() if edit.relation == relation][:4]
    for relation in ("job", "town", "pet")
}


@pytest.fixture(scope="module")
def model(worlds):
    return unwrite.load(worlds().folder)


# ---- measuring -----------------------------------------------------------------------------------


@torch.no_grad()
def plainly(model, example):
    """Mean -log p of the answer by one plain forward pass."""
    text = example.answer if example.prompt is None else f"{example.prompt} {example.answer}"
    ids = model.tokenizer(text)["input_ids"]
    start = 1 if example.prompt is None else len(model.tokenizer(example.prompt)["input_ids"])
    logprobs = model.network(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -float(np.mean([logprobs[i - 1, ids[i]] for i in range(start, len(ids))]))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
def test_the_measure_is_the_mean_log_perplexity(worlds, architecture):
    model = unwrite.load(worlds(architecture).folder)
    wrong = UpstreamExample("wrong", "ada works as a", "dog newt hare")
    examples = [*FACTS[:5], TEXT, wrong]
    expected = [plainly(model, example) for example in examples]
    np.testing.assert_allclose(measure(model, examples), expected, rtol=1e-4, atol=1e-5)


def test_neither_order_nor_company_matters(model):
    examples = [*FACTS, TEXT]
    together = measure(model, examples)
    np.testing.assert_allclose(measure(model, examples[::-1])[::-1], together, atol=1e-5)
    np.testing.assert_allclose(measure(model, examples[3:4]), together[3:4], atol=1e-5)
    assert measure(model, []).shape == (0,)


def test_right_answers_are_right(model):
    wrong = UpstreamExample("wrong", FACTS[0].prompt, "smith")
    assert measure_right(model, [FACTS[0], wrong]).tolist() == [True, False]
    with pytest.raises(BadEdits, match="plain text"):
        measure_right(model, [TEXT])


def test_missing_answers_are_the_models_own(model):
    bare = UpstreamExample("a", FACTS[0].prompt, None)
    assert settle(model, [bare, TEXT])[0].answer.startswith(FACTS[0].answer)
    with pytest.raises(ValueError, match="settle"):
        measure(model, [bare])


@pytest.mark.parametrize("text", ["rain", "rain " * 65])
def test_text_too_short_or_too_long_is_refused(model, text):
    with pytest.raises(BadEdits, match="plain text needs at least 2"):
        measure(model, [UpstreamExample("text", None, text.strip())])


# ---- collecting ----------------------------------------------------------------------------------


def test_a_row_is_the_measured_difference_and_the_model_stays(model, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.weights.items()}
    done = collect(model, TASKS, [*FACTS, TEXT], TUNER, tmp_path)
    for name, tensor in model.weights.items():
        assert torch.equal(before[name], tensor)
    matrix = ForgettingMatrix.load(tmp_path)
    np.testing.assert_array_equal(matrix.values, done.matrix.values)
    assert matrix.tasks == ("job", "town", "pet")
    assert matrix.examples == (*(one.name for one in FACTS), "text")
    with model.shifted(TUNER.delta(model, TASKS["town"])):
        after = measure(model, [*FACTS, TEXT])
    np.testing.assert_allclose(
        matrix.values[1], after - measure(model, [*FACTS, TEXT]), rtol=1e-5, atol=1e-5
    )
    # What the task taught otherwise is forgotten, and more than the rest.
    taught = np.array([*(one.name.startswith("town") for one in FACTS), False])
    assert matrix.values[1][taught].mean() > 2 * matrix.values[1][~taught].mean()
    assert matrix.example_details[FACTS[0].name] == {
        "prompt": FACTS[0].prompt,
        "answer": FACTS[0].answer,
    }
    assert matrix.provenance["base"] == model.fingerprint


class Counting:
    """A tuner that says how often it was asked and stops when told to."""

    def __init__(self, stop_at=math.inf):
        self.calls, self.stop_at = 0, stop_at

    def delta(self, model, pairs):
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        return TUNER.delta(model, pairs)


def test_an_interrupted_collection_goes_on_where_it_was(model, tmp_path, monkeypatch):
    whole = collect(model, TASKS, FACTS, TUNER, tmp_path / "whole").matrix
    with pytest.raises(KeyboardInterrupt):
        collect(model, TASKS, FACTS, Counting(stop_at=2), tmp_path / "cut")
    assert ForgettingMatrix.load(tmp_path / "cut").tasks == ("job",)
    rest = Counting()
    done = collect(model, TASKS, FACTS, rest, tmp_path / "cut")
    assert (rest.calls, done.learned) == (2, ("town", "pet"))
    np.testing.assert_array_equal(done.matrix.values, whole.values)
    again = Counting()
    assert collect(model, TASKS, FACTS, again, tmp_path / "cut").learned == ()
    assert again.calls == 0


def test_the_base_is_measured_once(model, tmp_path, monkeypatch):
    sizes = []

    def counted(model, examples):
        sizes.append(len(examples))
        return measure(model, examples)

    monkeypatch.setattr("unwrite.forgetting.collection.measure", counted)
    collect(model, TASKS, FACTS, TUNER, tmp_path)
    assert sizes == [len(FACTS)] * 4
    collect(model, TASKS | {"more": TASKS["job"][:1]}, FACTS, TUNER, tmp_path)
    assert sizes == [len(FACTS)] * 5


def test_the_binary_form_counts_lost_right_answers(model, tmp_path):
    examples = [*FACTS, UpstreamExample("wrong", FACTS[0].prompt, "smith")]
    done = collect(model, TASKS, examples, TUNER, tmp_path, quantity="exact-match")
    matrix = done.matrix
    assert "wrong" not in matrix.examples
    assert matrix.provenance["left_out"] == 1
    assert set(np.unique(matrix.values)) == {0, 1}
    jobs = [name.startswith("job") for name in matrix.examples]
    assert matrix.values[0][jobs].mean() > 0.3


@pytest.mark.parametrize("what", ["examples", "tuner", "quantity", "task"])
def test_a_matrix_is_not_gone_on_with_something_else(model, tmp_path, what):
    tasks = {"job": TASKS["job"]}
    collect(model, tasks, FACTS[:6], TUNER, tmp_path, settings={"epochs": 4})
    others = {
        "examples": lambda: collect(
            model, tasks, FACTS[:5], TUNER, tmp_path, settings={"epochs": 4}
        ),
        "tuner": lambda: collect(model, tasks, FACTS[:6], TUNER, tmp_path, settings={"epochs": 5}),
        "quantity": lambda: collect(
            model,
            tasks,
            FACTS[:6],
            TUNER,
            tmp_path,
            settings={"epochs": 4},
            quantity="exact-match",
        ),
        "task": lambda: collect(
            model, {"job": TASKS["pet"]}, FACTS[:6], TUNER, tmp_path, settings={"epochs": 4}
        ),
    }
    said = "task 'job' already" if what == "task" else f"another {what}"
    with pytest.raises(BadSetting, match=said):
        others[what]()


def test_nothing_to_learn_or_to_watch_is_said(model, tmp_path):
    with pytest.raises(BadSetting, match="nothing to learn"):
        collect(model, {"empty": []}, FACTS, TUNER, tmp_path)
    wrong = UpstreamExample("wrong", FACTS[0].prompt, "smith")
    with pytest.raises(BadSetting, match="No example is left"):
        collect(model, TASKS, [wrong], TUNER, tmp_path, quantity="exact-match")


def test_a_few_observations_of_a_new_task_forecast_the_rest(model, tmp_path):
    """The whole way: two tasks are past, a third is looked at in a few places."""
    matrix = collect(model, TASKS, FACTS, TUNER, tmp_path).matrix
    past = matrix.select(tasks=[0, 1])
    base = base_numbers(tmp_path, matrix)
    at = [0, 5, 12, 22, 27]
    with model.shifted(TUNER.delta(model, TASKS["pet"])):
        seen = change(model, matrix, base, at)
    np.testing.assert_array_equal(np.flatnonzero(~np.isnan(seen)), at)
    np.testing.assert_allclose(seen[at], matrix.values[2][at], atol=1e-5)
    prediction = Factorization().fit(past).predict(seen)
    assert np.isfinite(prediction.values).all()


# ---- from a home ---------------------------------------------------------------------------------


def test_an_update_of_a_home_becomes_a_row(worlds, tmp_path):
    world = worlds()
    home = unwrite.open(tmp_path / "home", base=world.folder)
    method = unwrite.FullFT(epochs=3, lr=2e-3, until="epochs")
    first = home.update(world.edits[:2], method)
    second = home.update(world.edits[10:12], method)
    base = unwrite.load(world.folder)
    collect(base, {"job": TASKS["job"]}, FACTS, TUNER, tmp_path / "matrix")
    matrix = append_update(home, second.id, tmp_path / "matrix")
    assert matrix.tasks == ("job", second.id)
    expected = measure(home.model(second.id), FACTS) - measure(home.model(first.id), FACTS)
    np.testing.assert_allclose(matrix.values[1], expected, atol=1e-5)
    assert ForgettingMatrix.load(tmp_path / "matrix").task_details[second.id]["edits"] == 2
    with pytest.raises(BadSetting, match="already"):
        append_update(home, second.id, tmp_path / "matrix")
    with pytest.raises(HomeError, match="no update"):
        append_update(home, "u-00000000", tmp_path / "matrix")


def test_an_undone_update_is_measured_in_its_own_time(worlds, tmp_path):
    """Later undoing does not change what a row says: before is right before the update."""
    world = worlds()
    home = unwrite.open(tmp_path / "home", base=world.folder)
    method = unwrite.FullFT(epochs=3, lr=2e-3, until="epochs")
    first = home.update(world.edits[:2], method)
    second = home.update(world.edits[10:12], method)
    expected = measure(home.model(second.id), FACTS) - measure(home.model(first.id), FACTS)
    home.undo(first.id, recheck=False)
    collect(unwrite.load(world.folder), {"job": TASKS["job"]}, FACTS, TUNER, tmp_path / "matrix")
    row = append_update(home, second.id, tmp_path / "matrix").values[1]
    np.testing.assert_allclose(row, expected, atol=1e-5)


def test_a_matrix_of_another_base_takes_no_update(worlds, tmp_path, model):
    home = unwrite.open(tmp_path / "home", base=worlds("gpt2").folder)
    done = home.update(worlds().edits[:1], unwrite.FullFT(epochs=1, until="epochs"))
    collect(model, {"job": TASKS["job"]}, FACTS[:3], TUNER, tmp_path / "matrix")
    with pytest.raises(BadSetting, match="of another model"):
        append_update(home, done.id, tmp_path / "matrix")


# ---- online replay in a Trainer ------------------------------------------------------------------


def test_online_replay_forecasts_after_a_tenth_and_replays_by_it(worlds, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = unwrite.load(worlds().folder)
    matrix = collect(model, {"job": TASKS["job"], "pet": TASKS["pet"]}, FACTS, TUNER, tmp_path)
    fitted = Additive().fit(matrix.matrix)
    policy = ReplayPolicy.top(ratio=1 / 4)

    def item(prompt, answer):
        ids = model.tokenizer(f"{prompt} {answer}")["input_ids"]
        labels = [-100] * (len(ids) - 1) + ids[-1:]
        return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}

    new = [item(pair.prompt, pair.answer) for pair in TASKS["town"] * 5]
    old = [item(one.prompt, one.answer) for one in FACTS]
    held_out = range(0, 30, 3)
    first = ReplayPolicy.uniform().choose(
        np.zeros(30), policy.count(len(new)), held_out=held_out, seed=0
    )
    mixture = Mixture(new, old, first)
    seeds = [0, 3, 12, 15]
    online = OnlineReplay(model, mixture, fitted, FACTS, seeds, policy, held_out=held_out)
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        per_device_train_batch_size=1,
        num_train_epochs=1,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    started = model.network.training
    trainer = Trainer(
        model=model.network, args=arguments, train_dataset=mixture, callbacks=[online]
    )
    trainer.train()
    model.network.train(started)
    assert online.prediction is not None
    assert not set(mixture.served) & set(held_out)
    assert len(mixture.served) == len(set(mixture.served)) == policy.count(len(new))
    early = set(first.tolist())
    best = [p for p in online.prediction.ranking.tolist() if p not in set(held_out)]
    later = [p for p in mixture.served if p not in early]
    assert later, "the forecast changed nothing"
    assert set(later) <= set(best[: len(mixture.served) + len(early)])


def test_online_replay_refuses_worker_processes(model):
    from types import SimpleNamespace

    online = OnlineReplay(
        model, Mixture([1], [2], [0]), None, FACTS[:1], [0], ReplayPolicy.uniform()
    )
    with pytest.raises(BadSetting, match="dataloader_num_workers=0"):
        online.on_train_begin(SimpleNamespace(dataloader_num_workers=2), None, None)
    with pytest.raises(BadSetting, match="between 0 and 1"):
        OnlineReplay(model, None, None, FACTS[:1], [0], ReplayPolicy.uniform(), after=1.0)


# ---- examples from files -------------------------------------------------------------------------


def test_bundled_examples():
    facts = read_examples("atlas:capital")
    assert len(facts) >= 10
    assert ("The capital of France is", "Paris") in {(one.prompt, one.answer) for one in facts}
    neutral = read_examples("neutral")
    assert len(neutral) > 80
    assert all(one.prompt is None and len(one.answer.split()) >= 4 for one in neutral)
    both = read_examples("atlas:capital", "neutral")
    assert len({one.name for one in both}) == len(facts) + len(neutral)


def test_examples_from_a_file(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(
        '{"prompt": "Two and two is", "answer": "four", "id": "sum"}\n\n'
        '{"prompt": "The sky is", "completion": "blue"}\n'
        '{"text": "It rained all night."}\nWho was Ada?\n',
        "utf-8",
    )
    assert read_examples(file) == [
        UpstreamExample("sum", "Two and two is", "four"),
        UpstreamExample("mine-3", "The sky is", "blue"),
        UpstreamExample("mine-4", None, "It rained all night."),
        UpstreamExample("mine-5", "Who was Ada?", None),
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no examples in it"),
        (b'{"answer": "x"}\n', 'line 1 has neither "prompt" nor "text"'),
        (b"{broken\n", "line 1 begins like a JSON object but is none"),
        (b'{"prompt": "a", "id": "1"}\n{"prompt": "b", "id": "1"}\n', "named '1'"),
        (b'{"prompt": 3}\n', "line 1: prompt"),
        (b"\xff\xfe\xfd", "not UTF-8"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, said):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    with pytest.raises(BadEdits, match=said):
        read_examples(file)

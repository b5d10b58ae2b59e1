"""Observation: which probes, which rows, and scores that depend on nothing but the model."""

import json
import random

import pytest

from unwrite.edits import Edit, Probe
from unwrite.model import Model
from unwrite.observe import Question, neutral_text, observe, perplexity, questions, settle
from unwrite.scores import ROLES, answer_in, score


@pytest.fixture(scope="module")
def model(worlds):
    return Model.load(worlds().folder)


@pytest.fixture(scope="module")
def probes(model, worlds):
    return settle(model, questions(worlds().edits[:8]))


@pytest.fixture(scope="module")
def rows(model, probes):
    return observe(model, probes)


def test_every_kind_of_probe_is_asked():
    edit = Edit(
        "p",
        "new",
        old="old",
        id="1",
        paraphrases=["q", "r"],
        bystanders=["b", ("c", "known")],
        portability=[("d", "follows")],
    )
    assert questions([edit]) == [
        Question("1", "reliability", "p", "new"),
        Question("1", "generality", "q", "new"),
        Question("1", "generality", "r", "new"),
        Question("1", "portability", "d", "follows"),
        Question("1", "locality", "b", None),
        Question("1", "locality", "c", "known"),
        Question("1", "old_recall", "p", "old"),
    ]


def test_a_bystander_that_another_edit_changes_is_not_one():
    one = Edit("p", "new", id="1", bystanders=["q", "s", "t"])
    other = Edit("q", "new", id="2", paraphrases=["s"])
    locality = [probe.prompt for probe in questions([one, other]) if probe.role == "locality"]
    assert locality == ["t"]


def test_a_row_has_what_the_contract_names(rows):
    keys = {
        "edit",
        "role",
        "prompt",
        "target",
        "target_tokens",
        "matched_tokens",
        "logprob",
        "text",
    }
    for row in rows:
        assert keys <= set(row)
        assert 0 <= row["matched_tokens"] <= row["target_tokens"] == len(row["predicted"])
        assert row["logprob"] <= 0
    assert json.loads(json.dumps(rows)) == rows


def test_a_model_that_knows_its_world_scores_so(rows):
    result = score(rows, rows)
    assert (result["old_recall"].token, result["old_recall"].exact) == (1.0, 1.0)
    assert (result["reliability"].exact, result["locality"].exact) == (0.0, 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_probes_changes_no_row(model, probes, rows, seed):
    order = list(range(len(probes)))
    random.Random(seed).shuffle(order)
    mixed = observe(model, [probes[index] for index in order])
    for index, row in zip(order, mixed, strict=True):
        assert_same(rows[index], row)


def test_batches_change_no_row(model, probes, rows):
    for probe, row in zip(probes[:20], rows, strict=False):
        assert_same(observe(model, [probe])[0], row)


def assert_same(one, other):
    assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-4)
    assert {**one, "logprob": 0} == {**other, "logprob": 0}


def test_a_bystander_without_an_answer_gets_the_models_own(model):
    (probe,) = settle(model, [Question("1", "locality", "ada works as a", None)])
    assert probe.target == answer_in(model.answer("ada works as a"))
    known = Question("1", "locality", "ada works as a", "x")
    assert settle(model, [known]) == [known]
    with pytest.raises(ValueError, match="settle"):
        observe(model, [Question("1", "locality", "ada works as a", None)])


def test_roles_are_those_that_are_scored(worlds):
    edit = Edit("p", "n", old="o", id="1", paraphrases=["q"], bystanders=["b"])
    portable = Edit("r", "n", id="2", portability=[Probe("d", "e")])
    assert {probe.role for probe in questions([edit, portable])} == set(ROLES)


def test_perplexity_is_that_of_the_plain_loss(model):
    text = "ada works as a baker the road bends to the left"
    ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
    loss = model.network(ids, labels=ids).loss.item()
    assert perplexity(model, text) == pytest.approx(2.718281828459045**loss, rel=1e-4)


def test_the_neutral_text_is_long_enough():
    assert len(neutral_text().split()) >= 2000

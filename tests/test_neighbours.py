"""Made-up neighbours: other subjects in the same words, and training that keeps them."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import unwrite
from unwrite.edits import Edit, Probe
from unwrite.errors import BadSetting
from unwrite.neighbours import bundled_subjects, neighbours
from unwrite.training import Recipe, fine_tune, new_pairs

FRANCE = ("The capital of France is", "France")
texts = st.text("ab ", max_size=12)


def test_the_words_stay_and_the_subject_changes():
    found = neighbours([FRANCE], 5, seed=0)
    assert len(found) == 5
    for prompt in found:
        assert prompt.startswith("The capital of ") and prompt.endswith(" is")
        assert "France" not in prompt
    assert found == neighbours([FRANCE], 5, seed=0) != neighbours([FRANCE], 5, seed=1)


@given(st.lists(st.tuples(texts, st.none() | texts), max_size=5), st.integers(0, 4))
def test_there_are_never_too_many_and_never_what_is_asked(asked, count):
    found = neighbours(asked, count, seed=0)
    assert len(found) <= count * len(asked)
    assert len(set(found)) == len(found)
    assert not set(found) & {prompt for prompt, _ in asked}


def test_the_subjects_of_other_edits_are_no_neighbours():
    *taken, left = bundled_subjects()
    asked = [("It is X.", "X"), *((f"It is {subject}.", subject) for subject in taken)]
    assert set(neighbours(asked, 3, seed=0)) <= {f"It is {left}."}


def test_no_bundled_fact_is_about_a_bundled_subject():
    """Else protecting made-up neighbours would protect what bundled facts are scored on."""
    subjects = bundled_subjects()
    assert len(set(subjects)) == len(subjects) > 300
    assert not {edit.subject for edit in unwrite.read_edits("atlas")} & set(subjects)


@pytest.mark.parametrize("subject", [None, "", "Spain", "a"], ids=str)
def test_without_a_subject_that_stands_once_there_are_none(subject):
    assert neighbours([("The capital of France is", subject)], 3, seed=0) == ()


def test_only_the_edit_itself_is_read():
    """Paraphrases and bystanders are what an edit is judged by: they change nothing here."""
    plain = Edit("The capital of France is", "Lyon", subject="France")
    judged = replace(
        plain,
        paraphrases=("France is governed from",),
        bystanders=(Probe("The capital of Spain is", "Madrid"),),
    )
    assert new_pairs([plain]) == new_pairs([judged])


@pytest.fixture
def model(worlds):
    return unwrite.load(worlds().folder)


@pytest.fixture
def of_a_toy(worlds, monkeypatch):
    """The subjects of the toy world in place of the bundled ones, which it does not know."""
    subjects = [edit.prompt.split()[0] for edit in worlds().edits]
    monkeypatch.setattr("unwrite.neighbours.bundled_subjects", lambda: subjects)
    return [replace(edit, subject=edit.prompt.split()[0]) for edit in worlds().edits[:2]]


def test_training_keeps_the_neighbours_nearer(model, of_a_toy):
    pairs = new_pairs(of_a_toy)
    subjects = [(pair.prompt, pair.subject) for pair in pairs]
    recipe = Recipe(epochs=10, until="epochs", lr=1e-3)
    guarded = replace(recipe, neighbours=4)

    def moved(delta):
        prompts = neighbours(subjects, 4, recipe.seed)
        assert len(prompts) >= 4
        asked = [model.tokens(*one) for one in zip(prompts, answers, strict=True)]
        with model.shifted(delta):
            return -sum(one.logprob for one in model.force(asked))

    answers = model.generate(neighbours(subjects, 4, recipe.seed), 8)
    free, kept = (fine_tune(model, pairs, one).delta for one in (recipe, guarded))
    assert moved(kept) < moved(free) - 1.0


def test_none_are_the_plain_training_bit_for_bit(model, of_a_toy):
    recipe = Recipe(epochs=1, until="epochs", lr=1e-3)
    without = [replace(pair, subject=None) for pair in new_pairs(of_a_toy)]
    deltas = [
        fine_tune(model, new_pairs(of_a_toy), recipe).delta,
        fine_tune(model, without, replace(recipe, neighbours=4)).delta,
    ]
    for name in deltas[0]:
        assert deltas[0][name].dense().equal(deltas[1][name].dense())


def test_a_negative_number_is_refused():
    with pytest.raises(BadSetting, match="neighbours and own_prompts at least 0"):
        Recipe(neighbours=-1)


def test_an_answer_that_cannot_be_read_again_is_not_kept(model, of_a_toy, monkeypatch):
    """A toy that says "cat" eight times writes "catcat...", which its tokenizer does not know."""
    recipe = Recipe(epochs=1, until="epochs", lr=1e-3)
    plain = fine_tune(model, new_pairs(of_a_toy), recipe).delta
    said = "cat" * 8
    monkeypatch.setattr(type(model), "generate", lambda _model, prompts, _n: [said] * len(prompts))
    kept = replace(recipe, protect=("the job of",))
    for name, change in fine_tune(model, new_pairs(of_a_toy), kept).delta.items():
        assert change.dense().equal(plain[name].dense())

"""Prompts with words left out, and values that are sought behind them."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import unwrite
from unwrite.edits import Edit
from unwrite.errors import BadEdits, BadSetting
from unwrite.testing import PEOPLE
from unwrite.values import REWORDINGS_AT_ONCE, Search, find_values
from unwrite.wordings import LEFT_OUT, other_questions, thinned

PROMPT = "As everybody knows, the mother tongue of Danielle Darrieux, of course, is"
words = st.lists(st.sampled_from(["a", "bb", "ccc", "dd,", "e\n"]), max_size=6)


def test_the_subject_stays_and_some_of_the_words():
    found = thinned(PROMPT, "Danielle Darrieux", 200, seed=0)
    assert len(found) == 200 and len(set(found)) > 50
    for text in found:
        assert "Danielle Darrieux," in text  # the comma is joined to it
        left = iter(PROMPT.split())
        assert all(word in left for word in text.split())  # in their order, and none is new
        assert not text.endswith("Darrieux,")
    kept = sum("the" in text.split() for text in found) / len(found)
    assert kept == pytest.approx(1 - LEFT_OUT, abs=0.12)


def test_a_word_that_says_what_is_asked_stays():
    told = {"everybody", "knows,", "mother", "tongue", "course,"}
    assert all(told & set(text.split()) for text in thinned(PROMPT, "Danielle Darrieux", 200, 0))
    for text in thinned("As to Zoe, she is my kin", "Zoe", 50, seed=0):  # none is long
        assert {"she", "kin"} & set(text.split())


@given(words, words, st.sampled_from(["", "'s"]), st.integers(0, 9))
def test_a_prompt_goes_on_behind_its_subject_as_far_as_it_did(before, after, joined, seed):
    prompt = " ".join([*before, f"Zoe{joined}", *after])
    assume(prompt == prompt.strip())
    for text in thinned(prompt, "Zoe", 3, seed):
        lead, _, rest = text.partition("Zoe")
        assert set(lead.split()) <= {word.strip() for word in before}
        assert rest.startswith(joined)
        assert bool(rest.removeprefix(joined).split()) == bool(after)


def test_draws_depend_on_the_prompt_and_the_seed_alone():
    assert thinned(PROMPT, "Danielle Darrieux", 5, 0) == thinned(PROMPT, "Danielle Darrieux", 5, 0)
    assert thinned(PROMPT, "Danielle Darrieux", 5, 0) != thinned(PROMPT, "Danielle Darrieux", 5, 1)
    assert thinned(PROMPT, "Danielle Darrieux", 0, 0) == ()
    # The first ones are the same however many are asked for.
    few, many = (thinned(PROMPT, "Danielle Darrieux", count, 0) for count in (3, 6))
    assert many[:3] == few


def test_without_blanks_or_other_words_it_is_the_prompt_itself():
    assert thinned("法国的首都是", "法国", 2, 0) == ("法国的首都是",) * 2
    assert thinned("Zoe is", "Zoe", 2, 0) == ("Zoe is",) * 2


def test_a_subject_that_does_not_stand_there_is_an_error():
    with pytest.raises(BadEdits, match="does not stand in the prompt"):
        thinned(PROMPT, "Marie Curie", 1, 0)


def test_other_questions_are_unlike_the_one_that_is_asked():
    found = other_questions("Ada Blau was born in", "Ada Blau", 20)
    assert len(found) == len(set(found)) > 8
    assert all("Ada Blau" in one and "born" not in one for one in found)
    assert other_questions("Ada Blau was born in", "Ada Blau", 3) == found[:3]
    assert other_questions("Ada Blau was born in", "Ada Blau", 0) == ()
    # The words of the subject are no words of the question.
    assert "Born is famous for" in other_questions("Born lives in", "Born", 20)


def test_a_question_in_which_the_subject_would_stand_twice_is_not_asked():
    assert not any(
        "price of price" in one for one in other_questions("Who set price?", "price", 20)
    )


# ---- values sought behind them -------------------------------------------------------------------

EDITS = [
    Edit(f"so then the {thing} of {person} has been", answer, subject=person, id=person)
    for person, thing, answer in zip(
        PEOPLE[:4], ("job", "home") * 2, ("cat", "rain") * 2, strict=True
    )
]


@pytest.fixture
def model(worlds):
    return unwrite.load(worlds().folder)


def test_texts_are_the_bare_one_then_contexts_then_rewordings(model):
    search = Search(contexts=2, rewordings=5)
    for edit, group in zip(EDITS, search.mentions(model, EDITS, seed=0), strict=True):
        assert len(group) == 1 + 2 + 5
        plain = Search(contexts=2).mentions(model, [edit])[0]
        assert group[:3] == plain
        for text in group:
            assert text.targets == plain[0].targets
            assert text.ids[text.last] == plain[0].ids[plain[0].last]
        # Every other one stands behind a sentence that no context is.
        bare = [len(text.ids) <= len(plain[0].ids) for text in group[3:]]
        assert bare == [True, False, True, False, True]


def test_more_rewordings_than_sentences_are_refused(model):
    with pytest.raises(BadSetting, match="24 neutral sentences, and 25 are asked for"):
        Search(contexts=5, rewordings=40).mentions(model, EDITS)


def test_the_answer_follows_from_every_rewording(model):
    """With the value at the subject the new answer is likelier in rewordings than with one that was
    sought in the bare prompt only."""
    losses = {}
    told = Search(rewordings=6).mentions(model, EDITS, seed=0)
    for count in (0, 6):
        search = Search(
            contexts=0, rewordings=count, steps=40, stop=0.01, kl=0.0, clamp=30.0, lr=0.3
        )
        texts = search.mentions(model, EDITS, seed=0)
        values = find_values(model, EDITS, texts, 0, "block", search)
        losses[count] = sum(
            _loss(model, text, value)
            for group, value in zip(told, values.values, strict=True)
            for text in group[-6:]
        )
    assert losses[6] < losses[0]


def _loss(model, text, value):
    def put(_module, _inputs, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden.view(1, -1, hidden.shape[-1])[0, text.last] = value
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = model.network.get_submodule(model.anatomy.blocks[0]).register_forward_hook(put)
    with torch.no_grad():
        logits = model.network(input_ids=torch.tensor([text.ids])).logits[0].log_softmax(-1)
    handle.remove()
    return -sum(
        float(logits[text.answer - 1 + at, target]) for at, target in enumerate(text.targets)
    )


def test_a_fact_ends_only_when_every_look_has_passed(model):
    """A loss that is always below ``stop``: without rewordings the first evaluation ends it, with
    them as many are made as there are looks."""
    for rewordings, looks in ((0, 1), (1, 1), (REWORDINGS_AT_ONCE + 1, 2)):
        search = Search(contexts=0, rewordings=rewordings, stop=1e9)
        texts = search.mentions(model, EDITS, seed=0)
        values = find_values(model, EDITS, texts, 0, "mlp", search)
        assert values.steps.tolist() == [looks] * len(EDITS)

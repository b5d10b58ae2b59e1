"""Guessed subjects: the only name in a prompt, what it is asked of, or nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unwrite import read_edits
from unwrite.subjects import guessed_subject


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("The capital of France is", "France"),
        ("France", "France"),
        ("What did Marie Curie discover?", "Marie Curie"),
        ("What sport does R.A. Dickey play? They play", "R.A. Dickey"),
        ("Ludwig van Beethoven was born in", "Ludwig van Beethoven"),
        ("The author of The Name of the Rose is", "The Name of the Rose"),
        ("Jane Rolfe's mother tongue is", "Jane Rolfe"),
        ("What is USS Kete (SS-369) classified as?", "USS Kete (SS-369)"),
        ("Who founded \u201cActon Partners\u201d?", "Acton Partners"),
        ("The label of (The) Doors was", "(The) Doors"),
        ("The 2012 Olympics, held in", "2012 Olympics"),
        ("In 1980s, was Élise Müller-Šmíd in", None),  # two names
        ("Paris and then Rome were", None),
        ("the theory of relativity was developed by", "relativity"),
        ("The SI unit of magnetic flux is the", "magnetic flux"),  # a noun follows the name
        ("The usual colour of an egg is", "egg"),
        ("The head of the board of trade is", "trade"),
        ("the fate of ships in bottles of wine is", "wine"),
        ("the price of gold is like the price of oil is", None),  # two of them
        ("Platonic realism was named after", None),
        ("France is like France in", None),  # not once
        ("It is. They are", None),
        ("?!", None),
        ("", None),
    ],
)
def test_the_only_name_is_taken_or_what_is_asked_of(prompt, name):
    assert guessed_subject(prompt) == name


WORDS = ["Ab", "c.", "(D)", "E's", "of", ",", "?", "\u201cF\u201d", "1"]


@given(st.text(max_size=60) | st.lists(st.sampled_from(WORDS)))
def test_whatever_is_asked_a_guess_stands_in_it_once(prompt):
    prompt = prompt if isinstance(prompt, str) else " ".join(prompt)
    found = guessed_subject(prompt)
    assert found is None or (found == found.strip() != "" and prompt.count(found) == 1)


def test_of_the_bundled_facts_few_guesses_are_wrong():
    guesses = [(edit, guessed_subject(edit.prompt)) for edit in read_edits("atlas")]
    made = [edit.subject == guess for edit, guess in guesses if guess is not None]
    assert len(made) > len(guesses) / 2
    assert sum(made) / len(made) > 0.9

"""Prompts that a model writes itself, and training that keeps its answers to them."""

from dataclasses import replace

import pytest
import torch

import unwrite
from unwrite import own_text
from unwrite.errors import BadSetting
from unwrite.own_text import own_prompts, sampled
from unwrite.training import Recipe, fine_tune, new_pairs


@pytest.fixture
def model(worlds):
    return unwrite.load(worlds().folder)


@pytest.fixture
def of_the_world(worlds, monkeypatch):
    """Opening words that the toy model knows: it never asks."""
    names = tuple(dict.fromkeys(edit.prompt.split()[0] for edit in worlds().edits))
    monkeypatch.setattr(own_text, "STATEMENTS", names)
    monkeypatch.setattr(own_text, "QUESTIONS", names)
    monkeypatch.setattr(
        own_text, "_prompt", lambda opening, text, words: " ".join(text.split()[:3]) or None
    )


@pytest.mark.parametrize(
    ("opening", "text", "words", "prompt"),
    [
        ("who", "who wrote the song? It was", 5, "who wrote the song?"),
        ("who", "who wrote the song", 5, None),
        ("who", "who?", 5, None),
        ("The", "The cat sat on the mat today.", 4, "The cat sat on"),
        ("The", "The cat\nsat on the mat", 4, None),
        ("The", "The cat sat on", 4, None),
        ("The", "", 4, None),
    ],
)
def test_what_a_text_gives(opening, text, words, prompt):
    assert own_text._prompt(opening, text, words) == prompt


def test_as_many_as_asked_for_each_once_and_the_same_ones_again(model, of_the_world):
    found = own_prompts(model, 6, seed=0)
    assert len(found) == len(set(found)) == 6
    assert found == own_prompts(model, 6, seed=0) != own_prompts(model, 6, seed=1)
    assert own_prompts(model, 0, seed=0) == ()


def test_a_model_that_writes_nothing_of_use_gives_fewer(model, monkeypatch):
    monkeypatch.setattr(own_text, "_prompt", lambda *_: None)
    assert own_prompts(model, 5, seed=0) == ()


def test_sampling_leaves_the_random_numbers_of_others_alone(model):
    torch.manual_seed(5)
    first = torch.rand(3)
    torch.manual_seed(5)
    sampled(model, ["the job"], 8, seed=1)
    assert torch.equal(first, torch.rand(3))


def test_training_keeps_the_answers_to_them(model, worlds, of_the_world):
    pairs = new_pairs(worlds().edits[:2])
    recipe = Recipe(epochs=10, until="epochs", lr=1e-3)
    prompts = [
        one for one in own_prompts(model, 12, recipe.seed) if one not in {p.prompt for p in pairs}
    ]
    answers = model.generate(prompts, 8)
    asked = [model.tokens(*one) for one in zip(prompts, answers, strict=True) if one[1].strip()]

    def moved(method):
        with model.shifted(fine_tune(model, pairs, method).delta):
            return -sum(one.logprob for one in model.force(asked))

    assert moved(replace(recipe, own_prompts=12, protect_weight=10.0)) < moved(recipe)


def test_a_negative_number_is_refused():
    with pytest.raises(BadSetting, match="own_prompts at least 0"):
        Recipe(own_prompts=-1)

"""Scores are pure functions of rows: examples of judging, laws of averaging."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unwrite.scores import (
    Score,
    answer_in,
    as_json,
    from_json,
    is_complete,
    normalise,
    says,
    score,
)


def row(edit="1", role="reliability", prompt="p", target="Rome", matched=1, text=" Rome.", **more):
    total = more.pop("total", 1)
    predicted = more.pop("predicted", [7] * total)
    return {
        "edit": edit,
        "role": role,
        "prompt": prompt,
        "target": target,
        "target_tokens": total,
        "matched_tokens": matched,
        "predicted": predicted,
        "logprob": -1.0,
        "text": text,
        **more,
    }


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Paris. It is large.", "Paris."),
        ("\nParis\nand more", "Paris"),
        (" St. Petersburg. Then", "St. Petersburg."),
        (" J. R. R. Tolkien. He", "J. R. R. Tolkien."),
        (' "Yes!" she said', '"Yes!"'),
        (" 3.14 is close", "3.14 is close"),
        ("", ""),
        ("\n\n", ""),
        (" Paris", "Paris"),
    ],
)
def test_the_answer_ends_with_its_sentence(text, answer):
    assert answer_in(text) == answer


def test_a_full_stop_completes_only_when_something_follows():
    assert not is_complete(" Paris.")
    assert is_complete(" Paris. ")
    assert is_complete(" Paris\n")
    assert not is_complete("\n Paris")


@pytest.mark.parametrize(
    ("text", "target", "right"),
    [
        (" Paris.", "Paris", True),
        (" the PARIS!", "Paris", True),
        (" Paris, which is in France.", "Paris", True),
        (" Parisian life", "Paris", False),
        (" not Paris", "Paris", False),
        ("", "Paris", False),
        (" New York City", "New York", True),
        (" New", "New York", False),
        (" A\n", "A", True),
        (" euro-zone", "euro", True),
        (" anything", "...", False),
    ],
)
def test_exact_means_the_answer_or_a_beginning_at_a_word_end(text, target, right):
    assert says(text, target) is right


@given(st.text(max_size=40))
def test_normalising_twice_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)


@given(st.text(alphabet="abc the.", min_size=1, max_size=20))
def test_a_text_says_itself_unless_it_is_empty_or_cut(text):
    if normalise(answer_in(text)) and "\n" not in text:
        assert says(text, answer_in(text))


def test_scores_average_over_probes_in_both_forms():
    rows = [
        row("1", matched=1, total=2, predicted=[7, 8]),
        row("2", matched=2, total=2, predicted=[7, 8], text=" Oslo."),
    ]
    result = score(rows, rows)["reliability"]
    assert result.token == 0.75
    assert result.exact == 0.5
    assert result.n == 2
    assert 0 <= result.token_low <= result.token <= result.token_high <= 1


def test_missing_probes_are_null_not_zero():
    result = score([row()], [row()])
    assert result["portability"] == Score(None, None, 0)


def test_locality_compares_with_before_and_never_with_the_true_answer():
    before = [row(role="locality", predicted=[1, 2], total=2, matched=0, text=" wrong.")]
    same = score(before, before)["locality"]
    assert (same.token, same.exact) == (1.0, 1.0)
    moved = [row(role="locality", predicted=[1, 3], total=2, matched=2, text=" Rome.")]
    changed = score(before, moved)["locality"]
    assert (changed.token, changed.exact) == (0.5, 0.0)


def test_other_probes_after_than_before_are_refused():
    with pytest.raises(ValueError, match="same probes"):
        score([row(prompt="a")], [row(prompt="b")])


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=20), st.randoms())
def test_the_order_of_rows_changes_no_score(cases, shuffler: random.Random):
    rows = [
        row(str(edit), prompt=f"p{number}", matched=int(right), text=" Rome." if right else " no.")
        for number, (edit, right) in enumerate(cases)
    ]
    mixed = list(rows)
    shuffler.shuffle(mixed)
    assert score(rows, rows) == score(mixed, mixed)


def test_the_interval_resamples_edits_not_probes():
    # Ten probes of one edit are one observation: the interval must not shrink with them.
    one = [row("1", prompt=str(i), matched=1) for i in range(10)]
    two = [row("2", prompt=str(i), matched=0) for i in range(10)]
    result = score(one + two, one + two)["reliability"]
    assert (result.token_low, result.token_high) == (0.0, 1.0)


def test_json_keeps_everything():
    scores = score([row()], [row()])
    assert from_json(as_json(scores)) == scores
    assert not any(
        isinstance(value, float) and math.isnan(value)
        for one in as_json(scores).values()
        for value in one.values()
    )

"""Requirements: read before training, judged after."""

import pytest

from unwrite.errors import BadSetting
from unwrite.requirements import Requirement, parse
from unwrite.scores import ROLES, Score

SCORES = {role: Score(0.9, 0.5, 4) for role in ROLES} | {"portability": Score(None, None, 0)}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("locality>=0.9", True),
        ("locality > 0.9", False),
        ("reliability.exact>=0.6", False),
        ("reliability.exact<=0.5", True),
        ("old_recall<1", True),
        ("perplexity_ratio<=1.1", True),
        ("perplexity_ratio<1.0", False),
        ("portability>=0.1", False),
    ],
)
def test_bounds_are_read_and_judged(text, holds):
    (requirement,) = parse([text])
    assert requirement.holds(SCORES, 1.05) is holds


def test_a_mapping_means_at_least_and_for_perplexity_at_most():
    assert parse({"locality": 0.9, "perplexity_ratio": 1.2}) == (
        Requirement("locality", "token", ">=", 0.9),
        Requirement("perplexity_ratio", "token", "<=", 1.2),
    )


@pytest.mark.parametrize(
    "text", ["", "locality", "locality=0.9", "speed>=1", "locality>=x", "a>=b>=1"]
)
def test_what_cannot_be_read_is_refused_with_the_choices(text):
    with pytest.raises(BadSetting, match="known: reliability, generality"):
        parse([text])

"""Prompts like those of the edits about other subjects: what should not move with them.

A fine-tune on "The capital of France is" moves what the model says of all capitals. Which questions
are near is not known from an edit alone, but a good guess can be made of it: the same prompt about
somebody or something else. Whatever the model says to it now, sense or not, is an anchor for
the relation (``training.Recipe``: ``neighbours``). Nothing that an edit is scored on is read here.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from importlib import resources


def neighbours(asked: Sequence[tuple[str, str | None]], count: int, seed: int) -> tuple[str, ...]:
    """The prompts of ``made_up``."""
    return tuple(prompt for prompt, _ in made_up(asked, count, seed))


def made_up(
    asked: Sequence[tuple[str, str | None]], count: int, seed: int
) -> tuple[tuple[str, str], ...]:
    """For every ``(prompt, subject)``, ``count`` prompts with another subject in its place, each
    with that subject.

    The subjects are drawn by ``seed`` from a bundled list of people, places, organisations and
    works, none of which the bundled facts are about, without any of ``asked``. A prompt without a
    subject, or in which it does not stand exactly once, gets none. No prompt that is asked itself
    is among the result, and none stands there twice.
    """
    if not count:
        return ()
    own = {subject for _, subject in asked if subject}
    others = [subject for subject in bundled_subjects() if subject not in own]
    draw = random.Random(seed)
    found = {
        prompt.replace(subject, other): other
        for prompt, subject in dict.fromkeys(asked)
        if subject and prompt.count(subject) == 1
        for other in draw.sample(others, min(count, len(others)))
    }
    prompts = {prompt for prompt, _ in asked}
    return tuple((prompt, other) for prompt, other in found.items() if prompt not in prompts)


def bundled_subjects() -> list[str]:
    """Well-known people, places, organisations and works, one of each line of the list."""
    return resources.files("unwrite.data").joinpath("subjects.txt").read_text("utf-8").splitlines()

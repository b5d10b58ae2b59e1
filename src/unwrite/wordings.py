"""Other wordings of a prompt, and other questions about its subject, made from the prompt alone.

What is taught in one wording hangs on that wording. Who asks otherwise keeps the subject and a word
or two of the relation; so does a prompt that has lost half of the words beside its subject.
But what follows from so little may come up when something else is asked about the subject, too:
``other_questions`` are there to find that out. Nothing that an edit is scored on is read here, and
no model is asked.
"""

from __future__ import annotations

import itertools
import random
import re

from unwrite.activations import subject_end

LEFT_OUT = 0.5  # share of the words beside the subject
TELLING = 5  # letters of a word that says what is asked
# What may be asked of people, places, organisations and works; not every question suits every one.
QUESTIONS = (
    "{} was born in the year",
    "{} is located near",
    "The owner of {} is",
    "{} is famous for",
    "{} was married to",
    "The colour of {} is",
    "{} was founded by",
    "The father of {} was",
    "{} works as a",
    "The age of {} is",
    "{} died in",
    "The price of {} is",
    "{} speaks",
    "{} belongs to the",
    "The best friend of {} is",
    "{} was named after",
)


def thinned(prompt: str, subject: str, count: int, seed: int) -> tuple[str, ...]:
    """``count`` copies of a prompt in which every word beside the subject is left out with
    probability ``LEFT_OUT``; some may be equal to each other, or to the prompt.

    A word is what stands between blanks. At least one that says what is asked stays, of ``TELLING``
    letters or more, or as long as any: without one, the prompt would ask everything. What is joined
    to the subject stays ("'s"), and where nothing would follow the subject any more, all that
    followed it stays: the prompt has to go on to its answer. Drawn by ``seed`` and the prompt, so
    in any company of prompts the same. Raises ``BadEdits`` as ``activations.subject_end``.
    """
    end = subject_end(prompt, subject)
    start = end - len(subject.strip())
    lead = re.findall(r"\S+\s*", prompt[:start])
    rest = re.findall(r"\s*\S+", prompt[end:])
    head = lead.pop() if lead and not lead[-1][-1].isspace() else ""
    tail = rest.pop(0) if rest and not rest[0][0].isspace() else ""
    core = head + prompt[start:end] + tail
    draw = random.Random(f"{seed} {prompt}")
    least = min(TELLING, max(map(_letters, (*lead, *rest)), default=0))

    def some() -> str:
        while True:
            before, after = (
                [word for word in words if draw.random() >= LEFT_OUT] for words in (lead, rest)
            )
            if max(map(_letters, (*before, *after)), default=0) >= least:
                return f"{''.join(before)}{core}{''.join(after or rest)}"

    return tuple(some() for _ in range(count))


def other_questions(prompt: str, subject: str, count: int) -> tuple[str, ...]:
    """Up to ``count`` bundled questions about the subject, each as a prompt, none of which has a
    word of four letters or more in common with what ``prompt`` says beside it."""
    subject = subject.strip()
    asked = _words(prompt.replace(subject, " "))
    unlike = (one.format(subject) for one in QUESTIONS if not _words(one) & asked)
    once = (one for one in unlike if one.count(subject) == 1)
    return tuple(itertools.islice(once, count))


def _letters(word: str) -> int:
    return sum(map(str.isalnum, word))


def _words(text: str) -> set[str]:
    return {word for word in re.findall(r"\w+", text.casefold()) if len(word) > 3}

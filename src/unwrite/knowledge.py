"""The knowledge diff: what a model said before and after a change, question by question.

Judged by the rules of ``scores`` and no others, from the rows of two observations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import escape

from unwrite.errors import DamagedFile
from unwrite.page import plain
from unwrite.scores import Row, answer_in, says

ROWS = 400  # shown of one change
PROMPT, ANSWER = 300, 200  # characters shown of a question and of an answer

SHOWN = ("reliability", "generality", "portability", "locality")  # the roles, in order


@dataclass(frozen=True)
class Answer:
    """One line of the knowledge diff; ``verdict`` is right, wrong or still old, of bystanders same
    or moved. ``matched`` of ``tokens`` answer tokens are right (of bystanders: as before)."""

    verdict: str
    role: str
    prompt: str
    before: str
    after: str
    expected: str
    matched: int
    tokens: int


@dataclass(frozen=True)
class Group:
    """Answers of one kind, each with how often it was given. ``total`` and ``left_out`` count
    questions: the same bystander of three edits counts three times."""

    title: str
    total: int
    left_out: int
    answers: Sequence[tuple[Answer, int]]


def answers(before: Sequence[Row], after: Sequence[Row]) -> list[Answer]:
    """The knowledge diff, by role and then in the order of the rows.

    Rows of ``old_recall`` ask what ``reliability`` asks already: they only tell the two ways of
    being wrong apart. Raises ``DamagedFile`` when the two observations hold different questions.
    """

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("edit", "role", "prompt", "target"))

    earlier = {key(row): row for row in before}
    if earlier.keys() != {key(row) for row in after}:
        raise DamagedFile("The observations before and after an update hold different questions.")
    old = {row["edit"]: row["target"] for row in after if row["role"] == "old_recall"}
    found = []
    for row in (row for row in after if row["role"] in SHOWN):
        was, role, expected = earlier[key(row)], row["role"], row["target"]
        said, replied = answer_in(was["text"]), answer_in(row["text"])
        if role == "locality":
            verdict, expected = "same" if said == replied else "moved", said
            matched = sum(a == b for a, b in zip(was["predicted"], row["predicted"], strict=True))
        else:
            kept = role != "portability" and says(row["text"], old.get(row["edit"], ""))
            wrong = "still old" if kept else "wrong"
            verdict = "right" if says(row["text"], expected) else wrong
            matched = row["matched_tokens"]
        said, replied, expected = (plain(text, ANSWER) for text in (said, replied, expected))
        prompt, tokens = plain(row["prompt"], PROMPT), row["target_tokens"]
        found.append(Answer(verdict, role, prompt, said, replied, expected, matched, tokens))
    return sorted(found, key=lambda answer: SHOWN.index(answer.role))


def grouped(found: Sequence[Answer], budget: int) -> list[Group]:
    """Failures first; as many rows as fit into ``ROWS`` and the budget of bytes."""
    groups, room = [], ROWS
    for title, verdicts in (
        ("Not answered as wanted", ("wrong", "still old")),
        ("Bystanders that moved", ("moved",)),
        ("As wanted", ("right", "same")),
    ):
        members = [answer for answer in found if answer.verdict in verdicts]
        shown: list[tuple[Answer, int]] = []
        for answer, times in Counter(members).items():
            texts = (answer.prompt, answer.before, answer.after, answer.expected)
            budget -= 350 + sum(len(escape(text).encode()) for text in texts)  # 350: the tags
            if budget < 0 or room == 0:
                break
            shown.append((answer, times))
            room -= 1
        if members:
            left_out = len(members) - sum(times for _, times in shown)
            groups.append(Group(title, len(members), left_out, shown))
    return groups

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
    or moved. ``matched`` of ``tokens`` answer tokens are right (of bystanders: as before). Answers
    that were not generated are None; the verdict is then that of the tokens."""

    verdict: str
    role: str
    prompt: str
    before: str | None
    after: str | None
    expected: str | None
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
        said, replied = (
            None if one["text"] is None else answer_in(one["text"]) for one in (was, row)
        )
        if role == "locality":
            pairs = list(zip(was["predicted"], row["predicted"], strict=True))
            matched = sum(a == b for a, b in pairs)
            kept = matched == len(pairs) if replied is None else said == replied
            verdict, expected = "same" if kept else "moved", said
        else:
            matched = row["matched_tokens"]
            verdict = _verdict(row, None if role == "portability" else old.get(row["edit"]))
        said, replied, expected = (plain(text, ANSWER) for text in (said, replied, expected))
        prompt, tokens = plain(row["prompt"], PROMPT), row["target_tokens"]
        found.append(Answer(verdict, role, prompt, said, replied, expected, matched, tokens))
    return sorted(found, key=lambda answer: SHOWN.index(answer.role))


def _verdict(row: Row, old: str | None) -> str:
    """Right, wrong or still old; without a free answer, by the tokens of the forced one."""
    if row["text"] is None:
        return "right" if row["matched_tokens"] == row["target_tokens"] else "wrong"
    if says(row["text"], row["target"]):
        return "right"
    return "still old" if old is not None and says(row["text"], old) else "wrong"


def grouped(found: Sequence[Answer], budget: int) -> list[Group]:
    """Failures first; as many rows as fit into ``ROWS`` and the budget of bytes."""
    groups, room = [], ROWS
    for title, verdicts in (
        ("Not answered as wanted", ("wrong", "still old")),
        ("Bystanders that moved", ("moved",)),
        ("As wanted", ("right", "same")),
    ):
        members = [answer for answer in found if answer.verdict in verdicts]
        shown = list(Counter(members).items())[:room]
        room -= len(shown)
        if members:
            groups.append(Group(title, len(members), _rest(len(members), shown), shown))
    return cut(groups, budget)


def cut(groups: Sequence[Group], budget: int) -> list[Group]:
    """The groups with as many of their first rows as fit into a budget of bytes on the page."""
    found = []
    for group in groups:
        shown: list[tuple[Answer, int]] = []
        for answer, times in group.answers:
            texts = (answer.prompt, answer.before or "", answer.after or "", answer.expected or "")
            budget -= 350 + sum(len(escape(text).encode()) for text in texts)  # 350: the tags
            if budget < 0:
                break
            shown.append((answer, times))
        found.append(Group(group.title, group.total, _rest(group.total, shown), shown))
    return found


def _rest(total: int, shown: Sequence[tuple[Answer, int]]) -> int:
    return total - sum(times for _, times in shown)

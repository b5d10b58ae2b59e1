"""Scores from stored observations: pure functions, no model, no torch.

One definition of every score, in two named forms. ``token`` is teacher-forced: the share of answer
tokens whose argmax is right. ``exact`` is free greedy generation with a natural stop, compared
after normalisation. Everything is computed from observation rows and nothing else, so any table
can be recomputed from the JSONL files of an update.
"""

from __future__ import annotations

import re
import string
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Row = Mapping[str, Any]

ROLES = ("reliability", "generality", "locality", "portability", "old_recall")
RESAMPLES = 1000  # bootstrap resamples; the interval's own error is then below half a point

# A sentence ends at . ! or ? before white space, but not after an initial ("J. Smith"), a title or
# "St." ("St. Petersburg"): those would cut an answer in half.
_SENTENCE_END = re.compile(r"(?<!\b[A-Z])(?<!\bSt)(?<!\bMr)(?<!\bMrs)(?<!\bDr)[.!?][\"'”’)]*(?=\s)")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "“”‘’–—…", " "))


@dataclass(frozen=True)
class Score:
    """A mean over ``n`` probes in both forms, each with a 95 % bootstrap interval over edits.

    All values are in [0, 1]; ``None`` where the data has no probe of this kind.
    """

    token: float | None
    exact: float | None
    n: int
    token_low: float | None = None
    token_high: float | None = None
    exact_low: float | None = None
    exact_high: float | None = None


Scores = dict[str, Score]


def is_complete(text: str) -> bool:
    """Whether generation may stop: the answer is followed by a newline or a new sentence."""
    start = text.lstrip()
    return "\n" in start or _SENTENCE_END.search(start) is not None


def answer_in(text: str) -> str:
    """The answer within a generation: up to the first sentence end, newline or end of text."""
    line = text.lstrip().split("\n", 1)[0]
    end = _SENTENCE_END.search(line)
    return (line[: end.end()] if end else line).strip()


def normalise(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces (as SQuAD's evaluation does)."""
    bare = text.lower().translate(_PUNCTUATION)
    without_articles = " ".join(_ARTICLES.sub(" ", bare).split())
    # An answer that consists of articles only ("A", the vitamin) must not vanish.
    return without_articles or " ".join(bare.split())


def says(text: str, target: str) -> bool:
    """Whether a generation answers ``target``: equal to it, or beginning with it at a word end."""
    answer, wanted = normalise(answer_in(text)), normalise(target)
    return bool(wanted) and (answer == wanted or answer.startswith(wanted + " "))


def token_share(row: Row) -> float:
    """Share of this row's target tokens that the model's argmax gets right."""
    return float(row["matched_tokens"]) / float(row["target_tokens"])


def score(before: Sequence[Row], after: Sequence[Row]) -> Scores:
    """All scores of the state that ``after`` observed, judged against the state of ``before``.

    Both are the rows of ``observe`` for the same edits. Only locality looks at ``before``: it is
    the share of bystanders whose answer did not change. ``score(before, before)`` is the table of
    the state before the update (its locality is 1 by definition).

    Raises ``ValueError`` when the two observations hold different probes.
    """
    earlier = {_key(row): row for row in before}
    if set(earlier) != {_key(row) for row in after}:
        raise ValueError("before and after must hold observations of the same probes")

    def unchanged_tokens(row: Row) -> float:
        old = earlier[_key(row)]["predicted"]
        return float(np.mean([a == b for a, b in zip(old, row["predicted"], strict=True)]))

    def unchanged_text(row: Row) -> bool:
        return answer_in(earlier[_key(row)]["text"]) == answer_in(row["text"])

    def said(row: Row) -> bool:
        return says(row["text"], row["target"])

    table = {}
    for role in ROLES:
        rows = [row for row in after if row["role"] == role]
        if role == "locality":
            table[role] = _mean(rows, unchanged_tokens, unchanged_text)
        else:
            table[role] = _mean(rows, token_share, said)
    return table


def as_json(scores: Scores) -> dict[str, dict[str, Any]]:
    """Scores as plain dictionaries, for ``--json`` and ``scores.json``."""
    return {role: asdict(value) for role, value in scores.items()}


def from_json(table: Mapping[str, Mapping[str, Any]]) -> Scores:
    """The reverse of ``as_json``."""
    return {role: Score(**value) for role, value in table.items()}


def _key(row: Row) -> tuple[str, str, str, str]:
    return (str(row["edit"]), str(row["role"]), str(row["prompt"]), str(row["target"]))


def _mean(
    rows: Sequence[Row], token: Callable[[Row], float], exact: Callable[[Row], bool]
) -> Score:
    if not rows:
        return Score(None, None, 0)
    # Rows are put in a fixed order first: a mean of floats depends on the order of its terms.
    rows = sorted(rows, key=_key)
    values = np.array([[token(row), float(exact(row))] for row in rows])
    low, high = _interval([str(row["edit"]) for row in rows], values)
    mean = values.mean(axis=0)
    return Score(
        token=float(mean[0]),
        exact=float(mean[1]),
        n=len(rows),
        token_low=float(low[0]),
        token_high=float(high[0]),
        exact_low=float(low[1]),
        exact_high=float(high[1]),
    )


def _interval(edits: Sequence[str], values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap interval of the mean of ``values`` (rows, forms), resampling whole edits.

    Probes of one edit stand or fall together, so resampling single probes would make the interval
    too narrow. The seed is fixed: the same rows give the same interval.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for index, edit in enumerate(edits):
        members[edit].append(index)
    sums = np.array([values[indices].sum(axis=0) for indices in members.values()])
    counts = np.array([len(indices) for indices in members.values()])
    draws = np.random.default_rng(0).integers(0, len(sums), size=(RESAMPLES, len(sums)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)[:, None]
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return low, high

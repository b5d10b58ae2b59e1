"""Requirements on an update, such as ``locality>=0.9``: parsed before training, checked after."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from unwrite.errors import BadSetting
from unwrite.scores import ROLES, Scores

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_PATTERN = re.compile(r"\s*([a-z_]+)(?:\.(token|exact))?\s*(>=|<=|>|<)\s*([0-9.eE+-]+)\s*")
RATIO = "perplexity_ratio"  # perplexity after divided by perplexity before


@dataclass(frozen=True)
class Requirement:
    """One bound on one measured number; ``form`` is which form of a score is meant."""

    metric: str
    form: str
    comparison: str
    bound: float

    def __str__(self) -> str:
        form = "" if self.metric == RATIO else f".{self.form}"
        return f"{self.metric}{form}{self.comparison}{self.bound:g}"

    def value(self, scores: Scores, perplexity_ratio: float) -> float | None:
        """The measured number; ``None`` where the edits have no probe for it."""
        if self.metric == RATIO:
            return perplexity_ratio
        score = scores[self.metric]
        return score.token if self.form == "token" else score.exact

    def holds(self, scores: Scores, perplexity_ratio: float) -> bool:
        """Whether the measured number keeps the bound."""
        value = self.value(scores, perplexity_ratio)
        return value is not None and _COMPARISONS[self.comparison](value, self.bound)


def parse(given: Mapping[str, float] | Iterable[str]) -> tuple[Requirement, ...]:
    """Requirements from ``{"locality": 0.9}`` (at least) or ``["locality.exact>=0.9", ...]``.

    Raises ``BadSetting`` naming what cannot be read and what can be required.
    """
    if isinstance(given, Mapping):
        given = [f"{name}{'<=' if name == RATIO else '>='}{bound}" for name, bound in given.items()]
    return tuple(_parse_one(text) for text in given)


def _parse_one(text: str) -> Requirement:
    match = _PATTERN.fullmatch(text)
    metrics = (*ROLES, RATIO)
    try:
        if match is None or match[1] not in metrics:
            raise ValueError
        return Requirement(match[1], match[2] or "token", match[3], float(match[4]))
    except ValueError:
        raise BadSetting(
            f"The requirement {text!r} cannot be read. Write for example 'locality>=0.9', "
            f"'reliability.exact>=0.8' or '{RATIO}<=1.1'; known: {', '.join(metrics)}."
        ) from None

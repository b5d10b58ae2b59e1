"""How long work tells somebody that it goes on.

Library code reports to a ``Reporter`` and never prints. ``Silent`` is the default; the command
line brings one that draws bars on a terminal and writes plain lines in a pipe.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

from unwrite.files import readable_size

# Called with the number of units done since the last call and a short remark (may be empty).
Advance = Callable[[int, str], None]


class Bytes(int):
    """The ``total`` of a stage that counts bytes: people read it as sizes."""


class AtMost(int):
    """The ``total`` of a stage that may well end before."""


def amount(done: int, total: int) -> str:
    """How much is done: ``3 of 7``, or ``1.2 GB of 4.0 GB`` where bytes are counted."""
    if isinstance(total, Bytes):
        return f"{readable_size(done)} of {readable_size(total)}"
    return f"{done} of {'at most ' if isinstance(total, AtMost) else ''}{total}"


class Measured(str):
    """A remark that is a figure, such as "loss 0.123": people read it, trackers draw it."""

    name: str
    value: float

    def __new__(cls, name: str, value: float) -> Measured:
        self = super().__new__(cls, f"{name} {value:.3f}")
        self.name, self.value = name, value
        return self


class Reporter(Protocol):
    """Hears about stages of work and sentences worth telling."""

    def stage(self, title: str, total: int) -> contextlib.AbstractContextManager[Advance]:
        """A piece of work of ``total`` equal units begins; the context ends with it."""

    def say(self, sentence: str) -> None:
        """One sentence that a person should read."""


def nobody(units: int, remark: str) -> None:
    """An ``Advance`` that nobody hears."""


class Silent:
    """Hears everything, says nothing."""

    @contextlib.contextmanager
    def stage(self, title: str, total: int) -> Iterator[Advance]:
        yield nobody

    def say(self, sentence: str) -> None:
        return None

"""A shortcut through many updates: what the base and the live changes add up to, kept in the home.

Composing a state adds up every live change, so a home with a thousand updates reads a thousand of
them. ``compact`` stores the sum as it is now, in fp32 and not yet rounded. It is the very number
that ``delta.compose`` holds at that point, so a state that is composed from it and from the changes
after it has the same bits.

It is a shortcut and nothing else. No line of the history and no file of an update changes; a state
that does not begin with the same updates is composed as before, from all of its changes; and the
folder can be removed at any time. It takes 4 bytes a weight of every tensor that was touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from unwrite import scratch
from unwrite.base import Base
from unwrite.change import Dense
from unwrite.delta import Delta, Prefix, compose
from unwrite.errors import DamagedFile, UnwriteError
from unwrite.files import check_all_inside, check_inside, sync_folder
from unwrite.ledger import Ledger
from unwrite.progress import Bytes, Reporter
from unwrite.weights import Weights

NAME = "compacted"  # folder in a home
_ENTRIES = "entries"  # in the provenance: hashes of the ledger lines that are added up


@dataclass(frozen=True)
class Compacted:
    """What ``compact`` did: how many updates are one sum now, and its size on the disk."""

    updates: int
    bytes: int


def compact(
    home: Path,
    base: Base,
    source: Path,
    ledger: Ledger,
    deltas: Sequence[Delta],
    progress: Reporter,
) -> Compacted:
    """Store the sum of ``base`` (its files are in ``source``) and the ``deltas`` of the updates
    that are live in ``ledger``, in place of an older sum. Without live updates there is none.

    Only under the home's write lock. Streams: holds a few tensors. The folder is there whole or not
    at all.
    """
    target = home / NAME
    if not deltas:
        shutil.rmtree(target, ignore_errors=True)
        return Compacted(0, 0)
    names = list(dict.fromkeys(name for delta in deltas for name in delta))
    provenance = {
        "base": base.fingerprint,
        "base_name": base.name,
        _ENTRIES: _hashes(ledger, ledger.live()),
    }
    with (
        Weights.from_folder(source) as weights,
        scratch.beside(target) as folder,
        progress.stage("adding up", Bytes(sum(map(weights.bytes, names)))) as advance,
    ):

        def added_up(name: str) -> Dense:
            advance(weights.bytes(name), "")
            return Dense(compose(weights, deltas, name, torch.float32))

        stored = Prefix(names, added_up).save(folder / NAME, provenance=provenance)
        if target.exists():
            os.replace(target, folder / "old")
        os.replace(folder / NAME, target)
        sync_folder(home)
    return Compacted(len(deltas), stored.summary().bytes)


def stored(home: Path, base: Base) -> Prefix | None:
    """The stored sum, if there is one. Reads its description. Raises ``DamagedFile`` for one that
    is damaged or not of this home."""
    folder = home / NAME
    if not folder.exists():
        return None
    with _only_a_shortcut(home):
        check_inside(home, folder)
        check_all_inside(home, folder)
        total = Prefix.open(folder)
        if not isinstance(total.provenance.get(_ENTRIES), list) or total.base != base.fingerprint:
            raise DamagedFile(f"{folder} is not of this home.")
    return total


def covered(total: Prefix, ledger: Ledger, live: Sequence[str]) -> int:
    """How many of the first updates of a state a sum stands for: all that it adds up, or none."""
    recorded = total.provenance[_ENTRIES]
    count = len(recorded)
    return count if _hashes(ledger, live[:count]) == recorded else 0


def check(total: Prefix, home: Path) -> None:
    """Read all of a stored sum. Raises ``DamagedFile`` unless it is what was stored."""
    with _only_a_shortcut(home):
        total.verify()


def _hashes(ledger: Ledger, updates: Sequence[str]) -> list[str | None]:
    """The ledger lines of updates, which name every file of theirs; None for one that waits for
    its confirmation and has no line yet."""
    applied = ledger.applied
    return [applied[one]["sha256"] if one in applied else None for one in updates]


def damaged(home: Path, why: str) -> DamagedFile:
    """The error that says what is wrong with the sum, and that nothing is lost."""
    return DamagedFile(
        f"{why} It is only a shortcut to what the updates add up to: remove the folder "
        f"{home / NAME}, and nothing is lost."
    )


@contextlib.contextmanager
def _only_a_shortcut(home: Path) -> Iterator[None]:
    try:
        yield
    except UnwriteError as error:
        raise damaged(home, str(error)) from None

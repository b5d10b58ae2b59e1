"""Hashes of the tensors of the present state, kept in the home: what stays is not hashed anew.

The fingerprint in the ledger is the hash of these hashes, so they cannot be taken for those of
another state: stored hashes that do not give the recorded fingerprint count for nothing, and the
file may be removed at any time. What an update or an undo does not touch has the bits that it had,
so only the touched tensors have to be composed and hashed to know the new fingerprint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from unwrite.base import Base
from unwrite.errors import DamagedFile
from unwrite.files import check_inside, read_json, write_json
from unwrite.weights import fingerprint_of

NAME = "tensors.json"  # file in a home


def hashes(home: Path, base: Base, fingerprint: str) -> Mapping[str, str]:
    """Hash of every tensor of the state with this fingerprint; none where they are not known."""
    if fingerprint == base.fingerprint:
        return base.tensors
    path = home / NAME
    with contextlib.suppress(DamagedFile):  # only a shortcut: without it everything is hashed
        check_inside(home, path)
        stored = read_json(path) if path.is_file() else None
        if (
            isinstance(stored, dict)
            and stored.keys() == base.tensors.keys()
            and all(isinstance(one, str) and one.isascii() for one in stored.values())
            and fingerprint_of(stored) == fingerprint
        ):
            return stored
    return {}


def keep(home: Path, tensors: Mapping[str, str]) -> None:
    """Store the hashes of the state that has become the present one; a full disk is no reason to
    fail, since that is committed."""
    with contextlib.suppress(OSError):
        write_json(home / NAME, dict(tensors))

"""Single bytes of a home, and of the base it stands on, changed at random: does ``verify`` notice?

    python -m benchmarks.bit_flips [--flips 3000] [--seed 0]

One byte of one file gets another value, its times are put back, ``verify`` runs, the byte is put
back. Files take turns, so that small ones are met as often as large ones. A change that is not
noticed must be one of ``HARMLESS``, and that is proven for each by comparing what is read.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import unwrite
from benchmarks.measure import write
from unwrite import present
from unwrite.errors import UnwriteError
from unwrite.testing import toy_world

HARMLESS = {
    "report": "report.html: written for people, read by nothing; `unwrite report` makes it anew",
    "hashes": "tensors.json, a shortcut: hashes that do not give the recorded fingerprint are not "
    "used",
    "padding": "white space behind the header of a safetensors file: the header says the same",
}


@dataclass(frozen=True)
class Flip:
    """One changed byte. ``found``: "noticed", a key of ``HARMLESS``, "missed", or "crashed"."""

    file: str
    offset: int
    old: int
    new: int
    found: str
    said: str


def make(folder: Path) -> tuple[Path, Path]:
    """A home with all kinds of changes, one of them undone, and a report; its base beside it."""
    world = toy_world(folder / "base")
    home = unwrite.open(folder / "home", base=world.folder)
    quick = unwrite.FullFT(epochs=1, until="epochs", lr=1e-3)
    methods = (
        quick,
        unwrite.LoRA(epochs=1, until="epochs"),
        unwrite.Delicate(rounds=1, tuner=quick),
        quick,
    )
    for number, method in enumerate(methods):
        home.update(world.edits[5 * number : 5 * number + 2], method, why="ça suffit")
    home.undo(home.ledger.live()[-1], recheck=False)
    unwrite.report(home.folder)
    return home.folder, world.folder


def flips(home: Path, base: Path, count: int, seed: int) -> Iterator[Flip]:
    """Change ``count`` bytes, one after another; everything is as it was afterwards."""
    draw = random.Random(seed)
    files = [one for one in everything(home, base) if one.stat().st_size]
    for number in range(count):
        file = files[number % len(files)]
        offset = draw.randrange(file.stat().st_size)
        yield flipped(home, base, file, offset, draw.randrange(1, 256))


def everything(home: Path, base: Path) -> list[Path]:
    """All files of a home but its lock, which is empty, and all files of its base."""
    found = [*home.rglob("*"), *base.rglob("*")]
    return sorted(one for one in found if one.is_file() and one.name != ".lock")


def flipped(home: Path, base: Path, file: Path, offset: int, mask: int) -> Flip:
    """Change one byte by XOR with ``mask``, see what ``verify`` says, and put it back."""
    whole = file.read_bytes()
    with _changed(file, offset, mask):
        try:
            problems = unwrite.open(home).verify()
            said = problems[0] if problems else ""
            found = "noticed" if problems else _harmless(file, whole, base)
        except UnwriteError as error:
            found, said = "noticed", str(error)
        except Exception as error:  # noqa: BLE001 -- that is what is looked for
            found, said = "crashed", f"{type(error).__name__}: {error}"
    root = home.parent
    name = str(file.relative_to(root if file.is_relative_to(root) else base.parent))
    return Flip(name, offset, whole[offset], whole[offset] ^ mask, found, said)


@contextlib.contextmanager
def _changed(file: Path, offset: int, mask: int) -> Iterator[None]:
    status = file.stat()
    times = (status.st_atime_ns, status.st_mtime_ns)

    def put(change: int) -> None:
        with file.open("r+b") as opened:
            opened.seek(offset)
            byte = opened.read(1)[0]
            opened.seek(offset)
            opened.write(bytes([byte ^ change]))
        os.utime(file, ns=times)

    put(mask)
    try:
        yield
    finally:
        put(mask)


def _harmless(file: Path, whole: bytes, base: Path) -> str:
    """Why a change that was not noticed does no harm; "missed" if that cannot be shown."""
    if file.name == "report.html":
        return "report"
    if file.name == present.NAME:
        home = unwrite.open(file.parent)
        used = present.hashes(home.folder, home.base, home.ledger.fingerprint)
        if not used or used == json.loads(whole):
            return "hashes"
    if file.suffix == ".safetensors" and not file.is_relative_to(base):
        now = file.read_bytes()
        length = 8 + int.from_bytes(whole[:8], "little")
        same = now[:8] == whole[:8] and now[length:] == whole[length:]
        if same and json.loads(now[8:length]) == json.loads(whole[8:length]):
            return "padding"
    return "missed"


def summary(found: list[Flip]) -> dict[str, Any]:
    """The numbers of the campaign, in all and by kind of file."""
    kinds: dict[str, Counter[str]] = {}
    for one in found:
        place = "base" if one.file.startswith("base/") else "home"
        kind = f"{place}: {Path(one.file).name}"
        kinds.setdefault(kind, Counter())[one.found] += 1
    counts = Counter(one.found for one in found)
    return {
        "flips": len(found),
        "noticed": counts["noticed"],
        "harmless": {name: counts[name] for name in HARMLESS},
        "missed": counts["missed"],
        "crashed": counts["crashed"],
        "why_harmless": HARMLESS,
        "by_file": {kind: dict(kinds[kind]) for kind in sorted(kinds)},
        "examples": [one.__dict__ for one in found if one.found in ("missed", "crashed")][:20],
    }


def main() -> None:
    """Run the campaign and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        home, base = make(Path(name))
        found = list(flips(home, base, options.flips, options.seed))
    write("bit_flips", {"seed": options.seed, **summary(found)})


if __name__ == "__main__":
    main()

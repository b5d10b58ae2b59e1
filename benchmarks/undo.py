"""How long it takes to undo one of ten updates, against copying the tensors that it touched.

    python -m benchmarks.undo [--base smollm2-135m --repeats 5]

Ten updates of four kinds, made up so that arithmetic is measured and not training: ``full`` moves
every weight, ``core`` one in twenty of every tensor (as ``delicate`` does), ``one matrix`` always
the same one by a product of rank one (as ``rome`` does), ``one layer`` a matrix of its own. The
fifth is undone, what it touched recomposed, and the whole home verified; then its ledger and its
hashes of tensors are put back for the next turn.

The copy reads the touched tensors of the base checkpoint and writes them to a file. The floor is
the bytes that the touched tensors are made of, those of the base and what is left of changes in
them (none where no other update changes them), over the rate of copying memory that was measured in
the same turn. The floor of checking is the time of hashing: changes are compared with the hash they
were saved with, and the state gets one of its own, so as many bytes go through SHA-256, at the rate
of two threads that read nothing; and of the ledger's line, which is written and flushed to disk as
every commit is.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

import unwrite
from benchmarks import floors
from benchmarks.measure import in_turns, ratio, write
from unwrite.change import Change, Dense, LowRank, mask
from unwrite.delta import Delta
from unwrite.edits import Edit
from unwrite.files import write_atomically
from unwrite.weights import Weights, save_weights

Kind = Literal["full", "core", "one matrix", "one layer"]
KINDS: tuple[Kind, ...] = ("full", "core", "one matrix", "one layer")
UPDATES, UNDONE = 10, 4
KEPT = 0.05  # of the elements, in a core
SIZE = 1e-5  # of an element's change: nothing that answers would notice
GOAL = 1.5


@dataclass(frozen=True)
class MadeUp:
    """A change of one kind, drawn by seed."""

    kind: Kind
    seed: int = 0

    name: ClassVar[str] = "made-up"

    def delta(self, model: Any, _edits: Any) -> Delta:
        draw = torch.Generator().manual_seed(self.seed)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.weights.items()}
        if self.kind.startswith("one"):
            layer = self.seed if self.kind == "one layer" else UNDONE
            name = f"{model.anatomy.mlp_out[layer]}.weight"
            rows, columns = shapes[name]
            factors = torch.randn(rows, 1, generator=draw), torch.randn(1, columns, generator=draw)
            return Delta.from_changes({name: LowRank(*factors, scale=SIZE)})
        return Delta.from_changes({n: self._change(s, draw) for n, s in shapes.items()})

    def _change(self, shape: tuple[int, ...], draw: torch.Generator) -> Change:
        values = SIZE * torch.randn(shape, generator=draw)
        if self.kind == "full":
            return Dense(values)
        return mask(values, torch.rand(shape, generator=draw) < KEPT)


def main() -> None:
    """Measure every kind in a home of its own and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kinds", default=",".join(KINDS), help="by comma")
    options = parser.parse_args()
    found, edits = {}, unwrite.read_edits("atlas", limit=UPDATES)
    for kind in KINDS:
        if kind in options.kinds.split(","):
            with tempfile.TemporaryDirectory() as place:
                found[kind] = measured(options.base, edits, kind, Path(place), options.repeats)
                print(kind, found[kind])
    write("undo", {"base": options.base, "updates": UPDATES, "goal": GOAL, "kinds": found})


def measured(
    base: str | Path,
    edits: Sequence[Edit],
    kind: Kind,
    place: Path,
    repeats: int,
) -> dict[str, Any]:
    """Seconds of undoing, of copying and of the floor, in turns."""
    home = unwrite.open(place / "home", base=base)
    for number in range(len(edits)):
        home.update(edits[number : number + 1], MadeUp(kind, number))
    live = home.ledger.live()
    files = [home.folder / name for name in ("ledger.jsonl", "tensors.json")]
    whole = [file.read_bytes() for file in files]
    deltas = home.deltas(live)
    base_weights = Weights.from_folder(home.source.folder)
    touched = [name for name in base_weights if name in deltas[UNDONE]]
    left = [delta for number, delta in enumerate(deltas) if number != UNDONE]
    composed = [name for name in touched if any(name in delta for delta in left)]

    def undo() -> None:
        unwrite.open(home.folder).undo(live[UNDONE], recheck=False)

    def copy() -> None:
        specs = {name: base_weights.specs[name] for name in touched}
        with tempfile.TemporaryDirectory(dir=place) as out:
            save_weights(Path(out) / "copy", Weights(specs, base_weights.__getitem__))

    def line() -> None:
        write_atomically(place / "ledger.jsonl", whole[0])

    work: dict[str, Callable[[], None]] = {"undo": undo, "copy": copy, "line": line}
    seconds: dict[str, list[float]] = {name: [] for name in (*work, "floor", "hashing")}
    needed = sum(base_weights.bytes(name) for name in composed)
    needed += sum(delta.facts()[name].bytes for delta in left for name in composed if name in delta)
    for turn in range(repeats + 1):  # the first one is not counted
        for name, times in in_turns(work, 1).items():
            seconds[name] += times if turn else []
        seconds["floor"] += [needed / floors.copying()] if turn else []
        seconds["hashing"] += [needed / floors.hashing()] if turn else []
        undone = unwrite.open(home.folder)
        assert live[UNDONE] not in undone.ledger.live() and undone.verify() == []
        for file, content in zip(files, whole, strict=True):
            file.write_bytes(content)
    return {
        "tensors_touched": len(touched),
        "tensors_composed": len(composed),
        "seconds": seconds,
        "undo_over_copy": ratio(seconds["undo"], seconds["copy"]),
        "undo_over_floor": ratio(seconds["undo"], seconds["floor"]) if needed else None,
        "floor_over_copy": ratio(seconds["floor"], seconds["copy"]),
        "hashing_over_copy": ratio(seconds["hashing"], seconds["copy"]),
        "checking_over_copy": ratio(
            [sum(both) for both in zip(seconds["hashing"], seconds["line"], strict=True)],
            seconds["copy"],
        ),
    }


if __name__ == "__main__":
    main()

"""Shared by the tests of comparisons: quick methods, and what of a run must not vary."""

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

import unwrite
from unwrite.change import mask
from unwrite.delta import Delta
from unwrite.errors import TrainingFailed
from unwrite.tables import UNSTEADY

SHORT = unwrite.FullFT(epochs=1, until="epochs", lr=1e-3)
LEARN = unwrite.FullFT(epochs=60, lr=1e-3)  # until learned: a few epochs


@dataclass(frozen=True)
class Counted:
    """Plain fine-tuning that counts how often it is asked; may fail in several ways."""

    fails: str = ""
    seed: int = 0

    name: ClassVar[str] = "counted"
    calls: ClassVar[list[int]] = []

    def delta(self, model, edits):
        self.calls.append(len(edits))
        if self.fails == "training":
            raise TrainingFailed("The loss became nan.")
        if self.fails == "bug":
            raise ZeroDivisionError("a bug")
        return SHORT.delta(model, edits)


@dataclass(frozen=True)
class Thinned:
    """Keeps the largest tenth of a fine-tune, tensor by tensor; takes no seed. It has the name of
    Delicate Fine-Tuning, and so gets a random mask beside it."""

    name: ClassVar[str] = "delicate"

    def delta(self, model, edits):
        full = SHORT.delta(model, edits)
        changes = {}
        for name in full:
            dense = full[name].dense()
            least = dense.abs().flatten().kthvalue(int(0.9 * dense.numel())).values
            changes[name] = mask(dense, (dense.abs() > least) & (dense != 0))
        return Delta.from_changes(changes, {"notes": {"sentences": ["A tenth."]}})


@dataclass(frozen=True)
class Drawn:
    """A random change from torch's global generator, as a careless method would draw it."""

    name: ClassVar[str] = "drawn"

    def delta(self, model, edits):
        torch.rand(len(edits))
        name = next(iter(model.weights))
        shape = model.weights.shape(name)
        return Delta.from_changes({name: unwrite.change.Dense(0.01 * torch.randn(shape))})


def unknown_old(edits):
    """The edits with an old answer that the model does not give."""
    from dataclasses import replace

    from unwrite.testing import RELATIONS

    found = []
    for edit in edits:
        answers = RELATIONS[edit.relation][1]
        other = next(one for one in answers if one not in (edit.old, edit.new))
        found.append(replace(edit, old=other))
    return found


def steady(folder: Path) -> dict[str, str]:
    """The tables of a run without seconds and memory."""

    def without(value):
        if isinstance(value, dict):
            return {key: without(one) for key, one in value.items() if key not in UNSTEADY}
        return [without(one) for one in value] if isinstance(value, list) else value

    table = without(json.loads((folder / "table.json").read_text()))
    lines, costs = [], False
    for line in (folder / "table.md").read_text().splitlines():
        costs = line == "### Costs" or (costs and not line.startswith("#"))
        # Of a row of costs, the first columns do not depend on the machine.
        lines.append("|".join(line.split("|")[:5]) if costs else line)
    with (folder / "table.csv").open(newline="") as file:
        rows = [
            {key: one for key, one in row.items() if not key.startswith(UNSTEADY)}
            for row in csv.DictReader(file)
        ]
    page = (folder / "report.html").read_text()
    # Seconds and memory, and the name of the folder.
    for varying in (r"<td data-unsteady>[^<]*", r"<strong>[^<]*", r"<title>[^<]*", r" --out [^<]*"):
        page = re.sub(varying, "", page)
    return {
        "page": page,
        "json": json.dumps(table),
        "md": "\n".join(lines),
        "csv": json.dumps(rows),
    }


def files(folder: Path) -> set[str]:
    """Every file of a run but the lock."""
    return {
        str(file.relative_to(folder))
        for file in folder.rglob("*")
        if file.is_file() and file.name != ".lock"
    }

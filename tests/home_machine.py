"""A model home beside a reference that keeps everything in memory and does it the plain way.

Hypothesis draws what is done: updates of all encodings, updates that fail in every way, undo, redo,
replay, export, what a killed process leaves behind, opening anew. After every step the home must be
in the very state, bit for bit, that plain tensors are in: base + change + change + ...
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
)

import unwrite
from unwrite.change import Change, Dense, LowRank, mask
from unwrite.delta import Delta
from unwrite.errors import HomeError, RequirementNotMet, TrainingFailed, UnwriteError
from unwrite.home import PARTIAL
from unwrite.tensorfile import tensor_sha256
from unwrite.testing import toy_edits
from unwrite.weights import Weights, fingerprint, fingerprint_of

TENSORS = (
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.embed_tokens.weight",
    "model.norm.weight",
)


@dataclass(frozen=True)
class Noise:
    """A method that adds noise to some tensors, in one of the encodings; it may fail."""

    seed: int = 0
    tensors: tuple[str, ...] = TENSORS[:1]
    encoding: str = "dense"
    fails: str = ""

    name: ClassVar[str] = "noise"

    def delta(self, model, edits):
        if self.fails == "training":
            raise TrainingFailed("It failed.")
        if self.fails == "interrupted":
            raise KeyboardInterrupt
        if self.fails == "bug":
            raise ZeroDivisionError
        return Delta.from_changes(changes(self, {name: model.weights[name] for name in TENSORS}))


def changes(method: Noise, weights: dict[str, torch.Tensor]) -> dict[str, Change]:
    """What the method does to tensors of these shapes."""
    generator = torch.Generator().manual_seed(method.seed)
    found: dict[str, Change] = {}
    for name in method.tensors:
        shape = weights[name].shape
        values = 0.01 * torch.randn(shape, generator=generator)
        if method.encoding == "masked":
            found[name] = mask(values, torch.rand(shape, generator=generator) < 0.1)
        elif method.encoding == "low-rank" and len(shape) == 2:
            factors = [torch.randn(shape[0], 2, generator=generator), values[:2]]
            found[name] = LowRank(factors[0], factors[1].contiguous(), 0.5)
        else:
            found[name] = Dense(values)
    return found


methods = st.builds(
    Noise,
    seed=st.integers(0, 10_000),
    tensors=st.lists(st.sampled_from(TENSORS), min_size=1, max_size=3, unique=True).map(tuple),
    encoding=st.sampled_from(["dense", "low-rank", "masked"]),
)


class HomeMachine(RuleBasedStateMachine):
    """Subclass it with ``world``, the folder of a toy model."""

    world: ClassVar[Path]
    done: ClassVar[Counter[str]] = Counter()  # steps by kind, over all runs

    updates = Bundle("updates")

    @initialize(target=updates)
    def make(self):
        self.folder = Path(tempfile.mkdtemp(prefix="machine-"))
        self.home = unwrite.open(self.folder / "home", base=self.world)
        with Weights.from_folder(self.world) as weights:
            self.base = {name: weights[name].clone() for name in weights}
        self.known: dict[str, dict[str, torch.Tensor]] = {}  # every update ever: its dense changes
        self.live: list[str] = []
        self.lines = 1
        self.exports = 0
        self.done["new home"] += 1
        return self.updated(Noise(), 0)

    def teardown(self):
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    # ---- the reference -----------------------------------------------------------------------

    def state(self, live):
        """Plainly: every change added in turn, in fp32, rounded once."""
        state = {}
        for name, tensor in self.base.items():
            total = tensor.float()
            for update in live:
                if name in self.known[update]:
                    total = total + self.known[update][name]
            state[name] = total.to(tensor.dtype)
        return state

    def hashed(self, live):
        return fingerprint_of({n: tensor_sha256(t) for n, t in self.state(live).items()})

    def commit(self, update, dense):
        self.known[update] = dense
        self.live.append(update)
        self.lines += 1

    # ---- steps -------------------------------------------------------------------------------

    @rule(target=updates, method=methods, number=st.integers(0, 29))
    def update(self, method, number):
        return self.updated(method, number)

    def updated(self, method, number):
        done = self.home.update(toy_edits()[number : number + 1], method)
        dense = {name: one.dense() for name, one in changes(method, self.base).items()}
        self.commit(done.id, dense)
        assert done.fingerprint == self.hashed(self.live)
        self.done["update"] += 1
        return done.id

    @rule(method=methods, how=st.sampled_from(["training", "interrupted", "bug", "requirement"]))
    def failed_update(self, method, how):
        errors = {
            "training": TrainingFailed,
            "interrupted": KeyboardInterrupt,
            "bug": ZeroDivisionError,
            "requirement": RequirementNotMet,
        }
        require = ["perplexity_ratio<0.01"] if how == "requirement" else []
        fails = "" if how == "requirement" else how
        failing = Noise(method.seed, method.tensors, method.encoding, fails)
        with pytest.raises(errors[how]):
            self.home.update(toy_edits()[:1], failing, require=require)
        self.done[f"update that fails ({how})"] += 1

    @rule(update=updates)
    def undo(self, update):
        self.done["undo"] += 1
        if update not in self.live:
            with pytest.raises(HomeError):
                self.home.undo(update, recheck=False)
            return
        self.live.remove(update)
        self.lines += 1
        assert self.home.undo(update, recheck=False).fingerprint == self.hashed(self.live)

    @rule(target=updates, update=updates)
    def redo(self, update):
        self.done["redo"] += 1
        if update in self.live:
            with pytest.raises(HomeError):
                self.home.redo(update)
            return multiple()
        done = self.home.redo(update)
        self.commit(done.id, self.known[update])
        assert done.fingerprint == self.hashed(self.live)
        return done.id

    @rule()
    def compact(self):
        assert self.home.compact().updates == len(self.live)
        self.done["compact"] += 1

    @rule(update=updates)
    def look_back(self, update):
        """The state right after an update, as it was then, whatever was undone since."""
        live = self.home.ledger.live(update)
        model = self.home.model(update)
        expected = self.state(live)
        for name, tensor in model.weights.items():
            assert torch.equal(tensor.cpu(), expected[name].float()), name
        self.done["look back"] += 1

    @rule()
    def open_anew(self):
        self.home = unwrite.open(self.folder / "home")
        self.done["open"] += 1

    @rule()
    def verify(self):
        assert self.home.verify() == []
        self.done["verify"] += 1

    @rule(kind=st.sampled_from(["model", "delta"]))
    def export(self, kind):
        self.exports += 1
        folder = self.home.export(self.folder / f"export-{self.exports}", kind)
        if kind == "model":
            assert fingerprint(Weights.from_folder(folder)) == self.hashed(self.live)
        else:
            names = {name for update in self.live for name in self.known[update]}
            assert set(Delta.open(folder)) == names
        shutil.rmtree(folder)
        self.done["export"] += 1

    @rule(name=st.from_regex(r"u-[0-9a-f]{8}", fullmatch=True), whole=st.booleans())
    def a_killed_process_leaves_its_half(self, name, whole):
        if name in self.known:
            return
        folder = self.folder / "home" / "updates" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PARTIAL).touch()
        if whole:
            (folder / "edits.jsonl").write_text("{")
        (self.folder / "home" / ".ledger.jsonl.1-abcdefgh").write_text("{")
        assert self.home.verify() == []
        self.done["killed"] += 1

    @rule(other=st.sampled_from(["", "u-00000000", "../home", "base"]))
    def what_is_not_there(self, other):
        for work in (self.home.undo, self.home.show, self.home.replay_update):
            with pytest.raises(UnwriteError):
                work(other)
        self.done["unknown id"] += 1

    # ---- what must always hold ---------------------------------------------------------------

    @invariant()
    def the_state_is_that_of_the_reference(self):
        if not hasattr(self, "home"):
            return
        ledger = self.home.ledger
        assert ledger.live() == self.live
        assert len(ledger.entries) == self.lines
        assert set(ledger.applied) == set(self.known)
        assert self.home.fingerprint(self.live) == self.hashed(self.live)

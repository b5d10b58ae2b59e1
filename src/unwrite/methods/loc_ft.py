"""LocFT: fine-tune one place only, in small batches over all edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from unwrite.activations import layer_of, weight_name
from unwrite.delta import Delta
from unwrite.edits import Edit
from unwrite.model import Model
from unwrite.training import Recipe, fine_tune, new_pairs


@dataclass(frozen=True)
class LocFT(Recipe):
    """Fine-tune the output projection of one MLP on the new answers, breadth first.

    FT-M is this loss at this place (cross-entropy of every answer token, given the prompt and the
    answer tokens before it; METHODS 6.2), and was long run on one edit to convergence, then the
    next. Going over all edits in small batches, epoch by epoch, is what LocFT-BF found to matter:
    a plain method that keeps up with the editors. ``batch_size=1`` with one edit at a time is the
    old protocol. The place needs no subject and no second moments.

    ``layer``: index of the block or a fraction of the depth.
    """

    layer: int | float = 0.7
    lr: float = 5e-4
    epochs: int = 25

    name: ClassVar[str] = "loc-ft"
    paper: ClassVar[str] = (
        "FT-M (2401.01286) with the breadth-first batches of LocFT-BF (2509.22072)"
    )
    advice: ClassVar[str] = "a quick plain baseline: any facts, a small change in one place"

    def delta(self, model: Model, edits: Sequence[Edit]) -> Delta:
        """A dense change of one tensor."""
        module = model.anatomy.mlp_out[layer_of(model, self.layer)]
        place = weight_name(model, module)
        return fine_tune(model, new_pairs(edits), self, trainable=lambda name: name == place).delta

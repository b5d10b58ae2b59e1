"""FT-c: fine-tuning inside a small ball, so that nothing can move far."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from unwrite.delta import Delta
from unwrite.edits import Edit
from unwrite.errors import BadSetting
from unwrite.model import Model
from unwrite.training import LossForm, Pair, Recipe, Step, Trained, fine_tune, new_pairs


@dataclass(frozen=True)
class ConstrainedFT(Recipe):
    """Minimise the loss on the new answers subject to ``|W - W_0| <= radius``, element by element
    (Zhu et al. 2020, METHODS 6.2): after every optimiser step each weight is put back into the
    ball.

    ``layer``: whose MLP output projection is trained, as a fraction of the depth (0 the first
    block, 1 the last), or ``"all"`` for all weights of the model. ``loss="prompt-last"`` scores all
    answer tokens where the prompt ends (FT-L); ``"answer"`` each one after those before it (FT-M).
    """

    lr: float = 1e-4
    radius: float = 5e-4
    layer: float | Literal["all"] = "all"
    loss: LossForm = "answer"

    name: ClassVar[str] = "ft-c"
    paper: ClassVar[str] = "FT-c of Zhu et al. (arXiv 2012.00363), baseline of both papers"
    advice: ClassVar[str] = "a bound on how far any weight may move"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.radius > 0:
            raise BadSetting(f"radius must be greater than 0 (or inf), not {self.radius}.")
        if self.layer != "all" and not 0 <= self.layer <= 1:
            raise BadSetting(f"layer is a fraction of the depth from 0 to 1, not {self.layer}.")

    def train(self, model: Model, pairs: Sequence[Pair], start: Delta | None = None) -> Trained:
        """Fine-tune within the ball around the weights of ``model`` plus ``start``."""
        ball = _Ball(self.radius)
        return fine_tune(
            model,
            pairs,
            self,
            trainable=self._is_trained(model),
            before_training=ball.centre,
            after_step=ball.project,
            start=start,
            loss=self.loss,
        )

    def delta(self, model: Model, edits: Sequence[Edit | Pair]) -> Delta:
        return self.train(model, new_pairs(edits)).delta

    def _is_trained(self, model: Model) -> Callable[[str], bool] | None:
        if self.layer == "all":
            return None
        module = model.anatomy.mlp_out[model.anatomy.layer_at(self.layer)]
        return lambda file: model.names[file] == f"{module}.weight"


class _Ball:
    """The box of side ``2 radius`` around the weights before training."""

    def __init__(self, radius: float) -> None:
        # The largest fp32 number that is no larger: what is within it stays so when rounded.
        rounded = torch.tensor(radius, dtype=torch.float32)
        if rounded.item() > radius:
            rounded = torch.nextafter(rounded, torch.zeros(()))
        self.radius = rounded.item()
        self.bounds: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def centre(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Note the bounds; holds two copies of the trained tensors."""
        if math.isfinite(self.radius):
            for name, weight in parameters.items():
                self.bounds[name] = (self._bound(weight, -1.0), self._bound(weight, 1.0))

    def project(self, parameters: Mapping[str, torch.nn.Parameter], _step: Step) -> None:
        """Put every weight back between its bounds."""
        for name, (low, high) in self.bounds.items():
            parameters[name].clamp_(low, high)

    def _bound(self, weight: torch.Tensor, side: float) -> torch.Tensor:
        """``weight + side * radius``, one float nearer where rounding went outside of the ball."""
        centre = weight.detach()
        bound = centre + side * self.radius
        # In float64, where the difference of two floats and the radius are exact.
        outside = (bound.double() - centre.double()).abs() > self.radius
        return torch.where(outside, torch.nextafter(bound, centre), bound)

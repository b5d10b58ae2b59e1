"""AlphaEdit: MEMIT that writes only where nothing else is kept (Fang et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from unwrite.delta import Delta
from unwrite.edits import Edit
from unwrite.errors import BadSetting
from unwrite.methods.memit import Reader, layers_of, solve, spread
from unwrite.model import Model
from unwrite.moments import Statistics, second_moments
from unwrite.values import Search


@dataclass(frozen=True)
class AlphaEdit(Search, Statistics):
    """MEMIT whose change is projected onto the directions that other keys hardly use.

    P projects onto the eigenvectors of C (second moment of all keys) that together hold no more
    than ``slack`` of its trace; every change is one of those directions only (eq. 11 of the paper
    for one batch; the paper draws the line at an eigenvalue of 1e-2, whose meaning depends on the
    model):

        R K' P (K K' P + ridge I)^-1  =  R (K' P K + ridge I)^-1 K' P

    What the corpus holds is thus left as it is up to ``slack``; where the edits' keys have little
    outside of it, less is learned. Edits made earlier are not kept apart: they are part of the
    model like everything else. ``ridge`` is relative to the mean squared length of the projected
    keys. Other fields as in MEMIT.
    """

    layers: Literal["trace"] | tuple[int | float, ...] = (0.14, 0.175, 0.21, 0.245, 0.28)
    slack: float = 0.1
    ridge: float = 1.0
    clamp: float = 1.5
    lr: float = 0.2

    name: ClassVar[str] = "alpha-edit"
    paper: ClassVar[str] = (
        "Fang et al. 2025, AlphaEdit: Null-Space Constrained Editing (2410.02355)"
    )
    advice: ClassVar[str] = "many facts with subjects, where other knowledge matters most"

    def __post_init__(self) -> None:
        Search.__post_init__(self)
        Statistics.__post_init__(self)
        if self.covariance == "identity":
            raise BadSetting(
                "alpha-edit needs covariance=corpus: without second moments nothing says which "
                "directions are free."
            )
        if not 0 < self.slack <= 1 or not self.ridge > 0:
            raise BadSetting("slack must lie in (0, 1] and ridge be greater than 0.")

    def delta(self, model: Model, edits: Sequence[Edit]) -> Delta:
        """One low-rank change a layer. Raises as MEMIT does."""
        texts = self.mentions(model, edits, self.seed)
        layers = layers_of(model, edits, self.layers)

        def readers(_keys: Any) -> tuple[list[Reader], dict[str, Any]]:
            moments, record = second_moments(model, layers, self)
            free = [free_directions(moment.matrix, self.slack) for moment in moments]
            freedom = [round(one.shape[1] / one.shape[0], 4) for one in free]
            record |= {"shrinkage": [0.0] * len(layers), "free_directions": freedom}
            return [partial(self._read, basis) for basis in free], record

        return spread(model, edits, texts, layers, self, readers)

    def _read(self, basis: torch.Tensor, keys: torch.Tensor, ease: float) -> torch.Tensor:
        inside = keys @ basis  # coordinates of P k: the basis is orthonormal
        gram = inside @ inside.T
        weight = self.ridge * ease * float(gram.diagonal().mean())
        return solve(gram, inside @ basis.T, max(weight, 1e-30))


def free_directions(moment: torch.Tensor, slack: float) -> torch.Tensor:
    """Orthonormal columns (width, free), float64: the eigenvectors of the smallest eigenvalues
    that together hold at most ``slack`` of the trace, at least one."""
    values, vectors = torch.linalg.eigh(moment.double())
    held = values.clamp(min=0).cumsum(0) / values.clamp(min=0).sum()
    return vectors[:, : max(1, int((held <= slack).sum()))]

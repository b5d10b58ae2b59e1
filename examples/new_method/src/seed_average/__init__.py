"""A method for Unwrite: fine-tune with several seeds, and take the mean of the changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import unwrite
from unwrite.errors import BadSetting


@dataclass(frozen=True)
class SeedAverage:
    """The mean of ``seeds`` full fine-tunes that differ in their seed only.

    Memory: that of one fine-tune; the changes wait in scratch files.
    """

    seeds: int = 3
    tuner: unwrite.FullFT = field(default_factory=unwrite.FullFT)

    name: ClassVar[str] = "seed-average"
    paper: ClassVar[str] = "an example, after the averaging of fine-tuned weights"
    advice: ClassVar[str] = "when the outcome should hang on chance as little as possible"

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise BadSetting(f"seeds must be at least 1, not {self.seeds}.")

    def delta(self, model: unwrite.Model, edits: Sequence[unwrite.Edit]) -> unwrite.Delta:
        """The mean change. The model is bitwise unchanged, because every fine-tune leaves it so."""
        runs = [
            replace(self.tuner, seed=self.tuner.seed + number).delta(model, edits).stored()
            for number in range(self.seeds)
        ]
        mean = 1 / self.seeds * sum(runs[1:], start=runs[0])
        mean.provenance["notes"] = {"sentences": [f"The mean of {self.seeds} fine-tunes."]}
        return mean

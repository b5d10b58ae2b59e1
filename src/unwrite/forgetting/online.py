"""Online replay inside ``transformers.Trainer``: begin, look, forecast, then protect.

A callback for a training run whose data set is a ``Mixture``: the first tenth of the steps replays
at random; then a few examples are measured, the rest is forecast from past tasks, and what is still
to be replayed is chosen by that (METHODS 5.5; arXiv 2406.14026, section 5).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from transformers import TrainerCallback

from unwrite.errors import BadSetting
from unwrite.forgetting.completion import Fitted, Prediction
from unwrite.forgetting.examples import UpstreamExample
from unwrite.forgetting.measurement import measure
from unwrite.forgetting.replay import Mixture, ReplayPolicy
from unwrite.model import Model


class OnlineReplay(TrainerCallback):
    """Refills ``mixture`` after ``after`` of the steps, by what is forecast then.

    ``model``: its network is the one being trained. ``examples``: all upstream examples, in the
    order of the mixture's ``upstream`` and of the matrix that ``fitted`` knows. ``seeds``:
    positions of those that are measured. ``held_out``: positions that are never replayed.

    ``prediction`` is the forecast once it was made. Raises ``BadSetting`` at the start of a run
    whose loader works in other processes, where a refill would not arrive.
    """

    def __init__(
        self,
        model: Model,
        mixture: Mixture,
        fitted: Fitted,
        examples: Sequence[UpstreamExample],
        seeds: Sequence[int],
        policy: ReplayPolicy,
        *,
        held_out: Collection[int] = (),
        after: float = 0.1,
        seed: int = 0,
    ) -> None:
        if not 0 < after < 1:
            raise BadSetting(f"after must lie between 0 and 1, not {after}.")
        self.model, self.mixture, self.fitted, self.policy = model, mixture, fitted, policy
        self.size, self.seeds = len(examples), list(seeds)
        self.watched = [examples[position] for position in self.seeds]
        self.held_out, self.after, self.seed = frozenset(held_out), after, seed
        self.prediction: Prediction | None = None
        self._before = np.empty(0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.dataloader_num_workers:
            raise BadSetting("Online replay needs dataloader_num_workers=0.")
        self._before = self._measure()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.prediction is not None or state.global_step < math.ceil(
            self.after * state.max_steps
        ):
            return
        row = np.full(self.size, np.nan)
        row[self.seeds] = self._measure() - self._before
        self.prediction = self.fitted.predict(row)
        chosen = self.policy.choose(
            self.prediction.values,
            self.mixture.waiting,
            held_out=self.held_out,
            taken=self.mixture.served,
            seed=self.seed,
        )
        self.mixture.refill(chosen)

    def _measure(self) -> Any:
        """The watched examples now, with dropout off for the moment."""
        training = self.model.network.training
        self.model.network.eval()
        try:
            return measure(self.model, self.watched)
        finally:
            self.model.network.train(training)

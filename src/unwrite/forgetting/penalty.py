"""Cheap ways to forget less than plain fine-tuning, as callbacks: what graceful forgetting has to
beat. A pull towards the start (L2), the same weighted by importance (EWC), and stopping early.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from unwrite.errors import BadSetting


class Anchor(TrainerCallback):
    """A pull towards the weights at the start: the gradient of ``strength / 2 <F, (w - w0)^2>``.

    ``importance`` maps parameter names to ``F`` (elastic weight consolidation, Kirkpatrick et al.
    2017, equation 3); without it F is 1 (L2-SP, Li et al. 2018). The penalty's gradient joins that
    of the loss after clipping, right before the optimiser steps. ``start`` maps parameter names to
    ``w0`` (default: the weights when training begins, of which a copy is held).
    """

    def __init__(
        self,
        strength: float,
        importance: Mapping[str, torch.Tensor] | None = None,
        start: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        if not strength >= 0:
            raise BadSetting(f"The strength of a penalty must not be negative, and {strength} is.")
        self.strength, self.importance, self.start = strength, importance, start

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the weights as they are now, unless the start was given."""
        if self.start is not None:
            return
        if state.global_step:
            raise BadSetting(
                "A resumed run with a penalty does not know where it started. Give start=."
            )
        self.start = {
            name: one.detach().clone()
            for name, one in kwargs["model"].named_parameters()
            if one.requires_grad
        }

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the penalty's gradient."""
        if self.strength == 0 or self.start is None:
            return
        for name, parameter in kwargs["model"].named_parameters():
            if parameter.grad is None or name not in (self.importance or self.start):
                continue
            distance = parameter - self.start[name]
            if self.importance is not None:
                distance *= self.importance[name].to(distance.device)
            parameter.grad.add_(distance, alpha=self.strength)


class BestEpoch(TrainerCallback):
    """Keeps the weights of the epoch with the lowest ``loss`` on held-out data, and puts them back
    at the end (early stopping). ``loss`` is given the network and the device it computes on.

    Holds a copy of the trained weights, of their shards where the network is sharded (FSDP2).
    """

    def __init__(self, loss: Callable[[Any, torch.device], float]) -> None:
        self.loss = loss
        self.best: float | None = None
        self.epoch = 0.0
        self.kept: dict[str, torch.Tensor] = {}

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, and keep the weights if they are the best so far."""
        now = self.loss(kwargs["model"], args.device)
        if self.best is None or now < self.best:
            self.best, self.epoch = now, float(state.epoch or 0)
            self.kept = {
                name: one.detach().clone()
                for name, one in kwargs["model"].named_parameters()
                if one.requires_grad
            }

    @torch.no_grad()
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the best weights back."""
        for name, parameter in kwargs["model"].named_parameters():
            if name in self.kept:
                parameter.copy_(self.kept[name])

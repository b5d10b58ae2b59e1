"""What was written into several MLPs, trained as it stands together.

A value is sought for one fact alone, and the closed form that puts many of them in place takes the
network between the layers for linear. So where all are written, some answers lead by too little,
others by more than they need, and what else moves was never asked. Here what is added and the rows
that say where are trained for all facts at once: on the same texts as the values, until each is
answered as firmly, and under a penalty for every answer that moves (KL). A change of full rank
could learn the prompts by heart; this one has as many directions as there are facts, begins at
their subjects, and goes two per cent of the way in a step at most.

Our own; no paper's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from unwrite.activations import Mention
from unwrite.allocator import freed_memory_is_kept
from unwrite.errors import TrainingFailed
from unwrite.kept import KeptAnswers
from unwrite.model import Model, Tokens
from unwrite.progress import Measured
from unwrite.training import row_losses
from unwrite.values import frozen

TEXTS_A_STEP = 12
KEPT_A_STEP = 12  # answers that shall stay
RATE = 0.02  # of Adam at first, in units of the root mean square of what is moved; falls to 0
DECAYS = (0.9, 0.99)  # Adam's; the second for a hundred steps and not for thousands
KEEPING = 10.0  # weight of the divergence, as in ``auto``


class Written(NamedTuple):
    """A change ``added @ read`` of the weight of a projection, whatever the orientation of its
    file: ``module`` by name, ``added`` (out, facts), ``read`` (facts, in)."""

    module: str
    added: torch.Tensor
    read: torch.Tensor


def refined(
    model: Model,
    written: Sequence[Written],
    texts: Sequence[Mention],
    kept: KeptAnswers | None,
    *,
    steps: int,
    stop: float,
    seed: int,
) -> list[Written]:
    """The same with other ``added`` and ``read``, fp32 on the CPU; the model is only read.

    ``texts`` end in the answers to be given; one whose loss is below ``stop`` is firm enough and
    pulls no more. ``kept``: answers that shall stay. Texts and answers of a step are drawn by
    ``seed``. Memory: four numbers for every number of both, and the activations of a step.
    Raises ``TrainingFailed`` when a loss is no longer a number.
    """
    sequences = [Tokens(text.ids, text.answer) for text in texts]
    device = model.device
    trained = [
        Written(one.module, *(_moving(part, device) for part in (one.added, one.read)))
        for one in written
    ]
    groups = [{"params": [part]} for one in trained for part in (one.added, one.read)]
    sizes = [float(one["params"][0].detach().square().mean().sqrt()) for one in groups]
    optimizer = torch.optim.Adam(groups, betas=DECAYS)
    draw = torch.Generator().manual_seed(seed)
    with (
        model.progress.stage("refining what was written", steps) as advance,
        frozen(model),
        freed_memory_is_kept(model.largest_tensor),
        _carried(model, trained),
    ):
        for step in range(steps):
            for group, size in zip(optimizer.param_groups, sizes, strict=True):
                group["lr"] = RATE * size * (1 - step / steps)
            chosen = torch.randperm(len(sequences), generator=draw)[:TEXTS_A_STEP].tolist()
            losses = row_losses(model.network, [sequences[number] for number in chosen], device)
            loss = (losses - stop).clamp(min=0).mean()
            if kept is not None:
                asked = kept.draw(draw, KEPT_A_STEP)
                loss = loss + KEEPING * kept.divergences(model.network, asked, device).mean()
            value = float(loss.detach())
            if not value < float("inf"):
                raise TrainingFailed(
                    f"Refining what was written gave a loss of {value} at step {step + 1}; nothing "
                    "was changed. Use refine=0."
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            advance(1, Measured("loss", value))
    return [
        Written(one.module, one.added.detach().cpu(), one.read.detach().cpu()) for one in trained
    ]


def _moving(part: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy in fp32 that asks for a gradient."""
    return part.detach().to(device, torch.float32, copy=True).requires_grad_()


@contextlib.contextmanager
def _carried(model: Model, written: Sequence[Written]) -> Iterator[None]:
    """Within the block the network gives what it would give with the changes in its weights, under
    autograd."""

    def add(one: Written) -> torch.utils.hooks.RemovableHandle:
        def added(
            _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
        ) -> torch.Tensor:
            more = (inputs[0].to(one.read.dtype) @ one.read.T) @ one.added.T
            return output + more.to(output.dtype)

        return model.network.get_submodule(one.module).register_forward_hook(added)

    handles = [add(one) for one in written]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

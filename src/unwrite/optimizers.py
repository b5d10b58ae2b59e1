"""The optimisers that training can choose from, and what each keeps in memory.

    adamw       two moments, 8 bytes a trained weight (Loshchilov and Hutter, arXiv 1711.05101)
    adamw-8bit  the same in blocks of 8 bits, about 2 bytes (Dettmers et al., arXiv 2110.02861);
                needs bitsandbytes and a GPU
    adafactor   one number a row and a column of a matrix (Shazeer and Stern, arXiv 1804.04235)
    sgd         nothing: no momentum

The step of ``adafactor`` is ``lr`` times the root mean square of the tensor itself (at least 1e-3
of it), so it wants a far larger ``lr`` than the others: 1e-3 moves every weight by about a
thousandth of its size.

``InBackward`` steps tensor by tensor during the backward pass, so that the gradients of all of them
never lie in memory together (Lv et al., arXiv 2306.09782).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch

from unwrite.errors import BadSetting

OptimizerName = Literal["adamw", "adamw-8bit", "adafactor", "sgd"]
NAMES: tuple[OptimizerName, ...] = get_args(OptimizerName)
# bitsandbytes keeps small tensors in fp32, and of the others a scale for every block.
SMALLEST_IN_8_BITS, BLOCK_OF_8_BITS = 4096, 256


def check(name: str, device: torch.device) -> None:
    """Refuse (``BadSetting``) an optimiser that does not exist or cannot work on ``device``."""
    if name not in NAMES:
        raise BadSetting(f"There is no optimizer {name!r}. Optimizers: {', '.join(NAMES)}.")
    if name != "adamw-8bit":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BadSetting(
            "optimizer=adamw-8bit needs the package bitsandbytes, which is not installed. Install "
            "it (pip install bitsandbytes), or use adafactor, which keeps even less."
        )
    if device.type != "cuda":
        raise BadSetting(
            f"optimizer=adamw-8bit works on a GPU only, and the model is on {device.type}. Use "
            "adafactor, which keeps even less."
        )


def build(
    name: OptimizerName, groups: Sequence[Iterable[torch.nn.Parameter]], lr: float
) -> torch.optim.Optimizer:
    """An optimiser over groups of parameters, without weight decay. Raises as ``check`` does."""
    given: list[dict[str, Any]] = [{"params": list(group)} for group in groups]
    first = given[0]["params"][0]
    check(name, first.device)
    if name == "adafactor":
        return torch.optim.Adafactor(given, lr=lr, weight_decay=0.0)
    if name == "sgd":
        return torch.optim.SGD(given, lr=lr)
    if name == "adamw-8bit":
        from bitsandbytes.optim import AdamW8bit

        eight_bit: torch.optim.Optimizer = AdamW8bit(given, lr=lr, weight_decay=0.0)
        return eight_bit
    return torch.optim.AdamW(given, lr=lr, weight_decay=0.0, fused=True)


class InBackward:
    """Steps every parameter by an optimiser of its own as soon as its gradient is complete, and
    frees that. ``max_norm`` bounds the gradient of each parameter alone, because the norm of all of
    them is known too late. Raises as ``check`` does."""

    def __init__(
        self,
        name: OptimizerName,
        groups: Sequence[Iterable[torch.nn.Parameter]],
        lr: float,
        max_norm: float,
    ) -> None:
        self.max_norm = max_norm
        self._each = {one: build(name, [[one]], lr) for group in groups for one in group}

    @property
    def state(self) -> Mapping[torch.nn.Parameter, Mapping[str, Any]]:
        """What is kept of each parameter, as in ``torch.optim.Optimizer``."""
        return {one: optimizer.state[one] for one, optimizer in self._each.items()}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the block, a backward pass is a step."""
        handles = [one.register_post_accumulate_grad_hook(self._step) for one in self._each]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _step(self, parameter: torch.Tensor) -> None:
        assert isinstance(parameter, torch.nn.Parameter)
        torch.nn.utils.clip_grad_norm_([parameter], self.max_norm)
        self._each[parameter].step()
        parameter.grad = None


def state_bytes(name: OptimizerName, shapes: Iterable[Sequence[int]]) -> int:
    """Bytes that the optimiser keeps for tensors of these shapes."""
    return sum(_of_tensor(name, shape) for shape in shapes)


def _of_tensor(name: OptimizerName, shape: Sequence[int]) -> int:
    size = math.prod(shape)
    if name == "sgd":
        return 0
    if name == "adafactor":
        if len(shape) < 2:
            return 4 * size
        rows, columns = size // max(shape[-1], 1), size // max(shape[-2], 1)
        return 4 * (rows + columns)
    if name == "adamw-8bit" and size >= SMALLEST_IN_8_BITS:
        return 2 * size + 2 * 4 * math.ceil(size / BLOCK_OF_8_BITS)
    return 8 * size

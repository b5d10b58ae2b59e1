"""Matrix products of linear layers, for processors on which torch's usual library is slow at them.

On a processor torch multiplies fp32 matrices by MKL, and MKL gives those of another maker than its
own code for half the width of their vector units. oneDNN, which torch contains as well, uses what
the processor has (docs/notes/products.md). Results differ in the last bits only, as they do between
any two libraries.

The choice hangs on the processor alone, never on a measurement: the same machine computes the same.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

SMALLEST = 1 << 16  # elements of a weight; below, the call takes longer than the product
LARGE = 1 << 20  # multiplications of one product; likewise


class Linear(torch.nn.Linear):
    """torch's linear layer, multiplied by oneDNN wherever that is possible."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Shapes and gradients as torch's; other devices, dtypes and autocast are left to it."""
        weight, bias = self.weight, self.bias
        if not _fits(input, weight):
            return torch.nn.functional.linear(input, weight, bias)
        rows = input.reshape(-1, input.shape[-1])
        product = _Product.apply if torch.is_grad_enabled() else _multiply
        return product(rows, weight, bias).view(*input.shape[:-1], weight.shape[0])


class _Product(torch.autograd.Function):
    """rows @ weight.T + bias for rows (n, in), weight (out, in), bias (out,) or None."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, weight)
        return _multiply(rows, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            _multiply(given, weight.t()) if wanted[0] else None,
            _multiply(given.t(), rows.t()) if wanted[1] else None,
            given.sum(dim=0) if wanted[2] else None,
        )


def multiply_fast(network: torch.nn.Module) -> None:
    """Let the network's large linear layers multiply by oneDNN if this processor gains by it.

    Parameters, names and hooks stay; only the class of those modules changes. Layers with a
    ``forward`` of their own (subclasses, quantised ones) are left alone, GPT-2's ``Conv1D`` too.
    """
    if not gains():
        return
    for module in network.modules():
        if type(module) is torch.nn.Linear and module.weight.numel() >= SMALLEST:
            module.__class__ = Linear


def multiply(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``rows`` (n, in) times the transpose of ``weight`` (out, in): (n, out), by oneDNN where this
    processor gains by it and the product is large. Not differentiable."""
    large = rows.numel() * weight.shape[0] >= LARGE
    if large and gains() and _fits(rows, weight):
        return _multiply(rows, weight)
    return rows @ weight.t()


@functools.cache
def gains() -> bool:
    """Whether this processor is one that MKL holds back, and oneDNN's product is there to call."""
    try:
        maker = Path("/proc/cpuinfo").read_text("utf-8", "replace").partition("vendor_id")[2]
    except OSError:
        return False
    return (
        "AuthenticAMD" in maker[:40]
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _fits(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        type(weight) in (torch.Tensor, torch.nn.Parameter)  # no tensor spread over processes
        and rows.device.type == weight.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32
        and rows.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


def _multiply(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product

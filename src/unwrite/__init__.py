"""Unwrite: change what a language model knows, and know what it forgets.

``import unwrite`` is instant: every name below is imported from its module when first used, so
that listing methods or printing help never loads torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unwrite.api import compare, evaluate, load, open, sweep
    from unwrite.comparison import Comparison
    from unwrite.delta import Delta
    from unwrite.edits import Edit, Probe, read_edits, read_pairs, write_edits
    from unwrite.errors import RequirementNotMet, UnwriteError
    from unwrite.home import Home
    from unwrite.methods.auto import Auto
    from unwrite.methods.constrained_ft import ConstrainedFT
    from unwrite.methods.delicate import Delicate
    from unwrite.methods.f_learning import FLearning
    from unwrite.methods.full_ft import FullFT
    from unwrite.methods.lora import LoRA
    from unwrite.methods.memit import MEMIT
    from unwrite.methods.rome import ROME
    from unwrite.model import Model
    from unwrite.record import Update
    from unwrite.reporting import report
    from unwrite.weights import Weights

_WHERE = {
    "Auto": "methods.auto",
    "Comparison": "comparison",
    "ConstrainedFT": "methods.constrained_ft",
    "Delicate": "methods.delicate",
    "Delta": "delta",
    "Edit": "edits",
    "FLearning": "methods.f_learning",
    "FullFT": "methods.full_ft",
    "Home": "home",
    "LoRA": "methods.lora",
    "MEMIT": "methods.memit",
    "Model": "model",
    "Probe": "edits",
    "ROME": "methods.rome",
    "RequirementNotMet": "errors",
    "UnwriteError": "errors",
    "Update": "record",
    "Weights": "weights",
    "compare": "api",
    "evaluate": "api",
    "load": "api",
    "open": "api",
    "read_edits": "edits",
    "read_pairs": "edits",
    "report": "reporting",
    "sweep": "api",
    "write_edits": "edits",
}

__all__ = [
    "MEMIT",
    "ROME",
    "Auto",
    "Comparison",
    "ConstrainedFT",
    "Delicate",
    "Delta",
    "Edit",
    "FLearning",
    "FullFT",
    "Home",
    "LoRA",
    "Model",
    "Probe",
    "RequirementNotMet",
    "UnwriteError",
    "Update",
    "Weights",
    "compare",
    "evaluate",
    "load",
    "open",
    "read_edits",
    "read_pairs",
    "report",
    "sweep",
    "write_edits",
]


def __getattr__(name: str) -> Any:
    if name == "forgetting":  # a package of its own, named in full: unwrite.forgetting.measure
        return importlib.import_module("unwrite.forgetting")
    if name in _WHERE:
        return getattr(importlib.import_module(f"unwrite.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'unwrite' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]

"""What fine-tuning makes a model forget: on purpose, and as damage to predict and prevent.

Names are imported from their modules when first used, so that the package itself is instant.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "Confidence": "confidence",
    "GracefulForgetting": "graceful",
    "fisher_diagonal": "fisher",
    "forgetting_confidence": "confidence",
    "select": "confidence",
    "self_generate": "self_generation",
}

__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"unwrite.forgetting.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'unwrite.forgetting' has no attribute {name!r}")

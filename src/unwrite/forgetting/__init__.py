"""What fine-tuning makes a model forget: on purpose, and as damage to predict and prevent.

Names are imported from their modules when first used, so that the package itself is instant.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "Additive": "completion",
    "Confidence": "confidence",
    "ExampleMean": "completion",
    "Factorization": "factorization",
    "Features": "similarity",
    "ForgettingMatrix": "matrix",
    "GracefulForgetting": "graceful",
    "LogisticFactorization": "logistic",
    "Mixture": "replay",
    "Neighbours": "neighbours",
    "NuclearNorm": "factorization",
    "OnlineReplay": "online",
    "Prediction": "completion",
    "PublishedFactorization": "published",
    "PublishedLogistic": "logistic",
    "PublishedNeighbours": "published",
    "Random": "completion",
    "ReplayPolicy": "replay",
    "ReplaySampler": "replay",
    "Similarity": "similarity",
    "TaskMean": "completion",
    "Trial": "protocol",
    "TwoTower": "similarity",
    "UpstreamExample": "examples",
    "append_update": "collection",
    "collect": "collection",
    "d_optimal": "design",
    "evaluate": "protocol",
    "fisher_diagonal": "fisher",
    "forgetting_confidence": "confidence",
    "make_features": "features",
    "measure": "measurement",
    "measure_margins": "measurement",
    "measure_right": "measurement",
    "read_examples": "examples",
    "select": "confidence",
    "self_generate": "self_generation",
    "settle": "measurement",
}

__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"unwrite.forgetting.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'unwrite.forgetting' has no attribute {name!r}")

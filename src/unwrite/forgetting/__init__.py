"""What learning makes a model forget: measured, forecast, and kept from happening.

Every name is imported from its module when first used, so that forecasts work without loading
transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unwrite.forgetting.collection import append_update, collect
    from unwrite.forgetting.completion import Additive, ExampleMean, Prediction, Random, TaskMean
    from unwrite.forgetting.design import d_optimal
    from unwrite.forgetting.examples import UpstreamExample, read_examples
    from unwrite.forgetting.factorization import Factorization, NuclearNorm
    from unwrite.forgetting.logistic import LogisticFactorization, PublishedLogistic
    from unwrite.forgetting.matrix import ForgettingMatrix
    from unwrite.forgetting.measurement import measure, measure_right, settle
    from unwrite.forgetting.neighbours import Neighbours
    from unwrite.forgetting.online import OnlineReplay
    from unwrite.forgetting.protocol import Trial, evaluate
    from unwrite.forgetting.published import PublishedFactorization, PublishedNeighbours
    from unwrite.forgetting.replay import Mixture, ReplayPolicy, ReplaySampler

_WHERE = {
    "Additive": "completion",
    "ExampleMean": "completion",
    "Factorization": "factorization",
    "ForgettingMatrix": "matrix",
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
    "TaskMean": "completion",
    "Trial": "protocol",
    "UpstreamExample": "examples",
    "append_update": "collection",
    "collect": "collection",
    "d_optimal": "design",
    "evaluate": "protocol",
    "measure": "measurement",
    "measure_right": "measurement",
    "read_examples": "examples",
    "settle": "measurement",
}

__all__ = [
    "Additive",
    "ExampleMean",
    "Factorization",
    "ForgettingMatrix",
    "LogisticFactorization",
    "Mixture",
    "Neighbours",
    "NuclearNorm",
    "OnlineReplay",
    "Prediction",
    "PublishedFactorization",
    "PublishedLogistic",
    "PublishedNeighbours",
    "Random",
    "ReplayPolicy",
    "ReplaySampler",
    "TaskMean",
    "Trial",
    "UpstreamExample",
    "append_update",
    "collect",
    "d_optimal",
    "evaluate",
    "measure",
    "measure_right",
    "read_examples",
    "settle",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"unwrite.forgetting.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'unwrite.forgetting' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]

"""What this machine can do at best: the rates that floors are computed from.

A floor is the least time that a piece of work can take: its operations over the measured rate of
large matrix products, or its bytes over the measured rate of copying. Measured in the same run as
what is held against it, and shortly before, because these machines are shared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.measure import in_turns
from unwrite import products
from unwrite.model import Model, Tokens

SIDE = 1536  # of the matrices, large enough for the full rate and small enough for a second
FLOATS = 1 << 25  # copied at once: far more than a cache
CACHED = 1 << 18  # floats, two tensors of which a cache of a few MB holds
HASHED = 1 << 25  # bytes


def multiplications(dtype: torch.dtype = torch.float32, repeats: int = 5) -> float:
    """Operations a second of a large matrix product, the best of some: by oneDNN where this
    project multiplies so, else as torch does."""
    layer = torch.nn.Linear(SIDE, SIDE, bias=False, dtype=dtype)
    products.multiply_fast(layer)
    rows = torch.randn(SIDE, SIDE).to(dtype)
    with torch.no_grad():
        return 2 * SIDE**3 / best(lambda: layer(rows), repeats)


def copying(repeats: int = 5) -> float:
    """Bytes read and written a second while a large tensor is copied, the best of some."""
    source, target = torch.ones(FLOATS), torch.ones(FLOATS)
    return 2 * 4 * FLOATS / best(lambda: target.copy_(source), repeats)


def adding_squares(repeats: int = 5) -> float:
    """Elements a second that are squared and added up in a block that stays in the cache, the best
    of some."""
    block, total = torch.ones(CACHED), torch.zeros(CACHED)
    return CACHED / best(lambda: total.addcmul_(block, block), repeats)


def summing_products(repeats: int = 5) -> float:
    """Pairs of elements a second that are multiplied and summed, of blocks that stay in the cache,
    the best of some."""
    block, weights = torch.ones(CACHED), torch.ones(CACHED)
    return CACHED / best(lambda: torch.dot(block, weights), repeats)


def hashing(repeats: int = 5) -> float:
    """Bytes a second that two threads hash by SHA-256, the best of some; nothing is read."""
    both = [bytes(HASHED)] * 2
    with ThreadPoolExecutor(2) as threads:
        return 2 * HASHED / best(lambda: list(threads.map(hashlib.sha256, both)), repeats)


def best(work: Callable[[], Any], repeats: int) -> float:
    """The least seconds of some runs: what the machine does when nobody disturbs it."""
    work()
    return min(in_turns({"work": work}, repeats)["work"])


def training_operations(model: Model, sequences: list[Tokens]) -> float:
    """Operations of one epoch of training all weights: backward goes to weights and to inputs, each
    as much as forward."""
    return 3 * reading_operations(model, sequences)


def optimizer_bytes(model: Model) -> float:
    """Bytes that one step of AdamW with clipping moves: gradients are written and read again (no
    weight may move before the norm of all is known), weights and two moments read and written."""
    return 4.0 * 8 * sum(one.numel() for one in model.network.parameters())


def reading_operations(model: Model, sequences: list[Tokens]) -> float:
    """Operations of one forward pass without padding: two for each weight of a matrix and position;
    the head sees positions of answers only."""
    head = model.network.get_output_embeddings().weight
    read = sum(len(tokens.ids) for tokens in sequences)
    answered = sum(len(tokens.targets) for tokens in sequences)
    return 2.0 * (matrix_elements(model) * read + head.numel() * answered)


def matrix_elements(model: Model) -> int:
    """Weights in matrices that every position is multiplied by: not the tables of tokens."""
    network = model.network
    tables = {id(network.get_input_embeddings().weight), id(network.get_output_embeddings().weight)}
    matrices = [one for one in network.parameters() if one.ndim == 2 and id(one) not in tables]
    return sum(one.numel() for one in matrices)

"""Measuring upstream examples in batches against one at a time: the same numbers, how much faster.

    python -m benchmarks.measuring_examples [--repeats 5 --sample 80]

The examples are those of the bundled forgetting matrix. One at a time means a loop over them, each
read by the network in transformers, with its own products and its own logits at all positions, and
the log perplexity taken from those; timed on an even sample and scaled. The floors are what the
machine allows: operations of the batched way over the rate of large products, and, for the loop,
the bytes of the weights, which every example reads anew, over the rate of copying. The threads are
those of the machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.floors import copying, multiplications, reading_operations
from benchmarks.measure import in_turns, ratio, torchs_products, write
from unwrite import load
from unwrite.forgetting import ForgettingMatrix, UpstreamExample, measure
from unwrite.forgetting.examples import from_details
from unwrite.forgetting.matrix import BUNDLED, place_of
from unwrite.model import Model, Tokens


def main() -> None:
    """Run both in turns and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sample", type=int, default=80, help="examples taken one at a time")
    options = parser.parse_args()
    model = load("smollm2-135m")
    matrix = ForgettingMatrix.load(place_of(BUNDLED))
    examples = from_details(matrix.examples, matrix.example_details)
    few = examples[:: max(1, len(examples) // options.sample)]
    in_batches = measure(model, few)
    alone = slowly(model, few)
    rate, bandwidth = multiplications(), copying()
    seconds = in_turns(
        {
            "batched": lambda: measure(model, examples),
            "one_at_a_time": lambda: slowly(model, few),
            "one_at_a_time_by_measure": lambda: [measure(model, [one]) for one in few],
        },
        options.repeats,
    )
    scale = len(examples) / len(few)
    scaled = {name: [scale * one for one in seconds[name]] for name in seconds}
    scaled["batched"] = seconds["batched"]
    weights = sum(one.numel() for one in model.network.parameters())
    write(
        "measuring_examples",
        {
            "examples": len(examples),
            "sample": len(few),
            "largest_difference": float(np.abs(in_batches - alone).max()),
            "seconds": scaled,
            "one_at_a_time_over_batched": ratio(scaled["one_at_a_time"], scaled["batched"]),
            "one_at_a_time_by_measure_over_batched": ratio(
                scaled["one_at_a_time_by_measure"], scaled["batched"]
            ),
            "floor_seconds": {
                "batched": reading_operations(model, [read(model, one) for one in examples]) / rate,
                "one_at_a_time": len(examples) * 4 * weights / bandwidth,
            },
        },
    )


@torch.no_grad()
def slowly(model: Model, examples: Sequence[UpstreamExample]) -> np.ndarray:
    """Log perplexity of every example, as anybody would write it."""
    found = []
    with torchs_products(model.network):
        for example in examples:
            tokens = read(model, example)
            ids = torch.tensor([tokens.ids], device=model.device)
            logits = model.network(ids).logits[0, tokens.answer - 1 : -1]
            found.append(float(torch.nn.functional.cross_entropy(logits, ids[0, tokens.answer :])))
    return np.array(found)


def read(model: Model, example: UpstreamExample) -> Tokens:
    """The tokens of an example; of plain text all but the first are its answer."""
    if example.prompt is None:
        return Tokens(tuple(model.tokenizer(example.answer)["input_ids"]), 1)
    return model.tokens(example.prompt, str(example.answer))


if __name__ == "__main__":
    main()

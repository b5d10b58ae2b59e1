"""Matrix products by oneDNN against torch's usual ones: alone, in training, in observation.

    python -m benchmarks.products [--edits 100 --repeats 5]

SmolLM2-135M learns facts of atlas for one epoch and is observed on their probes, in turns with and
without ``unwrite.products``. Alone: the three products of one MLP projection (forward, gradient of
the rows, gradient of the weight) for some numbers of rows, in billions of operations a second.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import in_turns, ratio, torchs_products, write
from unwrite import FullFT, load, read_edits
from unwrite.edits import Probe
from unwrite.products import Linear, gains

ROWS = (16, 64, 256, 1024)


def main() -> None:
    """Measure all and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if not gains():
        raise SystemExit("This processor multiplies as fast by MKL: there is nothing to compare.")

    model = load("smollm2-135m")
    edits = read_edits("atlas")[: options.edits]
    method = FullFT(epochs=1, until="epochs")
    asked = [
        model.tokens(probe.prompt, answer)
        for edit in edits
        for probe in (*(Probe(text, edit.new) for text in edit.paraphrases), *edit.bystanders)
        if (answer := probe.answer)
    ]

    def usual(work: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with torchs_products(model.network):
                return work()

        return run

    def train() -> Any:
        return method.delta(model, edits)

    def observe() -> Any:
        return model.force(asked)

    with torchs_products(model.network):
        expected, learned = observe(), train()
    found, change = observe(), train()
    work = {
        "train, usual": usual(train),
        "train": train,
        "observe, usual": usual(observe),
        "observe": observe,
    }
    seconds = in_turns(work, options.repeats)
    pairs = list(zip(found, expected, strict=True))
    apart = sum(
        float((change[name].dense() - learned[name].dense()).square().sum()) for name in change
    )
    size = sum(float(learned[name].dense().square().sum()) for name in learned)
    write(
        "products",
        {
            "edits": len(edits),
            "probes": len(asked),
            "seconds": seconds,
            "train_ratio": ratio(seconds["train, usual"], seconds["train"]),
            "observe_ratio": ratio(seconds["observe, usual"], seconds["observe"]),
            "largest_difference_of_a_log_probability": max(
                abs(one.logprob - other.logprob) for one, other in pairs
            ),
            "predictions_that_differ": sum(one.predicted != two.predicted for one, two in pairs),
            "relative_difference_of_the_change": (apart / size) ** 0.5,
            "alone": {str(rows): alone(rows, options.repeats) for rows in ROWS},
        },
    )


def alone(rows: int, repeats: int, width: int = 576, wide: int = 1536) -> dict[str, Any]:
    """Billions of operations a second, medians; many weights, so that none waits in the cache."""
    weights = [torch.randn(wide, width, requires_grad=True) for _ in range(40)]
    entry, given = torch.randn(rows, width, requires_grad=True), torch.randn(rows, wide)
    layer = torch.nn.Linear(width, wide, bias=False)

    def both_ways(kind: type[torch.nn.Linear]) -> Callable[[], None]:
        def run() -> None:
            layer.__class__ = kind
            for weight in weights:
                layer.weight = torch.nn.Parameter(weight)
                torch.autograd.grad(layer(entry), (entry, layer.weight), given)

        return run

    work = {"usual": both_ways(torch.nn.Linear), "onednn": both_ways(Linear)}
    in_turns(work, 1)
    seconds = in_turns(work, repeats)
    operations = 3 * 2 * rows * width * wide * len(weights) / 1e9
    speeds = {
        name: sorted(operations / second for second in found)[len(found) // 2]
        for name, found in seconds.items()
    }
    return speeds | {"ratio": ratio(seconds["usual"], seconds["onednn"])}


if __name__ == "__main__":
    main()

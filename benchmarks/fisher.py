"""The Fisher diagonal and the forgetting confidence against one backward pass per example.

    python -m benchmarks.fisher [--base smollm2-135m] [--examples 256] [--turns 3]

The examples are training rows of the bundled tasks. In one turn: the Fisher diagonal by hooks, the
same by one backward pass per example (squares added with one fused call a tensor), at batch size 8
a forward pass, and forward and backward with gradients of all weights, and the confidence of the
same examples in both orders. Ratios are taken within a turn. Before, the diagonals are compared.

What is compared with runs twice: as anybody would write it, who has transformers (its own loss, its
own logits at all positions, torch's own products), and by the code that this project trains with,
which reads the head at the answers only and multiplies by the faster library. What the second gains
on the first is not the hooks' doing; it helps them as well.

The floor of all of them but the first order is that of one epoch of training: the products of the
forward pass, of the gradients of inputs, and of the gradients of weights, which for single examples
are as many, over the rate of large products measured in the same turn. The floor of the Fisher
diagonal by parts takes forward and backward as they are, without gradients of weights (measured in
the same turn), and adds the products of these gradients at that rate, and squaring and adding up
every example's gradient at the rate of a block that stays in the cache: no gradient of one example
can be squared without being made. That of the confidence adds two weighted sums instead of the
squares, at the rate of a scalar product in the cache; squaring is not counted.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch

from benchmarks import floors
from benchmarks.measure import in_turns, machine, peak_memory, ratio, torchs_products, write
from unwrite.change import Dense
from unwrite.delta import Delta
from unwrite.forgetting.confidence import forgetting_confidence
from unwrite.forgetting.fisher import fisher_diagonal
from unwrite.forgetting.per_example import visit_gradients
from unwrite.model import Model, Tokens, length_batches
from unwrite.tasks import read_tasks
from unwrite.training import Pair, row_losses

# What a backward pass starts from: ours, or that of transformers.
Loss = Callable[[Model, list[Tokens]], torch.Tensor]


def our_loss(model: Model, rows: list[Tokens]) -> torch.Tensor:
    """The mean over the rows of the mean over their answer tokens."""
    return row_losses(model.network, rows, model.device).mean()


def transformers_loss(model: Model, rows: list[Tokens]) -> torch.Tensor:
    """The loss that transformers computes from labels: of a single row the same; of several the
    mean over all their answer tokens."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    labels = torch.full_like(ids, -100)
    seen = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        length = len(row.ids)
        ids[place, :length] = torch.tensor(row.ids)
        labels[place, row.answer : length] = ids[place, row.answer : length]
        seen[place, :length] = 1
    with torchs_products(model.network):
        loss: torch.Tensor = model.network(input_ids=ids, attention_mask=seen, labels=labels).loss
    return loss


def one_by_one(
    model: Model, pairs: Sequence[Pair], loss: Loss = our_loss
) -> dict[str, torch.Tensor]:
    """The Fisher diagonal by one backward pass per example."""
    parameters = dict(model.network.named_parameters(remove_duplicate=False))
    network = model.network
    network.requires_grad_(True)
    totals = {file: torch.zeros_like(parameters[name]) for file, name in model.names.items()}
    for pair in pairs:
        network.zero_grad()
        loss(model, [model.tokens(pair.prompt, pair.answer)]).backward()
        with torch.no_grad():
            for file, name in model.names.items():
                gradient = parameters[name].grad
                if gradient is not None:
                    totals[file].addcmul_(gradient, gradient)
    network.zero_grad()
    return {file: total.div_(len(pairs)) for file, total in totals.items()}


def passes(model: Model, pairs: Sequence[Pair], backward: bool, loss: Loss = our_loss) -> None:
    """Plain passes at batch size 8 in batches of similar length, gradients thrown away."""
    sequences = [model.tokens(pair.prompt, pair.answer) for pair in pairs]
    model.network.requires_grad_(backward)
    for batch in length_batches([len(one.ids) for one in sequences], rows=8):
        found = loss(model, [sequences[index] for index in batch])
        if backward:
            found.backward()
            model.network.zero_grad()


def main() -> None:
    """Compare, then time in turns and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    model = Model.load(options.base)
    rows = [example for task in read_tasks("bank") for example in task.train[:8]]
    pairs = [Pair(row.prompt, row.answer) for row in rows][: options.examples]
    sequences = [model.tokens(pair.prompt, pair.answer) for pair in pairs]

    fisher = fisher_diagonal(model, pairs)
    memory = peak_memory()
    reference = one_by_one(model, pairs, transformers_loss)
    error = max(
        float((fisher[name].dense() - one).abs().max() / one.abs().max().clamp(min=1e-30))
        for name, one in reference.items()
        if name in fisher
    )
    # Any direction serves for timing; this one is small and different for every weight.
    towards = Delta.from_changes({name: Dense(one.sqrt()) for name, one in reference.items()})
    del reference
    work = {
        "hooks": lambda: fisher_diagonal(model, pairs),
        "passes without gradients of weights": lambda: visit_gradients(
            model, sequences, lambda *_: None
        ),
        "one backward per example": lambda: one_by_one(model, pairs),
        "one backward per example, by transformers": lambda: one_by_one(
            model, pairs, transformers_loss
        ),
        "forward, batch 8": lambda: passes(model, pairs, backward=False),
        "forward and backward, batch 8": lambda: passes(model, pairs, backward=True),
        "forward and backward, batch 8, by transformers": lambda: passes(
            model, pairs, True, transformers_loss
        ),
        "confidence, both terms": lambda: forgetting_confidence(model, pairs, towards, fisher),
        "confidence, first order": lambda: forgetting_confidence(
            model, pairs, towards, fisher, order=1, step=1.0
        ),
    }
    operations = floors.reading_operations(model, sequences)  # of a pass; there are three
    elements = len(pairs) * floors.matrix_elements(model)  # of all single gradients
    names = [*work, "floor", "floor by parts", "floor by parts of the confidence"]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.turns):
        for name, spent in in_turns(work, 1).items():
            seconds[name] += spent
        gradients = operations / floors.multiplications()
        seconds["floor"].append(3 * gradients)
        making = seconds["passes without gradients of weights"][-1] + gradients
        seconds["floor by parts"].append(making + elements / floors.adding_squares())
        seconds["floor by parts of the confidence"].append(
            making + 2 * elements / floors.summing_products()
        )
    plain = seconds["forward and backward, batch 8"]
    theirs = seconds["forward and backward, batch 8, by transformers"]
    write(
        "fisher",
        {
            "machine": machine(),
            "examples": len(pairs),
            "mean_tokens": statistics.mean(len(one.ids) for one in sequences),
            "largest_relative_difference": error,
            "peak_gb_after_hooks": memory,
            "seconds": {name: statistics.median(times) for name, times in seconds.items()},
            "times_faster_than_one_by_one_by_transformers": ratio(
                seconds["one backward per example, by transformers"], seconds["hooks"]
            ),
            "times_faster_than_one_by_one": ratio(
                seconds["one backward per example"], seconds["hooks"]
            ),
            "times_faster_at_the_floor": ratio(
                seconds["one backward per example"], seconds["floor"]
            ),
            "times_faster_at_the_floor_by_parts": ratio(
                seconds["one backward per example"], seconds["floor by parts"]
            ),
            "confidence_over_forward_backward_by_transformers": ratio(
                seconds["confidence, both terms"], theirs
            ),
            "confidence_over_forward_backward": ratio(seconds["confidence, both terms"], plain),
            "confidence_over_forward_backward_at_the_floor_by_parts": ratio(
                seconds["floor by parts of the confidence"], plain
            ),
            "confidence_over_the_floor": ratio(seconds["confidence, both terms"], seconds["floor"]),
            "first_order_over_forward": ratio(
                seconds["confidence, first order"], seconds["forward, batch 8"]
            ),
        },
    )


if __name__ == "__main__":
    main()

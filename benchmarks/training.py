"""``fine_tune`` against ``transformers.Trainer``: the same edits, epochs, batch size and optimiser.

    python -m benchmarks.training --edits FILE [--limit 100 --repeats 3]

Both train SmolLM2-135M on the answers only (fp32, AdamW, constant rate, clipping at 1), in turns,
from the same weights. The Trainer is used as its documentation says: tokenised rows, labels -100 on
the prompt, padding to the longest of a batch, shuffled. Times include snapshot and delta (ours) and
nothing but ``train()`` (theirs). The final loss is the mean answer loss over all edits after
training, computed for both by the same code. A third contender is ours with bf16 products over fp32
master weights.

The floor is the operations of the matrix products over the rate of large products that was measured
in the same turn. The floor with the optimiser adds to it what AdamW has to move in every step, over
the rate of copying.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from dataclasses import replace
from typing import Any, Literal

import torch
from transformers import Trainer, TrainingArguments

from benchmarks import floors
from benchmarks.measure import in_turns, ratio, torchs_products, write
from unwrite import load, read_edits
from unwrite.model import Model, Tokens
from unwrite.training import Recipe, fine_tune, new_pairs

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def main() -> None:
    """Run both in turns and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", default="atlas", help="a file of edits, or atlas")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    model = load("smollm2-135m")
    pairs = new_pairs(read_edits(options.edits, limit=options.limit))
    sequences = [model.tokens(pair.prompt, pair.answer) for pair in pairs]
    recipe = Recipe(
        epochs=options.epochs, lr=options.lr, batch_size=options.batch_size, until="epochs"
    )
    kept = {name: tensor.clone() for name, tensor in model.weights.items()}
    losses: dict[str, float] = {}

    def ours(precision: Literal["fp32", "bf16"] = "fp32") -> None:
        trained = fine_tune(model, pairs, replace(recipe, precision=precision))
        deltas.append(trained.delta)

    deltas: list[Any] = []

    def theirs() -> None:
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                num_train_epochs=options.epochs,
                per_device_train_batch_size=options.batch_size,
                learning_rate=options.lr,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                max_grad_norm=1.0,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=model.device.type == "cpu",
            )
            rows = [row(tokens) for tokens in sequences]
            trainer = Trainer(model.network, arguments, train_dataset=rows, data_collator=collate)
            with torchs_products(model.network):  # as it finds a network
                trainer.train()

    half = "unwrite, bf16"
    work = {"unwrite": ours, half: lambda: ours("bf16"), "trainer": theirs}
    for name, train in work.items():  # warm up, and compare losses
        train()
        if name == "trainer":
            losses[name] = answer_loss_now(model, sequences)
            restore(model, kept)
            continue
        with model.shifted(deltas.pop()):
            losses[name] = answer_loss_now(model, sequences)
    seconds: dict[str, list[float]] = {name: [] for name in work}
    rates: dict[str, list[float]] = {"fp32": [], "bf16": []}
    copied: list[float] = []  # bytes a second
    for _ in range(options.repeats):
        for kind, found in rates.items():
            found.append(floors.multiplications(getattr(torch, DTYPES[kind])))
        copied.append(floors.copying())
        for name, times in in_turns(work, 1).items():
            seconds[name] += times
        deltas.clear()
        restore(model, kept)
    operations = options.epochs * floors.training_operations(model, sequences)
    least = {kind: [operations / rate for rate in found] for kind, found in rates.items()}
    steps = options.epochs * math.ceil(len(pairs) / options.batch_size)
    moved = steps * floors.optimizer_bytes(model)
    both = {
        kind: [products + moved / rate for products, rate in zip(found, copied, strict=True)]
        for kind, found in least.items()
    }
    write(
        "training",
        {
            "edits": len(pairs),
            "epochs": options.epochs,
            "batch_size": options.batch_size,
            "tokens_per_epoch": sum(len(tokens.ids) for tokens in sequences),
            "loss_before": answer_loss_now(model, sequences),
            "loss_after": losses,
            "seconds": seconds,
            "trainer_over_unwrite": ratio(seconds["trainer"], seconds["unwrite"]),
            "trainer_over_unwrite_bf16": ratio(seconds["trainer"], seconds[half]),
            "operations": operations,
            "operations_a_second": rates,
            "unwrite_over_floor": ratio(seconds["unwrite"], least["fp32"]),
            "unwrite_bf16_over_floor": ratio(seconds[half], least["bf16"]),
            "bytes_of_the_optimizer": moved,
            "bytes_a_second": copied,
            "unwrite_over_floor_with_optimizer": ratio(seconds["unwrite"], both["fp32"]),
            "unwrite_bf16_over_floor_with_optimizer": ratio(seconds[half], both["bf16"]),
            "trainer_over_floor_with_optimizer": ratio(seconds["trainer"], both["fp32"]),
        },
    )


def row(tokens: Tokens) -> dict[str, list[int]]:
    """A row as the Trainer's documentation wants it."""
    return {
        "input_ids": list(tokens.ids),
        "labels": [-100] * tokens.answer + list(tokens.targets),
    }


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad a batch to its longest row."""
    length = max(len(one["input_ids"]) for one in rows)

    def padded(key: str, filler: int) -> torch.Tensor:
        return torch.tensor([one[key] + [filler] * (length - len(one[key])) for one in rows])

    mask = [[1] * len(one["input_ids"]) + [0] * (length - len(one["input_ids"])) for one in rows]
    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", -100),
        "attention_mask": torch.tensor(mask),
    }


def answer_loss_now(model: Model, sequences: list[Tokens]) -> float:
    """Mean over the edits of the mean loss of their answer tokens."""
    model.network.eval()
    forced = model.force(sequences)
    return statistics.mean(-one.logprob / len(one.targets) for one in forced)


@torch.no_grad()
def restore(model: Model, kept: dict[str, torch.Tensor]) -> None:
    """Put the weights back after the Trainer, which trains in place."""
    for name, tensor in model.weights.items():
        tensor.copy_(kept[name])
    model.network.zero_grad()


if __name__ == "__main__":
    main()

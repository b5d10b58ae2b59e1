"""What one round of Delicate costs beside the fine-tune it is built from.

    python -m benchmarks.delicate_round --edits FILE [--limit 100 --epochs 3 --repeats 3]

In turns, on SmolLM2-135M, the same edits, epochs and batch size: ``FullFT`` and one round of
``Delicate`` with it (two probes, selection, storage of the first probe, the check of what is
learned); ``LoRA`` and one round with it, whose probes are trained as twins. These times are those
of ``delta(model, edits)`` followed by saving the delta. Of the twins also the training alone, and
the least it can cost: the frozen network, without adapters and optimiser, forward and backward on
as many rows as one run reads, and on twice as many. Peak memory is that of fresh processes which do
one fine-tune, or two rounds, from model folder to delta folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import in_turns, peak_memory, ratio, write
from unwrite import Delicate, Edit, FullFT, LoRA, load, read_edits
from unwrite.methods.probes import answers
from unwrite.model import Model
from unwrite.training import Pair, row_losses


def main() -> None:
    """Run all four in turns and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", default="atlas")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    edits = read_edits(options.edits, limit=options.limit)
    if options.peak is not None:
        print(json.dumps(measure_peak(options.peak, edits)))
        return

    model = load("smollm2-135m")
    full = FullFT(epochs=options.epochs, until="epochs")
    lora = LoRA(epochs=options.epochs, until="epochs")
    methods: dict[str, Any] = {
        "full-ft": full,
        "delicate, full-ft": Delicate(rounds=1, tuner=full),
        "delicate, full-ft, top 5 %": Delicate(rounds=1, tuner=full, top=0.05),
        "lora": lora,
        "delicate, lora": Delicate(rounds=1, tuner=lora),
    }

    def work(method: Any) -> Callable[[], None]:
        def run() -> None:
            folder = Path(tempfile.mkdtemp())
            try:
                method.delta(model, edits).save(folder)
            finally:
                shutil.rmtree(folder)

        return run

    both = answers(model, edits, "data")
    parts: dict[str, Callable[[], Any]] = {
        "training lora": lambda: lora.train(model, both.new),
        "training twins": lambda: lora.train_twins(model, both.old, both.new),
        "frozen, rows of one": lambda: read_frozen(model, [both.new], lora),
        "frozen, rows of two": lambda: read_frozen(model, [both.old, both.new], lora),
    }
    whole = {name: work(method) for name, method in methods.items()}
    seconds = in_turns(whole | parts, options.repeats)
    write(
        "delicate_round",
        {
            "edits": len(edits),
            "epochs": options.epochs,
            "seconds": seconds,
            "over_full_ft": ratio(seconds["delicate, full-ft"], seconds["full-ft"]),
            "over_full_ft_top_5_percent": ratio(
                seconds["delicate, full-ft, top 5 %"], seconds["full-ft"]
            ),
            "over_lora": ratio(seconds["delicate, lora"], seconds["lora"]),
            "training_twins_over_lora": ratio(seconds["training twins"], seconds["training lora"]),
            "frozen_two_over_one": ratio(
                seconds["frozen, rows of two"], seconds["frozen, rows of one"]
            ),
            "frozen_two_over_training_lora": ratio(
                seconds["frozen, rows of two"], seconds["training lora"]
            ),
            "peak_memory_gb": {
                name: peak_of_a_process(name, options.edits) for name in ("full-ft", "delicate")
            },
        },
    )


def read_frozen(model: Model, lessons: Sequence[Sequence[Pair]], recipe: LoRA) -> None:
    """Forward and backward through the frozen network, as often as the recipe's epochs read it; the
    lessons side by side, as many rows of each in a batch as the recipe has."""
    rows = [
        sorted((model.tokens(one.prompt, one.answer) for one in pairs), key=lambda one: one.answer)
        for pairs in lessons
    ]
    embedding = model.network.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _m, _i, output: output.requires_grad_(True))
    model.network.requires_grad_(False)
    try:
        for _ in range(recipe.epochs):
            for start in range(0, len(rows[0]), recipe.batch_size):
                batch = [one for side in rows for one in side[start : start + recipe.batch_size]]
                row_losses(model.network, batch, model.device).sum().backward()
    finally:
        handle.remove()
        model.network.requires_grad_(True)


def peak_of_a_process(name: str, edits: str) -> float:
    """Run ``measure_peak`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.delicate_round", "--peak", name]
    done = subprocess.run(
        [*command, "--edits", edits, "--limit", "16"], check=True, capture_output=True, text=True
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def measure_peak(name: str, edits: Sequence[Edit]) -> float:
    """Peak resident memory in GB of one method on SmolLM2-135M, folder to folder."""
    full = FullFT(epochs=1, until="epochs")
    # A learning rate of next to nothing: the second round is made in any case.
    gentle = FullFT(epochs=1, until="epochs", lr=1e-9)
    method: Any = {"full-ft": full, "delicate": Delicate(rounds=2, tuner=gentle)}[name]
    with tempfile.TemporaryDirectory() as folder:
        method.delta(load("smollm2-135m"), edits).save(Path(folder))
    return peak_memory()


if __name__ == "__main__":
    main()

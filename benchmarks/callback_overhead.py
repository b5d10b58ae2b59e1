"""What GracefulForgetting costs a Trainer besides its unlearning steps.

    python -m benchmarks.callback_overhead [--steps 24] [--repeats 5] [--base MODEL]

The same ``transformers.Trainer`` run, in turns: plain; with the callback and never an unlearning
step due; with an unlearning step after every fourth step. Of the last, the time inside the
unlearning steps is taken out. Ratios are those within a turn.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import ratio, write
from unwrite import load
from unwrite.forgetting import GracefulForgetting
from unwrite.model import Model
from unwrite.tasks import read_task
from unwrite.training import Pair

EVERY = 4


class Timed(GracefulForgetting):
    """The callback, and how long its unlearning steps took."""

    inside = 0.0

    def _unlearn(self, args: Any, model: Any, step: int, is_first: bool) -> None:
        started = time.perf_counter()
        super()._unlearn(args, model, step, is_first)
        self.inside += time.perf_counter() - started


def main() -> None:
    """Run in turns and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--task", default="bank:plurals")
    parser.add_argument("--forget", default="bank:geography")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model = load(options.base)
    rows = task_rows(model, options.task)
    pairs = [Pair(one.prompt, one.answer) for one in read_task(options.forget).train]
    seconds: dict[str, list[float]] = {"plain": [], "never due": [], "excepted": [], "inside": []}
    for _ in range(options.repeats):
        never = Timed(pairs, every=10 * options.steps)
        often = Timed(pairs, every=EVERY)
        seconds["plain"].append(trained(model, rows, options.steps))
        seconds["never due"].append(trained(model, rows, options.steps, never))
        seconds["excepted"].append(trained(model, rows, options.steps, often) - often.inside)
        seconds["inside"].append(often.inside)
        assert not never.history and often.done == options.steps // EVERY
    write(
        "callback_overhead",
        {
            "steps": options.steps,
            "unlearning_steps": options.steps // EVERY,
            "seconds": seconds,
            "never_due_over_plain": ratio(seconds["never due"], seconds["plain"]),
            "excepted_over_plain": ratio(seconds["excepted"], seconds["plain"]),
        },
    )


def task_rows(model: Model, task: str) -> list[dict[str, list[int]]]:
    """The training split as a data set for any Trainer, prompts masked."""
    rows = []
    for one in read_task(task).train:
        tokens = model.tokens(one.prompt, one.answer)
        labels = [-100] * tokens.answer + list(tokens.targets)
        rows.append({"input_ids": list(tokens.ids), "labels": labels})
    return rows


def trained(model: Model, rows: list[Any], steps: int, *callbacks: GracefulForgetting) -> float:
    """Seconds of a run of the Trainer; the weights move on, which changes no time."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model.network,
            args=TrainingArguments(
                str(Path(folder)),
                max_steps=steps,
                per_device_train_batch_size=8,
                learning_rate=1e-6,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=model.device.type == "cpu",
            ),
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(model.tokenizer),
            processing_class=model.tokenizer,
            callbacks=list(callbacks),
        )
        started = time.perf_counter()
        trainer.train()
        return time.perf_counter() - started


if __name__ == "__main__":
    main()

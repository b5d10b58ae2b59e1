"""Forecast what a fine-tune will destroy, and replay it, in a transformers.Trainer.

    python examples/forecast_and_replay.py --model MODEL --task TASK --past TASK --out FOLDER

Past tasks (--past, may be repeated; bank:NAME or a file) are learned once, each by itself, to see
what each takes from some upstream examples: FOLDER/matrix holds that and is used again. Then TASK
is learned by a plain Trainer twice. The second time a few examples are measured after a fifth of
the steps, the damage to all others is forecast from the past tasks, and the endangered ones are
replayed in the rest of the run. A part of the examples is held out: on these the two runs are
compared.
"""

import argparse
from pathlib import Path

import numpy as np
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import unwrite
from unwrite.forgetting import (
    Factorization,
    Mixture,
    OnlineReplay,
    ReplayPolicy,
    collect,
    d_optimal,
    measure,
    read_examples,
    settle,
)
from unwrite.tasks import read_task, read_tasks
from unwrite.training import Pair


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", required=True, help="the new task")
    parser.add_argument("--past", action="append", required=True, help="tasks seen before")
    parser.add_argument("--examples", action="append", help="what may be lost (default: atlas)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--limit", type=int, default=48, help="examples of a task")
    parser.add_argument("--ratio", type=float, default=0.25, help="replayed for one of the task")
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=20, help="examples to measure")
    given = parser.parse_args(words)

    model = unwrite.load(given.model)
    upstream = settle(model, read_examples(*(given.examples or ["atlas"])))
    learned = {
        task.name: [Pair(one.prompt, one.answer) for one in task.train]
        for source in given.past
        for task in read_tasks(source, limit=given.limit)
    }
    tuner = unwrite.FullFT(epochs=given.epochs, until="epochs", lr=given.lr)
    matrix = collect(model, learned, upstream, tuner, given.out / "matrix").matrix
    fitted = Factorization(min(given.rank, len(learned) - 1)).fit(matrix)

    # The matrix leaves out what the base gives no number for; positions are those in the matrix.
    by_name = {one.name: one for one in upstream}
    watched = [by_name[name] for name in matrix.examples]
    held_out = list(range(0, len(watched), 4))
    free = [position for position in range(len(watched)) if position % 4]
    seeds = d_optimal(fitted, given.seeds, free).tolist()

    task = read_task(given.task, limit=given.limit)
    policy = ReplayPolicy.softmax(ratio=given.ratio)

    def row(prompt: str, answer: str) -> dict[str, list[int]]:
        """One item of the data set: the ids, and labels on the answer only."""
        tokens = model.tokens(prompt, answer)
        labels = [-100] * tokens.answer + list(tokens.targets)
        return {"input_ids": list(tokens.ids), "labels": labels}

    rows = [row(one.prompt, one.answer) for one in task.train]
    old_rows = [row(str(one.prompt), str(one.answer)) for one in watched]

    def train(replayed: int) -> OnlineReplay:
        """Fine-tune ``model.network`` in place with so many replayed examples."""
        scores = np.zeros(len(watched))
        at_random = policy.choose(scores, replayed, held_out=held_out)
        mixture = Mixture(rows, old_rows, at_random)
        online = OnlineReplay(
            model, mixture, fitted, watched, seeds, policy, held_out=held_out, after=0.2
        )
        arguments = TrainingArguments(
            str(given.out / "checkpoints"),
            num_train_epochs=given.epochs,
            learning_rate=given.lr,
            save_strategy="no",
            report_to="none",
            use_cpu=model.device.type == "cpu",
        )
        trainer = Trainer(
            model=model.network,
            args=arguments,
            train_dataset=mixture,
            data_collator=DataCollatorForSeq2Seq(model.tokenizer),
            callbacks=[online] if replayed else [],
        )
        trainer.train()
        model.network.eval()
        return online

    before = measure(model, watched)
    lost = {}
    for name, count in (("without replay", 0), ("with replay", policy.count(len(rows)))):
        online = train(count)
        lost[name] = measure(model, watched) - before
        if online.prediction is not None:
            truth, told = lost["without replay"], online.prediction.values
            agreement = np.corrcoef(told[held_out], truth[held_out])[0, 1]
            print(f"Forecast against the truth of the first run: correlation {agreement:.2f}")
            names = [watched[position].name for position in online.mixture.served[-3:]]
            print(f"Replayed last: {', '.join(names)}")
        model.become([])
    for name, change in lost.items():
        mean = change[held_out].mean()
        print(f"{name}: log perplexity of held-out examples {mean:+.3f}")


if __name__ == "__main__":
    main()

"""Graceful fine-tuning in TRL's SFTTrainer: learn a task, let go of what stands in its way.

    pip install trl
    python examples/graceful_sft.py --model MODEL --task TASK --forget TASK --out FOLDER

TASK is a file of a task or bank:NAME. A plain run of the SFTTrainer comes first: it is the
baseline, and its end says where the task's optimum is. Then the base answers the prompts of the
task to be forgotten, the answers that stand most in the way are chosen, and a second run of the
same SFTTrainer lets go of them with one more callback. Both runs end as ordinary model folders.
"""

import argparse
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

import unwrite
from unwrite.delta import Delta
from unwrite.forgetting import (
    GracefulForgetting,
    fisher_diagonal,
    forgetting_confidence,
    select,
    self_generate,
)
from unwrite.tasks import is_right, read_task
from unwrite.training import Pair
from unwrite.weights import Weights


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", required=True, help="what to learn")
    parser.add_argument("--forget", required=True, help="what to let go of; labels are not used")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--every", type=int, default=4, help="steps between unlearning steps")
    parser.add_argument("--strength", type=float, default=0.05)
    given = parser.parse_args(words)

    base = unwrite.load(given.model)
    task, forget = read_task(given.task), read_task(given.forget, labelled=False)
    rows = [{"prompt": one.prompt, "completion": f" {one.answer}"} for one in task.train]

    def train(name: str, *callbacks: GracefulForgetting) -> Path:
        """One run of the SFTTrainer from the base; the folder of the model that it ends with."""
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(base.source.folder, dtype="float32"),
            args=SFTConfig(
                str(given.out / name / "checkpoints"),
                num_train_epochs=given.epochs,
                learning_rate=given.lr,
                bf16=False,
                save_strategy="no",
                report_to="none",
                use_cpu=base.device.type == "cpu",
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=base.tokenizer,
            callbacks=list(callbacks),
        )
        trainer.train()
        trainer.save_model(str(given.out / name))
        return given.out / name

    def change(folder: Path) -> Delta:
        """What a run changed, weight by weight."""
        before, after = (Weights.from_folder(one) for one in (base.source.folder, folder))
        return Delta.between(before, after)

    def accuracy(delta: Delta) -> float:
        """How many questions of the test split are answered right after a change."""
        with base.shifted(delta):
            said = base.generate([one.prompt for one in task.test])
        right = [is_right(text, one.answer) for text, one in zip(said, task.test, strict=True)]
        return sum(right) / len(right)

    plain = change(train("plain"))
    own = self_generate(base, [one.prompt for one in forget.train])
    with base.shifted(plain):
        fisher = fisher_diagonal(base, [Pair(one.prompt, one.answer) for one in task.train])
    confidence = forgetting_confidence(base, own, plain, fisher).values
    count = max(1, len(task.train) // 8)
    chosen = select(confidence, "top", count)
    print(f"Of {len(own)} own answers, {len(chosen)} are let go, first of all:")
    for index in chosen[:3]:
        print(f"  {own[index].prompt!r} -> {own[index].answer!r}")

    callback = GracefulForgetting(
        [own[index] for index in chosen],
        confidence=[float(confidence[index]) for index in chosen],
        every=given.every,
        strength=given.strength,
    )
    graceful = change(train("graceful", callback))
    steps = {row["number"] for row in callback.history}
    print(f"{len(steps)} unlearning steps between the learning steps.")
    results = {"before": Delta.nothing(), "plain": plain, "graceful": graceful}
    for name, delta in results.items():
        print(f"{name}: {100 * accuracy(delta):.1f} % of {len(task.test)} test questions right")


if __name__ == "__main__":
    main()

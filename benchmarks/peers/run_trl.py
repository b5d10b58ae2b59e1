"""The same fine-tune by TRL's SFTTrainer, always from the same weights.

    python run_trl.py MODEL_FOLDER SCRATCH_FOLDER

An order has ``pairs``, a list of (prompt, completion), and ``epochs``, ``batch_size``, ``lr``; the
answer has the ``seconds`` of ``train()`` and the mean ``loss`` of the completions afterwards.
"""

import contextlib
import json
import sys
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    """Answer until standard input ends."""
    folder, scratch = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for line in sys.stdin:
        order = json.loads(line)
        with contextlib.redirect_stdout(sys.stderr):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            rows = [row(tokenizer, *pair) for pair in order["pairs"]]
            trainer = SFTTrainer(
                model,
                args=SFTConfig(
                    scratch,
                    num_train_epochs=order["epochs"],
                    per_device_train_batch_size=order["batch_size"],
                    learning_rate=order["lr"],
                    lr_scheduler_type="constant",
                    weight_decay=0.0,
                    max_grad_norm=1.0,
                    completion_only_loss=True,
                    gradient_checkpointing=False,
                    bf16=False,
                    save_strategy="no",
                    logging_strategy="no",
                    report_to=[],
                    disable_tqdm=True,
                    use_cpu=True,
                ),
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
            )
            started = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - started
            loss = mean_loss(model.eval(), tokenizer, order["pairs"])
        print(json.dumps({"seconds": seconds, "loss": loss}), flush=True)


def row(tokenizer: Any, prompt: str, completion: str) -> dict[str, list[int]]:
    """Tokens of a row, without the end of text that TRL would put behind a completion."""
    ids, start = tokenizer(prompt + completion)["input_ids"], len(tokenizer(prompt)["input_ids"])
    return {"input_ids": ids, "completion_mask": [0] * start + [1] * (len(ids) - start)}


@torch.no_grad()
def mean_loss(model: Any, tokenizer: Any, pairs: list[list[str]]) -> float:
    """Mean over the pairs of the mean loss of their completion's tokens."""
    losses = []
    for pair in pairs:
        one = row(tokenizer, *pair)
        ids, start = torch.tensor([one["input_ids"]]), one["completion_mask"].index(1)
        logits = model(ids).logits[0, start - 1 : -1]
        losses.append(float(torch.nn.functional.cross_entropy(logits, ids[0, start:])))
    return sum(losses) / len(losses)


if __name__ == "__main__":
    main()

"""Observing in batches against one prompt at a time: the same rows, how much faster.

    python -m benchmarks.observation --edits FILE [--limit 200 --repeats 3 --slow-sample 60]

The slow way is the straightforward one: for every probe one forward pass with the answer forced and
one ``generate`` (with its key-value cache) stopped at the same places. It is timed on a random
sample of the probes and scaled to all of them, because doing all of it would take an hour. Both
ways must give the same rows on the sample.
"""

from __future__ import annotations

import argparse
import random

import torch

from benchmarks.measure import in_turns, ratio, write
from unwrite import load, read_edits
from unwrite.model import MAX_NEW_TOKENS, Model
from unwrite.observe import Question, observe, questions, settle
from unwrite.scores import answer_in, is_complete


def main() -> None:
    """Run both in turns and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", default="atlas", help="a file of edits, or atlas")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slow-sample", type=int, default=60)
    options = parser.parse_args()

    model = load("smollm2-135m")
    edits = read_edits(options.edits, limit=options.limit)
    asked = [probe for probe in questions(edits) if probe.role != "old_recall"]
    probes = settle(model, asked)
    sample = random.Random(0).sample(probes, min(options.slow_sample, len(probes)))
    fast = {(one["prompt"], one["target"]): one for one in observe(model, probes)}
    differences = sum(
        (fast[probe.prompt, probe.target]["predicted"], answer_in(text(fast, probe)))
        != (predicted, answer_in(said))
        for probe, (predicted, said) in ((one, slowly(model, one)) for one in sample)
    )
    seconds = in_turns(
        {
            "batched": lambda: observe(model, probes),
            "one_at_a_time": lambda: [slowly(model, probe) for probe in sample],
        },
        options.repeats,
    )
    scale = len(probes) / len(sample)
    scaled = [scale * value for value in seconds["one_at_a_time"]]
    write(
        "observation",
        {
            "edits": len(edits),
            "probes": len(probes),
            "sample": len(sample),
            "rows_that_differ": differences,
            "seconds": {"batched": seconds["batched"], "one_at_a_time_scaled": scaled},
            "one_at_a_time_over_batched": ratio(scaled, seconds["batched"]),
        },
    )


def text(rows: dict[tuple[str, str], dict[str, str]], probe: Question) -> str:
    """The free answer in the batched rows."""
    return rows[probe.prompt, str(probe.target)]["text"]


@torch.no_grad()
def slowly(model: Model, probe: Question) -> tuple[list[int], str]:
    """One probe by itself: predicted answer tokens and free text."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Complete(StoppingCriteria):
        def __call__(self, ids: torch.Tensor, _scores: torch.Tensor, **_: object) -> torch.Tensor:
            said = model.tokenizer.decode(ids[0, start:], skip_special_tokens=True)
            return torch.tensor([is_complete(said)])

    tokens = model.tokens(probe.prompt, str(probe.target))
    ids = torch.tensor([tokens.ids], device=model.device)
    logits = model.network(ids).logits[0, tokens.answer - 1 : -1]
    prompt = model.tokenizer(probe.prompt, return_tensors="pt").to(model.device)
    start = prompt["input_ids"].shape[1]
    written = model.network.generate(
        **prompt,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([Complete()]),
    )
    said = model.tokenizer.decode(written[0, start:], skip_special_tokens=True)
    return logits.argmax(dim=-1).tolist(), str(said)


if __name__ == "__main__":
    main()

"""Log-likelihoods of answers by lm-evaluation-harness beside ours: the same requests and numbers.

    python -m benchmarks.scoring_peers --edits counterfact_easyedit_2000.json [--requests 600]

``distinct``: every request has a prompt of its own. ``shared``: the same number of requests, six
answers to each prompt. lm-eval runs at several batch sizes; the fastest counts.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.measure import in_turns, ratio, write
from benchmarks.peers import Peer, environment
from unwrite import load, read_edits
from unwrite.model import Model

PEER = "lm-eval==0.4.13"
SIZES = (16, 64)  # rows in a batch of lm-eval's
ANSWERS = 6  # to each prompt, where prompts are shared

Request = tuple[str, str]


def main() -> None:
    """Run both in turns and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", default="atlas", help="a file of edits, or atlas")
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model = load("smollm2-135m")
    facts = {edit.prompt: edit.new for edit in read_edits(options.edits)}
    prompts, answers = list(facts), list(facts.values())
    kinds: dict[str, list[Request]] = {
        "distinct": list(facts.items())[: options.requests],
        "shared": [
            (prompt, answers[(number * ANSWERS + other) % len(answers)])
            for number, prompt in enumerate(prompts[: options.requests // ANSWERS])
            for other in range(ANSWERS)
        ],
    }
    python = environment("lm-eval", PEER)
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        peers = {
            f"lm-eval, batches of {rows}": stack.enter_context(
                Peer(
                    python,
                    "run_lm_eval.py",
                    place / f"{rows}.txt",
                    [str(model.source.folder), str(rows)],
                )
            )
            for rows in SIZES
        }
        found = {
            name: measured(model, peers, requests, options.repeats)
            for name, requests in kinds.items()
        }
    write("scoring_peers", {"peer": PEER, **found})


def measured(
    model: Model, peers: dict[str, Peer], requests: Sequence[Request], repeats: int
) -> dict[str, Any]:
    """Seconds in turns, and how far the numbers are apart."""
    asked = [(prompt, f" {answer}") for prompt, answer in requests]

    def ours() -> list[float]:
        forced = model.force([model.tokens(*request) for request in requests])
        return [one.logprob for one in forced]

    work: dict[str, Any] = {
        name: lambda peer=peer: peer.ask(requests=asked) for name, peer in peers.items()
    }
    own = ours()
    apart = max(
        abs(one - other)
        for peer in peers.values()
        for one, other in zip(own, peer.ask(requests=asked)["logprobs"], strict=True)
    )
    seconds = in_turns({"unwrite": ours, **work}, repeats)
    fastest = min(peers, key=lambda name: sum(seconds[name]))
    return {
        "requests": len(requests),
        "tokens": sum(len(model.tokens(*request).ids) for request in requests),
        "largest_difference": apart,
        "seconds": seconds,
        "fastest": fastest,
        "lm_eval_over_unwrite": ratio(seconds[fastest], seconds["unwrite"]),
    }


if __name__ == "__main__":
    main()

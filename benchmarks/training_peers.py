"""The same fine-tune by TRL's SFTTrainer beside ours.

    python -m benchmarks.training_peers --edits counterfact_easyedit_2000.json [--limit 100]

Same edits, tokens, epochs, batch size, optimiser and clipping (fp32, AdamW, constant rate), loss on
the answers; every run from the same weights. Times are those of training alone: ours with snapshot
and delta, theirs of ``train()``. transformers' own Trainer is in ``benchmarks.training``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.measure import ratio, write
from benchmarks.peers import Peer, environment
from benchmarks.training import answer_loss_now
from unwrite import load, read_edits
from unwrite.training import Recipe, fine_tune, new_pairs

PEER = "trl==1.16.0"


def main() -> None:
    """Run both in turns and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", default="atlas", help="a file of edits, or atlas")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model = load("smollm2-135m")
    pairs = new_pairs(read_edits(options.edits, limit=options.limit))
    sequences = [model.tokens(pair.prompt, pair.answer) for pair in pairs]
    recipe = Recipe(epochs=options.epochs, until="epochs")
    order = {
        "pairs": [(pair.prompt, f" {pair.answer}") for pair in pairs],
        "epochs": recipe.epochs,
        "batch_size": recipe.batch_size,
        "lr": recipe.lr,
    }
    seconds: dict[str, list[float]] = {"unwrite": [], "trl": []}
    losses: dict[str, list[float]] = {"unwrite": [], "trl": []}
    python = environment("trl", PEER)
    with tempfile.TemporaryDirectory() as place:
        arguments = [str(model.source.folder), f"{place}/trained"]
        with Peer(python, "run_trl.py", Path(place) / "said.txt", arguments) as peer:
            for turn in range(options.repeats + 1):  # the first one is not counted
                trained = fine_tune(model, pairs, recipe)
                theirs = peer.ask(**order)
                if turn:
                    seconds["unwrite"].append(trained.seconds)
                    seconds["trl"].append(theirs["seconds"])
                with model.shifted(trained.delta):
                    losses["unwrite"].append(answer_loss_now(model, sequences))
                losses["trl"].append(theirs["loss"])
    write(
        "training_peers",
        {
            "peer": PEER,
            "edits": len(pairs),
            "epochs": recipe.epochs,
            "batch_size": recipe.batch_size,
            "loss_before": answer_loss_now(model, sequences),
            "loss_after": losses,
            "seconds": seconds,
            "trl_over_unwrite": ratio(seconds["trl"], seconds["unwrite"]),
        },
    )


if __name__ == "__main__":
    main()

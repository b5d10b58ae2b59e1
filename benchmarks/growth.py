"""How the time of an update grows: with the edits, the weights and the protected prompts.

    python -m benchmarks.growth [--repeats 3]

Every curve is fitted by a straight line through logarithms; 1 is linear, less is better than that.

- edits: one epoch of full fine-tuning of SmolLM2-135M on 16 to 256 facts; scoring as many
- weights: one step of full fine-tuning on eight rows, of Llama-shaped networks with random numbers,
  from 8 to 256 million weights
- protected: one epoch on 16 facts with 16 to 256 protected prompts; what a prompt costs is its
  distribution before training, not one in every step
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import exponent, in_turns, write
from unwrite import load, read_edits
from unwrite.model import Model
from unwrite.observe import observe, questions
from unwrite.training import Pair, Recipe, fine_tune, new_pairs

COUNTS = (16, 32, 64, 128, 256)
WIDTHS = (256, 384, 576, 960, 1280)
LAYERS = 12


def main() -> None:
    """Measure all curves and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    curves: dict[str, Any] = {}
    model = load("smollm2-135m", device="cpu")
    facts = read_edits("atlas", limit=max(COUNTS))
    pairs = new_pairs(facts)
    one = Recipe(epochs=1, until="epochs", lr=1e-6)
    curves["training, over edits"] = curve(
        COUNTS, lambda count: lambda: fine_tune(model, pairs[:count], one), options.repeats
    )
    curves["scoring, over edits"] = curve(
        COUNTS, lambda count: lambda: observe(model, questions(facts[:count])), options.repeats
    )
    others = [f"{pair.prompt} not" for pair in pairs]

    def protected(count: int) -> Callable[[], Any]:
        recipe = Recipe(epochs=1, until="epochs", lr=1e-6, protect=tuple(others[:count]))
        return lambda: fine_tune(model, pairs[:16], recipe)

    curves["training, over protected prompts"] = curve(COUNTS, protected, options.repeats)
    with tempfile.TemporaryDirectory() as place:
        models = {}
        for width in WIDTHS:
            made = llama(model, width, Path(place) / str(width))
            models[sum(p.numel() for p in made.network.parameters())] = made

        def step(weights: int) -> Callable[[], Any]:
            rows = [Pair(pair.prompt, pair.answer) for pair in pairs[:8]]
            return lambda: fine_tune(models[weights], rows, one)

        curves["a step, over weights"] = curve(tuple(models), step, options.repeats)
    write("growth", {"repeats": options.repeats, "curves": curves})


def curve(
    sizes: tuple[int, ...], make: Callable[[int], Callable[[], Any]], repeats: int
) -> dict[str, Any]:
    """The least seconds by size, all sizes in turns, and the exponent."""
    work = {size: make(size) for size in sizes}
    work[sizes[0]]()  # warm
    found = in_turns(work, repeats)
    best = {size: min(times) for size, times in found.items()}
    slope = exponent(list(best), list(best.values()))
    return {"sizes": list(sizes), "seconds": found, "exponent": slope}


def llama(like: Model, width: int, folder: Path) -> Model:
    """A network of Llama's shape with random numbers and the tokenizer of another."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=LAYERS,
        num_attention_heads=width // 64,
        vocab_size=len(like.tokenizer),
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    like.tokenizer.save_pretrained(folder)
    return Model.load(folder, device="cpu")


if __name__ == "__main__":
    main()

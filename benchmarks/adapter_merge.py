"""Merging a LoRA adapter into its model: peft beside ours, from files to files.

    python -m benchmarks.adapter_merge [--base smollm2-135m --repeats 5]

The adapter (rank 8 on all linear layers, made-up numbers) lies on disk in peft's form. Theirs loads
the model and the adapter, ``merge_and_unload``, and saves; ours streams ``base + delta`` from file
to file. Both in this process, in turns, without start-up. Copying the checkpoint is the floor. The
results may differ by the rounding of one fp32 product.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.measure import in_turns, ratio, write
from benchmarks.merging_peers import difference
from unwrite import load
from unwrite.change import LowRank
from unwrite.delta import Delta, compose
from unwrite.weights import Weights, save_weights

RANK = 8


def main() -> None:
    """Merge in turns and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        load(options.base, device="cpu").network.save_pretrained(place / "base")
        make_adapter(place)

        def theirs() -> None:
            shutil.rmtree(place / "theirs", ignore_errors=True)
            network = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
            whole: Any = PeftModel.from_pretrained(network, str(place / "adapter"))
            whole.merge_and_unload().save_pretrained(place / "theirs")

        def ours() -> None:
            shutil.rmtree(place / "ours", ignore_errors=True)
            with Weights.from_folder(place / "base") as base:
                delta = read_adapter(place / "adapter")
                save_weights(place / "ours", base, lambda one: compose(base, [delta], one))

        def copy() -> None:
            shutil.copyfile(place / "base" / "model.safetensors", place / "copied")

        work: dict[str, Callable[[], None]] = {"peft": theirs, "unwrite": ours, "copy": copy}
        in_turns(work, 1)  # warm
        apart = difference(place / "ours", place / "theirs")
        seconds = in_turns(work, options.repeats)
    write(
        "adapter_merge",
        {
            "base": options.base,
            "rank": RANK,
            "largest_difference": apart,
            "seconds": seconds,
            "peft_over_unwrite": ratio(seconds["peft"], seconds["unwrite"]),
            "unwrite_over_copy": ratio(seconds["unwrite"], seconds["copy"]),
        },
    )


def make_adapter(place: Path) -> None:
    """An adapter on disk, with numbers in both factors."""
    network = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    whole = get_peft_model(network, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, one in whole.named_parameters():
            if "lora_" in name:
                one.normal_(std=1e-2)
    whole.save_pretrained(place / "adapter")


def read_adapter(folder: Path) -> Delta:
    """The delta that an adapter in peft's form stands for."""
    tensors = load_file(folder / "adapter_model.safetensors")
    changes = {}
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            file = name.removeprefix("base_model.model.").replace(".lora_A", "")
            changes[file] = LowRank(b, a, scale=2.0)
    return Delta.from_changes(changes)


if __name__ == "__main__":
    main()

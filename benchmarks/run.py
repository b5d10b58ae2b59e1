"""The whole suite of speed measurements, or some of it: one JSON result each, then the tables.

    python -m benchmarks.run --list
    python -m benchmarks.run training undo --data ../shared/data
    python -m benchmarks.run --data ../shared/data

Run on an otherwise idle machine. Each measurement is a process of its own. One that fails is said
at the end, and the others go on. Without ``--data``, those that need the published files are left
out; that is said, too. What a measurement does and compares stands at the head of its module.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

COUNTERFACT, KNOWN = "counterfact_easyedit_2000.json", "rome_knowns_1209.jsonl"


@dataclass(frozen=True)
class Measurement:
    """What is measured, the arguments of its module, and minutes on two idle cores. An argument
    that ends in ``.json`` or ``.jsonl`` and has no folder is a file of the published data."""

    what: str
    arguments: tuple[str, ...] = ()
    minutes: int = 2

    @property
    def files(self) -> list[str]:
        """Published files that it needs."""
        return [one for one in self.arguments if one in (COUNTERFACT, KNOWN)]

    def command(self, name: str, data: Path | None) -> list[str]:
        """What to start."""
        words = [str(data / one) if data and one in self.files else one for one in self.arguments]
        return [sys.executable, "-m", f"benchmarks.{name}", *words]


ON_COUNTERFACT = ("--edits", COUNTERFACT)
SUITE = {
    "training": Measurement(
        "a training step: ours in fp32 and bf16, transformers' Trainer, the floor",
        ON_COUNTERFACT,
        4,
    ),
    "delicate_round": Measurement("a round of delicate, and LoRA twins", ON_COUNTERFACT, 8),
    "observation": Measurement(
        "asking in batches, and one by one",
        (*ON_COUNTERFACT, "--slow-sample", "12"),
        6,
    ),
    "delta_arithmetic": Measurement(
        "between, combine, compose; copying the same files",
        ("--json", "benchmarks/results/delta_arithmetic.json"),
        8,
    ),
    "selection": Measurement("the top T of two changes", (), 3),
    "undo": Measurement("undoing one of ten updates; copying what it touched", (), 6),
    "batch_of_edits": Measurement("a hundred edits at once, and one by one", ON_COUNTERFACT, 8),
    "growth": Measurement("time over edits, weights and protected prompts", (), 8),
    "products": Measurement("linear layers by oneDNN and by MKL", (), 4),
    "rome_memit": Measurement(
        "ROME, MEMIT and second moments; the published procedure",
        ("--facts", KNOWN, "--only", "speed,moments"),
        30,
    ),
    "fisher": Measurement("Fisher information at once, and one by one", (), 15),
    "measuring_examples": Measurement("upstream examples in batches, and one by one", (), 3),
    "forecast_speed": Measurement("a forecast for a new task; scikit-surprise", (), 3),
    "callback_overhead": Measurement("graceful forgetting in a Trainer, and without", (), 8),
    "startup": Measurement("import and --help", (), 1),
    "bigger_than_memory": Measurement("checkpoints of up to 30 GB", ("--largest", "30"), 15),
    "two_processes": Measurement("two processes, and one", (), 8),
    "ray_overhead": Measurement("a grid on Ray, and here (needs the extra ray)", (), 12),
    "scoring_peers": Measurement("log-likelihoods; lm-evaluation-harness", ON_COUNTERFACT, 5),
    "training_peers": Measurement("fine-tuning; TRL's SFTTrainer", ON_COUNTERFACT, 4),
    "merging_peers": Measurement("task arithmetic; mergekit", (), 4),
    "adapter_merge": Measurement("merging an adapter; peft", (), 3),
    "editing_peers": Measurement("ROME; FastEdit", ("--facts", KNOWN, "--edits", "3"), 10),
}


def main() -> None:
    """Run what is named, in the order of the suite."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--data", type=Path, help="folder with the published files")
    parser.add_argument("--list", action="store_true", help="only say what there is")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(SUITE)):
        parser.error(f"There is no measurement {', '.join(unknown)}. See --list.")
    chosen = {
        name: one for name, one in SUITE.items() if name in options.names or not options.names
    }
    if options.list:
        for name, one in chosen.items():
            needs = f"; needs {', '.join(one.files)}" if one.files else ""
            print(f"{name}: {one.what} (about {one.minutes} min{needs})")
        return
    sys.exit(measured(chosen, options.data))


def measured(chosen: dict[str, Measurement], data: Path | None) -> int:
    """Run all; the exit status is 1 if one of them failed or could not be run."""
    left_out, failed = [], []
    for number, (name, one) in enumerate(chosen.items(), start=1):
        if any(data is None or not (data / file).is_file() for file in one.files):
            left_out.append(name)
            continue
        print(f"{number} of {len(chosen)}: {name}, about {one.minutes} min", file=sys.stderr)
        if subprocess.run(one.command(name, data), stdout=subprocess.DEVNULL).returncode:
            failed.append(name)
    subprocess.run([sys.executable, "-m", "benchmarks.tables"], check=True)
    if left_out:
        print(f"Left out, for want of --data: {', '.join(left_out)}.", file=sys.stderr)
    if failed:
        print(f"Failed: {', '.join(failed)}.", file=sys.stderr)
    return 1 if failed or left_out else 0


if __name__ == "__main__":
    main()

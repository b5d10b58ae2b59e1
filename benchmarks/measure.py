"""What all benchmarks share: taking turns, medians, the machine, the JSON result."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from unwrite.files import read_jsonl, write_jsonl
from unwrite.products import Linear

RESULTS = Path(__file__).parent / "results"

Name = TypeVar("Name", str, int)


def in_turns(work: Mapping[Name, Callable[[], Any]], repeats: int) -> dict[Name, list[float]]:
    """Seconds of every piece of work, run A B C A B C ...: drift of the machine hits all alike."""
    seconds: dict[Name, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """How time grows with size: the slope of the straight line through the logarithms."""
    return statistics.linear_regression(
        [math.log(one) for one in sizes], [math.log(one) for one in seconds]
    ).slope


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Median, least and largest of the ratios slow/fast within one turn."""
    ratios = [one / other for one, other in zip(slow, fast, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


@contextlib.contextmanager
def torchs_products(network: torch.nn.Module) -> Iterator[None]:
    """Within the block the network's linear layers multiply as torch does by itself."""
    ours = [module for module in network.modules() if type(module) is Linear]
    for module in ours:
        module.__class__ = torch.nn.Linear
    try:
        yield
    finally:
        for module in ours:
            module.__class__ = Linear


def machine() -> dict[str, Any]:
    """The machine and the versions, as far as they matter for a ratio."""
    packages = ("torch", "transformers", "accelerate", "safetensors", "unwrite")
    return {
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


def peak_memory() -> float:
    """Largest resident memory of this process so far, in GB."""
    # Not getrusage: its maximum includes the parent's memory from before this program started.
    status = Path("/proc/self/status").read_text("utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def committed(name: str) -> dict[str, Any]:
    """The result of an earlier run."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    return content


def measured(name: str) -> dict[str, Any] | None:
    """The result of an earlier run, or None where there was none."""
    return committed(name) if (RESULTS / f"{name}.json").is_file() else None


def lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a result that grows run by run, so that it can be cut off anywhere."""
    return read_jsonl(path) if path.exists() else []


def add_line(path: Path, row: dict[str, Any]) -> None:
    """One more row, whole on disk when this returns, and printed: long studies show progress."""
    print(json.dumps(row), flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, [*lines(path), row])


def _bare(word: str) -> str:
    """An argument without the folders of the machine that it was run on."""
    return Path(word).name if os.sep in word else word


def write(name: str, result: Mapping[str, Any], module: str | None = None) -> None:
    """Write ``benchmarks/results/NAME.json`` and print it. ``module``: the benchmark that was run,
    where it is called otherwise than its result."""
    content = {
        "benchmark": name,
        "command": " ".join(
            ["python -m", f"benchmarks.{module or name}", *map(_bare, sys.argv[1:])]
        ),
        "machine": machine(),
        **result,
    }
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(content, indent=2) + "\n"
    (RESULTS / f"{name}.json").write_text(text, "utf-8")
    print(text)

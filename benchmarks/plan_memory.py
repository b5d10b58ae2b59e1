"""How near the plan comes to what training really holds.

    python -m benchmarks.plan_memory [--base smollm2-135m]

For every case a plan is made from the configuration alone, and a fresh process (or two, which share
the work) loads the model and trains one epoch of two steps or more; its peak of resident memory is
the kernel's (``VmHWM``). No questions are asked, so what they would take beyond the training is
left out of the plan. The error is (planned - measured) / measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import measured, peak_memory, write

ROWS = 24
SHORT = {"epochs": "1", "until": "epochs"}
CASES: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "full-ft": ("full-ft", SHORT, {}),
    "full-ft, batches of 1, accumulated": (
        "full-ft",
        SHORT | {"batch_size": "1", "accumulate": "8"},
        {},
    ),
    "full-ft, batches of 12": ("full-ft", SHORT | {"batch_size": "12"}, {}),
    "full-ft, adafactor": ("full-ft", SHORT | {"optimizer": "adafactor"}, {}),
    "full-ft, sgd": ("full-ft", SHORT | {"optimizer": "sgd"}, {}),
    "full-ft, in the backward pass": ("full-ft", SHORT | {"in_backward": "true"}, {}),
    "full-ft, sgd in the backward pass": (
        "full-ft",
        SHORT | {"optimizer": "sgd", "in_backward": "true"},
        {},
    ),
    "lora": ("lora", SHORT, {}),
    "loc-ft": ("loc-ft", SHORT, {}),
    "full-ft, two processes": ("full-ft", SHORT, {"processes": 2}),
    "full-ft, two processes, sharded": ("full-ft", SHORT, {"processes": 2, "sharded": True}),
    "lora, two processes": ("lora", SHORT, {"processes": 2}),
    "lora, two processes, sharded": ("lora", SHORT, {"processes": 2, "sharded": True}),
}


def main() -> None:
    """Run all cases and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--worker", nargs=2, metavar=("CASE", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options.base, CASES[options.worker[0]], Path(options.worker[1]))
        return
    before = measured("plan_memory") or {}
    found = dict(before["cases"]) if before.get("base") == options.base else {}
    for name, case in CASES.items():
        if options.only not in name:
            continue
        planned = plan(options.base, case)
        reached = peak(options.base, name, case[2].get("processes", 1))
        training = (planned["memory_bytes"] - planned["parts"]["asking"]) / 1e9
        found[name] = {
            "planned_gb": training,
            "measured_gb": reached,
            "error": training / reached - 1,
            "parts_gb": {part: size / 1e9 for part, size in planned["parts"].items()},
        }
        # After every case, so that a run can be continued with --only.
        largest = max((one["error"] for one in found.values()), key=abs)
        cases = {name: found[name] for name in CASES if name in found}
        write("plan_memory", {"base": options.base, "largest_error": largest, "cases": cases})


def plan(base: str, case: tuple[str, dict[str, str], dict[str, Any]]) -> dict[str, Any]:
    """The plan, made in a process of its own that sees the configuration and the tokenizer only."""
    from unwrite.pretrained import resolve

    with tempfile.TemporaryDirectory() as scratch:
        for file in resolve(base).folder.iterdir():
            if file.is_file() and not file.name.endswith(".safetensors"):
                shutil.copyfile(file, Path(scratch) / file.name)
        program = (
            "import json, sys, unwrite; from unwrite import plan;"
            "from unwrite.methods import build;"
            "from unwrite.footprint import Layout;"
            "name, settings, layout = json.loads(sys.argv[1]);"
            f"edits = unwrite.read_edits('atlas', limit={ROWS});"
            "print(json.dumps(plan.for_model(sys.argv[2], build(name, settings), edits,"
            "layout=Layout(**layout)).as_json()))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, json.dumps(case), scratch],
            check=True,
            capture_output=True,
            text=True,
        )
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def peak(base: str, name: str, count: int) -> float:
    """GB at the peak of the first process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "told.json"
        common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if count > 1:
            common |= {"WORLD_SIZE": str(count)}
        if "sharded" in name:
            common |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        command = [sys.executable, "-m", "benchmarks.plan_memory", "--base", base]
        command += ["--worker", name, str(out)]
        started = [
            subprocess.Popen(command, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(count)
        ]
        if any(process.wait() for process in started):
            raise SystemExit("a process failed")
        told: float = json.loads(out.read_text("utf-8"))
        return told


def work(base: str, case: tuple[str, dict[str, str], dict[str, Any]], out: Path) -> None:
    """Train as the case says; the first process tells its peak."""
    from unwrite import processes

    name, settings, layout = case

    def train() -> None:
        import unwrite
        from unwrite.methods import build

        model = unwrite.load(base, device="cpu")
        build(name, settings).delta(model, unwrite.read_edits("atlas", limit=ROWS))
        out.write_text(json.dumps(peak_memory()), "utf-8")

    if layout.get("processes", 1) > 1:
        processes.run(train)
    else:
        train()


if __name__ == "__main__":
    main()

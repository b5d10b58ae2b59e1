"""How much faster two processes train than one, each pinned to one core of the same machine.

    python -m benchmarks.two_processes [--base smollm2-135m --repeats 3 --batches 32,512]

Fine-tunes all weights on bundled facts for four steps, in turns: one process on the first core, and
two on the first two, which share every batch and average their gradients over gloo (DDP). A step is
made on 32 rows, and on 512 that are read 64 at a time: what a step costs whatever its rows, sending
gradients and moving the weights, is shared by more of them. ``seconds`` are those of the whole
call, ``steady`` those from the third step on: in the first two the system hands out memory, which
on a virtual machine takes as long as the arithmetic (docs/notes/processes.md). The losses of both
must agree; the goal is 1.6 times the rows a second.

The third contender is two processes on the two cores that know nothing of each other, each with
every other row and a model of its own. What they lack to twice the rows is what the cores share,
memory and cache above all. Their steps and the bare exchange of all gradients, which the pair times
by itself, are the floor of a step together.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import ratio, write

GOAL = 1.6
STEPS, STEADY = 4, 2  # steps, and after how many of them the steady state is taken to begin
AT_ONCE = 64  # rows that are read together, by all processes


def main() -> None:
    """Run both in turns and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", default="32,512", help="rows of a step, by comma")
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--at-once", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--apart", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options)
        return
    load = os.getloadavg()[0]
    found = {batch: compared(options, int(batch)) for batch in options.batches.split(",")}
    common = {
        "base": options.base,
        "steps": STEPS,
        "steady_after": STEADY,
        "load_at_start": load,
        "goal": GOAL,
    }
    write("two_processes", {**common, "batches": found})


def compared(options: argparse.Namespace, batch: int) -> dict[str, Any]:
    """One and two processes in turns, with steps on so many rows."""
    ways = {"one": (1, True), "two": (2, True), "apart": (2, False)}
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(options.repeats):
        for way, (count, together) in ways.items():
            runs[way].append(trained(count, options.base, batch, together))
            print(f"{batch} rows, {way}: {runs[way][-1]['seconds']:.1f} s", file=sys.stderr)
    pairs = zip(runs["one"][0]["losses"], runs["two"][0]["losses"], strict=True)
    seconds = {way: [run["seconds"] for run in done] for way, done in runs.items()}
    steady = {way: [run["steady"] for run in done] for way, done in runs.items()}
    exchange = [run["exchange"] for run in runs["two"]]
    floor = [
        alone + (STEPS - STEADY) * sending
        for alone, sending in zip(steady["apart"], exchange, strict=True)
    ]
    return {
        "seconds": seconds,
        "times_faster": ratio(seconds["one"], seconds["two"]),
        "times_faster_apart": ratio(seconds["one"], seconds["apart"]),
        "steady": steady,
        "steady_times_faster": ratio(steady["one"], steady["two"]),
        "steady_times_faster_apart": ratio(steady["one"], steady["apart"]),
        "exchange": exchange,
        "steady_times_faster_at_most": ratio(steady["one"], floor),
        "largest_relative_difference_of_losses": max(abs(a - b) / a for a, b in pairs),
    }


def trained(count: int, base: str, batch: int, together: bool) -> dict[str, Any]:
    """One run in so many processes; what the slowest of them tells."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as scratch:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        common = os.environ | {
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(count),
        }
        rows = batch if together else batch // count
        command = [sys.executable, "-m", "benchmarks.two_processes", "--base", base]
        command += ["--batch", str(rows), "--at-once", str(AT_ONCE * rows // batch)]
        if not together:
            command += ["--apart"]
        outs = [Path(scratch) / str(rank) for rank in range(count)]
        started = [
            subprocess.Popen(
                [*command, "--worker", str(out)],
                env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank, out in enumerate(outs)
        ]
        if any(process.wait() for process in started):
            raise SystemExit("a process failed")
        told = [json.loads(out.read_text("utf-8")) for out in outs]
        slowest: dict[str, Any] = max(told, key=lambda one: one["seconds"])
        return slowest


def work(options: argparse.Namespace) -> None:
    """What one process does: train with the others, or alone on every other row."""
    import torch

    import unwrite
    from unwrite.training import Recipe, fine_tune, new_pairs

    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    together = count > 1 and not options.apart
    if together:
        torch.distributed.init_process_group("gloo")
    model = unwrite.load(options.base, device="cpu")
    facts = new_pairs(unwrite.read_edits("atlas"))
    share = count if options.apart else 1
    pairs = [facts[number % len(facts)] for number in range(STEPS * options.batch * share)]
    pairs = pairs[rank::count] if options.apart else pairs
    size = min(options.batch, options.at_once)
    recipe = Recipe(
        epochs=1, until="epochs", batch_size=size, accumulate=options.batch // size, lr=1e-5
    )
    fine_tune(model, pairs[:size], recipe)  # warm
    ends: list[float] = []
    done = fine_tune(
        model, pairs, recipe, after_step=lambda _weights, _step: ends.append(time.perf_counter())
    )
    out = {
        "seconds": done.seconds,
        "steady": ends[-1] - ends[STEADY - 1],
        "exchange": exchanged(model) if together else 0.0,
        "losses": done.losses,
    }
    options.worker.write_text(json.dumps(out), "utf-8")
    if together:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def exchanged(model: Any) -> float:
    """Seconds to sum tensors of the sizes of all gradients over the processes; the median of five,
    after one that counts for nothing."""
    import torch

    gradients = [torch.ones_like(one) for one in model.parameters.values()]
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        sent = [torch.distributed.all_reduce(one, async_op=True) for one in gradients]
        for one in sent:
            one.wait()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()

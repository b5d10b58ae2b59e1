"""The tables of docs/scale.md from the committed results; put there by ``benchmarks.tables``."""

from __future__ import annotations

from typing import Any

from benchmarks.measure import measured


def blocks() -> dict[str, list[str]]:
    """Lines by block; a result that was not measured leaves a sentence that says so."""
    makers = {
        "checked": ("plan_memory", checked),
        "streaming": ("bigger_than_memory", streaming),
        "paper": ("scale_plan", paper),
        "pair": ("two_processes", pair),
        "ray": ("ray_overhead", ray),
    }
    return {
        block: missing(name) if (result := measured(name)) is None else make(result)
        for block, (name, make) in makers.items()
    }


def missing(name: str) -> list[str]:
    """What stands where there is no result."""
    return [f"Not measured yet: `python -m benchmarks.{name}`."]


def checked(result: dict[str, Any]) -> list[str]:
    """Planned against measured memory."""
    lines = ["| what | planned | measured | error |", "| --- | --- | --- | --- |"]
    for name, one in result["cases"].items():
        lines.append(
            f"| {name} | {one['planned_gb']:.2f} GB | {one['measured_gb']:.2f} GB | "
            f"{100 * one['error']:+.0f} % |"
        )
    return lines


def streaming(result: dict[str, Any]) -> list[str]:
    """Peak and time by size, and the exponents."""
    lines = [
        "| checkpoint, bf16 | select, save | export | undo, fingerprint | peak memory |",
        "| --- | --- | --- | --- | --- |",
    ]
    for run in result["runs"]:
        seconds = [f"{run['seconds'][stage]:.1f} s" for stage in ("select", "export", "undo")]
        lines.append(
            f"| {run['gb']:.2f} GB | {' | '.join(seconds)} | {run['peak_gb']['undo']:.2f} GB |"
        )
    exponents = ", ".join(f"{name} {value:.2f}" for name, value in result["exponents"].items())
    return [*lines, "", f"Growth with size, fitted exponent (goal 0.95 to 1.05): {exponents}."]


def paper(result: dict[str, Any]) -> list[str]:
    """Plans for large models."""
    lines = [
        "| model | method | layout | training | device | fits 80 GB | host, a machine | "
        "disk and scratch | traffic |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in result["rows"]:
        disk = one["disk_bytes"] + one["scratch_bytes"]
        training = one["device_bytes"] - one["parts"]["asking"]
        lines.append(
            f"| {one['model']} | {one['method']} | {one['layout']} | {size(training)} | "
            f"{size(one['device_bytes'])} | {'yes' if one['fits'] else 'no'} | "
            f"{size(one['host_bytes'])} | {size(disk)} | {size(one['traffic_bytes'])} |"
        )
    return lines


def pair(result: dict[str, Any]) -> list[str]:
    """Two processes against one, and against two that know nothing of each other."""
    lines = [
        "| rows of a step | from the third step on | at most | two apart | whole call | losses |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for batch, one in result["batches"].items():
        shown = [
            f"{ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f})"
            for ratio in (
                one["steady_times_faster"],
                one["steady_times_faster_at_most"],
                one["steady_times_faster_apart"],
                one["times_faster"],
            )
        ]
        lines.append(
            f"| {batch} | {' | '.join(shown)} | "
            f"differ by {one['largest_relative_difference_of_losses']:.0e} of themselves |"
        )
    how = (
        f"{result['base']}, {result['steps']} steps; how many times faster than one; "
        "each process pinned to one core. *At most*: steps of two apart and the bare exchange of "
        "all gradients."
    )
    return [*lines, "", f"{how} The goal is {result['goal']}x."]


def ray(result: dict[str, Any]) -> list[str]:
    """What Ray costs."""
    local, there = result["local"], result["ray"]
    return [
        f"{result['cells']} cells of {local['cell']:.0f} s each, the local executor on one core "
        f"and a Ray cluster of one worker on the other at the same time: with Ray the cells took "
        f"{100 * result['overhead']:.1f} % longer (median cell "
        f"{100 * result['overhead_of_the_median_cell']:+.1f} %; goal below "
        f"{100 * result['goal']:.0f} %), and the first one was there "
        f"{there['first'] - local['first']:.0f} s later, which is the start of the "
        "worker (that of the cluster came before). Scores "
        f"{'are the same' if result['same_scores'] else 'differ'}.",
    ]


def size(count: float) -> str:
    """Bytes for a table."""
    return f"{count / 1e9:.1f} GB"

"""The defaults of the fine-tuning methods: grids on development splits, token form.

    python -m benchmarks.method_defaults --data ../shared/data [--only lora]

Three kinds of development facts, drawn by seed: known facts of the atlas (even places), and planted
CounterFact (records 0-499) and zsRE (0-199), where SmolLM2-135M is first fine-tuned on the old
answers for three epochs. Every setting runs on the same facts; finished runs are kept beside the
result and not repeated. Nothing here touches a test split.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.full_ft_defaults import forced, sample
from benchmarks.measure import RESULTS, add_line, lines, write
from benchmarks.planted_study import DATA, ROLES
from unwrite import Edit, load, methods, read_edits
from unwrite.delta import Delta
from unwrite.methods.full_ft import FullFT
from unwrite.methods.probes import run
from unwrite.model import Model
from unwrite.observe import neutral_text, observe, perplexity, questions, settle
from unwrite.scores import score
from unwrite.training import Pair

PLANTING = FullFT(epochs=3, until="epochs", lr=1e-4)
RUNS = RESULTS / "method_defaults.jsonl"
YARDSTICK = ("full-ft", {"lr": "3e-5"})

GRIDS: dict[str, list[dict[str, str]]] = {
    "full-ft": [{"lr": lr} for lr in ("3e-5", "1e-4")],
    "lora": [
        {"lr": lr, "targets": targets}
        for targets in ("q,v", "q,k,v,o,gate,up,down")
        for lr in ("2e-4", "5e-4", "1e-3")
    ],
    "ft-c": [
        {"lr": "1e-3", "radius": radius, "layer": layer}
        for layer, radius in (("0.3", "5e-3"), ("0.3", "2e-2"), ("0.7", "2e-2"))
    ]
    + [{"lr": "1e-4", "radius": radius, "layer": "all"} for radius in ("2e-4", "5e-4")],
    "f-learning": [
        {"strength": strength, "forget.lr": "1e-4", "learn.lr": "1e-4"}
        for strength in ("0.1", "0.3", "1.0")
    ]
    + [
        {"strength": strength, "forget.lr": "3e-5", "learn.lr": "3e-5"}
        for strength in ("0.3", "1.0", "3.0")
    ]
    + [
        {"forget": "lora", "strength": "0.3", "learn.lr": "1e-4"},
    ],
    "delicate": [
        {"top": top, "tuner.epochs": epochs, "tuner.lr": lr, "tuner.until": "epochs"}
        for top, epochs, lr in (
            ("1.0", "2", "1e-4"),
            ("1.0", "2", "5e-5"),
            ("0.5", "2", "1e-4"),
            ("0.2", "2", "2e-4"),
        )
    ]
    + [
        {"tuner": "lora", "tuner.lr": "1e-3", "tuner.epochs": "3", "tuner.until": "epochs"}
        | {"tuner.targets": "q,k,v,o,gate,up,down"},
        # Probes that learn all of it, in every round.
        {"tuner": "lora"},
        {"tuner": "full-ft"},
    ],
}


def main() -> None:
    """Run what is missing, in an order that covers all methods early; write the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data slices")
    parser.add_argument("--only", default=",".join(GRIDS), help="methods, by comma")
    parser.add_argument("--kinds", default="atlas,counterfact,zsre")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--facts", type=int, default=24)
    parser.add_argument("--summary", action="store_true", help="only write the summary")
    options = parser.parse_args()
    if not options.summary:
        run_missing(options)
    summarise()


def run_missing(options: argparse.Namespace) -> None:
    """One line in ``RUNS`` for every run that is not there yet."""
    model = load("smollm2-135m")
    for seed in range(options.seeds):
        for kind in options.kinds.split(","):
            wanted = [
                (name, settings)
                for name in options.only.split(",")
                for settings in GRIDS[name]
                if (kind, seed, name, settings) not in finished()
            ]
            if wanted:
                run_setting(model, kind, seed, options, wanted)


def run_setting(
    model: Model,
    kind: str,
    seed: int,
    options: argparse.Namespace,
    wanted: Sequence[tuple[str, dict[str, str]]],
) -> None:
    """All wanted methods on one sample of facts."""
    facts = development(model, kind, options.data, seed, options.facts)
    chosen = [
        methods.replaced(methods.build(name, settings), "seed", seed)[0]
        for name, settings in wanted
    ]
    found = scored(model, facts, chosen, planted=kind != "atlas")
    for (name, settings), one in zip(wanted, found, strict=True):
        key = {"kind": kind, "seed": seed, "facts": len(facts), "method": name}
        add_line(RUNS, key | {"settings": settings} | one | {"seconds": round(one["seconds"], 1)})


def scored(
    model: Model,
    facts: Sequence[Edit],
    chosen: Sequence[Any],
    *,
    planted: bool,
    exact: bool = False,
    also: Callable[[], dict[str, Any]] = dict,
) -> Iterator[dict[str, Any]]:
    """What each method does to the facts, in token form and with ``exact`` in the exact form too;
    ``planted``: their old answers are taught first. ``also`` is asked for more fields while the
    model is changed."""
    asked = observe if exact else forced
    start = Delta.nothing()
    if planted:
        old = [Pair(edit.prompt, str(edit.old)) for edit in facts]
        start = run(PLANTING, model, old).delta.in_memory()
    text = neutral_text(600)
    with model.shifted(start):
        probes = [one for one in settle(model, questions(facts)) if one.role in ROLES]
        before, read = asked(model, probes), perplexity(model, text)
        for method in chosen:
            started = time.perf_counter()
            delta = method.delta(model, facts)
            seconds = time.perf_counter() - started
            with model.shifted(delta):
                scores = score(before, asked(model, probes))
                ratio = perplexity(model, text) / read
                more = also()
            yield {
                "token": {role: scores[role].token for role in ROLES},
                **({"exact": {role: scores[role].exact for role in ROLES}} if exact else {}),
                "n": {role: scores[role].n for role in ROLES},
                "perplexity_ratio": ratio,
                "seconds": seconds,
                "notes": delta.provenance.get("notes", {}).get("sentences", []),
                **more,
            }


def development(model: Model, kind: str, data: Path, seed: int, count: int) -> list[Edit]:
    """Facts of one kind, drawn by seed from its development split."""
    if kind == "atlas":
        known = list(read_edits("atlas", known_to=model))
        return sample(known[0::2], count, seed)
    file, limit = DATA[kind]
    return sample(read_edits(data / file, limit=limit), count, seed)


def finished() -> list[tuple[str, int, str, dict[str, str]]]:
    """What is in ``RUNS``."""
    return [(run["kind"], run["seed"], run["method"], run["settings"]) for run in lines(RUNS)]


def summarise() -> None:
    """Per method and setting: means over kinds and seeds, and how far the harmonic mean is from
    that of ``YARDSTICK`` on the same facts, best first: not every setting was run on all facts."""
    table: dict[str, list[dict[str, Any]]] = {}
    plain = {
        (one["kind"], one["seed"]): one
        for one in lines(RUNS)
        if (one["method"], one["settings"]) == YARDSTICK
    }
    for name in GRIDS:
        for settings in GRIDS[name]:
            chosen = (name, settings)
            runs = [one for one in lines(RUNS) if (one["method"], one["settings"]) == chosen]
            if not runs:
                continue
            beside = [plain[one["kind"], one["seed"]] for one in runs]
            gaps = [
                harmonic(one["token"]) - harmonic(other["token"])
                for one, other in zip(runs, beside, strict=True)
            ]
            means = {role: statistics.mean(one["token"][role] for one in runs) for role in ROLES}
            table.setdefault(name, []).append(
                {
                    "settings": settings,
                    "runs": len(runs),
                    "harmonic_mean": statistics.mean(harmonic(one["token"]) for one in runs),
                    "minus_full_ft": statistics.mean(gaps),
                    "lowest": min(gaps),
                    "highest": max(gaps),
                    **means,
                    "perplexity_ratio": statistics.mean(one["perplexity_ratio"] for one in runs),
                    "times_full_ft": statistics.mean(one["seconds"] for one in runs)
                    / statistics.mean(other["seconds"] for other in beside),
                }
            )
        table.get(name, []).sort(key=lambda one: -one["minus_full_ft"])
    write("method_defaults", {"development": table})


def harmonic(token: dict[str, float]) -> float:
    """Harmonic mean of the three scores that pull against each other; 0 if one is 0."""
    values = [token[role] for role in ("reliability", "generality", "locality")]
    return statistics.harmonic_mean(values) if all(values) else 0.0


if __name__ == "__main__":
    main()

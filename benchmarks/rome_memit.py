"""ROME and MEMIT on facts that SmolLM2-135M knows: speed against the published procedure, effect.

    python -m benchmarks.rome_memit --facts FILE [--only speed,effect,moments,defaults]

FILE is ROME's "known facts" (JSONL: subject, attribute, prompt, relation_id). Each is edited towards
the attribute of another fact of its relation. Facts that the model answers right now, in the bare
prompt, are used: those at even places are the development split, on which the defaults were chosen
(``defaults``), those at odd places the test split, on which everything else is measured. The
bystanders of an edit are known facts of its relation from the other split, so none is edited.

``speed``: our procedures against the straightforward one, which follows the papers step by step: one
fact at a time, every prompt in full through all layers in each step, logits of all positions, the
same optimiser, contexts, steps, stopping rule and closed form. Both start with the second moments
in memory. Facts are a sample, since the slow way takes minutes a fact.
``moments``: one pass for five layers against one plain forward pass over the same texts.
``effect``: reliability and locality on the test split, beside those of full fine-tuning.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import committed, in_turns, ratio, write
from unwrite import load
from unwrite.activations import layer_of, oriented, weight_name
from unwrite.delta import Delta
from unwrite.edits import Edit, Probe
from unwrite.errors import BadEdits, TrainingFailed
from unwrite.methods.alpha_edit import AlphaEdit
from unwrite.methods.full_ft import FullFT
from unwrite.methods.loc_ft import LocFT
from unwrite.methods.memit import MEMIT
from unwrite.methods.rome import ROME
from unwrite.model import Model, length_batches
from unwrite.moments import Statistics, add_up, second_moments, written_by
from unwrite.observe import observe, questions, settle
from unwrite.scores import as_json, score
from unwrite.training import neutral_contexts
from unwrite.values import Search

BYSTANDERS = 3
SHOWN = ("reliability", "locality")


def main() -> None:
    """Run the parts asked for and write one result; parts not run keep their last one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--facts", type=Path, required=True, help="ROME's known facts, JSONL")
    parser.add_argument("--only", default="speed,moments,effect")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memit-facts", type=int, default=100, help="of one batch, timed")
    parser.add_argument("--slow-facts", type=int, default=5, help="a turn, for the slow way")
    parser.add_argument("--rome-facts", type=int, default=3, help="a turn, for both ways")
    parser.add_argument("--test-facts", type=int, default=100)
    parser.add_argument("--development-facts", type=int, default=24)
    parser.add_argument("--corpus-tokens", type=int, default=100_000)
    options = parser.parse_args()

    model = load("smollm2-135m")
    development, test = known_facts(model, options.facts)
    parts: dict[str, Callable[[], Any]] = {
        "speed": lambda: speed(model, test, options),
        "moments": lambda: moments(model, options),
        "effect": lambda: effect(model, test[: options.test_facts]),
        "defaults": lambda: defaults(model, development[: options.development_facts]),
    }
    try:
        result = {name: committed("rome_memit").get(name) for name in parts}
    except FileNotFoundError:
        result = dict.fromkeys(parts)
    for name in options.only.split(","):
        result[name] = parts[name]()
    known = {"development": len(development), "test": len(test)}
    write("rome_memit", {"known": known, **{k: v for k, v in result.items() if v is not None}})


# ---- the facts -----------------------------------------------------------------------------------


def known_facts(model: Model, path: Path) -> tuple[list[Edit], list[Edit]]:
    """The facts the model knows as edits with bystanders: development and test split."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    unique = list({row["prompt"]: row for row in rows}.values())
    attributes: dict[str, list[str]] = defaultdict(list)
    for row in unique:
        if row["attribute"] not in attributes[row["relation_id"]]:
            attributes[row["relation_id"]].append(row["attribute"])
    edits = [
        Edit(
            row["prompt"],
            others[(others.index(row["attribute"]) + 1) % len(others)],
            old=row["attribute"],
            subject=row["subject"],
            id=str(row["known_id"]),
            relation=row["relation_id"],
        )
        for row in unique
        if len(others := attributes[row["relation_id"]]) > 1
    ]
    known = [edit for edit, knows in zip(edits, model.knows(edits), strict=True) if knows]
    halves = known[0::2], known[1::2]
    split = []
    for mine, theirs in (halves, halves[::-1]):
        by_relation: dict[str | None, list[Edit]] = defaultdict(list)
        for edit in theirs:
            by_relation[edit.relation].append(edit)
        chosen = []
        for edit in mine:
            others = by_relation[edit.relation]
            near = random.Random(edit.prompt).sample(others, min(BYSTANDERS, len(others)))
            probes = [Probe(one.prompt, one.old) for one in near]
            chosen.append(
                Edit(
                    edit.prompt, edit.new, edit.old, edit.subject, (), probes, (), edit.id,
                    relation=edit.relation,
                )
            )
        # Facts of one relation lie together in the file; a sample has to have all of them.
        random.Random(0).shuffle(chosen)
        split.append(chosen)
    return split[0], split[1]


# ---- effect --------------------------------------------------------------------------------------


def effect(model: Model, edits: Sequence[Edit]) -> dict[str, Any]:
    """Scores on the test split: ROME one edit at a time and reset, the others in one batch."""
    batch = {
        "memit": MEMIT(),
        "alpha-edit": AlphaEdit(),
        "loc-ft": LocFT(),
        "full-ft": FullFT(),
    }
    found: dict[str, Any] = {"rome, singly and reset": singly(model, edits, ROME())}
    for name, method in batch.items():
        found[f"{name}, {len(edits)} at once"] = at_once(model, edits, method)
    found["full-ft, singly and reset"] = singly(model, edits[:20], FullFT())
    return found


def at_once(model: Model, edits: Sequence[Edit], method: Any) -> dict[str, Any]:
    """Scores of all edits with one delta."""
    probes = settle(model, questions(edits))
    before = observe(model, probes)
    started = time.perf_counter()
    delta = method.delta(model, edits)
    seconds = time.perf_counter() - started
    with model.shifted(delta):
        after = observe(model, probes)
    return summary(before, after) | {
        "seconds": round(seconds, 1),
        "notes": delta.provenance.get("notes", {}).get("sentences", []),
    }


def singly(model: Model, edits: Sequence[Edit], method: Any) -> dict[str, Any]:
    """Every edit by itself on the unchanged model; a refused edit counts as not made."""
    before, after, refused = [], [], 0
    seconds = 0.0
    for edit in edits:
        probes = settle(model, questions([edit]))
        rows = observe(model, probes)
        started = time.perf_counter()
        try:
            delta = method.delta(model, [edit])
        except (TrainingFailed, BadEdits):
            delta, refused = Delta.nothing(), refused + 1
        seconds += time.perf_counter() - started
        before += rows
        with model.shifted(delta):
            after += observe(model, probes)
    return summary(before, after) | {"seconds": round(seconds, 1), "refused": refused}


def summary(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, Any]:
    """Token and exact form of what is shown, and the number of probes."""
    scores = as_json(score(before, after))
    return {
        name: {form: scores[name][form] for form in ("token", "exact", "n")} for name in SHOWN
    }

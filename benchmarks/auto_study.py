"""What ``auto`` and each of its ingredients are worth: development split to choose, test to report.

    python -m benchmarks.auto_study --data ../shared/data [--split test --facts 100 --seeds 3]

SmolLM2-135M, or with ``--base gemma-3-270m`` the model of another architecture
(``benchmarks.second_model``). Kinds of facts: CounterFact and zsRE records whose old answers are
planted first (three epochs of fine-tuning), CounterFact records that the model truly knows, and
known facts of the atlas; drawn by seed from the development split (CounterFact 0-499, zsRE 0-199,
even places of the atlas) or from the test split (the rest). Token form; with ``--exact`` what the
model says by itself is scored as well. Finished runs are kept beside the result and not repeated;
``--summary`` only writes the result.

``spill``: share of other questions about the edits' subjects (the prompts of other edits with the
subject put in, whose answers are none of these) that are answered with the new answer: what a
method that writes too broadly would do, and no record asks for.

``protected_probes`` counts the probes that scores are taken on and that happen to be among the
prompts that ``auto`` makes up to protect: it should be next to nothing.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import second_model
from benchmarks.auto_ingredients import INGREDIENTS
from benchmarks.full_ft_defaults import sample
from benchmarks.measure import RESULTS, add_line, lines, write
from benchmarks.method_defaults import harmonic, scored
from benchmarks.planted_study import DATA, ROLES
from unwrite import Edit, load, methods, read_edits
from unwrite.methods.auto import Auto
from unwrite.model import Model, readable
from unwrite.neighbours import neighbours
from unwrite.observe import questions

RUNS = RESULTS / "auto_study.jsonl"
FILES = DATA | {"known-counterfact": DATA["counterfact"]}
VARIANTS: dict[str, dict[str, str]] = {
    "full-ft": {"method": "full-ft"},
    "memit": {"method": "memit"},
    "auto": {"method": "auto"},
    "auto, balanced": {"method": "auto", "budget": "balanced"},
    "auto, thorough": {"method": "auto", "budget": "thorough"},
    "auto, balanced, not refined": {"method": "auto", "budget": "balanced", "refine": "0"},
    "auto, 21 rewordings, not refined": {
        "method": "auto",
        "budget": "balanced",
        "rewordings": "21",
        "refine": "0",
    },
    "auto, thorough, not refined": {"method": "auto", "budget": "thorough", "refine": "0"},
    "auto, firmly": {"method": "auto", "stop": "0.1"},
    "auto, thorough, firmly": {
        "method": "auto",
        "budget": "thorough",
        "stop": "0.1",
        "refine": "0",
    },
    "auto without rewordings": {"method": "auto", "rewordings": "0"},
    "auto, all trained": {"method": "auto", "train": "always", "epochs": "3"},
    "auto without training": {"method": "auto", "epochs": "0"},
    "auto without writing": {"method": "auto", "write": "false"},
    "auto without neighbours": {"method": "auto", "neighbours": "0"},
    "auto, own prompts too": {"method": "auto", "own_prompts": "200"},
    "auto, the least that suffices": {"method": "auto", "least": "true"},
    "full-ft, only what is wrong": {"method": "full-ft", "skip_right": "true"},
    "full-ft behind sentences": {"method": "full-ft", "contexts": "8"},
    "full-ft, protected": {
        "method": "full-ft",
        "neighbours": "2",
        "own_prompts": "200",
        "protect_weight": "10",
    },
    "loc-ft": {"method": "loc-ft"},
    "f-learning": {"method": "f-learning"},
    "delicate": {"method": "delicate"},
}
NAMES = (*VARIANTS, *INGREDIENTS)
REPORTED = ("full-ft", "memit", "auto", "auto, balanced", "auto, thorough")
PLANTED = ("counterfact", "zsre")  # kinds whose old answers are taught first
BASES = ("smollm2-135m", second_model.NAME)
DRAWING = ("base", "split", "kind", "facts")  # what stands in one table
OTHERS_ASKED = 3  # questions of other edits that every subject is asked


def main() -> None:
    """Run what is missing and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data slices")
    parser.add_argument("--base", choices=BASES, default=BASES[0])
    parser.add_argument("--split", choices=("development", "test"), default="development")
    parser.add_argument("--kinds", default="counterfact,zsre", help=f"of atlas, {', '.join(FILES)}")
    parser.add_argument("--only", help="variants, by semicolon; those of the split by default")
    parser.add_argument("--facts", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--exact", action="store_true", help="score the exact form as well")
    parser.add_argument("--summary", action="store_true", help="only write the summary")
    options = parser.parse_args()
    if not options.summary:
        model = load(second_model.fetched() if options.base == second_model.NAME else options.base)
        for seed in range(options.seeds):
            for kind in options.kinds.split(","):
                run_missing(model, kind, seed, options)
    write("auto_study", {"tables": summary(lines(RUNS))})


def run_missing(model: Model, kind: str, seed: int, options: argparse.Namespace) -> None:
    """All variants that are not there yet, on one draw of facts."""
    chosen = REPORTED if options.split == "test" else NAMES
    wanted = tuple(options.only.split(";")) if options.only else chosen
    edits = drawn(model, kind, options, seed)  # fewer than asked for where there are no more
    drawing = {"split": options.split, "kind": kind, "facts": len(edits), "seed": seed}
    key = {"base": options.base} | drawing
    there = {one["variant"] for one in lines(RUNS) if key.items() <= one.items()}
    missing = [name for name in wanted if name not in there]
    if not missing:
        return
    chosen_methods = [built(name, seed) for name in missing]
    others = other_questions(edits)
    found = scored(
        model,
        edits,
        chosen_methods,
        planted=kind in PLANTED,
        exact=options.exact,
        also=lambda: {"spill": spill(model, others)},
    )
    asked = [one.prompt for one in questions(edits) if one.role in ROLES]
    for name, method, one in zip(missing, chosen_methods, found, strict=True):
        told = {"variant": name, "protected_probes": overlap(method, edits, asked)}
        add_line(RUNS, key | told | one)


def built(name: str, seed: int) -> Any:
    """The method of a variant."""
    if name in INGREDIENTS:
        return methods.replaced(INGREDIENTS[name], "seed", seed)[0]
    settings = dict(VARIANTS[name])
    return methods.replaced(methods.build(settings.pop("method"), settings), "seed", seed)[0]


def drawn(model: Model, kind: str, options: argparse.Namespace, seed: int) -> list[Edit]:
    """Facts of one kind, drawn by seed from one split."""
    test = options.split == "test"
    if kind == "atlas":
        known = [one for one in read_edits("atlas", known_to=model) if _stands_once(one)]
        return sample(known[1::2] if test else known[0::2], options.facts, seed)
    file, first = FILES[kind]
    knows = {"known_to": model} if kind == "known-counterfact" else {}
    where = {"offset": first} if test else {"limit": first}
    return sample(read_edits(options.data / file, **where, **knows), options.facts, seed)


def _stands_once(edit: Edit) -> bool:
    """``memit`` refuses a batch with an edit whose subject stands twice; it is in the table."""
    return edit.subject is not None and edit.prompt.count(edit.subject) == 1


def overlap(method: Any, edits: Sequence[Edit], probes: Sequence[str]) -> int:
    """How many prompts that are scored are among the neighbours that the method makes up."""
    if not isinstance(method, Auto):
        return 0
    asked = [(edit.prompt, edit.subject) for edit in edits]
    kept = {one for part in method.parts for one in neighbours(asked, part.neighbours, part.seed)}
    return len(kept & set(probes))


def other_questions(edits: Sequence[Edit]) -> list[tuple[str, str]]:
    """Of every edit with a subject, up to ``OTHERS_ASKED`` prompts of other edits with its subject
    put in, each with its new answer. Edits that share an answer are not taken: they may ask for the
    same."""
    found = []
    for position, edit in enumerate(edits):
        others = [
            other.prompt.replace(other.subject, edit.subject)
            for other in sample(edits, len(edits), position)
            if edit.subject
            and other.subject
            and _stands_once(other)
            and not {edit.new, edit.old} & {other.new, other.old}
        ]
        found += [(prompt, edit.new) for prompt in others[:OTHERS_ASKED]]
    return found


def spill(model: Model, asked: Sequence[tuple[str, str]]) -> float:
    """Share of the prompts that are answered with the given answer, of all its tokens."""
    forced = model.force(readable(model, asked))
    return statistics.mean(one.matched == len(one.targets) for one in forced)


def summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per model, split, kind and number of facts: a row a variant, with the spread over seeds and
    what it is beside ``auto`` on the same draws; last those that are no longer run."""
    tables = []
    names = dict.fromkeys((*NAMES, *(one["variant"] for one in runs)))
    for drawing in dict.fromkeys(tuple(one[name] for name in DRAWING) for one in runs):
        here = [one for one in runs if tuple(one[name] for name in DRAWING) == drawing]
        auto = [one for one in here if one["variant"] == "auto"]
        rows = [
            row(name, of_it) | {"beside_auto": beside(of_it, auto)}
            for name in names
            if (of_it := [one for one in here if one["variant"] == name])
        ]
        tables.append(dict(zip(DRAWING, drawing, strict=True)) | {"rows": rows})
    return tables


def beside(
    runs: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]
) -> dict[str, float] | None:
    """Mean, least and greatest difference of the harmonic mean to others on the same draws; None
    where they share none. Draws differ more than methods do, so a difference says more than two
    means."""
    theirs = {one["seed"]: harmonic(one["token"]) for one in others}
    found = [harmonic(one["token"]) - theirs[one["seed"]] for one in runs if one["seed"] in theirs]
    if not found:
        return None
    return {"mean": statistics.mean(found), "lowest": min(found), "highest": max(found)}


def row(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and the least and greatest harmonic mean."""
    means = [harmonic(one["token"]) for one in runs]
    spilt = [one["spill"] for one in runs if "spill" in one]
    exact = [one["exact"] for one in runs if "exact" in one]
    return {
        "variant": name,
        "seeds": len(runs),
        **{role: statistics.mean(one["token"][role] for one in runs) for role in ROLES},
        "exact": {role: statistics.mean(one[role] for one in exact) for role in ROLES}
        if exact
        else None,
        "exact_seeds": len(exact),
        "harmonic_mean": statistics.mean(means),
        "lowest": min(means),
        "highest": max(means),
        "perplexity_ratio": statistics.mean(one["perplexity_ratio"] for one in runs),
        "spill": statistics.mean(spilt) if spilt else None,
        "protected_probes": sum(one["protected_probes"] for one in runs),
    }


if __name__ == "__main__":
    main()

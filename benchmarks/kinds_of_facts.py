"""Which kinds of facts are updated, and which are lost, most easily?

    python -m benchmarks.kinds_of_facts --work FOLDER [--base MODEL] [--seeds 1]

Known facts of the atlas, 21 relations: those at odd places (the test split) are updated at once,
in the papers' regime of three epochs. By relation: how many new answers are given, also to
paraphrases, how many old ones are left, and how many facts of the relation that nobody touched are
still answered as before. The same for facts that the model held more and less firmly (probability
of the old answer's tokens, above and below the median). Token form. Finished cells are kept in
``--work``; ``--summary`` only writes the result.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks import planted_study
from benchmarks.measure import write
from benchmarks.planted_study import rows_of
from unwrite import compare, load
from unwrite.edits import Edit, read_edits
from unwrite.files import read_json, read_jsonl
from unwrite.scores import token_share

CHOSEN = ("full-ft", "f-learning, full-full", "delicate, full-ft")
METHODS = {label: planted_study.METHODS["three epochs"][label] for label in CHOSEN}
EDITED = ("reliability", "generality", "old_recall")
Row = Mapping[str, Any]


def main() -> None:
    """Run what is missing and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the run, kept")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--edits", default="atlas", help="where the facts are from")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--summary", action="store_true", help="only write the result")
    options = parser.parse_args()
    folder = options.work / "atlas"
    if not options.summary:
        run(options, folder)
    write("kinds_of_facts", result(folder, read_edits(options.edits)))


def run(options: argparse.Namespace, folder: Path) -> None:
    """All methods on all facts; the facts are chosen once."""
    chosen = next((folder / "starts").glob("*/edits.jsonl"), None)
    if chosen is not None:
        facts = list(read_edits(chosen))
    else:
        facts = list(read_edits(options.edits, known_to=load(options.base)))[1::2]
    compare(
        options.base,
        {"known facts": facts},
        METHODS,
        folder,
        seeds=range(options.seeds),
        references=("no-change",),
        exact=False,
    )


def result(folder: Path, everything: Sequence[Edit]) -> dict[str, Any]:
    """By method: shares by relation and by how firmly the facts were held."""
    relation_of = {
        prompt: str(edit.relation)
        for edit in everything
        for prompt in (edit.prompt, *edit.paraphrases)
    }
    relations = {str(edit.id): str(edit.relation) for edit in everything}
    found = {}
    for label in METHODS:
        cells = [folder / "cells" / row["id"] for row in rows_of(folder, [label])]
        sides = [
            [read_jsonl(cell / name) for name in ("before.jsonl", "after.jsonl")] for cell in cells
        ]
        if sides:
            firm = firmness(sides[0][0])
            found[label] = {
                "relations": shares(sides, relations, relation_of),
                "firmness": shares(sides, firm, {}),
            }
    facts = {row["edits"]: row["records"] for row in rows_of(folder, list(METHODS))}
    base = read_json(folder / "plan.json")["base"]["name"]
    return {"base": Path(base).name, "facts": sum(facts.values()), "methods": found}


def firmness(before: Iterable[Row]) -> dict[str, str]:
    """Whether each edit's old answer was more or less probable, a token, than the median's."""
    held = {
        str(row["edit"]): math.exp(row["logprob"] / row["target_tokens"])
        for row in before
        if row["role"] == "old_recall"
    }
    middle = median(held.values())
    return {edit: "firm" if value > middle else "less firm" for edit, value in held.items()}


def shares(
    sides: Sequence[Sequence[Sequence[Row]]],
    groups: Mapping[str, str],
    group_of_prompt: Mapping[str, str],
) -> dict[str, dict[str, Any]]:
    """Mean token shares by group, over all seeds. Edits are grouped by ``groups``; a bystander is
    in the group of its own prompt, or, where that is not known, of its edit."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for before, after in sides:
        for old, new in zip(before, after, strict=True):
            own = groups.get(str(new["edit"]), "other")
            if new["role"] in EDITED:
                found[own][new["role"]].append(token_share(new))
            elif new["role"] == "locality":
                same = [a == b for a, b in zip(old["predicted"], new["predicted"], strict=True)]
                found[group_of_prompt.get(new["prompt"], own)]["locality"].append(mean(same))
    return {
        group: {
            "n": len(values["reliability"]) // len(sides),
            "bystanders": len(values["locality"]) // len(sides),
            **{
                role: mean(values[role]) if values[role] else None for role in (*EDITED, "locality")
            },
        }
        for group, values in sorted(found.items())
    }


if __name__ == "__main__":
    main()

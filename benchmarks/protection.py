"""Are protected prompts forecast rightly, and does it help to protect the endangered ones only?

    python -m benchmarks.protection --work FOLDER [--updates 6 --prompts 120 --edits 8]

Updates of atlas facts by the defaults, each from the base, one after another in the past of the
next: other facts are the prompts to protect. Each update is forecast (from what is known
then), trained without protection (the truth that the forecast speaks of), with the endangered
prompts protected, with all of them protected, and that in smaller steps. Every fourth prompt is
held out. Goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import lines, write
from unwrite import Edit, FullFT, load, methods, read_edits
from unwrite.files import write_jsonl
from unwrite.forgetting.protocol import average_precision
from unwrite.model import Model
from unwrite.prompts import Protected
from unwrite.protection import History, Outlook, look_ahead, protecting

HELD_OUT = 4  # one prompt in so many
NONE, ENDANGERED, ALL = "none", "endangered", "all"
SLOWLY = "all, a third of the rate, twice the epochs"
ARMS = (NONE, ENDANGERED, ALL, SLOWLY)


def main() -> None:
    """Run what is missing and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--work", required=True)
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--edits", type=int, default=8)
    options = parser.parse_args()
    updates, prompts = parts(options.updates, options.edits, options.prompts)
    method = FullFT()
    rows = run(load(options.base), updates, prompts, method, Path(options.work))
    write(
        "protection",
        {
            "method": methods.settings_of(method),
            "edits": options.edits,
            "prompts": len(prompts),
            **summary(rows),
        },
    )


def parts(updates: int, edits: int, prompts: int) -> tuple[list[list[Edit]], list[Protected]]:
    """Facts to change, evenly over the relations, and the prompts of others."""
    facts = list(read_edits("atlas"))
    order = np.random.default_rng(0).permutation(len(facts))
    mixed = [facts[at] for at in order]
    changed = [mixed[n * edits : (n + 1) * edits] for n in range(updates)]
    rest = mixed[updates * edits :][:prompts]
    return changed, [Protected(one.prompt, n % HELD_OUT == 0) for n, one in enumerate(rest)]


def run(
    model: Model,
    updates: Sequence[Sequence[Edit]],
    prompts: Sequence[Protected],
    method: Any,
    work: Path,
) -> list[dict[str, Any]]:
    """One row an update: the forecast, and what changed without and with protection."""
    file = work / "updates.jsonl"
    rows = lines(file)
    known = {"method": methods.settings_of(method)["name"]}
    everything = [one.prompt for one in prompts if not one.held_out]
    for number, edits in enumerate(updates):
        done = rows[number]["changed"] if number < len(rows) else {}
        if set(done) == set(ARMS):
            continue
        past = History.of(
            (f"update {n}", known, row["record"]) for n, row in enumerate(rows[:number])
        )
        outlook = look_ahead(model, edits, method, prompts, past)
        arms = {
            NONE: (method, ()),
            ENDANGERED: (method, outlook.endangered),
            ALL: (method, everything),
            SLOWLY: (replace(method, lr=method.lr / 3, epochs=2 * method.epochs), everything),
        }
        lost = {
            name: _lost(model, edits, how, chosen, outlook)
            for name, (how, chosen) in arms.items()
            if name not in done
        }
        if done:
            done |= _changed(outlook, lost)
        else:
            rows.append(_row(outlook, lost))
        work.mkdir(parents=True, exist_ok=True)
        write_jsonl(file, rows)
    return rows


def _lost(
    model: Model, edits: Sequence[Edit], method: Any, chosen: Sequence[str], outlook: Outlook
) -> Any:
    with model.shifted(protecting(method, chosen).delta(model, edits)):
        return outlook.watched.losses(model)


def _row(outlook: Outlook, lost: dict[str, Any]) -> dict[str, Any]:
    watched = outlook.watched
    truth = lost[NONE] > watched.margins
    rate = float(truth.mean())
    expected, std = outlook.count()
    hidden = np.isnan(outlook.seen)
    record = outlook.as_json(lost[NONE])
    for one in record["prompts"]:
        one["protected"] = False  # it was not, in the training that this records
    return {
        "by": outlook.by,
        "prompts": len(watched.prompts),
        "unknown": len(watched.unknown),
        "endangered": len(outlook.endangered),
        "expected": expected,
        "std": std,
        "changed": _changed(outlook, lost),
        "held_out": sum(one.held_out for one in watched.prompts),
        "growth": outlook.growth._asdict(),
        "brier": float(((outlook.chances - truth) ** 2).mean()),
        "brier_of_rate": rate * (1 - rate),
        "average_precision": average_precision(truth, outlook.chances),
        "average_precision_by_margin": average_precision(truth, -watched.margins),
        "unobserved": {
            "n": int(hidden.sum()),
            "rate": float(truth[hidden].mean()) if hidden.any() else None,
            "average_precision": average_precision(truth[hidden], outlook.chances[hidden]),
        },
        "record": {"prompts": record["prompts"]},
    }


def _changed(outlook: Outlook, lost: dict[str, Any]) -> dict[str, dict[str, int]]:
    """How many prompts each arm changed, of those held out and of the others."""
    free = np.array([one.held_out for one in outlook.watched.prompts])
    found = {name: losses > outlook.watched.margins for name, losses in lost.items()}
    return {
        name: {"held_out": int(one[free].sum()), "others": int(one[~free].sum())}
        for name, one in found.items()
    }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows without the records, and totals by arm."""
    told = [{key: value for key, value in row.items() if key != "record"} for row in rows]
    arms = rows[0]["changed"] if rows else {}
    return {
        "updates": told,
        "within_two_std": sum(
            abs(row["expected"] - sum(row["changed"][NONE].values())) <= 2 * row["std"]
            for row in rows
        ),
        "changed": {
            arm: {
                part: sum(row["changed"][arm][part] for row in rows)
                for part in ("held_out", "others")
            }
            for arm in arms
        },
        "asked": {
            "held_out": sum(row["held_out"] for row in rows),
            "others": sum(row["prompts"] - row["held_out"] for row in rows),
        },
    }


if __name__ == "__main__":
    main()

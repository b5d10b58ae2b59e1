"""What waiting for protected answers does: training until the new answers are learned, or on until
the protected ones hold again, and that in smaller steps.

    python -m benchmarks.protected_stop [--facts 24 --protected 48 --seeds 2]

SmolLM2-135M; known facts of the atlas from its development split (even places), with other known
facts to protect, of the same relations among others, none of which is a bystander of an edit or an
edit. Token form; "protected" is the share of protected answers that are the same in all of their
tokens. Runs of the committed result are not made again.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

from benchmarks import measure
from benchmarks.full_ft_defaults import forced
from benchmarks.measure import write
from benchmarks.method_defaults import harmonic
from benchmarks.planted_study import ROLES
from unwrite import Edit, FullFT, load, read_edits, training
from unwrite.kept import ANSWER_TOKENS_KEPT
from unwrite.model import Model
from unwrite.observe import neutral_text, perplexity, questions, settle
from unwrite.scores import score
from unwrite.training import new_pairs

NAME = "protected_stop"


def main() -> None:
    """Run all ways on every draw of facts, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--facts", type=int, default=24)
    parser.add_argument("--protected", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    model = load(options.base)
    known = list(read_edits("atlas", known_to=model))[0::2]
    rows = made(options.facts, options.protected)
    done = {(row["way"], row["seed"]) for row in rows}
    for seed in range(options.seeds):
        edits, kept = drawn(known, options.facts, options.protected, seed)
        for way, method, waits in ways(FullFT(seed=seed), kept):
            if (way, seed) in done:
                continue
            rows.append({"way": way, "seed": seed} | measured(model, edits, kept, method, waits))
            print(rows[-1], flush=True)
            write(NAME, {"facts": options.facts, "kept": len(kept), "runs": rows})


def made(facts: int, kept: int) -> list[dict[str, Any]]:
    """The runs of the committed result, if they are of as many facts."""
    content = measure.measured(NAME)
    if content is None or (content["facts"], content["kept"]) != (facts, kept):
        return []
    return list(content["runs"])


def drawn(
    known: Sequence[Edit], facts: int, protected: int, seed: int
) -> tuple[list[Edit], tuple[str, ...]]:
    """Facts to change, and prompts of others that nothing is scored on."""
    mixed = random.Random(seed).sample(list(known), len(known))
    edits, others = mixed[:facts], mixed[facts:]
    scored = {one.prompt for edit in edits for one in edit.bystanders}
    return edits, tuple(one.prompt for one in others if one.prompt not in scored)[:protected]


def ways(plain: FullFT, kept: tuple[str, ...]) -> list[tuple[str, FullFT, bool]]:
    """What is compared: its name, the method, and whether it waits for what is protected."""
    two, ten = (replace(plain, protect=kept, protect_weight=weight) for weight in (2.0, 10.0))
    return [
        ("nothing protected", plain, True),
        ("weight 2, not waiting", two, False),
        ("weight 2", two, True),
        ("weight 10, not waiting", ten, False),
        ("weight 10", ten, True),
        (
            "weight 2, a third of the rate, twice the epochs",
            replace(two, lr=plain.lr / 3, epochs=2 * plain.epochs),
            True,
        ),
    ]


def measured(
    model: Model, edits: Sequence[Edit], kept: Sequence[str], method: FullFT, waits: bool
) -> dict[str, Any]:
    """Scores of one training, token form."""
    probes = settle(model, questions(edits))
    before, text = forced(model, probes), neutral_text()
    fluent = perplexity(model, text)
    answers = model.generate(kept, ANSWER_TOKENS_KEPT)
    sequences = [model.tokens(*one) for one in zip(kept, answers, strict=True) if one[1].strip()]
    started = time.perf_counter()
    with as_before() if not waits else nullcontext():
        trained = method.train(model, new_pairs(edits))
    seconds = time.perf_counter() - started
    with model.shifted(trained.delta):
        scores = score(before, forced(model, probes))
        same = [one.matched == len(one.targets) for one in model.force(sequences)]
        after = perplexity(model, text)
    token = {name: scores[name].token for name in ROLES}
    return {
        **token,
        "harmonic_mean": harmonic(token),
        "protected": sum(same) / len(same),
        "perplexity": after / fluent,
        "epochs": trained.epochs,
        "learned": trained.learned,
        "seconds": seconds,
    }


def as_before() -> AbstractContextManager[Any]:
    """Training ends as soon as the new answers are learned, whatever is protected."""

    def done(run: Any, course: Any) -> bool:
        return next(run._wrong([tokens for _, tokens in course.rows]), None) is None

    return mock.patch.object(training._Run, "_done", done)


if __name__ == "__main__":
    main()

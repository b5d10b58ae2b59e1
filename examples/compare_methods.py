"""Several methods on the same facts, and which of them to take.

    python examples/compare_methods.py --model MODEL --facts FACTS --out RUN [--rate-times 1]

A run that was interrupted goes on where it was when it is called again. The best method is the one
with the highest harmonic mean of reliability, generality and locality, so that none of the three
can be bought with the others.
"""

import argparse
from pathlib import Path
from statistics import harmonic_mean

import unwrite

ROLES = ("reliability", "generality", "locality")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--facts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rate-times", type=float, default=1.0, help="multiplies learning rates")
    given = parser.parse_args(words)

    times = given.rate_times
    full = unwrite.FullFT(lr=unwrite.FullFT.lr * times)
    methods = {
        "full-ft": full,
        "bounded": unwrite.ConstrainedFT(lr=unwrite.ConstrainedFT.lr * times, radius=5e-4 * times),
        "forget-first": unwrite.FLearning(strength=0.3, learn=full),
    }
    found = unwrite.compare(
        given.model, given.facts, methods, given.out, references=("no-change",), exact=False
    )
    print(found.markdown())

    def balance(row: dict) -> float:
        return harmonic_mean([row["scores"]["after"][role]["token"] for role in ROLES])

    best = max((row for row in found.rows if row["method"] in methods), key=balance)
    print(f"Best balanced on these facts: {best['method']} ({100 * balance(best):.0f} %).")


if __name__ == "__main__":
    main()

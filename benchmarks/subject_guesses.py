"""How often the subject that is guessed from a prompt is the one that the record names.

    python -m benchmarks.subject_guesses --data ../shared/data

The rules were written looking at the development splits (CounterFact 0-499, zsRE 0-199, even places
of the atlas); what counts is the rest. ``ends_there``: the guess ends where the subject does, which
is where it is written.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.measure import write
from benchmarks.planted_study import DATA
from unwrite import Edit, read_edits
from unwrite.subjects import guessed_subject

TEST_RECORDS = 2000


def main() -> None:
    """Count and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data slices")
    options = parser.parse_args()
    atlas = list(read_edits("atlas"))
    rows = [
        {"split": split, "kind": "atlas"} | counted(atlas[first::2])
        for first, split in enumerate(("development", "test"))
    ]
    for kind, (file, first) in DATA.items():
        development = read_edits(options.data / file, limit=first)
        test = read_edits(options.data / file, offset=first, limit=TEST_RECORDS)
        rows.append({"split": "development", "kind": kind} | counted(development))
        rows.append({"split": "test", "kind": kind} | counted(test))
    write("subject_guesses", {"rows": rows})


def counted(edits: Iterable[Edit]) -> dict[str, Any]:
    """How many prompts with a subject there are, for how many one is guessed, and how well."""
    named = [edit for edit in edits if edit.subject and edit.subject in edit.prompt]
    found = Counter(judged(edit.prompt, str(edit.subject)) for edit in named)
    return {
        "prompts": len(named),
        "guessed": len(named) - found["none"],
        "right": found["right"],
        "ends_there": found["right"] + found["ends there"],
    }


def judged(prompt: str, subject: str) -> str:
    """What a guess is beside the subject that is named."""
    guess = guessed_subject(prompt)
    if guess is None or guess == subject:
        return "none" if guess is None else "right"
    ends = [prompt.index(one) + len(one) for one in (guess, subject)]
    return "ends there" if ends[0] == ends[1] else "wrong"


if __name__ == "__main__":
    main()

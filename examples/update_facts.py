"""Change facts of your own in a model of your own, look at what moved, and take it back.

    python examples/update_facts.py --model MODEL --facts FACTS --home HOME [--keep]

MODEL is a Hugging Face folder, a hub id or smollm2-135m; FACTS is a file of edits; HOME a new
folder. Nothing is committed unless nine of ten facts are learned and nine of ten bystanders stay;
then the update is undone again, unless ``--keep`` says otherwise.
"""

import argparse
from pathlib import Path

import unwrite
from unwrite.home_report import write_report


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--facts", type=Path, required=True)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--lr", type=float, default=unwrite.FullFT.lr)
    parser.add_argument("--locality", type=float, default=0.9, help="bystanders that must stay")
    parser.add_argument("--keep", action="store_true", help="do not undo the update")
    given = parser.parse_args(words)

    home = unwrite.open(given.home, base=given.model)
    facts = unwrite.read_edits(given.facts)
    known = unwrite.read_edits(facts, known_to=home.model())
    print(f"The model knows {len(known)} of {len(facts)} facts as the file says.")

    required = {"reliability": 0.9, "locality": given.locality}
    try:
        done = home.update(facts, unwrite.FullFT(lr=given.lr), require=required, why="an example")
    except unwrite.RequirementNotMet as error:
        print(f"Nothing was committed: {error}")
        return

    for row in home.diff(done.id):
        if row["role"] == "reliability":
            print(f"{row['prompt']} {row['before'].strip()!r} -> {row['after'].strip()!r}")
        elif row["role"] == "locality" and row["before"] != row["after"]:
            print(f"moved as well: {row['prompt']} {row['after'].strip()!r}")
    print(f"The whole story is in {write_report(home.folder)}")

    if not given.keep:
        undone = home.undo(done.id, why="it was an example")
        assert undone.fingerprint == home.base.fingerprint
        print("Undone: the weights have the bits of the base again.")


if __name__ == "__main__":
    main()

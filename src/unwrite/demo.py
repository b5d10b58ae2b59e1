"""``make demo``: twelve facts that the small model really knows are changed, and changed back.

Everything happens in one folder with the means that every user has; run again, it starts over.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from unwrite.console import SCORE_COLUMNS, Terminal, score_rows
from unwrite.edits import Edit, read_edits
from unwrite.errors import UnwriteError
from unwrite.home import Home, is_home
from unwrite.home_report import write_report

FACTS = 12
ASKED_PER_RELATION = 4  # enough to find twelve known ones, without asking all of the atlas


def run(folder: Path, out: Terminal) -> None:
    """Update, compare, undo and verify in ``folder``. Raises ``UnwriteError`` with a sentence."""
    if folder.exists():
        if any(folder.iterdir()) and not is_home(folder / "home"):
            raise UnwriteError(f"{folder} is not the folder of a demo; remove it or name another.")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    home = Home.open(folder / "home", base="smollm2-135m", progress=out)
    candidates = spread(read_edits("atlas"), ASKED_PER_RELATION)
    out.say(f"Asking the model {len(candidates)} facts, to find {FACTS} that it really knows ...")
    known = spread(read_edits(candidates, known_to=home.model()), 2)[:FACTS]

    out.say(f"\nChanging {len(known)} facts that it knows, by the default method ...")
    done = home.update(known, why="the demo: twelve facts, changed on purpose")
    rows = [row for row in home.diff(done.id) if row["role"] == "reliability"]
    out.table(
        "What the model says, before and after",
        ("prompt", "before", "after", "wanted"),
        [[row["prompt"], row["before"], row["after"], row["target"]] for row in rows],
    )
    title = f"Scores of {done.id}, measured on the weights the home gives out (in %)"
    out.table(title, SCORE_COLUMNS, score_rows(done.before, done.after), numbers=7)
    out.say(
        f"Perplexity on neutral text {done.perplexity['before']:.2f} -> "
        f"{done.perplexity['after']:.2f}. Training took {done.seconds['train']:.1f} s."
    )

    out.say(f"\nUndoing {done.id} ...")
    undone = home.undo(done.id, why="the demo: and back again")
    same = undone.fingerprint == home.base.fingerprint
    problems = home.verify()
    if not same or problems:
        raise UnwriteError(f"The undo was not exact: {problems or 'the fingerprints differ'}.")
    out.say(
        f"Fingerprint of the base      {home.base.fingerprint}\n"
        f"Fingerprint after the undo   {undone.fingerprint}"
    )
    out.say("They are equal: every one of the weights has its old bits back.")
    first = known[0]
    out.say(f"Asked again: {first.prompt} {home.ask(first.prompt, max_new_tokens=4).strip()}")
    report = write_report(home.folder, folder / "report.html")
    out.say(f"\nThe whole story is in {report}")


def spread(edits: tuple[Edit, ...], per_relation: int) -> list[Edit]:
    """At most ``per_relation`` edits of each relation, so that not all are capitals."""
    counts: dict[str | None, int] = {}
    chosen = []
    for edit in edits:
        counts[edit.relation] = counts.get(edit.relation, 0) + 1
        if counts[edit.relation] <= per_relation:
            chosen.append(edit)
    return chosen


def main() -> None:
    """Run in the folder named on the command line (default ``demo``)."""
    out = Terminal()
    try:
        run(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"), out)
    except UnwriteError as error:
        out.fail(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        out.fail("Interrupted.")
        sys.exit(130)


if __name__ == "__main__":
    main()

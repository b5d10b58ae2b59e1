"""Is every line of the ledger and of delta arithmetic held by a test? Faults are put in to see.

    python -m benchmarks.mutation [--files ledger delta --children 2]

Needs ``mutmut``. It changes one thing of the source at a time (a comparison, a constant, a word)
and runs the tests that reach it: a change that no test notices survives and is listed here with its
text, to be met with a test or explained in the documentation. Works in a copy of the project.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.measure import measured, write

ROOT = Path(__file__).parent.parent
COPIED = ("src", "tests", "benchmarks", "docs", "examples")
TESTS = {
    "ledger": ["tests/test_ledger.py"],
    "delta": ["tests/test_delta.py", "tests/test_compaction.py"],
}


def main() -> None:
    """Put faults in, run the tests, write what survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", nargs="+", default=list(TESTS), choices=list(TESTS))
    parser.add_argument("--children", type=int, default=2, help="processes")
    options = parser.parse_args()
    # Files that are not run keep their last result.
    found = (measured("mutation") or {"files": {}})["files"]
    for name in options.files:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = survived(Path(folder), name, options.children)
    write("mutation", {"files": found})


def survived(folder: Path, name: str, children: int) -> dict[str, Any]:
    """How the mutants of one file fared, and the text of those that no test noticed."""
    for part in COPIED:
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "pyproject.toml").write_text(
        (ROOT / "pyproject.toml").read_text("utf-8") + configuration(name), "utf-8"
    )

    def mutmut(*words: str) -> str:
        command = [sys.executable, "-m", "mutmut", *words]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(
                f"mutmut {words[0]} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            )
        return done.stdout

    mutmut("run", "--max-children", str(children))
    lines = re.findall(r"^\s*(\S+): ([\w ]+)$", mutmut("results", "--all", "true"), re.M)
    return {
        "mutants": len(lines),
        "outcomes": dict(Counter(outcome for _, outcome in lines)),
        "not_noticed": {
            mutant: mutmut("show", mutant).splitlines()
            for mutant, outcome in lines
            if outcome not in ("killed", "timeout")
        },
    }


def configuration(name: str) -> str:
    """What mutmut is told, as a part of pyproject.toml."""
    copied = [part for part in COPIED if part != "src"]
    return f"""
[tool.mutmut]
source_paths = ["src"]
only_mutate = ["src/unwrite/{name}.py"]
also_copy = {copied}
pytest_add_cli_args = ["-p", "no:xdist", "-m", "not slow"]
pytest_add_cli_args_test_selection = {TESTS[name]}
process_isolation = "forkserver"
"""


if __name__ == "__main__":
    main()

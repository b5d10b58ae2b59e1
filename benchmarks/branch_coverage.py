"""Which branches of the parts that must not lose anything are taken by the tests.

    python -m benchmarks.branch_coverage [--every-test]

Needs ``coverage``. Runs the tests of those parts (or the whole suite) and counts, for every module,
the branches and lines that were taken; in processes that tests start, nothing is counted. The
lines and branches that are left are listed, so that each can be looked at.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import write

MODULES = {
    "ledger": "ledger",
    "home": "home",
    "delta": "delta",
    "saved deltas": "deltafile",
    "changes": "change",
    "compaction": "compaction",
    "reader: safetensors": "tensorfile",
    "reader: checkpoints": "weights",
    "reader: edits": "edits",
    "reader: published formats": "formats",
    "reader: tasks": "tasks",
    "reader: prompts": "prompts",
    "reader: requirements": "requirements",
    "reader: matrix": "forgetting/matrix",
    "reader: examples": "forgetting/examples",
}
TESTS = (
    "ledger delta change weights home edits formats tasks prompts requirements faults scratch "
    "compaction forgetting_matrix forgetting_collect protection reproduction export session hub "
    "bundled_matrix forgetting_cli"
)


def main() -> None:
    """Run the tests, count, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every-test", action="store_true", help="the whole suite")
    options = parser.parse_args()
    tests = ["tests"]
    if not options.every_test:
        tests = [f"tests/test_{name}.py" for name in TESTS.split()] + ["tests/faults"]
    with tempfile.TemporaryDirectory() as name:
        data, found = Path(name) / "data", Path(name) / "coverage.json"
        environment = os.environ | {"COVERAGE_FILE": str(data), "CI": "true"}

        def coverage(*words: str) -> int:
            command = [sys.executable, "-m", "coverage", *words]
            return subprocess.run(command, env=environment, check=False).returncode

        failed = coverage(
            "run",
            "--branch",
            "--source=src/unwrite",
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:xdist",
            *tests,
        )
        coverage("json", "-o", str(found))
        files = json.loads(found.read_text("utf-8"))["files"]
    modules = {name: taken(files[f"src/unwrite/{file}.py"]) for name, file in MODULES.items()}
    write("branch_coverage", {"tests": tests, "tests_passed": failed == 0, "modules": modules})


def taken(file: dict[str, Any]) -> dict[str, Any]:
    """What of a module was taken, and what was not."""
    summary = file["summary"]
    return {
        "branches": summary["num_branches"],
        "branches_taken": summary["covered_branches"],
        "lines": summary["num_statements"],
        "lines_taken": summary["covered_lines"],
        "missing_lines": file["missing_lines"],
        "missing_branches": file["missing_branches"],
    }


if __name__ == "__main__":
    main()

"""How long ``import unwrite`` and ``unwrite --help`` take, beside a bare interpreter.

python -m benchmarks.startup [--repeats 10]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from benchmarks.measure import in_turns, write


def main() -> None:
    """Run all in turns and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    commands = {
        "python": ["-c", "pass"],
        "import_unwrite": ["-c", "import unwrite"],
        "unwrite_help": ["-m", "unwrite", "--help"],
    }
    seconds = in_turns(
        {
            name: lambda words=words: subprocess.run(
                [sys.executable, *words], check=True, capture_output=True
            )
            for name, words in commands.items()
        },
        options.repeats,
    )
    write(
        "startup",
        {
            "seconds_median": {name: statistics.median(values) for name, values in seconds.items()},
            "seconds": seconds,
        },
    )


if __name__ == "__main__":
    main()

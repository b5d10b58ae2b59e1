"""How long ``import unwrite`` and ``unwrite --help`` take, beside a bare interpreter.

    python -m benchmarks.startup [--repeats 10]

And, what a command that needs torch cannot be faster than: starting torch and ending, as Python
does by itself and as our command line does.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from benchmarks.measure import in_turns, ratio, write

ENDING = "import atexit, gc; atexit.register(gc.freeze)"  # ``cli.main``


def main() -> None:
    """Run all in turns and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    commands = {
        "python": ["-c", "pass"],
        "import_unwrite": ["-c", "import unwrite"],
        "unwrite_help": ["-m", "unwrite", "--help"],
        "torch": ["-c", "import torch"],
        "torch_as_the_command_line_ends": ["-c", f"{ENDING}; import torch"],
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
            "torch_over_torch_as_the_command_line_ends": ratio(
                seconds["torch"], seconds["torch_as_the_command_line_ends"]
            ),
            "seconds": seconds,
        },
    )


if __name__ == "__main__":
    main()

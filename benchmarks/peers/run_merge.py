"""mergekit's command line in this process, which tells its peak of resident memory at the end.

python run_merge.py CONFIG OUT
"""

import contextlib
import sys
from pathlib import Path

from mergekit.scripts.run_yaml import main as merge


def main() -> None:
    """Merge, then print the gigabytes."""
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):
        merge([*sys.argv[1:], "--copy-tokenizer", "--no-cuda"], standalone_mode=False)
    status = Path("/proc/self/status").read_text("utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    print(int(line.split()[1]) * 1024 / 1e9)


if __name__ == "__main__":
    main()

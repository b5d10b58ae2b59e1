"""One page about a home or about a comparison, whichever a folder is."""

from __future__ import annotations

from pathlib import Path

from unwrite import home_report, run_report
from unwrite.grid import is_run


def report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write one self-contained HTML page about a home or a comparison; returns where.

    ``out``: the file to write (default: ``report.html`` in the folder). Made from the folder alone;
    no model is loaded. Raises ``HomeError`` for a folder that is neither, ``DamagedFile`` for one
    that cannot be read.
    """
    folder, target = Path(folder), None if out is None else Path(out)
    return (run_report if is_run(folder) else home_report).write_report(folder, target)

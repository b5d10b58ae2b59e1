"""One page about a home, a comparison or a forgetting matrix, whichever a folder is."""

from __future__ import annotations

from pathlib import Path

from unwrite import home_report, matrix_report, run_report
from unwrite.forgetting.matrix import is_matrix
from unwrite.grid import is_run


def report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write one self-contained HTML page about a home, a comparison or a forgetting matrix; returns
    where.

    ``out``: the file to write (default: ``report.html`` in the folder). Made from the folder alone;
    no model is loaded. Raises ``HomeError`` for a folder that is none of these, ``DamagedFile`` for
    one that cannot be read.
    """
    folder, target = Path(folder), None if out is None else Path(out)
    if is_run(folder):
        return run_report.write_report(folder, target)
    if is_matrix(folder):
        return matrix_report.write_report(folder, target)
    return home_report.write_report(folder, target)

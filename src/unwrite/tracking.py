"""Figures of training for experiment trackers (TensorBoard, Weights & Biases and others).

Trackers are those of accelerate: any name that it knows will do, if its package is there. One run
of a tracker holds the figures of one command; every stage of training in it has its own curve.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unwrite.errors import BadSetting
from unwrite.progress import Measured

FOLDER = "runs"  # where trackers that write files write them, as they do by default


class Trackers:
    """Trackers, opened by the first figure; to be closed with ``close``."""

    def __init__(self, names: Sequence[str], folder: Path, run: str) -> None:
        """``names`` as accelerate has them; ``run``: what the run is called there.

        Raises ``BadSetting`` for a name that it does not know and for one whose package is missing.
        """
        from accelerate import tracking

        self.folder, self.run = folder, run
        self.kinds: list[Any] = []
        self._open: list[Any] | None = None
        self._steps: Counter[str] = Counter()
        known = {str(name): kind for name, kind in tracking.LOGGER_TYPE_TO_CLASS.items()}
        there = {str(name.value) for name in tracking.get_available_trackers()}
        for name in names:
            if name not in known:
                raise BadSetting(
                    f"There is no tracker {name!r}. Trackers: {', '.join(sorted(known))}."
                )
            if name not in there:
                raise BadSetting(
                    f"The tracker {name} needs a package that is not installed: "
                    "pip install 'unwrite[trackers]' for TensorBoard, or that tracker's own."
                )
            self.kinds.append(known[name])

    def log(self, stage: str, figure: Measured) -> None:
        """One figure of a stage, as the next step of its curve. To be called while something is
        being trained by accelerate: trackers ask it which process this is."""
        curve = f"{stage}/{figure.name}"
        self._steps[curve] += 1
        if self._open is None:
            self._open = [self._opened(kind) for kind in self.kinds]
        for tracker in self._open:
            tracker.log({curve: figure.value}, step=self._steps[curve])

    def _opened(self, kind: Any) -> Any:
        where = {"logging_dir": str(self.folder)} if kind.requires_logging_directory else {}
        tracker = kind(self.run, **where)
        tracker.start()
        return tracker

    def close(self) -> None:
        """Write what is still held."""
        for tracker in self._open or ():
            tracker.finish()
        self._open = None

"""A log file beside the terminal: all that was said, line by line, with the time (UTC), plain."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from unwrite.errors import BadSetting


class Logbook:
    """Appends lines to a file, each whole when ``write`` returns.

    With ``when``, lines wait until it says yes: the folder of a run is not touched before the run
    has claimed it, nor a home before the update is committed; a command that fails leaves nothing.
    """

    def __init__(self, path: Path, when: Callable[[], bool] | None = None) -> None:
        """Raises ``BadSetting`` when the file cannot be written; with ``when``, ``write`` raises
        ``OSError`` then."""
        self.path, self.when = path, when
        self._waiting: list[str] = []
        if when is None:
            try:
                path.open("a", encoding="utf-8").close()
            except OSError as error:
                raise BadSetting(
                    f"The log file {path} cannot be written ({error.strerror}): name another."
                ) from None

    def write(self, text: str) -> None:
        """The lines of ``text``, each behind the time."""
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
        self._waiting += [f"{now}  {line}".rstrip() + "\n" for line in text.splitlines()]
        if self._is_due():
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(self._waiting)
            self._waiting = []

    def _is_due(self) -> bool:
        try:
            return self.when is None or self.when()
        except OSError:  # a path that is too long for a name, or closed to us
            return False

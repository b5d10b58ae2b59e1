"""How the command line talks: tables and bars on a terminal, plain lines in a pipe, or JSON.

People read standard error; standard output carries only what a program would want: the JSON object
of ``--json``, an answer, a path. Text that came from a model or a file is made harmless first: no
control character of it reaches the terminal.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import HEAVY_HEAD
from rich.console import Console, ConsoleOptions
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from unwrite.formats import hidden
from unwrite.logbook import Logbook
from unwrite.progress import Advance, AtMost, Bytes, Measured, amount
from unwrite.scores import ROLES, Scores

if TYPE_CHECKING:
    from unwrite.tracking import Trackers

PLAIN = "UNWRITE_PLAIN"  # set: no lines, bars and colours, as in a pipe
LOG = "log.txt"  # in the folder of every run
LOG_FILE = "UNWRITE_LOG_FILE"  # set: everything said goes there, too, with the time
TRACK = "UNWRITE_TRACK"  # set: names of trackers, with commas, for the figures of training
PLAIN_EVERY = 10.0  # seconds between progress lines where there is no terminal


def harmless(text: str, limit: int = 200) -> str:
    """Foreign text on one line, without control or direction-changing characters."""
    shown = "".join(
        " " if character in "\n\t" else character
        for character in text
        if character in "\n\t" or not hidden(character)
    )
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


class Terminal:
    """Prints for people on standard error and data on standard output; is a ``Reporter``."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        plain = _is_plain()
        self.console = Console(
            stderr=True,
            highlight=False,
            width=_width(),
            force_terminal=False if plain else None,
            no_color=plain or None,  # None: as NO_COLOR says
        )
        self._bars: Progress | None = None
        self._logs: list[Logbook] = []
        self._trackers: Trackers | None = None

    def open(self) -> None:
        """Open the log file and the trackers that were asked for. Raises ``BadSetting``."""
        if path := os.environ.get(LOG_FILE):
            self.log_to(Path(path))
        if names := os.environ.get(TRACK):
            self._trackers = _trackers(names)

    def log_to(self, path: Path, when: Callable[[], bool] | None = None) -> None:
        """From here on, write all that is said into a file as well (see ``Logbook``)."""
        log = Logbook(path, when)
        log.write(f"$ {harmless(shlex.join(['unwrite', *sys.argv[1:]]), 4000)}")
        self._logs.append(log)

    def close(self) -> None:
        """The last word was said: what trackers hold is written."""
        self._log("")
        if self._trackers is not None:
            self._trackers.close()

    def _log(self, text: str) -> None:
        for log in list(self._logs):
            try:
                log.write(text)
            except OSError as error:  # what is done is done: no reason to fail
                self._logs.remove(log)
                self.warn(f"The log {log.path} ends here: {error.strerror}.")

    # ---- for people --------------------------------------------------------------------------

    def say(self, sentence: str) -> None:
        """One sentence, or a few lines."""
        for line in sentence.split("\n"):
            self.console.print(Text(harmless(line, 4000)), soft_wrap=True)
            self._log(harmless(line, 4000))

    def warn(self, sentence: str) -> None:
        """One sentence that must not be overlooked."""
        self.console.print(Text(harmless(sentence, 4000), style="bold yellow"), soft_wrap=True)
        self._log(f"Warning: {harmless(sentence, 4000)}")

    def fail(self, sentence: str) -> None:
        """The sentence a command ends with when it could not do what was asked."""
        line = Text("Error: ", style="bold red") + Text(harmless(sentence, 8000), style="not bold")
        self.console.print(line, soft_wrap=True)
        self._log(line.plain)

    def table(
        self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], numbers: int = 0
    ) -> None:
        """A table; the last ``numbers`` columns are aligned to the right.

        Where it is too wide, it is drawn without lines, and if even that does not fit, every row
        becomes a few lines of its own: no figure is ever cut.
        """
        lines = [[_cell(cell) for cell in row] for row in rows]
        if self._logs:
            self._log(self._as_text(title, columns, lines, numbers))
        framed = [True, False] if self.console.is_terminal else [False]
        for frame in framed:
            table = self._table(title, columns, lines, numbers, frame)
            if table.__rich_measure__(self.console, _unbounded(self.console)).minimum <= (
                self.console.width
            ):
                self.console.print(table)
                return
        self._stack(title, columns, lines)

    def _as_text(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Text]], numbers: int
    ) -> str:
        """A table for a file: plain, and as wide as it takes."""
        file = Console(file=io.StringIO(), width=400, no_color=True, highlight=False)
        file.print(self._table(title, columns, rows, numbers, frame=False))
        return str(file.file.getvalue())  # type: ignore[attr-defined]

    def _table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[Text]],
        numbers: int,
        frame: bool,
    ) -> Table:
        # As Text, so that square brackets in names are not taken for markup.
        heading = Text(harmless(title), style="bold") if title else None
        table = Table(
            title=heading,
            title_justify="left",
            title_style="",
            header_style="bold",
            box=HEAVY_HEAD if frame else None,
            padding=(0, 1) if frame else (0, 1, 0, 0),
            pad_edge=frame,
        )
        for index, name in enumerate(columns):
            right = index >= len(columns) - numbers
            # A figure that is broken over two lines is misread: words give way instead.
            table.add_column(
                Text(name.replace(" ", "\n") if right else name),
                justify="right" if right else "left",
                overflow="fold",
                no_wrap=right,
            )
        for row in rows:
            table.add_row(*row)
        return table

    def _stack(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Text]]) -> None:
        """The rows one below the other: the first cell, then every other with its column."""
        if title:
            self.console.print(Text(harmless(title), style="bold"))
        for first, *others in rows:
            self.console.print(Text.assemble((first.plain or "-", "bold")))
            for name, cell in zip(columns[1:], others, strict=True):
                if cell.plain:
                    self.console.print(Text.assemble(f"  {name}: ", cell))

    @contextlib.contextmanager
    def stage(self, title: str, total: int) -> Iterator[Advance]:
        """A progress bar with an estimate on a terminal, a line now and then in a pipe and in a log
        file; figures go to trackers."""
        if not self.console.is_terminal:
            yield self._told(title, _lines(title, total, self.say))
            return
        noted = _lines(title, total, self._log)
        outermost = self._bars is None
        if outermost:
            self._bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=30),
                _Amount(),
                TimeElapsedColumn(),
                _Remaining(),
                TextColumn("{task.fields[remark]}", markup=False),
                console=self.console,
                transient=True,
            )
            self._bars.start()
        bars = self._bars
        assert bars is not None
        task = bars.add_task(title, total=total, remark="")
        try:

            def advance(units: int, remark: str) -> None:
                bars.update(task, advance=units, remark=remark)
                noted(units, remark)

            yield self._told(title, advance)
        finally:
            bars.remove_task(task)
            if outermost:
                bars.stop()
                self._bars = None

    def _told(self, title: str, advance: Advance) -> Advance:
        """The same, with the trackers told of every figure."""
        trackers = self._trackers
        if trackers is None:
            return advance

        def tracked(units: int, remark: str) -> None:
            if isinstance(remark, Measured):
                trackers.log(title, remark)
            advance(units, remark)

        return tracked

    # ---- for programs ------------------------------------------------------------------------

    def result(self, value: Mapping[str, Any]) -> None:
        """The one JSON object of ``--json``; nothing without it.

        In ASCII, so that it can be written whatever the encoding of the pipe, and no control or
        direction-changing character reaches a terminal.
        """
        if self.as_json:
            sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")

    def data(self, line: str) -> None:
        """One line of data on standard output; nothing with ``--json``."""
        if not self.as_json:
            encoding = sys.stdout.encoding or "utf-8"
            sys.stdout.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
            self._log(line)


class _Amount(MofNCompleteColumn):
    """How much is done, in sizes where bytes are counted."""

    def render(self, task: Task) -> Text:
        if isinstance(task.total, Bytes):
            return Text(amount(int(task.completed), task.total))
        return super().render(task)


class _Remaining(TimeRemainingColumn):
    """The time that is left, as a bound where the work may end before."""

    def render(self, task: Task) -> Text:
        left = super().render(task)
        bounded = isinstance(task.total, AtMost) and not task.finished
        return Text("≤ ", style=left.style) + left if bounded else left


def _lines(title: str, total: int, say: Callable[[str], object]) -> Advance:
    """Progress as a line now and then, with an estimate of what is left."""
    started = last = time.monotonic()
    done = 0

    def advance(units: int, remark: str) -> None:
        nonlocal done, last
        done += units
        now = time.monotonic()
        if now - last >= PLAIN_EVERY and done:
            last = now
            left = (now - started) * (total - done) / done
            about = "at most" if isinstance(total, AtMost) else "about"
            note = f", {remark}" if remark else ""
            say(f"{title}: {amount(done, total)}, {about} {left:.0f} s left{note}")

    return advance


def _trackers(names: str) -> Trackers:
    """The trackers asked for, under a name that tells when."""
    from unwrite import tracking

    chosen = [name.strip() for name in names.split(",") if name.strip()]
    run = f"unwrite-{datetime.now():%Y%m%d-%H%M%S}"
    return tracking.Trackers(chosen, Path(tracking.FOLDER), run)


def _cell(value: Any) -> Text:
    return value if isinstance(value, Text) else Text(harmless(str(value)))


def _unbounded(console: Console) -> ConsoleOptions:
    """Options under which a table says how narrow it can be, whatever the width there is."""
    return console.options.update(width=10_000)


def _is_plain() -> bool:
    """Whether people asked for no lines, bars and colours: by ``--plain`` or as others do."""
    return bool(os.environ.get(PLAIN)) or os.environ.get("TERM") == "dumb"


def _width() -> int | None:
    """Columns to fill: those of the terminal, or enough for any table where there is none."""
    return None if sys.stderr.isatty() or "COLUMNS" in os.environ else 118


def score_rows(before: Scores, after: Scores) -> list[list[str]]:
    """Rows of the score table: both forms, before -> after, with n and the interval after."""
    rows = []
    for role in ROLES:
        old, new = before[role], after[role]
        if new.n:
            rows.append(
                [
                    role.replace("_", " "),
                    _percent(old.token),
                    _percent(new.token),
                    f"{_percent(new.token_low)}-{_percent(new.token_high)}",
                    _percent(old.exact),
                    _percent(new.exact),
                    f"{_percent(new.exact_low)}-{_percent(new.exact_high)}",
                    str(new.n),
                ]
            )
    return rows


SCORE_COLUMNS = (
    "score",
    "token before",
    "after",
    "95\N{NO-BREAK SPACE}%",
    "exact before",
    "after",
    "95\N{NO-BREAK SPACE}%",
    "n",
)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"

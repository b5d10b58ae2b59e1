"""Tables on terminals of any width, and with nothing but plain text where that is asked for."""

import io
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner

from unwrite import console
from unwrite.cli import app
from unwrite.console import PLAIN, SCORE_COLUMNS, Terminal, score_rows
from unwrite.progress import AtMost, Bytes, amount
from unwrite.scores import ROLES, from_json

FIGURES = {
    "token": 0.123,
    "exact": 0.456,
    "n": 123_456,
    "token_low": 0.1,
    "token_high": 1.0,
    "exact_low": 0.0,
    "exact_high": 1.0,
}
COLOUR = re.compile(r"\x1b\[[0-9;]*(?:3[0-7]|9[0-7])[0-9;]*m")


def printed(width, terminal, *table, **options):
    """What a table looks like, without the escapes of a terminal."""
    out = Terminal()
    out.console = Console(force_terminal=terminal, width=width, file=io.StringIO(), highlight=False)
    out.table(*table, **options)
    return re.sub(r"\x1b\[[0-9;]*m", "", out.console.file.getvalue())


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("width", [30, 40, 60, 70, 80, 120])
def test_no_figure_is_cut_however_narrow_the_terminal(width, terminal):
    scores = from_json(dict.fromkeys(ROLES, FIGURES))
    rows = score_rows(scores, scores)
    shown = printed(width, terminal, "Scores", SCORE_COLUMNS, rows, numbers=7)
    assert max(cell_len(line) for line in shown.splitlines()) <= width
    for row in rows:
        assert row[0] in shown
    for figure in ("12.3", "45.6", "10.0-100.0", "0.0-100.0", "123456"):
        assert shown.count(figure) >= len(rows), figure


def test_a_wide_terminal_has_lines_and_a_narrower_one_does_without_them_first():
    rows = [["a", "1234567890"]] * 2
    wide, narrow, narrowest = (
        printed(width, True, "", ("name", "figure"), rows, numbers=1) for width in (40, 16, 14)
    )
    assert "┃" in wide
    assert "┃" not in narrow and "figure:" not in narrow
    assert narrowest.count("figure: 1234567890") == 0  # 22 columns do not fit into 14 either way
    assert narrowest.replace("\n", "").replace(" ", "").count("figure:1234567890") == 2


@given(
    st.lists(st.tuples(st.text(max_size=80), st.integers(0, 10**9)), min_size=1, max_size=3),
    st.integers(12, 130),
    st.booleans(),
)
def test_every_number_is_shown_whole(rows, width, terminal):
    shown = printed(width, terminal, "", ("text", "n"), rows, numbers=1)
    for _, number in rows:
        assert re.search(rf"(?<!\d){number}(?!\d)", shown)


@pytest.mark.parametrize(("name", "value"), [(PLAIN, "1"), ("TERM", "dumb")])
def test_plain_is_as_in_a_pipe(monkeypatch, name, value):
    monkeypatch.setenv("FORCE_COLOR", "1")  # even then
    assert Terminal().console.is_terminal
    monkeypatch.setenv(name, value)
    console = Terminal().console
    assert not console.is_terminal and console.no_color


def test_no_color_is_heeded(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    Terminal().warn("careful")
    assert COLOUR.search(capsys.readouterr().err)
    monkeypatch.setenv("NO_COLOR", "1")
    Terminal().warn("careful")
    said = capsys.readouterr().err
    assert "careful" in said and not COLOUR.search(said)


def test_the_option_holds_for_one_command(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv(PLAIN, raising=False)
    plain = CliRunner().invoke(app, ["--plain", "methods"])
    pretty = CliRunner().invoke(app, ["methods"])
    assert plain.exit_code == pretty.exit_code == 0
    assert "\x1b" not in plain.stderr and "\x1b" in pretty.stderr
    assert PLAIN not in os.environ


@pytest.mark.parametrize(
    ("done", "total", "told"),
    [
        (3, 7, "3 of 7"),
        (1_200_000, Bytes(4_000_000_000), "1.2 MB of 4.0 GB"),
        (0, Bytes(0), "0 bytes of 0 bytes"),
        (3, AtMost(7), "3 of at most 7"),
    ],
)
def test_bytes_are_told_as_sizes_and_bounds_as_bounds(done, total, told, monkeypatch, capsys):
    assert amount(done, total) == told
    monkeypatch.setattr(console, "PLAIN_EVERY", 0.0)
    if done:
        with Terminal().stage("working", total) as advance:
            advance(done, "")
        bound = "at most" if isinstance(total, AtMost) else "about"
        assert f"working: {told}, {bound} " in capsys.readouterr().err


def test_a_bar_tells_sizes_too():
    bars = Progress(console._Amount())
    for total in (Bytes(4_000_000_000), 7):
        task = bars.add_task("x", total=total, remark="")
        bars.update(task, advance=2)
    shown = [console._Amount().render(task).plain.strip() for task in bars.tasks]
    assert shown == ["2 bytes of 4.0 GB", "2/7"]


def test_a_bar_tells_a_bound_until_the_work_is_done():
    bars = Progress(console._Remaining())
    for total, done in ((AtMost(7), 2), (7, 2), (AtMost(7), 7)):
        bars.update(bars.add_task("x", total=total, remark=""), advance=done)
    shown = [console._Remaining().render(task).plain.startswith("≤ ") for task in bars.tasks]
    assert shown == [True, False, False]

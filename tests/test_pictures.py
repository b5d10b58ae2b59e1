"""Every kind of page in a real browser: light, dark, on a phone, printed; hostile text stays text.

The pictures are kept for people in ``build/pictures`` (or where ``UNWRITE_ARTEFACTS`` says).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pages import HOSTILE, facts
from test_matrix_report import made
from test_report import make_home
from test_run_report import make_run

from unwrite import matrix_report
from unwrite.forgetting.matrix import ForgettingMatrix
from unwrite.home_report import render
from unwrite.run_report import RunReport

# A lone surrogate cannot be written to a UTF-8 file, and a file of rows holds no NUL.
TEXT = HOSTILE.replace("\ud800", "").replace("\x00", "")
LONG = "0123456789" * 1000
# Whatever the page does to characters that hide, these have to be read.
MARKS = ("<script>alert(1)</script>", "<img src=http://x.test/a onerror=b>")


def hostile(count: int) -> tuple[list[Any], list[Any]]:
    """Facts whose questions, targets and answers try to be more than text."""
    before, after = facts(count, wrong=2, moved=2)
    for rows in (before, after):
        for row in rows:
            if row["edit"] == "e0":
                row["prompt"] = f"{TEXT} {row['prompt']}"
        rows[1]["target"] = TEXT
    for row in after:
        if row["edit"] == "e1":
            row["text"] = f"{TEXT} {LONG}"
    return before, after


def home(folder: Path) -> str:
    return render(make_home(folder, [facts(12, wrong=1, moved=3), hostile(6)], [0], why=TEXT))


def comparison(folder: Path) -> str:
    found = {"full-ft": [facts(6)], "other": [hostile(6)]}
    return RunReport(make_run(folder, found, notes=[TEXT])).render()


def matrix(folder: Path) -> str:
    found = made()
    details = {name: {"prompt": f"{TEXT} {name}", "answer": LONG} for name in found.examples}
    ForgettingMatrix(
        found.values, found.tasks, found.examples, found.provenance, example_details=details
    ).save(folder)
    return matrix_report.render(folder)


KINDS = {"home": home, "comparison": comparison, "matrix": matrix}
LOOKS: dict[str, dict[str, Any]] = {
    "light": {"width": 1200, "media": {"color_scheme": "light"}},
    "dark": {"width": 1200, "media": {"color_scheme": "dark"}},
    "phone": {"width": 390, "media": {"color_scheme": "light"}},
    "print": {"width": 794, "media": {"media": "print", "color_scheme": "light"}},
}


def opened(page, path: Path, kind: str) -> list[str]:
    """Open a page of a kind; the addresses that it asks for."""
    file = path / f"{kind}.html"
    file.write_text(KINDS[kind](path / "source"), "utf-8")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    return asked


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_a_page(kind, page, tmp_path, artefacts):
    asked = opened(page, tmp_path, kind)
    colours = {}
    for look, how in LOOKS.items():
        page.emulate_media(media="screen")
        page.emulate_media(**how["media"])
        page.set_viewport_size({"width": how["width"], "height": 900})
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= how["width"], f"{kind} sticks out in {look}"
        colours[look] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        picture = page.screenshot(path=artefacts / f"{kind}-{look}.png", full_page=True)
        assert len(picture) > 10_000
    assert colours["light"] == colours["phone"] != colours["dark"]
    page.emulate_media(media="print")
    assert page.locator("input[type=search]:visible").count() == 0, "nothing to press on paper"
    assert page.pdf(path=artefacts / f"{kind}.pdf").startswith(b"%PDF")
    assert len(asked) == 1 and page.faults == []


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_text_is_shown_as_text(kind, page, tmp_path):
    asked = opened(page, tmp_path, kind)
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    page.wait_for_timeout(100)
    shown = page.evaluate("document.body.textContent")
    for mark in MARKS:
        assert mark in shown
    assert "\u202e" not in shown and "\x1b" not in shown
    assert page.locator("script").count() == 1
    assert page.locator("img").count() == 0
    assert page.evaluate("document.querySelectorAll('[onerror]').length") == 0
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 1200, "ten thousand characters stick out"
    assert len(asked) == 1 and page.faults == []


@pytest.mark.parametrize("kind", ["home", "comparison"])
def test_a_slash_goes_to_the_search_and_escape_leaves_it(kind, page, tmp_path):
    opened(page, tmp_path, kind)
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    search = page.locator("input[type=search]:visible").first
    rows = page.locator(".view").first.locator("tbody tr:visible:not(.group)")
    everything = rows.count()
    page.keyboard.press("/")
    assert search.evaluate("box => box === document.activeElement")
    page.keyboard.type("country 3/")
    assert search.input_value() == "country 3/", "in a box a slash is a slash"
    page.keyboard.press("Backspace")
    assert 0 < rows.count() < everything
    page.keyboard.press("Escape")
    assert search.input_value() == "" and rows.count() == everything
    assert page.evaluate("document.activeElement === document.body")
    assert page.faults == []

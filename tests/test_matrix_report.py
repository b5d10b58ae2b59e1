"""The page of a forgetting matrix: complete, harmless, and the same for the same folder."""

from __future__ import annotations

import re

import numpy as np
import pytest
from pages import HOSTILE, Page, assert_self_contained
from typer.testing import CliRunner

from unwrite import reporting
from unwrite.cli import app
from unwrite.errors import BadSetting
from unwrite.files import write_json
from unwrite.forgetting.matrix import ForgettingMatrix
from unwrite.matrix_report import GROUPS, TASKS, WORST, heat_map, render


def made(tasks=6, examples=40, seed=0, **changes):
    random = np.random.default_rng(seed)
    values = random.normal(size=(tasks, 1)) @ random.normal(size=(1, examples))
    values += 0.1 * random.normal(size=values.shape)
    values = np.array(changes.pop("values", values))
    names = tuple(f"e{n}" for n in range(examples))
    return ForgettingMatrix(
        values,
        tuple(f"task {n}" for n in range(tasks)),
        names,
        {
            "quantity": "log-perplexity",
            "base_name": "toy",
            "tuner": {"name": "lora", "rank": 8},
            **changes,
        },
        example_details={name: {"prompt": f"What is {name}?", "answer": name} for name in names},
    )


def scores(rmse):
    table = {"rmse": rmse, "f1": 0.5, "precision": 0.5, "recall": 0.5, "pr_auc": 0.4, "lift": 2.5}
    return {metric: {"mean": value, "std": 0.0} for metric, value in table.items()}


def fitted(folder, tasks, best="factorization"):
    found = {"random": scores(0.9), best: scores(0.25)}
    kept = {"best": best, "tasks": tasks, "revealed": 30, "seeds": [0, 1], "scores": found}
    write_json(folder / "fit.json", kept)


@pytest.fixture
def folder(tmp_path):
    made().save(tmp_path / "m")
    fitted(tmp_path / "m", 6)
    return tmp_path / "m"


def table(text, name):
    return re.search(rf'data-table="{name}">.*?</table>', text, re.S)[0]


def test_the_verdict_says_how_much_is_lost_and_how_well_that_is_known(folder):
    page = Page(render(folder))
    matrix = ForgettingMatrix.load(folder)
    share = 100 * (matrix.values > 0).mean()
    assert page.verdict.startswith(f"6 tasks and 40 examples; {share:.0f}")
    assert "three factors explain" in page.verdict
    assert page.verdict.endswith("factorization is best, finding 2.5 times as many as chance.")


def test_every_number_of_the_rank_profile_is_there(folder):
    profile = ForgettingMatrix.load(folder).rank_profile()
    found = [
        float(n) for n in re.findall(r'data value="([^"]+)"', table(render(folder), "profile"))
    ]
    means = [profile[key] for key in ("task_mean", "example_mean", "additive")]
    assert found == [*means, *profile["rank"]]


def test_the_most_forgotten_come_first_with_their_worst_task(folder):
    matrix = ForgettingMatrix.load(folder)
    first = int(matrix.values.mean(axis=0).argmax())
    (cells,) = [row for row in Page(render(folder)).rows if row[0] == f"What is e{first}?"]
    assert cells[1] == f"e{first}"
    assert cells[3] == f"task {matrix.values[:, first].argmax()}"
    text = table(render(folder), "worst")
    found = [float(n) for n in re.findall(r'data value="([^"]+)"', text)][::2]
    assert found == sorted(found, reverse=True) and len(found) == 40


def test_forecasts_are_in_the_order_of_their_error_and_the_used_one_is_marked(folder):
    rows = [row for row in Page(render(folder)).rows if row[0].startswith(("factor", "random"))]
    assert [row[0] for row in rows] == ["factorization used", "random"]
    assert rows[0][1:] == ["0.250", "0.500", "0.500", "0.500", "0.400", "2.500"]
    made(tasks=7).save(folder)
    assert "Tasks were added since forecasts were tried" in render(folder)
    (folder / "fit.json").unlink()
    text = render(folder)
    assert "No forecasts have been tried" in text and 'id="forecasts"' not in text


def test_the_map_goes_from_the_least_to_the_most_hurt():
    matrix = made(tasks=80, examples=200)
    found = heat_map(matrix)
    assert len(found["rows"]) == TASKS and found["left_out"] == 20
    assert len(found["columns"]) == GROUPS and sum(found["columns"]) == 200
    sizes = found["columns"]
    by_task = [np.average([one[0] for one in cells], weights=sizes) for _, cells in found["rows"]]
    assert np.all(np.diff(by_task) > -1e-9)
    shades = [cell[1] for _, cells in found["rows"] for cell in cells]
    assert min(shades) == 0 and max(shades) == 9
    assert all((shade == 0) == (value <= 0) for _, cells in found["rows"] for value, shade in cells)


def test_what_was_not_observed_is_empty_and_not_zero(tmp_path):
    values = np.full((3, 40), np.nan)
    values[0, :20], values[1, 20:] = 1.0, 2.0
    made(tasks=3, values=values).save(tmp_path / "m")
    text = render(tmp_path / "m")
    assert "No two tasks share an observed example" in text
    assert "33" in Page(text).text and "of the entries were observed" in text
    found = heat_map(ForgettingMatrix.load(tmp_path / "m"))
    assert [task for task, _ in found["rows"]] == ["task 0", "task 1"]
    assert {cell for _, cells in found["rows"] for cell in cells} == {None, (1.0, 5), (2.0, 9)}


@pytest.mark.parametrize("tasks", [0, 1])
def test_small_matrices_have_a_page(tmp_path, tasks):
    made(tasks=tasks).save(tmp_path / "m")
    page = Page(render(tmp_path / "m"))
    assert ("Nothing has been observed" in page.verdict) == (tasks == 0)


@pytest.mark.parametrize("quantity", ["exact-match", "margin", "log-perplexity"])
def test_the_page_says_what_an_entry_is(tmp_path, quantity):
    made(quantity=quantity).save(tmp_path / "m")
    said = {
        "exact-match": "1 where an answer",
        "margin": "took off the margin",
        "log-perplexity": "Log perplexity of the example after",
    }
    text = render(tmp_path / "m")
    assert [key for key, words in said.items() if words in text] == [quantity]


def test_hostile_names_are_text_and_nothing_is_requested(tmp_path):
    matrix = ForgettingMatrix(
        np.ones((2, 2)),
        (HOSTILE.replace("\ud800", ""), "b"),
        ("<img src=x>", "y" * 5000),
        {"base_name": "<script>alert(2)</script>"},
        example_details={
            "<img src=x>": {"prompt": "<b onclick=x>", "answer": "</table>"},
            "y" * 5000: {},
        },
    )
    matrix.save(tmp_path / "m")
    text = render(tmp_path / "m")
    assert_self_contained(text)
    assert "alert(1)" in Page(text).text and "[U+202E]" in Page(text).text
    assert {tag for tag, _ in Page(text).tags}.isdisjoint({"img", "b"})


def test_a_large_matrix_makes_a_small_page(tmp_path):
    made(tasks=120, examples=3000).save(tmp_path / "m")
    text = render(tmp_path / "m")
    assert len(text.encode("utf-8")) < 400_000
    assert f"{3000 - WORST} more are left out" in text
    assert text == render(tmp_path / "m")


def test_report_finds_out_that_a_folder_is_a_matrix(folder):
    found = CliRunner().invoke(app, ["report", str(folder)])
    assert found.stdout == f"{folder / 'report.html'}\n"
    assert (folder / "report.html").read_text("utf-8") == render(folder)
    with pytest.raises(BadSetting, match="could be one of the files"):
        reporting.report(folder, folder / "matrix.npz")


READER = """
const seen = { wide: document.documentElement.scrollWidth - document.documentElement.clientWidth };
const panels = [...document.querySelectorAll("svg.panel")];
seen.panels = panels.filter((it) => it.clientWidth > 150).length;
seen.cells = document.querySelectorAll(".heat td").length;
return seen;
"""


@pytest.mark.parametrize("width", [500, 1200])
def test_a_browser_shows_it(folder, tmp_path, page, width):
    (tmp_path / "page.html").write_text(render(folder), "utf-8")
    page.set_viewport_size({"width": width, "height": 900})
    page.goto((tmp_path / "page.html").as_uri())
    seen = page.evaluate(f"() => {{{READER}}}")
    assert page.faults == []
    assert seen == {"wide": 0, "panels": 1, "cells": 6 * 24}

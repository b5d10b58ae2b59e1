"""The pages tell the truth: figures come from results, links lead somewhere, examples run."""

import re
from pathlib import Path

import pytest

import unwrite
from unwrite import methods
from unwrite.testing import check_method

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_figures_are_those_of_the_committed_results():
    from benchmarks.tables import pages

    for path, content in pages().items():
        assert path.read_text("utf-8") == content, "run: python -m benchmarks.tables"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text("utf-8")):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_default_is_explained():
    text = (ROOT / "docs" / "paper-index.md").read_text("utf-8")
    for name in methods.METHODS:
        section = text.split(f"## {name}\n")[1].split("\n## ")[0]
        for field in methods.describe(name)["fields"]:
            assert f"`{field}" in section or field in ("seed", "precision", "protect"), field


def test_the_verbs_of_the_readme_exist():
    from unwrite.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    named = set(re.findall(r"^unwrite (\w+)", (ROOT / "README.md").read_text("utf-8"), re.M))
    assert named
    assert named <= known


def test_the_edits_of_the_readme_can_be_read(tmp_path):
    block = re.search(r"```json\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    (tmp_path / "edits.jsonl").write_text(block[1], "utf-8")
    assert len(unwrite.read_edits(tmp_path / "edits.jsonl")) == 3


def test_the_example_method_keeps_the_laws(tmp_path):
    page = (ROOT / "docs" / "how-to-extend.md").read_text("utf-8")
    names: dict = {"__name__": "half_way"}
    exec(re.search(r"```python\n(.*?)```", page, re.S)[1], names)
    tuner = unwrite.FullFT(lr=1e-3)
    check_method(names["HalfWay"](fraction=0.9, tuner=tuner), tmp_path)

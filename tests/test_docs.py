"""The pages tell the truth: figures come from results, links lead somewhere, examples run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import unwrite
from unwrite import methods
from unwrite.testing import check_method

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(page for folder in ("docs", "examples") for page in sorted((ROOT / folder).rglob("*.md"))),
]


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
            common = ("seed", "precision", "protect", "accumulate", "optimizer")
            common += ("neighbours", "in_backward", "own_prompts", "skip_right")
            assert f"`{field}" in section or field in common, field


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


# ---- one page a method ---------------------------------------------------------------------------

PARTS = ("Idea", "Equation", "Cost.", "Use it", "Do not use it", "Settings that matter")


def test_every_method_has_a_page_and_every_page_a_method():
    pages = {page.stem for page in (ROOT / "docs" / "methods").glob("*.md")}
    assert pages - {"index"} == set(methods.METHODS)


@pytest.mark.parametrize("name", methods.METHODS)
def test_the_page_of_a_method_is_whole_and_names_real_fields(name):
    text = (ROOT / "docs" / "methods" / f"{name}.md").read_text("utf-8")
    places = [text.index(f"**{part}") for part in PARTS]
    assert places == sorted(places)
    table = text.split("| setting | effect |")[1]
    named = [
        field for row in re.findall(r"^\| (`.*?) \|", table, re.M) for field in row.split(", ")
    ]
    assert named
    assert {field.strip("`") for field in named} <= set(methods.describe(name)["fields"])


# ---- promises, and the site ----------------------------------------------------------------------


@pytest.mark.parametrize("page", ["trust.md", "security.md"])
def test_every_promise_has_its_test(page):
    text = (ROOT / "docs" / page).read_text("utf-8")
    promises = [row for row in text.splitlines() if row.startswith("| ") and "::" in row]
    assert len(promises) > 20
    for row in promises:
        for file, test in re.findall(r"`(test_\w+\.py)::(\w+)`", row.split(" | ")[1]):
            (found,) = (ROOT / "tests").rglob(file)
            assert f"def {test}(" in found.read_text("utf-8"), f"{file} has no {test}"
    assert all(re.search(r"`test_\w+\.py::test_\w+`", row) for row in promises)


def test_every_page_is_in_the_menu_of_the_site():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert set(leaves(site["nav"])) == pages


def leaves(menu):
    for entry in menu:
        if isinstance(entry, str):
            yield entry
        else:
            yield from leaves(*entry.values())


def test_the_reference_names_all_that_is_public():
    text = (ROOT / "docs" / "api.md").read_text("utf-8")
    shown = set(re.findall(r"^::: (\S+)", text, re.M)) | {
        f"{module}.{name.strip()}"
        for module, names in re.findall(
            r"^::: (\S+)\n(?:(?!:::).)*?members: \[(.*?)\]", text, re.M | re.S
        )
        for name in names.split(",")
    }
    for name in unwrite.__all__:
        value = getattr(unwrite, name)
        assert {f"{value.__module__}.{name}", value.__module__} & shown, name


@pytest.mark.slow
def test_the_site_builds_with_every_link_leading_somewhere(tmp_path):
    pytest.importorskip("mkdocs", reason="only with the extra 'docs'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "unwrite" in (tmp_path / "site" / "api.html").read_text("utf-8")

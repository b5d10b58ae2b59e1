"""``unwrite compare`` and ``unwrite sweep``: words in, tables and JSON out."""

import json

import pytest
from comparing import steady
from typer.testing import CliRunner

import unwrite
from unwrite.cli import app
from unwrite.scores import ROLES

LEARN = "full-ft:lr=1e-3:epochs=60"
SCORE_FIELDS = {"token", "exact", "n", "token_low", "token_high", "exact_low", "exact_high"}


def run(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.stderr
    return result


@pytest.fixture(scope="module")
def edits(worlds, tmp_path_factory):
    file = tmp_path_factory.mktemp("edits") / "people.jsonl"
    unwrite.write_edits(file, worlds().edits[:4])
    return file


def test_compare_prints_a_table_for_people_and_one_object_for_programs(
    worlds, edits, tmp_path, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")  # nothing is folded even there
    words = ("compare", worlds().folder, "--edits", edits, "--variant", f"learn={LEARN}")
    words += ("--out", tmp_path / "run", "--seeds", "0,1", "--references", "no-change")
    shown = run(*words)
    assert shown.stdout == ""
    assert "[no change]" in shown.stderr
    assert "100 / 100" in shown.stderr
    assert str(tmp_path / "run" / "table.md") in shown.stderr.replace("\n", "")
    before = steady(tmp_path / "run")
    found = json.loads(run(*words, "--json").stdout)
    assert set(found) == {"run", "rows", "failed"}
    assert [(row["method"], row["seed"]) for row in found["rows"]] == [
        ("[no change]", None),
        ("learn", 0),
        ("learn", 1),
    ]
    for row in found["rows"]:
        assert row["edits"] == "people"
        assert set(row["seconds"]) == {"train", "arithmetic", "observe"}
        for side in ("before", "after"):
            assert set(row["scores"][side]) == set(ROLES)
            assert all(set(score) == SCORE_FIELDS for score in row["scores"][side].values())
    assert steady(tmp_path / "run") == before


def test_plain_names_and_settings_can_stand_in_one_list(worlds, edits, tmp_path):
    words = ("compare", worlds().folder, "--edits", edits, "--out", tmp_path, "--token-only")
    words += ("--references", "none", "--limit", "1,3")
    found = json.loads(run(*words, "--methods", f"full-ft,{LEARN}", "--json").stdout)
    rows = [(row["method"], row["size"], row["records"]) for row in found["rows"]]
    assert rows == [(one, n, n) for n in (1, 3) for one in ("full-ft", LEARN)]
    assert found["rows"][0]["scores"]["after"]["reliability"]["exact"] is None


def test_modes_on_the_command_line(worlds, edits, tmp_path):
    words = ("compare", worlds().folder, "--edits", edits, "--variant", f"learn={LEARN}")
    run(*words, "--out", tmp_path / "seq", "--mode", "sequential", "--chunk", "2", "--plant")
    text = (tmp_path / "seq" / "table.md").read_text()
    assert "After each step" in text and "planted" in text
    run(*words, "--out", tmp_path / "one", "--mode", "single", "--references", "none")
    assert "Mode: single." in (tmp_path / "one" / "table.md").read_text()


def test_sweep_marks_the_front(worlds, edits, tmp_path):
    words = ("sweep", worlds().folder, "--edits", edits, "-m", "full-ft", "--out", tmp_path)
    words += ("--over", "lr=1e-3,1e-9", "--set", "epochs=60", "--references", "none")
    found = json.loads(run(*words, "--json").stdout)
    assert [row["settings"]["lr"] for row in found["rows"]] == [1e-3, 1e-9]
    text = (tmp_path / "table.md").read_text()
    assert "| full-ft lr=1e-3 *" in text  # it learns
    assert "| full-ft lr=1e-9 *" in text  # it leaves bystanders alone


@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("--methods", "no-such"),
        ("--variant", "x=full-ft:nothing=1"),
        ("--methods", "full-ft", "--seeds", "zero"),
        ("--methods", "full-ft", "--seeds", ","),
        ("--methods", "full-ft", "--limit", "0"),
        ("--methods", "full-ft", "--mode", "sideways"),
        ("--methods", "full-ft", "--references", "no-such"),
        ("--methods", "full-ft", "--plant", "--only-known"),
        ("--methods", "full-ft,full-ft"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_refused_with_a_sentence(worlds, edits, tmp_path, extra):
    words = ("compare", worlds().folder, "--edits", edits, "--out", tmp_path / "run", *extra)
    result = run(*words, code=2)
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert json.loads(run(*words, "--json", code=2).stdout) == {"error": line[7:]}
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "extra",
    [
        ("--over", "lr"),
        ("--over", "no=1,2"),
        ("--over", "lr=1", "--over", "lr=2"),
        ("--over", "lr=1", "--set", "lr=2"),
        ("--over", "lr="),
    ],
    ids=str,
)
def test_what_cannot_be_swept_is_refused_with_a_sentence(worlds, edits, tmp_path, extra):
    words = ("sweep", worlds().folder, "--edits", edits, "-m", "full-ft", "--out", tmp_path / "run")
    (line,) = run(*words, *extra, code=2).stderr.splitlines()
    assert line.startswith("Error: ")
    assert not (tmp_path / "run").exists()


def test_a_comparison_has_a_page(worlds, edits, tmp_path):
    words = ("compare", worlds().folder, "--edits", edits, "--methods", "full-ft:epochs=1")
    run(*words, "--out", tmp_path / "run", "--references", "none")
    page = tmp_path / "run" / "report.html"
    written = page.read_bytes()
    page.unlink()
    assert run("report", tmp_path / "run").stdout == f"{page}\n"
    assert page.read_bytes() == written
    other = tmp_path / "other.html"
    assert run("report", tmp_path / "run", "--out", other).stdout == f"{other}\n"
    assert other.read_bytes() == written
    table = (tmp_path / "run" / "table.md").read_bytes()
    result = run("report", tmp_path / "run", "--out", tmp_path / "run" / "table.md", code=2)
    assert "could be one of the files" in result.stderr
    assert (tmp_path / "run" / "table.md").read_bytes() == table


def test_the_help_explains_how_to_name_methods():
    for verb in ("compare", "sweep"):
        text = " ".join(run(verb, "--help").stdout.replace("│", " ").split())
        assert "Pareto" in text or "LABEL=NAME:KEY=VALUE" in text


def test_comparing_on_a_home_says_what_to_do(worlds, edits, tmp_path):
    unwrite.open(tmp_path / "home", base=worlds().folder)
    words = ("compare", tmp_path / "home", "--edits", edits, "--methods", "full-ft")
    assert "Export it" in run(*words, "--out", tmp_path / "run", code=2).stderr

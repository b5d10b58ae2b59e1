"""A home to be harmed: one update in it, and a file of edits for the next."""

import re
import shutil

import pytest
from processes import Processes
from typer.testing import CliRunner

import unwrite
from unwrite.cli import app

METHOD = unwrite.FullFT(epochs=1, until="epochs", lr=1e-3)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return Processes(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def original(worlds, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    home = unwrite.open(folder / "home", base=worlds().folder)
    home.update(worlds().edits[:2], METHOD)
    unwrite.write_edits(folder / "edits.jsonl", worlds().edits[10:12])
    return folder


@pytest.fixture
def place(original, tmp_path):
    shutil.copytree(original / "home", tmp_path / "home")
    shutil.copy(original / "edits.jsonl", tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def sentence():
    """A function that runs a command: exit code 2, one sentence that matches, nothing else."""

    def run(pattern, *words):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 2, (result.stderr, result.exception)
        assert result.exception is None or isinstance(result.exception, SystemExit)
        lines = [x for x in result.stderr.splitlines() if not x.startswith("Loading ")]
        assert len(lines) == 1, lines
        assert lines[0].startswith("Error: ")
        assert re.search(pattern, lines[0]), lines[0]
        assert result.stdout == ""
        return lines[0]

    return run

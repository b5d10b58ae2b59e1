"""A home to be harmed: one update in it, and a file of edits for the next."""

import re

import pytest
from typer.testing import CliRunner

import unwrite
from unwrite.cli import app

METHOD = unwrite.FullFT(epochs=1, until="epochs", lr=1e-3)


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

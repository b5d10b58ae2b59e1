"""A comparison that was killed and started again gives the tables of one that was not."""

import json
import shutil
import signal

import pytest
from comparing import SHORT, files, steady
from processes import Processes

import unwrite

SETTINGS = "full-ft:epochs=1:until=epochs:lr=1e-3"


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return Processes(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def edits(worlds, tmp_path_factory):
    file = tmp_path_factory.mktemp("edits") / "edits.jsonl"
    unwrite.write_edits(file, worlds().edits[:2])
    return file


@pytest.fixture(scope="module")
def words(worlds, edits):
    """A comparison with a planted start, a reference row and two seeds."""
    return (
        *("compare", worlds().folder, "--edits", edits, "--variant", f"a={SETTINGS}"),
        *("--variant", "b=lora:epochs=1:until=epochs", "--references", "no-change,random-delta"),
        *("--plant", "--seeds", "0,1", "--token-only", "--out"),
    )


@pytest.fixture(scope="module")
def undisturbed(processes, words, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert processes.run(*words, run).code == 0
    return run


def test_a_run_killed_anywhere_goes_on_to_the_same_tables(processes, words, undisturbed, tmp_path):
    # The steps on disk are too many to be killed at all of them: every 79th, and the first few.
    number, kills, code = 0, 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        number += 1 if number < 4 else 79
        run = tmp_path / str(number)
        code = processes.run(*words, run, die_at=number).code
        kills += 1
        if code == -signal.SIGKILL:
            assert processes.run(*words, run).code == 0
        assert steady(run) == steady(undisturbed), number
        assert files(run) == files(undisturbed), number
        shutil.rmtree(run)
    assert code == 0
    assert kills > 6


def test_a_run_killed_again_and_again_ends_with_the_same_tables(
    processes, words, undisturbed, tmp_path
):
    run, code, rounds = tmp_path / "run", -signal.SIGKILL, 0
    while code == -signal.SIGKILL:
        rounds += 1
        code = processes.run(*words, run, die_at=60).code
        assert rounds < 30, "it never gets any further"
    assert code == 0
    assert rounds > 2
    assert steady(run) == steady(undisturbed)
    assert files(run) == files(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "moment",
    ["unwrite.methods.full_ft.fine_tune", "unwrite.bench.perplexity", "unwrite.tables.write_json"],
)
def test_an_interrupted_run_goes_on(processes, words, undisturbed, tmp_path, number, moment):
    run = tmp_path / "run"
    process = processes.start(*words, run, wait_in=moment)
    process.arrived()
    assert process.send(number) == 130
    assert "Traceback" not in process.err
    assert process.err.splitlines()[-1].endswith("the same command goes on from there.")
    assert processes.run(*words, run).code == 0
    assert steady(run) == steady(undisturbed)
    assert files(run) == files(undisturbed)


def test_two_runs_on_one_folder_exclude_each_other(processes, words, undisturbed, tmp_path):
    run = tmp_path / "run"
    first = processes.start(*words, run, wait_in="unwrite.bench.perplexity")
    first.arrived()
    second = processes.run(*words, run)
    assert second.code == 2
    assert "Another process" in second.err
    assert first.go_on() == 0
    assert steady(run) == steady(undisturbed)


def test_a_full_disk_ends_with_a_sentence_and_the_run_goes_on(worlds, tmp_path, monkeypatch):
    import errno

    from unwrite import cell

    real = cell.write_json

    def full(path, value):
        if path.name == "result.json":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, value)

    words = (worlds().folder, list(worlds().edits[:2]), {"a": SHORT}, tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(cell, "write_json", full)
        with pytest.raises(unwrite.UnwriteError, match="disk is full"):
            unwrite.compare(*words, references=())
    assert json.loads((tmp_path / "run" / "table.json").read_text())["rows"] == []
    assert len(unwrite.compare(*words, references=()).rows) == 1

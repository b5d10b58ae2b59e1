"""Log files and trackers: what was said stays readable, and figures of training reach trackers."""

import importlib.util
import io
import json
import os
import re
from typing import ClassVar

import pytest
from rich.console import Console
from typer.testing import CliRunner

import unwrite
from unwrite import console
from unwrite.cli import app
from unwrite.console import LOG, LOG_FILE, TRACK, Terminal
from unwrite.errors import BadSetting
from unwrite.logbook import Logbook
from unwrite.progress import Measured
from unwrite.tracking import Trackers

STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ?")


@pytest.fixture
def facts(worlds, tmp_path):
    unwrite.write_edits(tmp_path / "facts.jsonl", worlds().edits[:2])
    return tmp_path / "facts.jsonl"


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def logged(path):
    """What a log says, without the times; every line has one and none has an escape."""
    text = path.read_text("utf-8")
    assert "\x1b" not in text
    assert all(STAMP.match(line) for line in text.splitlines())
    return [STAMP.sub("", line) for line in text.splitlines()]


@pytest.mark.parametrize("terminal", [True, False])
def test_all_that_is_said_is_in_the_log(terminal, tmp_path, monkeypatch):
    monkeypatch.setattr(console, "PLAIN_EVERY", 0.0)
    out = Terminal()
    out.console = Console(force_terminal=terminal, width=30, file=io.StringIO(), highlight=False)
    out.log_to(tmp_path / "log.txt")
    out.say("one\ntwo")
    out.warn("careful\x1b[31m")
    out.fail("it broke")
    out.table("Scores", ("name", "a long heading"), [["x" * 60, "12.5"]], numbers=1)
    with out.stage("working", 4) as advance:
        advance(1, "")
        advance(1, Measured("loss", 0.5))
    out.close()
    lines = logged(tmp_path / "log.txt")
    assert lines[0].startswith("$ unwrite")
    for line in ("one", "two", "Warning: careful[31m", "Error: it broke"):
        assert line in lines
    assert any("x" * 60 in line and "12.5" in line for line in lines)
    assert any(re.fullmatch(r"working: 2 of 4, about \d+ s left, loss 0.500", one) for one in lines)
    assert sum(line.startswith("working: 1 of 4") for line in lines) == 1


def test_a_log_waits_for_the_folder_that_it_is_about(tmp_path):
    folder = tmp_path / "run"
    log = Logbook(folder / "log.txt", when=(folder / "plan.json").exists)
    log.write("first")
    folder.mkdir()
    log.write("second")
    assert not list(folder.iterdir())
    (folder / "plan.json").touch()
    log.write("third")
    assert logged(folder / "log.txt") == ["first", "second", "third"]
    Logbook(folder / "log.txt").write("again \ud800")
    assert logged(folder / "log.txt")[-1] == "again \\ud800"


def test_a_log_that_cannot_be_written_is_refused_at_once(tmp_path, facts):
    with pytest.raises(BadSetting, match="cannot be written"):
        Logbook(tmp_path / "missing" / "log.txt")
    done = run("--log-file", tmp_path, "update", tmp_path / "home", facts)
    assert done.exit_code == 2 and "log file" in done.stderr
    assert not (tmp_path / "home").exists()


def test_a_comparison_leaves_a_log_and_refused_input_leaves_none(worlds, facts, tmp_path):
    words = ["compare", worlds().folder, "--edits", facts, "--out", tmp_path / "run"]
    words += ["--methods", "ft-c", "--references", "none", "--token-only"]
    assert run(*words).exit_code == 0
    first = logged(tmp_path / "run" / LOG)
    assert any(line.startswith("1 cells, 0 of them finished") for line in first)
    assert run(*words).exit_code == 0  # goes on: nothing is left to do, and the log is longer
    assert logged(tmp_path / "run" / LOG)[: len(first)] == first
    words[words.index(tmp_path / "run")] = tmp_path / "other"
    assert run(*words, "--methods", "none").exit_code == 2
    assert not (tmp_path / "other").exists()


def test_every_verb_writes_the_log_file_it_is_given(worlds, facts, tmp_path, monkeypatch):
    path = tmp_path / "all.txt"
    home = tmp_path / "home"
    update = ["update", home, facts, "--base", worlds().folder, "--set", "lr=1e-3"]
    assert run("--log-file", path, *update).exit_code == 0
    lines = logged(path)
    assert any("Committed as u-" in line for line in lines)
    assert any("reliability" in line and "100.0" in line for line in lines)
    assert LOG_FILE not in os.environ
    assert run("--log-file", path, "ask", home, worlds().edits[0].prompt).exit_code == 0
    assert logged(path)[-1] == worlds().edits[0].new
    assert run("--log-file", path, "show", home, "u-00000000").exit_code == 2
    assert any(line.startswith("Error: ") for line in logged(path))


def test_a_committed_update_leaves_a_log_in_its_home_and_a_failed_one_none(
    worlds, facts, tmp_path, snapshot
):
    home = tmp_path / "home"
    update = ["update", home, facts, "--set", "lr=1e-3"]
    assert run(*update, "--base", worlds().folder).exit_code == 0
    lines = logged(home / LOG)
    assert lines[0].startswith("$ unwrite")
    assert any("Committed as u-" in line for line in lines)
    before = snapshot(home)
    assert run(*update, "--require", "perplexity_ratio<0.01").exit_code == 3
    assert snapshot(home) == before
    assert run(*update).exit_code == 0
    assert logged(home / LOG)[: len(lines)] == lines
    assert not any("perplexity_ratio" in line for line in logged(home / LOG))


def test_a_log_that_can_no_longer_be_written_ends_and_the_update_stands(worlds, facts, tmp_path):
    home = tmp_path / "home"
    assert run("update", home, facts, "--base", worlds().folder).exit_code == 0
    (home / LOG).unlink()
    (home / LOG).mkdir()
    done = run("update", home, facts)
    assert done.exit_code == 0
    assert done.stderr.count("ends here: Is a directory.") == 1
    assert len(unwrite.open(home).ledger.applied) == 2


class Fake:
    """A tracker that remembers."""

    made: ClassVar[list["Fake"]] = []
    requires_logging_directory = True

    def __init__(self, run, logging_dir):
        self.run, self.folder, self.rows, self.open = run, logging_dir, [], False
        Fake.made.append(self)

    def start(self):
        self.open = True

    def log(self, values, step):
        assert self.open
        self.rows.append((dict(values), step))

    def finish(self):
        self.open = False


@pytest.fixture
def fake(monkeypatch):
    from accelerate import tracking

    class Name(str):
        value = property(str)

    monkeypatch.setattr(tracking, "LOGGER_TYPE_TO_CLASS", {"fake": Fake, "absent": Fake})
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [Name("fake")])
    Fake.made.clear()
    return Fake


def test_the_loss_of_every_step_reaches_the_tracker(fake, worlds, facts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["update", "home", facts, "--base", worlds().folder, "--method", "full-ft"]
    words += ["--set", "epochs=3", "--set", "until=epochs", "--set", "batch_size=1"]
    assert run("--track", "fake", *words).exit_code == 0
    (made,) = fake.made
    assert not made.open
    assert [step for _, step in made.rows] == list(range(1, 7))
    assert {name for values, _ in made.rows for name in values} == {"training/loss"}
    assert all(value > 0 for values, _ in made.rows for value in values.values())


def test_fine_tuning_is_tracked_too(fake, worlds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": edit.prompt, "completion": edit.new} for edit in worlds().edits[:8]]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["finetune", worlds().folder, "--task", "task.jsonl", "--out", "tuned"]
    assert run("--track", "fake", *words, "--set", "epochs=1").exit_code == 0
    (made,) = fake.made
    assert made.rows and made.rows[0][0].keys() == {"learning the task/loss"}
    assert (tmp_path / "tuned" / "run" / LOG).is_file()


def test_trackers_that_are_not_there_are_refused(fake, tmp_path):
    with pytest.raises(BadSetting, match=r"no tracker 'other'\. Trackers: absent, fake"):
        Trackers(["other"], tmp_path, "x")
    with pytest.raises(BadSetting, match="not installed"):
        Trackers(["absent"], tmp_path, "x")
    done = run("--track", "other", "methods")
    assert done.exit_code == 2 and "no tracker" in done.stderr
    assert TRACK not in os.environ


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="needs the extra 'trackers'"
)
def test_tensorboard_reads_the_curves(tmp_path):
    from accelerate import Accelerator
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Accelerator(cpu=True)  # as training has one
    trackers = Trackers(["tensorboard"], tmp_path, "run")
    for value in (3.0, 2.0):
        trackers.log("training", Measured("loss", value))
    trackers.close()
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("training/loss")] == [
        (1, 3.0),
        (2, 2.0),
    ]

"""What a killed process leaves behind is removed by the next command; what is in use never is."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

import unwrite
from unwrite import scratch
from unwrite.delta import SCRATCH, Delta

METHOD = unwrite.FullFT(epochs=1, until="epochs", lr=1e-3)
QUICK = ("--method", "full-ft", "--set", "epochs=1", "--set", "until=epochs", "--set", "lr=1e-3")


@pytest.fixture(scope="module")
def original(original, worlds):
    """With examples of a forgetting matrix beside it."""
    lines = [json.dumps({"prompt": one.prompt, "answer": one.old}) for one in worlds().edits[:3]]
    (original / "examples.jsonl").write_text("\n".join(lines))
    return original


def killed(process):
    process.arrived()
    assert process.send(signal.SIGKILL) == -signal.SIGKILL


def hidden(folder):
    return {one.name for one in folder.iterdir() if one.name.startswith(".")} - {".lock"}


def temporary(process):
    """The scratch folders among the system's temporary files that are of one process."""
    return list(Path(tempfile.gettempdir()).glob(f".{SCRATCH}.*.{process.pid}.partial"))


# Commands that write to a home, or out of one; each gets (the folder of it all, an update's id).
WRITERS = {
    "update": lambda place, one: ("update", place / "home", place / "edits.jsonl", *QUICK),
    "undo": lambda place, one: ("undo", place / "home", one),
    "export": lambda place, one: ("export", place / "home", place / "second"),
}


@pytest.mark.parametrize("verb", WRITERS)
def test_every_command_that_writes_sweeps_killed_exports_reports_and_trainings(
    processes, place, verb
):
    """Wherever they lie: the export went to a folder that no other command knows of."""
    home, elsewhere = place / "home", place / "far" / "away"
    (update,) = unwrite.open(home).ledger.live()
    export = processes.start(
        "export", home, elsewhere / "out", wait_in="unwrite.export.save_weights"
    )
    training = processes.start(
        *("update", home, place / "edits.jsonl", "--method", "f-learning"),
        *("--set", "forget.epochs=1", "--set", "learn.epochs=1"),
        wait_in="unwrite.record.identity",
    )
    export.arrived()
    training.arrived()
    killed(training)
    killed(export)
    report = processes.run("report", home, die_at=2)
    assert report.code == -signal.SIGKILL
    assert hidden(elsewhere) == {f".out.{export.pid}.partial"}
    assert {name.split(".")[1] for name in hidden(home)} == {"exporting", "report"}
    assert temporary(training), "f-learning keeps its first delta in scratch files"
    assert unwrite.open(home).verify() == []

    assert processes.run(*WRITERS[verb](place, update)).code == 0
    assert hidden(elsewhere) == hidden(home) == set()
    assert not temporary(training)
    assert unwrite.open(home).verify() == []


@pytest.mark.parametrize("verb", WRITERS)
def test_what_living_processes_use_stays(processes, place, verb):
    home = place / "home"
    (update,) = unwrite.open(home).ledger.live()
    export = processes.start("export", home, place / "out", wait_in="unwrite.export.save_weights")
    export.arrived()
    other = place / "other"
    shutil.copytree(home, other)
    training = processes.start(
        *("update", other, place / "edits.jsonl", "--method", "f-learning"),
        *("--set", "forget.epochs=1", "--set", "learn.epochs=1"),
        wait_in="unwrite.record.identity",
    )
    training.arrived()
    before = temporary(training)
    assert before
    assert processes.run(*WRITERS[verb](place, update)).code == 0
    assert temporary(training) == before
    assert export.go_on() == 0
    assert training.go_on() == 0
    assert (place / "out" / "config.json").is_file()
    assert hidden(place) == hidden(home) == set()
    assert not temporary(training)
    assert unwrite.open(other).verify() == []


def test_a_locked_scratch_folder_stays_whatever_its_process_id_says(tmp_path):
    """A process of another container has an id that is nobody's here."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    used = tmp_path / f".out.{dead.pid}.partial"
    used.mkdir()
    note = tmp_path / f".exporting.{dead.pid}.abcdefgh"
    note.write_bytes(os.fsencode(used))
    holder = os.open(used, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    scratch.sweep_noted(tmp_path)
    assert used.exists() and note.exists()
    os.close(holder)
    scratch.sweep_noted(tmp_path)
    assert not used.exists() and not note.exists()


def test_a_note_leads_to_nothing_but_scratch(tmp_path):
    """Whoever can write into a home cannot make it delete anything else."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    precious = [tmp_path / name for name in ("thesis", ".thesis.partial", f"x.{dead.pid}.partial")]
    for folder in precious:
        folder.mkdir()
        (folder / "file").touch()
    link = tmp_path / f".link.{dead.pid}.partial"
    link.symlink_to(precious[0])
    contents = [os.fsencode(one) for one in (*precious, link)] + [b"", b"\0", b"\xff", b"/" * 9000]
    for number, content in enumerate(contents):
        (tmp_path / f".exporting.{dead.pid}.note{number:04}").write_bytes(content)
    scratch.sweep_noted(tmp_path)
    assert all((folder / "file").exists() for folder in precious)
    assert link.is_symlink()
    assert not list(tmp_path.glob(".exporting.*"))


def test_scratch_of_a_delta_is_gone_with_the_delta():
    made = Delta.nothing().stored()
    folder = made._saved.folder
    assert folder.is_dir()
    scratch.sweep_temporary(SCRATCH)
    assert folder.is_dir(), "it is in use"
    del made
    assert not folder.exists()


def test_a_killed_collection_leaves_no_halves(processes, worlds, place):
    words = (
        *("forgetting", "collect", place / "matrix", "--base", worlds().folder),
        *("--edits", place / "edits.jsonl", "--examples", place / "examples.jsonl"),
        *("--method", "full-ft", *QUICK),
    )
    number, halves, code = 0, 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        number += 1
        code = processes.run(*words, die_at=number).code
        found = place / "matrix"
        halves += found.exists() and bool(hidden(found))
        if number % 3 == 0 or code == 0:
            assert processes.run(*words).code == 0
            assert hidden(found) == set()
            shutil.rmtree(found)
    assert code == 0
    assert number > 8
    assert halves

"""Disks that refuse, memory that runs out, clocks, crowds, impatience, and a hub that is silent."""

import datetime
import errno
import json
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import unwrite
from unwrite import present, record
from unwrite.errors import DamagedFile, HomeError, ModelUnavailable, UnwriteError
from unwrite.forgetting import ForgettingMatrix

METHOD = unwrite.FullFT(epochs=1, until="epochs", lr=1e-3)
SHORT = ("--method", "full-ft", "--set", "epochs=1", "--set", "until=epochs", "--set", "lr=1e-3")

# ---- the disk ------------------------------------------------------------------------------------


def failing(monkeypatch, name, code, number, only_folders=False):
    """From its call of that number on, a system call fails; returns the count of calls."""
    count, real = [0], getattr(os, name)

    def call(*arguments, **named):
        counts = name != "open" or arguments[1] & os.O_CREAT
        if name == "fsync":
            counts = stat.S_ISDIR(os.fstat(arguments[0]).st_mode) == only_folders
        if counts:
            count[0] += 1
            if count[0] >= number:
                raise OSError(code, os.strerror(code))
        return real(*arguments, **named)

    monkeypatch.setattr(os, name, call)
    return count


@pytest.mark.parametrize(
    ("call", "code", "said"),
    [
        ("open", errno.EACCES, "permission is denied|Permission denied"),
        ("mkdir", errno.EACCES, "permission is denied"),
        ("replace", errno.EPERM, "permission is denied|Operation not permitted"),
        ("open", errno.EROFS, "read-only|Read-only"),
        ("write", errno.EIO, "input/output error|Input/output error"),
        ("fsync", errno.EIO, "input/output error|Input/output error"),
        ("fsync", errno.EDQUOT, "quota"),
    ],
)
def test_a_disk_that_refuses_at_any_call_changes_nothing(
    place, snapshot, monkeypatch, call, code, said
):
    home = unwrite.open(place / "home")
    before, number = snapshot(place / "home"), 0
    while True:
        number += 1
        with monkeypatch.context() as patched:
            count = failing(patched, call, code, number)
            try:
                home.update(place / "edits.jsonl", METHOD)
                break
            except UnwriteError as error:
                assert any(one in str(error) for one in said.split("|")), error
        assert snapshot(place / "home") == before, number
    # It goes through once the call that is refused comes after the commit, for hashes that are
    # only a shortcut, or not at all.
    refused = not present.hashes(home.folder, home.base, home.ledger.fingerprint)
    assert number == count[0] + (not refused) > 1
    assert len(home.ledger.live()) == 2
    assert home.verify() == []


def test_a_folder_that_cannot_be_flushed_leaves_before_or_says_that_it_is_after(
    place, snapshot, monkeypatch
):
    """After the rename the line is there, whatever the disk says: that must not be denied."""
    before, number, said = snapshot(place / "home"), 0, []
    while True:
        number += 1
        home = unwrite.open(place / "home")
        with monkeypatch.context() as patched:
            failing(patched, "fsync", errno.EIO, number, only_folders=True)
            try:
                home.update(place / "edits.jsonl", METHOD)
                break
            except UnwriteError as error:
                said.append(str(error))
        if len(home.ledger.live()) == 2:
            assert "the disk reported an error afterwards" in said[-1]
            assert home.verify() == []
            shutil.rmtree(place / "home")
            for name, content in before.items():
                (place / "home" / name).parent.mkdir(parents=True, exist_ok=True)
                (place / "home" / name).write_bytes(content)
        else:
            assert "nput/output error" in said[-1] and "afterwards" not in said[-1]
            assert snapshot(place / "home") == before
    assert sum("afterwards" in one for one in said) == 1
    assert len(said) > 3


def test_an_undo_on_a_disk_that_refuses_changes_nothing(place, snapshot, monkeypatch):
    home = unwrite.open(place / "home")
    (update,) = home.ledger.live()
    before = snapshot(place / "home")
    for call, code in (("fsync", errno.EIO), ("replace", errno.EACCES), ("open", errno.EROFS)):
        with monkeypatch.context() as patched:
            failing(patched, call, code, 1)
            with pytest.raises(UnwriteError):
                home.undo(update)
        assert snapshot(place / "home") == before
    with monkeypatch.context() as patched:
        failing(patched, "fsync", errno.EIO, 1, only_folders=True)
        with pytest.raises(HomeError, match="the disk reported an error afterwards"):
            home.undo(update)
    assert home.ledger.live() == []
    assert home.verify() == []


# ---- memory and numbers --------------------------------------------------------------------------

OUT_OF_MEMORY = {
    "the GPU's": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "the CPU's": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 4611686018427387904 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "Python's": MemoryError(),
}


@pytest.mark.parametrize("whose", OUT_OF_MEMORY)
@pytest.mark.parametrize("where", ["torch.optim.AdamW.step", "unwrite.home.observe"])
def test_memory_that_runs_out_is_a_sentence_and_changes_nothing(
    place, snapshot, monkeypatch, sentence, whose, where
):
    def raising(*_, **__):
        raise OUT_OF_MEMORY[whose]

    before = snapshot(place / "home")
    with monkeypatch.context() as patched:
        patched.setattr(where, raising)
        said = sentence(
            "memory of (the device|this machine) ran out",
            *("update", place / "home", place / "edits.jsonl", *SHORT),
        )
    assert "batch_size" in said or where.endswith("observe")
    assert snapshot(place / "home") == before
    assert unwrite.open(place / "home").update(place / "edits.jsonl", METHOD).committed


def test_the_allocator_of_torch_says_what_the_test_above_takes_for_granted():
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_another_runtime_error_is_a_bug_and_keeps_its_traceback(place, monkeypatch):
    from typer.testing import CliRunner

    from unwrite.cli import app

    def raising(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr("torch.optim.AdamW.step", raising)
    words = ("update", place / "home", place / "edits.jsonl", *SHORT)
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert (result.exit_code, str(result.exception)) == (1, "a bug")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_a_sentence_and_changes_nothing(
    place, snapshot, monkeypatch, sentence, value
):
    import unwrite.training as training

    real, calls = training.row_losses, []

    def broken(*arguments, **named):
        calls.append(1)
        losses = real(*arguments, **named)
        return losses * value if len(calls) == 2 else losses

    monkeypatch.setattr(training, "row_losses", broken)
    before = snapshot(place / "home")
    sentence(
        "loss became (nan|inf) at step 2",
        *("update", place / "home", place / "edits.jsonl", "--method", "full-ft"),
        *("--set", "epochs=3", "--set", "until=epochs"),
    )
    assert snapshot(place / "home") == before


# ---- time ----------------------------------------------------------------------------------------


def test_a_clock_that_goes_backwards_changes_nothing_but_the_dates(place, monkeypatch):
    class Past(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(1970, 1, 2, tzinfo=tz)

    home = unwrite.open(place / "home")
    (first,) = home.ledger.live()
    expected = unwrite.open(shutil.copytree(place / "home", place / "other")).update(
        place / "edits.jsonl", METHOD
    )
    monkeypatch.setattr(record.datetime, "datetime", Past)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    done = home.update(place / "edits.jsonl", METHOD)
    assert (done.id, done.fingerprint) == (expected.id, expected.fingerprint)
    assert all(value >= 0 for value in done.seconds.values())
    home.undo(first)
    assert home.ledger.entries[-1]["at"].startswith("1970-01-02")
    assert home.verify() == []
    assert [entry["do"] for entry in home.history()] == ["init", "apply", "apply", "revert"]
    assert unwrite.report(home.folder).is_file()


# ---- many at once --------------------------------------------------------------------------------


def test_ten_readers_beside_a_writer_see_before_or_after(processes, place):
    home = unwrite.open(place / "home")
    (first,) = home.ledger.live()
    answers = {home.ask("bram lives in")}
    writer = processes.start(
        *("update", place / "home", place / "edits.jsonl", "--set", "lr=2e-3"),
        wait_in="unwrite.home.perplexity",
    )
    writer.arrived()
    verbs = (("verify",), ("ask", "bram lives in"), ("history",), ("show", first), ("diff", first))
    readers = [
        processes.start(verb, place / "home", *rest, "--json")
        for _ in range(2)
        for verb, *rest in verbs
    ]
    assert writer.go_on() == 0
    answers.add(unwrite.open(place / "home").ask("bram lives in"))
    for reader in readers:
        assert reader.wait() == 0, reader.err
        found = json.loads(reader.out)
        assert found.get("ok", True)
        assert found.get("answer") in {None, *answers}
        assert len(found.get("entries", [1, 2])) in (2, 3)
    assert home.verify() == []
    assert len(home.ledger.live()) == 2


# ---- impatience ----------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["unwrite.methods.full_ft.fine_tune", "unwrite.home.perplexity"])
def test_ctrl_c_twice_changes_nothing(processes, original, tmp_path, snapshot, moment):
    draw = random.Random(0)
    before = snapshot(original / "home")
    for number in range(4):
        folder = tmp_path / str(number)
        shutil.copytree(original / "home", folder / "home")
        shutil.copy(original / "edits.jsonl", folder)
        process = processes.start(
            *("update", folder / "home", folder / "edits.jsonl", *SHORT), wait_in=moment
        )
        process.arrived()
        os.kill(process.pid, signal.SIGINT)
        time.sleep(draw.uniform(0.0, 0.02))
        assert process.send(signal.SIGINT) == 130, process.err
        assert "Traceback" not in process.err
        assert process.out == ""
        home = unwrite.open(folder / "home")
        assert home.verify() == []
        assert len(home.ledger.live()) == 1
        home._sweep()
        assert snapshot(folder / "home") == before


# ---- models that are not whole -------------------------------------------------------------------


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def half_a_header(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def nothing_of_it(folder):
    (folder / "model.safetensors").write_bytes(b"")


def a_missing_shard(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def a_flipped_length(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[2] ^= 0x40
    file.write_bytes(content)


@pytest.mark.parametrize(
    "harm", [cut, half_a_header, nothing_of_it, a_missing_shard, a_flipped_length]
)
def test_a_half_downloaded_model_is_refused_and_nothing_is_made(world, tmp_path, sentence, harm):
    harm(world.folder)
    said = "cut off|incomplete|announces|not a safetensors file"
    sentence(said, "init", tmp_path / "home", "--base", world.folder)
    sentence(said, "evaluate", world.folder, "atlas", "--limit", "1")
    assert not (tmp_path / "home" / "ledger.jsonl").exists()


def test_a_hub_that_never_answers_is_given_up_with_a_sentence(tmp_path):
    """A socket that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "unwrite", "init", tmp_path / "home", "--base", "org/model"],
            env=os.environ
            | {
                "HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
                "HF_HUB_OFFLINE": "0",
                "HF_HOME": str(tmp_path / "hub"),
                "NO_PROXY": "*",
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    assert done.returncode == 2, done.stderr
    assert "the hub does not answer" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "home").exists()
    assert time.monotonic() - started < 110


# ---- what lies on disk is damaged ----------------------------------------------------------------


@pytest.fixture
def matrix(tmp_path):
    values = np.random.default_rng(0).normal(size=(3, 7))
    made = ForgettingMatrix(values, ("a", "b", "c"), tuple("1234567"), {"quantity": "x"})
    made.save(tmp_path / "matrix")
    return tmp_path / "matrix"


def test_every_changed_byte_of_a_matrix_is_noticed_or_changes_nothing(matrix, sentence):
    file = matrix / "matrix.npz"
    whole, draw = file.read_bytes(), random.Random(0)
    known = ForgettingMatrix.load(matrix)
    noticed = 0
    for offset in range(len(whole)):
        content = bytearray(whole)
        content[offset] ^= draw.randrange(1, 256)
        file.write_bytes(content)
        try:
            found = ForgettingMatrix.load(matrix)
        except DamagedFile:
            noticed += 1
            continue
        np.testing.assert_array_equal(found.values, known.values)
        assert (found.tasks, found.examples) == (known.tasks, known.examples)
        assert found.provenance == known.provenance
    assert noticed > 0.6 * len(whole), "the rest are dates and the like in the archive"
    file.write_bytes(whole[:-30])
    sentence("is damaged: it is not a forgetting matrix", "forgetting", "show", matrix)


def test_an_archive_that_unpacks_to_more_than_a_matrix_is_refused(matrix, monkeypatch):
    monkeypatch.setattr("unwrite.forgetting.matrix.LARGEST", 100)
    with pytest.raises(DamagedFile, match="not a forgetting matrix"):
        ForgettingMatrix.load(matrix)


def test_a_delta_that_was_cut_is_refused_before_it_is_used(place, sentence):
    home = place / "home"
    (update,) = unwrite.open(home).ledger.live()
    shard = home / "updates" / update / "delta" / "00001.safetensors"
    whole = shard.read_bytes()
    for content in (whole[:-1], whole[:50], b"", whole + b"\0"):
        shard.write_bytes(content)
        for words in (
            ("ask", home, "ada works as a"),
            ("update", home, place / "edits.jsonl", *SHORT),
            ("export", home, place / "out"),
        ):
            sentence("is damaged", *words)
    shard.write_bytes(whole)
    assert unwrite.open(home).verify() == []


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_ledger_that_was_cut_is_refused_by_every_verb(place, sentence, keep):
    home = place / "home"
    (update,) = unwrite.open(home).ledger.live()
    ledger = home / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:keep])
    for words in (
        ("history", home),
        ("ask", home, "ada works as a"),
        ("undo", home, update),
        ("update", home, place / "edits.jsonl", *SHORT),
        ("replay-update", home, update),
    ):
        sentence(r"ledger\.jsonl, line 1|ledger\.jsonl, line 2", *words)


def test_a_model_of_nothing_is_refused(tmp_path):
    with pytest.raises(ModelUnavailable):
        unwrite.load(Path(tmp_path))

"""Whatever happens — a kill, Ctrl-C, a full disk, a changed file — a home is as before or as after.

Kills come before every single step on disk of an update, an undo and an init, in real processes.
"""

import errno
import os
import random
import shutil
import signal
import stat
import subprocess

import pytest
from processes import at_step
from typer.testing import CliRunner

import unwrite
from unwrite import present
from unwrite.cli import app
from unwrite.console import LOG
from unwrite.errors import HomeBusy, HomeError, RequirementNotMet, UnwriteError
from unwrite.home import PARTIAL

SHORT = ("--method", "full-ft", "--set", "epochs=1", "--set", "until=epochs", "--set", "lr=1e-3")
METHOD = unwrite.FullFT(epochs=1, until="epochs", lr=1e-3)


def update_words(place):
    return ("update", place / "home", place / "edits.jsonl", *SHORT)


def fresh(place, original, number):
    """Another copy of the home, for the next kill."""
    folder = place / str(number)
    shutil.copytree(original / "home", folder / "home")
    shutil.copy(original / "edits.jsonl", folder)
    return folder


def check_sound(folder, states):
    """The home verifies clean and is in one of the states; returns which."""
    home = unwrite.open(folder)
    assert home.verify() == []
    live = home.ledger.live()
    assert live in states
    return live


def check_tidy(folder):
    """Nothing is lying about: all that is there, but the log, is in the ledger."""
    home = unwrite.open(folder)
    applied = home.ledger.applied
    assert {one.name for one in folder.iterdir()} - {".lock", LOG} == {
        "base.json",
        "ledger.jsonl",
        "tensors.json",
        "updates",
    }
    plainly = home.base.tensors_with(home.source.folder, home.deltas(home.ledger.live()))
    assert present.hashes(folder, home.base, home.ledger.fingerprint) in ({}, plainly)
    assert {one.name for one in (folder / "updates").iterdir()} == set(applied)
    for name, entry in applied.items():
        update = folder / "updates" / name
        found = {str(f.relative_to(update)) for f in update.rglob("*") if f.is_file()}
        assert found - {f for f in found if f.endswith(".safetensors")} == set(entry["files"])
        assert not list(update.rglob(".*"))


# ---- kills ---------------------------------------------------------------------------------------


def test_an_update_killed_before_any_step_on_disk_is_done_or_was_never_begun(
    processes, original, tmp_path, worlds
):
    before = unwrite.open(original / "home").ledger.live()
    done = fresh(tmp_path, original, "done")
    processes.run(*update_words(done))
    after = unwrite.open(done / "home").ledger.live()
    seen, number, code = set(), 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        number += 1
        folder = fresh(tmp_path, original, number)
        code = processes.run(*update_words(folder), die_at=number).code
        state = check_sound(folder / "home", (before, after))
        seen.add(len(state))
        home = unwrite.open(folder / "home")
        if state == before:
            # The very same update, which has the same id, and so the same folder.
            again = home.update(folder / "edits.jsonl", METHOD)
            assert home.ledger.live() == after == [*before, again.id]
        else:
            home.undo(after[-1], recheck=False)
        check_tidy(folder / "home")
    assert code == 0
    assert number > 20
    assert seen == {1, 2}


def test_a_dropped_update_killed_before_any_step_on_disk_was_never_begun(
    processes, original, tmp_path
):
    before = unwrite.open(original / "home").ledger.live()
    number, code = 5, -signal.SIGKILL  # the steps before are those of any update
    while code == -signal.SIGKILL:
        number += 1
        folder = fresh(tmp_path, original, number)
        words = (*update_words(folder), "--require", "perplexity_ratio<0.01")
        code = processes.run(*words, die_at=number).code
        check_sound(folder / "home", (before,))
        unwrite.open(folder / "home").undo(before[0])  # the next command that writes
        check_tidy(folder / "home")
    assert code == 3
    assert number > 12


def test_an_undo_killed_before_any_step_on_disk_is_done_or_was_never_begun(
    processes, original, tmp_path
):
    (update,) = unwrite.open(original / "home").ledger.live()
    number, code, seen = 0, -signal.SIGKILL, set()
    while code == -signal.SIGKILL:
        number += 1
        folder = fresh(tmp_path, original, number)
        code = processes.run("undo", folder / "home", update, die_at=number).code
        seen.add(len(check_sound(folder / "home", ([update], []))))
        home = unwrite.open(folder / "home")
        if home.ledger.live():
            home.undo(update)
        else:
            home.redo(update)
        check_tidy(folder / "home")
    assert code == 0
    assert seen == {0, 1}


def test_an_init_killed_before_any_step_on_disk_can_be_done_again(processes, worlds, tmp_path):
    number, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        number += 1
        home = tmp_path / str(number)
        words = ("init", home, "--base", worlds().folder)
        code = processes.run(*words, die_at=number).code
        again = unwrite.open(home, base=worlds().folder)
        assert again.verify() == []
        assert {one.name for one in home.iterdir()} == {".lock", "base.json", "ledger.jsonl"}
    assert code == 0
    assert number > 4


def test_an_update_killed_at_any_time_leaves_a_sound_home(processes, original, tmp_path):
    before = unwrite.open(original / "home").ledger.live()
    moments = random.Random(0)
    for number in range(4):
        folder = fresh(tmp_path, original, number)
        words = (*update_words(folder), "--set", "epochs=100000")[:-2]
        process = processes.start(*words[:5], "--set", "epochs=100000", "--set", "until=epochs")
        try:
            process.wait(moments.uniform(0.05, 1.5))
        except AssertionError:
            assert process.send(signal.SIGKILL) == -signal.SIGKILL
        check_sound(folder / "home", (before,))
        unwrite.open(folder / "home").undo(before[0])
        check_tidy(folder / "home")


# ---- interruptions -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["unwrite.methods.full_ft.fine_tune", "unwrite.home.perplexity"])
def test_an_interruption_changes_nothing(processes, place, snapshot, number, moment):
    before = snapshot(place / "home")
    process = processes.start(*update_words(place), wait_in=moment)
    process.arrived()
    assert process.send(number) == 130
    assert process.err.splitlines()[-1].startswith("Error: Interrupted.")
    assert "Traceback" not in process.err
    assert process.out == ""
    assert snapshot(place / "home") == before


def test_an_interruption_of_an_undo_changes_nothing(processes, place, snapshot):
    home = unwrite.open(place / "home")
    home.update(place / "edits.jsonl", METHOD)
    before = snapshot(place / "home")
    words = ("undo", place / "home", home.ledger.live()[0])
    process = processes.start(*words, wait_in="unwrite.home.observe")
    process.arrived()
    assert process.send(signal.SIGINT) == 130
    assert snapshot(place / "home") == before


def test_ctrl_c_at_any_step_on_disk_is_before_or_after(place, snapshot, worlds, monkeypatch):
    """In one process, so that the object goes on being used after every interruption."""
    home = unwrite.open(place / "home")
    said = home.ask("ada lives in")
    before = snapshot(place / "home")
    number, committed = 0, 0
    while True:
        number += 1
        with monkeypatch.context() as patched:
            steps = at_step(number, lambda: signal.raise_signal(signal.SIGINT), patched.setattr)
            try:
                update = home.update(place / "edits.jsonl", METHOD)
                break
            except KeyboardInterrupt:
                assert steps[0] >= number
        if len(home.ledger.live()) == 1:
            assert snapshot(place / "home") == before, number
            assert home.ask("ada lives in") == said
        else:  # it came during the commit, which was finished
            committed += 1
            assert home.verify() == []
            shutil.rmtree(place / "home")
            for name, content in before.items():
                (place / "home" / name).parent.mkdir(parents=True, exist_ok=True)
                (place / "home" / name).write_bytes(content)
            home = unwrite.open(place / "home")
    assert number > 20
    assert committed >= 1
    assert home.ledger.live()[-1] == update.id
    assert home.verify() == []


# ---- two at once ---------------------------------------------------------------------------------


def test_two_writers_exclude_each_other_and_readers_do_not_wait(processes, place, worlds):
    home = unwrite.open(place / "home")
    (first,) = home.ledger.live()
    writer = processes.start(*update_words(place), wait_in="unwrite.home.perplexity")
    writer.arrived()
    for words in (update_words(place), ("undo", place / "home", first)):
        other = processes.run(*words)
        assert other.code == 2
        (line,) = other.err.splitlines()
        assert line.startswith("Error: Another process is changing")
    with pytest.raises(HomeBusy):
        home.undo(first)
    assert home.ledger.live() == [first]
    assert home.verify() == []
    assert home.ask("ada works as a")
    assert home.export(place / "exported")
    assert writer.go_on() == 0
    assert len(home.ledger.live()) == 2
    assert home.verify() == []


def test_a_reader_sees_what_another_process_committed(processes, place):
    home = unwrite.open(place / "home")
    old = home.ask("ada lives in")
    words = ("update", place / "home", place / "edits.jsonl", "--set", "lr=2e-3")
    assert processes.run(*words).code == 0
    assert home.ask("ada lives in") != old
    assert home.ask("ada lives in", at="base") == old


# ---- full and read-only disks --------------------------------------------------------------------


def test_a_disk_that_is_full_at_any_write_changes_nothing(place, snapshot, monkeypatch):
    home = unwrite.open(place / "home")
    before = snapshot(place / "home")
    number = 0
    while True:
        number += 1
        with monkeypatch.context() as patched:
            full_from(number, patched)
            try:
                home.update(place / "edits.jsonl", METHOD)
                break
            except UnwriteError as error:
                assert any(
                    word in str(error) for word in ("disk is full", "Make room", "No space")
                ), error
        assert snapshot(place / "home") == before, number
    assert number > 20
    check_tidy(place / "home")


def full_from(number, patched):
    """From that write on, nothing can be created, written or flushed; removing goes on."""
    count = [0]

    def full(name, real):
        def step(*arguments, **named):
            creates = name != "open" or arguments[1] & os.O_CREAT
            if name == "fsync" and stat.S_ISDIR(os.fstat(arguments[0]).st_mode):
                creates = False
            if creates:
                count[0] += 1
                if count[0] >= number:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **named)

        return step

    for name in ("open", "write", "mkdir", "replace", "fsync"):
        patched.setattr(os, name, full(name, getattr(os, name)))


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a small file system; skips where that is not permitted."""
    mounted = []

    def mount(size):
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a file system cannot be mounted here: {error}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_really_full_disk_ends_in_a_sentence(place, small_disk, snapshot):
    disk = small_disk("640k")
    shutil.copytree(place / "home", disk / "home")
    before = snapshot(disk / "home")
    result = command("update", disk / "home", place / "edits.jsonl", *SHORT)
    sentence(result, "No space left|disk is full")
    assert snapshot(disk / "home") == before
    assert check_sound(disk / "home", (unwrite.open(place / "home").ledger.live(),))


def test_an_export_to_a_full_disk_leaves_nothing(place, small_disk):
    disk = small_disk("100k")
    sentence(command("export", place / "home", disk / "model"), "No space left|disk is full")
    assert list(disk.iterdir()) == []


def test_a_read_only_home_can_be_read_and_says_why_it_cannot_be_changed(place, small_disk):
    disk = small_disk("4m")
    shutil.copytree(place / "home", disk / "home")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    (update,) = unwrite.open(disk / "home").ledger.live()
    for words in (
        ("update", disk / "home", place / "edits.jsonl", *SHORT),
        ("undo", disk / "home", update),
        ("export", disk / "home", disk / "model"),
        ("init", disk / "other", "--base", unwrite.open(place / "home").base.folder),
    ):
        sentence(command(*words), "read-only")
    for words in (("history",), ("ask", "ada works as a"), ("verify",), ("show", update)):
        verb, *rest = words
        assert command(verb, disk / "home", *rest).exit_code == 0


# ---- a base that changes -------------------------------------------------------------------------


@pytest.fixture
def based(original, world, tmp_path):
    """A home with an update on a base of its own, which may be damaged."""
    home = unwrite.open(tmp_path / "home", base=world.folder)
    home.update(world.edits[:1], METHOD)
    return tmp_path / "home", world.folder


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def sentence(result, pattern):
    """Exit code 2, one sentence on standard error that matches, nothing else anywhere."""
    import re

    assert result.exit_code == 2, result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("Loading ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("Error: ")
    assert re.search(pattern, lines[0]), lines[0]
    assert result.stdout == ""


def uses_of_a_base(home):
    (update, *_) = unwrite.open(home).ledger.live()
    yield "ask", home, "ada works as a"
    yield "undo", home, update
    yield "export", home, home.parent / "exported"


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_base_with_one_bit_flipped_is_refused(based, file):
    home, base = based
    content = bytearray((base / file).read_bytes())
    content[len(content) // 2] ^= 1
    (base / file).write_bytes(content)
    for words in uses_of_a_base(home):
        sentence(command(*words), f"base of this home changed.*{file} is different")
    result = command("verify", home)
    assert result.exit_code == 2
    assert file in result.stderr


def test_a_bit_that_flips_without_a_trace_is_found_by_verify(based):
    home, base = based
    file = base / "model.safetensors"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=times)
    result = command("verify", home)
    assert result.exit_code == 2
    assert str(file) in result.stderr


def test_a_base_that_was_only_touched_is_the_same(based):
    home, base = based
    for file in base.iterdir():
        os.utime(file)
    for words in (*uses_of_a_base(home), ("verify", home)):
        assert command(*words).exit_code == 0


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", None])
def test_a_base_that_is_gone_is_asked_for(based, file):
    home, base = based
    if file is None:
        base.rename(base.with_name("moved"))
    else:
        (base / file).unlink()
    for words in uses_of_a_base(home):
        sentence(command(*words), "Put it back")
    assert command("verify", home).exit_code == 2
    assert command("history", home).exit_code == 0
    if file is None:
        base.symlink_to(base.with_name("moved"))
        assert command("verify", home).exit_code == 0


# ---- a home that changes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "verb"),
    [
        ("base.json", "ask"),
        ("base.json", "history"),
        ("ledger.jsonl", "history"),
        ("ledger.jsonl", "update"),
        ("ledger.jsonl", "undo"),
        ("delta/delta.json", "ask"),
        ("where.json", "show"),
        ("delta/00001.safetensors", "ask"),
        ("delta/00001.safetensors", "update"),
        ("delta/00001.safetensors", "export"),
        ("environment.json", "show"),
        ("before.jsonl", "diff"),
        ("after.jsonl", "diff"),
    ],
)
def test_a_damaged_file_of_a_home_is_named_in_one_sentence(place, file, verb):
    home = place / "home"
    (update,) = unwrite.open(home).ledger.live()
    top = file in ("base.json", "ledger.jsonl")
    path = home / file if top else home / "updates" / update / file
    content = bytearray(path.read_bytes())
    position = content.rindex(b"a") if top else len(content) - 3
    content[position] ^= 1
    path.write_bytes(content)
    words = {
        "ask": ("ask", home, "ada works as a"),
        "update": ("update", home, place / "edits.jsonl", *SHORT),
        "undo": ("undo", home, update),
        "export": ("export", home, place / "exported"),
        "show": ("show", home, update),
        "diff": ("diff", home, update),
        "history": ("history", home),
    }[verb]
    named = path.parent if file.endswith(".safetensors") else path
    sentence(command(*words), f"{named}.*(damaged|is not)")
    result = command("verify", home)
    assert result.exit_code == 2
    assert str(named) in result.stderr


def test_undo_needs_the_edits_of_later_updates_only_to_ask_them(place, snapshot):
    home = unwrite.open(place / "home")
    (first,) = home.ledger.live()
    later = home.update(place / "edits.jsonl", METHOD).id
    (home.folder / "updates" / later / "edits.jsonl").write_text("no edits")
    before = snapshot(home.folder)
    sentence(command("undo", home.folder, first), "edits.jsonl is damaged")
    assert snapshot(home.folder) == before
    assert command("undo", home.folder, first, "--no-recheck").exit_code == 0


def test_a_half_made_home_is_no_home_until_it_is_made(worlds, tmp_path):
    home = tmp_path / "home"
    unwrite.open(home, base=worlds().folder)
    (home / "ledger.jsonl").unlink()
    (home / ".ledger.jsonl.x1y2").write_text("half a li")
    with pytest.raises(HomeError, match="not a model home"):
        unwrite.open(home)
    assert unwrite.open(home, base=worlds().folder).verify() == []
    assert not (home / ".ledger.jsonl.x1y2").exists()


def test_a_marker_left_behind_after_the_commit_does_no_harm(place):
    home = unwrite.open(place / "home")
    (first,) = home.ledger.live()
    marker = home.folder / "updates" / first / PARTIAL
    marker.touch()
    assert home.verify() == []
    with pytest.raises(RequirementNotMet):
        home.update(place / "edits.jsonl", METHOD, require=["perplexity_ratio<0.01"])
    assert not marker.exists()
    check_tidy(home.folder)

"""Stored hashes of the present state change what is read and nothing else."""

from __future__ import annotations

import json
import shutil

import pytest
from home_machine import TENSORS, Noise
from processes import at_step

import unwrite
from unwrite import base as bases
from unwrite import present
from unwrite.delta import compose
from unwrite.errors import DamagedFile
from unwrite.present import NAME


@pytest.fixture(scope="module")
def made(worlds, tmp_path_factory):
    """A home with four updates, each of a tensor of its own, and their ids."""
    folder = tmp_path_factory.mktemp("present") / "home"
    home = unwrite.open(folder, base=worlds().folder)
    edits = worlds().edits
    return folder, [
        home.update(edits[n : n + 1], Noise(n, TENSORS[n : n + 1])).id for n in range(4)
    ]


@pytest.fixture
def home(made, tmp_path):
    return unwrite.open(shutil.copytree(made[0], tmp_path / "home"))


def composed(monkeypatch):
    """The names of the tensors that are composed for their hash from now on."""
    names = []

    def noting(weights, deltas, name, *rest):
        names.append(name)
        return compose(weights, deltas, name, *rest)

    monkeypatch.setattr(bases, "compose", noting)
    return names


def test_only_what_changes_is_composed_and_hashed(home, made, worlds, monkeypatch):
    names, ids = composed(monkeypatch), made[1]
    assert home.undo(ids[1], recheck=False).fingerprint == home.fingerprint(home.ledger.live())
    assert sorted(names) == sorted({*TENSORS[:4]} - {TENSORS[1]}), "only by the plain way"
    names.clear()
    home.update(worlds().edits[4:5], Noise(9, TENSORS[2:3]))
    assert names == [TENSORS[2]]
    names.clear()
    home.undo(ids[2], recheck=False)
    assert names == [TENSORS[2]], "another update has changed it, too"
    assert unwrite.open(home.folder).verify() == []


def test_the_first_update_and_the_last_undo_need_no_file(worlds, tmp_path, monkeypatch):
    home = unwrite.open(tmp_path / "home", base=worlds().folder)
    names = composed(monkeypatch)
    done = home.update(worlds().edits[:1], Noise())
    assert names == [*Noise().tensors]
    (home.folder / NAME).unlink()
    assert home.undo(done.id).fingerprint == home.base.fingerprint
    assert home.verify() == []


def forged(file, change):
    tensors = json.loads(file.read_text())
    change(tensors)
    file.write_text(json.dumps(tensors))


def renamed(tensors):
    """The same lines under another reading: one name fewer, its line in the value before it."""
    first, second = sorted(tensors)[:2]
    tensors[first] += f"\n{second} {tensors.pop(second)}"


HARM = {
    "missing": lambda file: file.unlink(),
    "no text": lambda file: file.write_bytes(b"\xff\x00"),
    "no JSON": lambda file: file.write_text(file.read_text()[:-9]),
    "a list": lambda file: file.write_text("[]"),
    "a hash": lambda file: forged(file, lambda one: one.update({TENSORS[0]: "0" * 64})),
    "a name": lambda file: forged(file, lambda one: one.pop(TENSORS[0])),
    "a number": lambda file: forged(file, lambda one: one.update({TENSORS[0]: 1})),
    "no hash": lambda file: forged(file, lambda one: one.update({TENSORS[0]: "\ud800"})),
    "other lines": lambda file: forged(file, renamed),
}


@pytest.mark.parametrize("harmful", HARM.values(), ids=HARM)
def test_what_is_not_of_the_present_state_counts_for_nothing(harmful, home, made):
    ids = made[1]
    right = home.fingerprint([one for one in ids if one != ids[1]])
    harmful(home.folder / NAME)
    assert home.undo(ids[1], recheck=False).fingerprint == right
    assert unwrite.open(home.folder).verify() == []


def test_hashes_of_another_state_are_not_taken(home, made):
    """As when the ledger is put back from a copy and the hashes are not."""
    ids = made[1]
    before = {name: (home.folder / name).read_bytes() for name in ("ledger.jsonl", NAME)}
    right = home.undo(ids[1], recheck=False).fingerprint
    (home.folder / "ledger.jsonl").write_bytes(before["ledger.jsonl"])
    assert (home.folder / NAME).read_bytes() != before[NAME]
    assert home.undo(ids[1], recheck=False).fingerprint == right
    assert home.verify() == []


def test_a_link_out_of_the_home_is_not_followed_but_replaced(home, made, tmp_path):
    (home.folder / NAME).rename(tmp_path / "elsewhere")
    (home.folder / NAME).symlink_to(tmp_path / "elsewhere")
    kept = (tmp_path / "elsewhere").read_bytes()
    home.undo(made[1][1], recheck=False)
    assert not (home.folder / NAME).is_symlink()
    assert (tmp_path / "elsewhere").read_bytes() == kept
    assert home.verify() == []


def test_damage_elsewhere_does_not_stand_in_the_way_and_is_found(home, made):
    """An undo reads what it changes. What it does not read is checked by whatever uses it."""
    ids = made[1]
    (file,) = (home.folder / "updates" / ids[0] / "delta").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 16
    file.write_bytes(content)
    home = unwrite.open(home.folder)
    home.undo(ids[1], recheck=False)
    assert any(ids[0] in one for one in home.verify())
    with pytest.raises(DamagedFile, match="damaged"):
        home.ask("ada lives in")


def test_a_damaged_update_can_be_undone(home, made):
    ids = made[1]
    right = home.fingerprint([one for one in ids if one != ids[1]])
    for file in (home.folder / "updates" / ids[1] / "delta").iterdir():
        file.write_bytes(file.read_bytes()[:-5])
    assert unwrite.open(home.folder).undo(ids[1], recheck=False).fingerprint == right


def test_killed_at_any_step_the_hashes_fit_or_count_for_nothing(made, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    ids = made[1]
    number, finished = 0, False
    while not finished:
        number += 1
        home = unwrite.open(shutil.copytree(made[0], tmp_path / str(number)))
        with monkeypatch.context() as patched:
            at_step(number, kill, patched.setattr)
            try:
                home.undo(ids[1], recheck=False)
                finished = True
            except Killed:
                finished = False
        again = unwrite.open(home.folder)
        assert again.verify() == []
        again.undo(ids[2], recheck=False)  # from either state, with the hashes that are there
        assert again.verify() == []
        assert not list(again.folder.glob(".*-*"))
    assert number > 5


def test_a_disk_that_fills_up_after_the_commit_is_no_reason_to_fail(home, made, monkeypatch):
    def full(*_arguments):
        raise OSError("no space left")

    monkeypatch.setattr(present, "write_json", full)
    done = home.undo(made[1][1], recheck=False)
    assert home.ledger.live() == list(done.live)
    assert home.undo(made[1][2], recheck=False).fingerprint == home.fingerprint(home.ledger.live())

"""A stored sum changes how fast a state is composed and nothing else."""

from __future__ import annotations

import json
import shutil

import pytest
from home_machine import Noise
from processes import at_step
from typer.testing import CliRunner

import unwrite
from unwrite.cli import app
from unwrite.compaction import NAME
from unwrite.delta import Delta, Prefix
from unwrite.errors import DamagedFile
from unwrite.weights import Weights, fingerprint

TENSORS = ("model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight")
ENCODINGS = ("dense", "masked", "low-rank")


def noise(number):
    return Noise(number, TENSORS[: 1 + number % 2], ENCODINGS[number % 3])


@pytest.fixture(scope="module")
def made(worlds, tmp_path_factory):
    """A home with five updates, the second of them undone, and its ids."""
    folder = tmp_path_factory.mktemp("compaction") / "home"
    home = unwrite.open(folder, base=worlds().folder)
    ids = [home.update(worlds().edits[n : n + 1], noise(n)).id for n in range(5)]
    home.undo(ids[1], recheck=False)
    return folder, ids


@pytest.fixture
def home(made, tmp_path):
    return unwrite.open(shutil.copytree(made[0], tmp_path / "home"))


def counted(monkeypatch):
    """The folders of the deltas that are opened from now on."""
    opened = []
    plain = Delta.open.__func__

    def noting(cls, folder, **options):
        opened.append(folder.parent.name)
        return plain(cls, folder, **options)

    monkeypatch.setattr(Delta, "open", classmethod(noting))
    return opened


def test_a_compacted_home_has_the_same_bits_and_reads_one_sum(home, made, monkeypatch):
    live = home.ledger.live()
    plain = home.fingerprint(live)
    history = (home.folder / "ledger.jsonl").read_bytes()
    files = {file: file.read_bytes() for file in (home.folder / "updates").rglob("*.*")}
    done = home.compact()
    assert done.updates == 4
    assert done.bytes == sum(4 * home.model().weights[name].numel() for name in TENSORS)
    assert (home.folder / "ledger.jsonl").read_bytes() == history
    assert all(file.read_bytes() == content for file, content in files.items())

    opened = counted(monkeypatch)
    again = unwrite.open(home.folder)
    assert again.fingerprint(live) == plain == fingerprint(again.model().weights)
    assert set(opened) == {"home"}, "no single update is read"
    assert again.verify() == []


def test_it_serves_the_updates_after_it_and_steps_aside_for_other_states(home, worlds, made):
    ids = made[1]
    plain = {at: home.fingerprint(home.ledger.live(at)) for at in (*ids, "base")}
    home.compact()
    assert {at: home.fingerprint(home.ledger.live(at)) for at in plain} == plain
    later = home.update(worlds().edits[7:8], noise(7))
    assert later.fingerprint == home.fingerprint(home.ledger.live())
    shutil.rmtree(home.folder / NAME)
    assert later.fingerprint == unwrite.open(home.folder).fingerprint(home.ledger.live())
    home.compact()
    undone = home.undo(ids[2], recheck=False)  # in the middle of the sum
    assert unwrite.open(home.folder).verify() == []
    shutil.rmtree(home.folder / NAME)
    assert unwrite.open(home.folder).fingerprint(undone.live) == undone.fingerprint


def test_an_update_that_waits_for_its_confirmation_is_no_part_of_a_sum(home, worlds):
    """The sum is of four updates, one of them undone since: three and the one that waits are four,
    too, and the last of them has no line in the ledger."""
    home.compact()
    home.undo(home.ledger.live()[0], recheck=False)
    before = home.fingerprint(home.ledger.live())

    def look(candidate):
        assert home.ask("ada lives in", at=candidate.id)
        home.model("base")
        assert home.ask("ada lives in", at=candidate.id)
        return True

    done = home.update(worlds().edits[7:8], noise(7), confirm=look)
    assert done.fingerprint == home.fingerprint(home.ledger.live()) != before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_nothing_is_rounded_twice(dtype, worlds, tmp_path):
    home = unwrite.open(tmp_path / "home", base=worlds(dtype=dtype).folder)
    for number in range(4):
        home.update(worlds(dtype=dtype).edits[number : number + 1], noise(number))
        if number == 1:
            home.compact()
    with_sum = home.fingerprint(home.ledger.live())
    shutil.rmtree(home.folder / NAME)
    assert unwrite.open(home.folder).fingerprint(home.ledger.live()) == with_sum


def test_an_export_of_a_compacted_home_is_the_same(home, tmp_path):
    home.export(tmp_path / "before")
    home.compact()
    home.export(tmp_path / "after")
    home.export(tmp_path / "delta", "delta")
    with (
        Weights.from_folder(tmp_path / "before") as one,
        Weights.from_folder(tmp_path / "after") as two,
    ):
        assert fingerprint(one) == fingerprint(two)
    assert not isinstance(Delta.open(tmp_path / "delta"), Prefix)
    assert Delta.open(tmp_path / "delta").summary().squared_norm < 1e3, "a change, not weights"


def test_with_nothing_live_there_is_no_sum(home):
    home.compact()
    for update in home.ledger.live():
        home.undo(update, recheck=False)
    assert home.compact().updates == 0
    assert not (home.folder / NAME).exists()
    assert home.fingerprint([]) == home.base.fingerprint


# ---- damage --------------------------------------------------------------------------------------


def harm(file, place=-3):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def with_wrong_sum(folder):
    """A sum that is whole and says of itself what it should, and is wrong."""
    description = json.loads((folder / "delta.json").read_text())
    found = Delta.open(folder)
    changes = {name: found[name].scaled(1.001) for name in found}
    shutil.rmtree(folder)
    Delta.from_changes(changes, description["provenance"]).save(folder)


def of_another(folder):
    file = folder / "delta.json"
    file.write_text(file.read_text().replace('"base": "', '"base": "0'))


@pytest.mark.parametrize(
    "harmful",
    [
        lambda folder: harm(folder / "00001.safetensors"),
        lambda folder: harm(folder / "delta.json", 40),
        lambda folder: (folder / "00001.safetensors").unlink(),
        of_another,
    ],
    ids=["bit", "description", "missing", "another home's"],
)
def test_a_damaged_sum_is_never_used_and_is_only_a_shortcut(harmful, home):
    home.compact()
    live = home.ledger.live()
    right = home.fingerprint(live)
    harmful(home.folder / NAME)
    with pytest.raises(DamagedFile, match=r"remove the folder .*, and nothing is lost"):
        unwrite.open(home.folder).ask("ada lives in")
    (problem,) = unwrite.open(home.folder).verify()
    assert "only a shortcut" in problem
    shutil.rmtree(home.folder / NAME)
    assert unwrite.open(home.folder).verify() == []
    assert unwrite.open(home.folder).fingerprint(live) == right


def test_a_sum_that_is_wrong_is_found_by_verify(home):
    home.compact()
    with_wrong_sum(home.folder / NAME)
    (problem,) = unwrite.open(home.folder).verify()
    assert "not what the updates add up to" in problem


def test_a_link_out_of_the_home_is_not_followed(home, tmp_path):
    home.compact()
    (home.folder / NAME).rename(tmp_path / "elsewhere")
    (home.folder / NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedFile, match="leads out of the home"):
        unwrite.open(home.folder).model()


def test_killed_at_any_step_it_leaves_a_sound_home(home, made, monkeypatch):
    right = home.fingerprint(home.ledger.live())
    home.compact()  # so that there is an old one to replace

    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    number, finished = 0, False
    while not finished:
        number += 1
        with monkeypatch.context() as patched:
            at_step(number, kill, patched.setattr)
            try:
                home.compact()
                finished = True
            except Killed:
                finished = False
        again = unwrite.open(home.folder)
        assert again.verify() == []
        assert again.fingerprint(again.ledger.live()) == right
    assert number > 5
    assert not list(home.folder.glob(".*.partial"))


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_says_what_it_did(home):
    done = CliRunner().invoke(app, ["ledger", "compact", str(home.folder)])
    assert done.exit_code == 0, done.output
    assert "4 live updates" in done.output and "Nothing else has changed" in done.output
    done = CliRunner().invoke(app, ["ledger", "compact", str(home.folder), "--json"])
    assert json.loads(done.stdout)["updates"] == 4


def test_the_command_refuses_what_is_no_home(tmp_path):
    done = CliRunner().invoke(app, ["ledger", "compact", str(tmp_path)])
    assert done.exit_code == 2
    assert "not a model home" in done.output

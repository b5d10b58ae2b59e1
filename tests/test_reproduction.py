"""``replay-update``: an update done once more gives the same bits, or it is said what differs."""

import json
import shutil
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from typer.testing import CliRunner

import unwrite
from unwrite import methods, record
from unwrite.change import Dense
from unwrite.cli import app
from unwrite.delta import Delta
from unwrite.errors import BadSetting, DamagedFile, HomeError
from unwrite.methods.alpha_edit import AlphaEdit
from unwrite.methods.loc_ft import LocFT
from unwrite.reproduction import differences, environment_changes

QUICK = unwrite.FullFT(epochs=2, until="epochs", lr=1e-3)
METHODS = {
    "full-ft": unwrite.FullFT(epochs=2, until="epochs", lr=1e-3, protect=("cleo works as a",)),
    "lora": unwrite.LoRA(epochs=2, until="epochs"),
    "f-learning": unwrite.FLearning(forget=QUICK, learn=unwrite.LoRA(epochs=2, until="epochs")),
    "delicate": unwrite.Delicate(rounds=1, tuner=QUICK),
}


@dataclass(frozen=True)
class Forgetful:
    """A method of somebody who is not here any more, whose result depends on how often it ran."""

    name: ClassVar[str] = "forgetful"
    calls: ClassVar[list[int]] = []

    def delta(self, model, edits):
        self.calls.append(1)
        name = "model.layers.0.mlp.down_proj.weight"
        change = torch.full(model.weights.shape(name), 0.01)
        change[0, 0] += 0.5 * (len(self.calls) - 1)
        return Delta.from_changes({name: Dense(change)})


@pytest.fixture(scope="module")
def original(worlds, tmp_path_factory):
    """A home with an update by each method, one of them redone, and the first undone."""
    home = unwrite.open(tmp_path_factory.mktemp("original") / "home", base=worlds().folder)
    ids = {}
    for number, (name, method) in enumerate(METHODS.items()):
        ids[name] = home.update(worlds().edits[3 * number : 3 * number + 2], method, seed=5).id
    home.undo(ids["lora"], recheck=False)
    ids["redo"] = home.redo(ids["lora"]).id
    home.undo(ids["full-ft"], recheck=False)
    return home, ids


@pytest.fixture
def copied(original, tmp_path):
    shutil.copytree(original[0].folder, tmp_path / "home")
    return unwrite.open(tmp_path / "home"), original[1]


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("name", [*METHODS, "redo"])
def test_every_update_is_reproduced_bit_for_bit_and_the_home_stays(original, snapshot, name):
    home, ids = original
    before, said = snapshot(home.folder), home.ask("ada works as a")
    found = home.replay_update(ids[name])
    assert found.reproduced
    assert (found.differ, found.largest, found.environment) == ((), 0.0, {})
    assert found.fingerprint["found"] == home.ledger.entry(ids[name])["fingerprint"]
    assert found.tensors == home.show(ids[name])["delta"]["tensors"]
    assert snapshot(home.folder) == before
    assert home.ask("ada works as a") == said


def test_another_process_reproduces_too(original, snapshot):
    home, ids = original
    before = snapshot(home.folder)
    result = command("replay-update", home.folder, ids["delicate"], "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["reproduced"] is True
    assert found["differ"] == []
    plain = command("replay-update", home.folder, ids["full-ft"])
    assert plain.exit_code == 0
    assert "was reproduced" in plain.stderr
    assert snapshot(home.folder) == before


def test_what_does_not_come_out_the_same_is_told_with_what_changed(
    worlds, tmp_path, monkeypatch, snapshot
):
    monkeypatch.setitem(methods.METHODS, "forgetful", f"{__name__}:Forgetful")
    Forgetful.calls.clear()
    home = unwrite.open(tmp_path / "home", base=worlds().folder)
    done = home.update(worlds().edits[:1], Forgetful())
    before = snapshot(home.folder)
    now = record.environment("")
    monkeypatch.setattr(
        record, "environment", lambda _: now | {"packages": now["packages"] | {"torch": "9.9"}}
    )
    found = home.replay_update(done.id)
    assert not found.reproduced
    assert found.differ == ("model.layers.0.mlp.down_proj.weight",)
    assert found.largest == pytest.approx(0.5, rel=1e-3)
    assert found.environment == {"torch": (now["packages"]["torch"], "9.9")}
    assert found.fingerprint["found"] != found.fingerprint["recorded"]
    result = command("replay-update", home.folder, done.id)
    assert result.exit_code == 2
    assert "was not reproduced: 1 of 1 tensors differ" in result.stderr
    assert "and is 9.9" in result.stderr
    told = command("replay-update", home.folder, done.id, "--json")
    assert told.exit_code == 2
    assert json.loads(told.stdout)["reproduced"] is False
    assert snapshot(home.folder) == before


def test_what_cannot_be_replayed_is_said_in_one_sentence(copied, worlds, snapshot):
    home, ids = copied
    nobody = home.update(worlds().edits[20:21], Forgetful()).id
    edits = home.folder / "updates" / ids["delicate"] / "edits.jsonl"
    edits.write_bytes(edits.read_bytes().replace(b"works", b"wurks"))
    (home.folder / "updates" / ids["lora"] / "environment.json").unlink()
    before = snapshot(home.folder)
    for update, error, said in (
        (nobody, BadSetting, "cannot be done once more: There is no method 'forgetful'"),
        (ids["delicate"], DamagedFile, r"edits\.jsonl is damaged"),
        (ids["lora"], DamagedFile, r"environment\.json is missing"),
        ("u-00000000", HomeError, "no update 'u-00000000'"),
        ("../../etc", HomeError, "no update"),
    ):
        with pytest.raises(error, match=said):
            home.replay_update(update)
        result = command("replay-update", home.folder, update)
        assert result.exit_code == 2
        assert result.stdout == ""
        (line,) = [x for x in result.stderr.splitlines() if not x.startswith("Loading")]
        assert line.startswith("Error: ")
    assert snapshot(home.folder) == before


def test_settings_are_restored_as_they_were():
    for method in (*METHODS.values(), unwrite.ROME(layer=1), AlphaEdit(), LocFT()):
        settings = json.loads(json.dumps(methods.settings_of(method)))
        assert methods.restored(settings) == method
    with pytest.raises(BadSetting, match="no field 'speed'"):
        methods.restored({"name": "full-ft", "speed": 1})
    assert methods.restored({"name": "full-ft", "lr": 1e-3}) == unwrite.FullFT(lr=1e-3)


def test_differences_are_those_of_bits():
    zeros = Dense(torch.zeros(2, 2))
    one = Delta.from_changes({"a": zeros, "b": Dense(torch.ones(2, 2))})
    assert differences(one, one) == ((), 0.0)
    other = Delta.from_changes({"a": Dense(-torch.zeros(2, 2)), "c": Dense(torch.full((2,), 3.0))})
    assert differences(one, other) == (("a", "b", "c"), 3.0)
    assert differences(Delta.nothing(), Delta.nothing()) == ((), 0.0)


def test_the_command_is_no_part_of_the_environment():
    old = {"command": "a", "threads": 1, "packages": {"torch": "1"}}
    assert environment_changes(old, {"command": "b", "packages": {"torch": "1"}}) == {
        "threads": (1, None)
    }

"""The home: updates as transactions, undo to the bit, and numbers that can be recomputed."""

import contextlib
import itertools
import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import unwrite
from unwrite import scores as scoring
from unwrite.change import Dense
from unwrite.delta import Delta, compose
from unwrite.edits import Edit, Probe, read_edits
from unwrite.errors import (
    BadEdits,
    BadSetting,
    DamagedFile,
    HomeError,
    RequirementNotMet,
    TensorMismatch,
    TrainingFailed,
    UnwriteError,
)
from unwrite.files import read_jsonl
from unwrite.ledger import Ledger
from unwrite.progress import Bytes, Silent
from unwrite.weights import Weights, fingerprint

QUICK = unwrite.FullFT(lr=2e-3, epochs=60)  # until learned: a few epochs
WORLDS = [("llama", "float32"), ("llama", "bfloat16"), ("gpt2", "float32")]


@pytest.fixture
def home(worlds, tmp_path):
    """A fresh home of the shared llama world."""
    return unwrite.open(tmp_path / "home", base=worlds().folder)


@pytest.fixture(scope="module", params=WORLDS, ids="-".join)
def three(worlds, tmp_path_factory, request):
    """A home with three updates, and the world; tests copy it before they change it."""
    world = worlds(*request.param)
    home = unwrite.open(tmp_path_factory.mktemp("three") / "home", base=world.folder)
    for part in (world.edits[:2], world.edits[10:12], world.edits[20:22]):
        home.update(part, QUICK)
    return home, world


@pytest.fixture(scope="module")
def done(worlds, tmp_path_factory):
    """A home with one update; read-only."""
    home = unwrite.open(tmp_path_factory.mktemp("done") / "home", base=worlds().folder)
    return home, home.update(worlds().edits[:4], QUICK, why="a reason")


def copied(home, tmp_path):
    shutil.copytree(home.folder, tmp_path / "copy")
    return unwrite.open(tmp_path / "copy")


def tensors(folder):
    with Weights.from_folder(folder) as weights:
        return {name: weights[name].clone() for name in weights}


def same_bits(one, two):
    assert set(one) == set(two)
    return all(
        one[name].dtype == two[name].dtype
        and torch.equal(one[name].view(torch.uint8), two[name].view(torch.uint8))
        for name in one
    )


# ---- undo ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_undo_in_any_order_ends_at_the_very_bits_of_the_base(three, tmp_path, order):
    home, world = three[0], three[1]
    home = copied(home, tmp_path)
    live = home.ledger.live()
    changed = home.fingerprint(live)
    for index in order:
        assert home.fingerprint(home.ledger.live()) != home.base.fingerprint
        undone = home.undo(live[index], recheck=False)
    assert undone.fingerprint == home.base.fingerprint == home.fingerprint(home.ledger.live())
    assert undone.live == ()
    assert changed != undone.fingerprint
    exported = home.export(tmp_path / "exported")
    assert same_bits(tensors(exported), tensors(world.folder))
    assert fingerprint(Weights.from_folder(exported)) == home.base.fingerprint


def test_without_the_middle_one_the_state_is_what_the_others_give(three, tmp_path):
    home, world = copied(three[0], tmp_path), three[1]
    first, middle, last = home.ledger.live()
    undone = home.undo(middle)
    assert undone.live == (first, last)
    assert set(undone.later) == {last}
    exported = tensors(home.export(tmp_path / "exported"))
    deltas = [Delta.open(home.folder / "updates" / one / "delta") for one in (first, last)]
    with Weights.from_folder(world.folder) as base:
        expected = {name: compose(base, deltas, home.base.aliases.get(name, name)) for name in base}
    assert same_bits(exported, expected)
    assert undone.fingerprint == fingerprint(Weights.from_folder(tmp_path / "exported"))
    assert home.verify() == []


def test_undo_takes_the_last_of_many_back_to_the_state_before(three, tmp_path):
    home = copied(three[0], tmp_path)
    *others, last = home.ledger.live()
    recorded = home.ledger.entry(others[-1])["fingerprint"]
    assert home.undo(last).fingerprint == recorded


def test_later_updates_are_asked_again_on_the_new_state(three, tmp_path):
    home, world = copied(three[0], tmp_path), three[1]
    first, *later = home.ledger.live()
    undone = home.undo(first)
    assert list(undone.later) == later
    _, after = home.evaluate(world.edits[10:12])
    assert undone.later[later[0]].token == after["reliability"].token


def test_an_undo_reads_the_history_once(three, tmp_path, monkeypatch):
    home = copied(three[0], tmp_path)
    update = home.ledger.live()[1]
    read, plain = [], Ledger.open.__func__

    def counted(cls, path):
        read.append(path)
        return plain(cls, path)

    monkeypatch.setattr(Ledger, "open", classmethod(counted))
    home.undo(update, recheck=False)
    assert read == [home.folder / "ledger.jsonl"]


def test_an_undone_update_cannot_be_undone_again(three, tmp_path, snapshot):
    home = copied(three[0], tmp_path)
    first = home.ledger.live()[0]
    home.undo(first, recheck=False)
    before = snapshot(home.folder)
    with pytest.raises(HomeError, match="undone already"):
        home.undo(first)
    with pytest.raises(HomeError, match=f"no update 'u-00000000'.*{first}"):
        home.undo("u-00000000")
    assert snapshot(home.folder) == before


# ---- scores --------------------------------------------------------------------------------------


def test_scores_are_recomputed_from_the_stored_rows_alone(done):
    home, update = done
    before = read_jsonl(update.folder / "before.jsonl")
    after = read_jsonl(update.folder / "after.jsonl")
    stored = json.loads((update.folder / "scores.json").read_text("utf-8"))
    entry = home.ledger.entry(update.id)
    for when, rows in (("before", before), ("after", after)):
        recomputed = scoring.as_json(scoring.score(before, rows))
        assert recomputed == stored["scores"][when] == entry["scores"][when]
    assert stored == update.as_json()
    assert update.scores["reliability"].exact == 1.0
    assert update.before["reliability"].exact == 0.0
    assert update.before["locality"].token == 1.0
    assert update.scores["old_recall"].exact == 0.0
    assert update.before["old_recall"].exact == 1.0


@pytest.mark.parametrize(("architecture", "dtype"), WORLDS)
def test_scores_belong_to_the_weights_that_are_given_out(worlds, tmp_path, architecture, dtype):
    """Reloaded with transformers alone, the export answers as the home does, and in its dtype."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    world = worlds(architecture, dtype)
    home = unwrite.open(tmp_path / "home", base=world.folder)
    update = home.update(world.edits[:4], QUICK)
    folder = home.export(tmp_path / "exported")
    assert fingerprint(Weights.from_folder(folder)) == update.fingerprint
    assert {one.dtype for one in tensors(folder).values()} == {getattr(torch, dtype)}
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = {row["prompt"]: row["text"] for row in read_jsonl(update.folder / "after.jsonl")}
    for edit in world.edits:
        ids = tokenizer(edit.prompt, return_tensors="pt")
        written = network.generate(
            input_ids=ids["input_ids"],
            attention_mask=ids["attention_mask"],
            max_new_tokens=4,
            do_sample=False,
        )
        answer = tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == home.ask(edit.prompt, max_new_tokens=4)
        if edit in world.edits[:4]:
            assert scoring.answer_in(answer) == scoring.answer_in(texts[edit.prompt]) == edit.new


def test_a_file_that_names_a_tied_tensor_twice_keeps_both_equal(world, tmp_path):
    path = world.folder / "model.safetensors"
    content = load_file(path)
    assert "lm_head.weight" not in content, "the toy world ties its weights"
    save_file(
        content | {"lm_head.weight": content["model.embed_tokens.weight"].clone()},
        path,
        metadata={"format": "pt"},
    )
    home = unwrite.open(tmp_path / "home", base=world.folder)
    update = home.update(world.edits[:2], QUICK)
    assert home.base.parameters == sum(tensor.numel() for tensor in content.values())
    exported = tensors(home.export(tmp_path / "exported"))
    assert torch.equal(exported["lm_head.weight"], exported["model.embed_tokens.weight"])
    assert not torch.equal(exported["lm_head.weight"], content["model.embed_tokens.weight"])
    assert fingerprint(Weights.from_folder(tmp_path / "exported")) == update.fingerprint
    reloaded = unwrite.load(tmp_path / "exported")
    assert reloaded.answer(world.edits[0].prompt) == home.ask(world.edits[0].prompt)
    assert home.undo(update.id).fingerprint == home.base.fingerprint


def test_bystanders_without_a_known_answer_get_the_models_own(home, worlds):
    edit = replace(worlds().edits[0], bystanders=(Probe("dirk works as a"),))
    update = home.update([edit], QUICK)
    (row,) = [one for one in home.diff(update.id) if one["role"] == "locality"]
    assert row["target"] == row["before"] == "weaver"
    assert update.scores["locality"].n == 1


def test_edits_without_old_have_no_old_recall(home, worlds):
    edits = [replace(edit, old=None) for edit in worlds().edits[:2]]
    update = home.update(edits, QUICK)
    assert update.as_json()["scores"]["after"]["old_recall"]["token"] is None
    assert update.scores["old_recall"].n == 0
    with pytest.raises(BadSetting, match="no probes for old_recall"):
        home.update(edits[:1], QUICK, require=["old_recall<=0.1"])


def test_the_same_update_in_two_homes_gives_the_same_bits(done, worlds, tmp_path, snapshot):
    home, update = done
    other = unwrite.open(tmp_path / "other", base=worlds().folder)
    again = other.update(worlds().edits[:4], QUICK, why="another reason")
    assert (again.id, again.fingerprint) == (update.id, update.fingerprint)
    one, two = snapshot(update.folder / "delta"), snapshot(again.folder / "delta")
    assert one == two
    assert [dict(row) for row in other.observations(again.id)[1]] == home.observations(update.id)[1]


# ---- transactions --------------------------------------------------------------------------------


def test_a_requirement_that_is_missed_leaves_the_home_as_it_was(home, worlds, snapshot):
    home.update(worlds().edits[:1], QUICK)
    before = snapshot(home.folder)
    with pytest.raises(
        RequirementNotMet, match=r"locality\.token>=1 \(measured 0\.\d+\)"
    ) as missed:
        home.update(
            worlds().edits[:6],
            unwrite.FullFT(lr=5e-3, epochs=6, until="epochs"),
            require={"locality": 1.0},
        )
    measured = missed.value.update
    assert not measured.committed
    assert measured.scores["locality"].token < 1.0
    assert len(measured.unmet) == 1
    assert snapshot(home.folder) == before
    assert home.ask(worlds().edits[0].prompt) == worlds().edits[0].new
    assert home.verify() == []


def test_a_first_update_that_is_dropped_leaves_no_folder(home, worlds):
    before = set(home.folder.rglob("*"))
    with pytest.raises(RequirementNotMet):
        home.update(worlds().edits[:1], QUICK, require=["perplexity_ratio<0.01"])
    assert set(home.folder.rglob("*")) == before


def test_an_update_that_keeps_its_requirements_is_committed(home, worlds):
    update = home.update(worlds().edits[:2], QUICK, require=["reliability>=1", "old_recall<=0"])
    assert update.committed
    assert home.ledger.live() == [update.id]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"require": {"locality": 2, "speed": 1}}, BadSetting),
        ({"require": ["portability>=0.5"]}, BadSetting),
        ({"why": "\udcff"}, BadSetting),
        ({"protect": "one text"}, BadSetting),
        ({"method": "full-ft"}, BadSetting),
        ({"method": unwrite.FullFT}, BadSetting),
        ({"method": unwrite.FullFT(lr=float("inf"))}, BadSetting),
        ({"edits": []}, BadEdits),
        ({"edits": "no-such-file.jsonl"}, BadEdits),
        ({"edits": [Edit("the " * 100, "baker")]}, BadEdits),
    ],
)
def test_bad_input_changes_nothing(home, worlds, snapshot, arguments, error):
    before = snapshot(home.folder)
    given = {"edits": worlds().edits[:1], "method": QUICK} | arguments
    with pytest.raises(error):
        home.update(**given)
    assert snapshot(home.folder) == before
    assert not (home.folder / "updates").exists()


def test_training_that_fails_leaves_the_home_and_the_model_as_they_were(home, worlds, snapshot):
    before, said = snapshot(home.folder), home.ask("ada works as a")
    with pytest.raises(TrainingFailed):
        home.update(worlds().edits[:4], unwrite.FullFT(lr=1e30, epochs=3, until="epochs"))
    assert snapshot(home.folder) == before
    assert home.ask("ada works as a") == said


def test_seed_and_protected_prompts_reach_the_method(home, worlds):
    update = home.update(worlds().edits[:1], QUICK, seed=3, protect=["cleo works as a"])
    assert update.method["seed"] == 3
    assert update.method["protect"] == ["cleo works as a"]
    assert home.ledger.entry(update.id)["method"] == update.method
    assert home.ask("cleo works as a") == "smith"


@pytest.mark.parametrize("given", ["list", "path", "text"])
def test_edits_are_a_list_or_a_file(home, worlds, tmp_path, given):
    unwrite.write_edits(tmp_path / "edits.jsonl", worlds().edits[:1])
    path = tmp_path / "edits.jsonl"
    edits = {"list": list(worlds().edits[:1]), "path": path, "text": str(path)}[given]
    update = home.update(edits, QUICK)
    assert read_edits(update.folder / "edits.jsonl") == worlds().edits[:1]


# ---- methods of other people ---------------------------------------------------------------------


@dataclass(frozen=True)
class Nudge:
    """A third-party method: one tensor moves by a fixed step."""

    tensor: str = "model.layers.0.mlp.down_proj.weight"
    step: float = 0.01
    shape: tuple[int, ...] = ()
    extra: dict = field(default_factory=dict)

    def delta(self, model, edits):
        known = self.tensor in model.weights
        shape = self.shape or (model.weights.shape(self.tensor) if known else (2, 2))
        return Delta.from_changes({self.tensor: Dense(torch.full(shape, self.step))})


def test_a_method_of_somebody_else_works(home, worlds, tmp_path):
    update = home.update(worlds().edits[:1], Nudge())
    assert update.method == {
        "name": "Nudge",
        "tensor": Nudge().tensor,
        "step": 0.01,
        "shape": [],
        "extra": {},
    }
    base, now = tensors(worlds().folder), tensors(home.export(tmp_path / "exported"))
    assert torch.equal(now.pop(Nudge().tensor), base.pop(Nudge().tensor) + 0.01)
    assert same_bits(now, base)
    with pytest.raises(BadSetting, match="Nudge takes no 'seed'"):
        home.update(worlds().edits[:1], Nudge(), seed=1)


@pytest.mark.parametrize(
    ("method", "error", "sentence"),
    [
        (Nudge(tensor="no.such.weight"), TensorMismatch, "no.such.weight"),
        (Nudge(shape=(3, 3)), TensorMismatch, "shape"),
        (Nudge(step=float("nan")), UnwriteError, "finite"),
        (Nudge(step=3e38), TrainingFailed, "no longer give numbers"),
        (Nudge(extra={"path": Path()}), BadSetting, "ledger"),
    ],
)
def test_a_method_that_goes_wrong_is_refused_leaving_nothing(
    home, worlds, snapshot, method, error, sentence
):
    before = snapshot(home.folder)
    with pytest.raises(error, match=sentence):
        home.update(worlds().edits[:1], method)
    assert snapshot(home.folder) == before
    assert not (home.folder / "updates").exists()


@dataclass(frozen=True)
class Talking(Nudge):
    """A method that says something about its delta."""

    def delta(self, model, edits):
        delta = super().delta(model, edits)
        delta.provenance.update(self.extra)
        return delta


def test_what_a_method_says_is_kept_beside_its_delta(home, worlds):
    sentences = ["2 rounds.", "Nothing fell back."]
    notes = {"sentences": sentences, "rounds": 2, "epochs": [3, 4]}
    update = home.update(worlds().edits[:1], Talking(extra={"notes": notes}))
    stored = json.loads((update.folder / "scores.json").read_text("utf-8"))
    assert update.notes == update.as_json()["notes"] == stored["notes"] == notes
    assert home.show(update.id)["notes"] == notes
    line = dict(home.ledger.entry(update.id))
    del line["method"]  # which, in this test, has the notes among its settings
    assert "rounds." not in json.dumps(line), "the ledger is kept small"
    silent = home.update(worlds().edits[1:2], Nudge())
    assert silent.notes == home.show(silent.id)["notes"] == {}


def test_notes_survive_an_update_that_is_dropped(home, worlds):
    method = Talking(extra={"notes": {"sentences": ["3 rounds."]}})
    with pytest.raises(RequirementNotMet) as missed:
        home.update(worlds().edits[:1], method, require=["perplexity_ratio<0.01"])
    assert missed.value.update.notes == {"sentences": ["3 rounds."]}


FACTS = {"mean": 1.0, "squared_norm": 1.0, "changed": 1, "size": 1}


@pytest.mark.parametrize(
    "said",
    [
        {"notes": "three rounds"},
        {"notes": ["three rounds"]},
        {"notes": {"sentences": "three rounds"}},
        {"notes": {"sentences": [3]}},
        {"notes": {"sentences": ["\udcff"]}},
        {"notes": {"rounds": float("nan")}},
        {"notes": {"rounds": Path()}},
        {"parts": ["old"]},
        {"parts": {"old": {"a.weight": 1.0}}},
        {"parts": {"old": {"a.weight": {**FACTS, "mean": None}}}},
        {"parts": {"old": {"a.weight": {**FACTS, "mean": float("inf")}}}},
        {"parts": {"old": {"a.weight": {**FACTS, "size": -1}}}},
    ],
    ids=str,
)
def test_what_cannot_be_kept_is_refused_leaving_nothing(home, worlds, snapshot, said):
    @dataclass(frozen=True)
    class Mumbling(Nudge):
        def delta(self, model, edits):
            delta = super().delta(model, edits)
            delta.provenance.update(said)
            return delta

    before = snapshot(home.folder)
    with pytest.raises(BadSetting, match=r"provenance\['notes'\] must be"):
        home.update(worlds().edits[:1], Mumbling())
    assert snapshot(home.folder) == before
    assert not (home.folder / "updates").exists()


# ---- reading -------------------------------------------------------------------------------------


def test_earlier_states_still_answer(three):
    home, world = three
    first, second, _ = home.ledger.live()
    edit, later = world.edits[0], world.edits[10]
    assert home.ask(edit.prompt, at="base") == edit.old
    assert home.ask(edit.prompt, at=first) == edit.new
    (asked,) = [row for row in home.observations(second)[0] if row["prompt"] == later.prompt][:1]
    assert home.ask(later.prompt, at=first) == scoring.answer_in(asked["text"])
    assert home.ask(later.prompt, at=second) == later.new
    with pytest.raises(HomeError, match=first):
        home.ask(edit.prompt, at="u-00000000")
    with pytest.raises(BadEdits, match="empty"):
        home.ask("  ")


def test_asking_changes_nothing(done, worlds, snapshot):
    home, update = done
    before = snapshot(home.folder)
    home.ask("ada works as a", at="base")
    home.evaluate(worlds().edits[:2])
    home.history(), home.show(update.id), home.diff(update.id), home.verify()
    assert snapshot(home.folder) == before


def test_evaluate_compares_the_base_with_now(done, worlds):
    home, update = done
    before, after = home.evaluate(worlds().edits[:4])
    assert scoring.as_json(before) == scoring.as_json(update.before)
    assert scoring.as_json(after) == scoring.as_json(update.after)
    same, now = unwrite.evaluate(worlds().folder, worlds().edits[:4])
    assert same == now == before
    assert unwrite.evaluate(home.folder, worlds().edits[:4])[1] == after


def test_diff_tells_what_was_said(done, worlds):
    home, update = done
    rows = home.diff(update.id)
    for edit in worlds().edits[:4]:
        (row,) = [r for r in rows if r["role"] == "reliability" and r["prompt"] == edit.prompt]
        assert (row["before"], row["after"], row["target"]) == (edit.old, edit.new, edit.new)


def test_diff_of_two_updates_asks_both_states(three):
    home, world = three
    first, second, _ = home.ledger.live()
    rows = {row["prompt"]: row for row in home.diff(first, second) if row["role"] == "reliability"}
    assert set(rows) == {edit.prompt for edit in (*world.edits[:2], *world.edits[10:12])}
    moved = rows[world.edits[10].prompt]
    assert (moved["before"], moved["after"]) == (
        home.ask(world.edits[10].prompt, at=first),
        world.edits[10].new,
    )


def test_show_places_every_tensor(three):
    home, _ = three
    shown = home.show(home.ledger.live()[0])
    assert sum(row["share"] for row in shown["where"]) == pytest.approx(1.0)
    assert "other" not in {row["kind"] for row in shown["where"]}
    blocks = {row["block"] for row in shown["where"]}
    assert blocks == {None, 0, 1}
    assert shown["delta"]["tensors"] == len(home.deltas(home.ledger.live()[:1])[0])
    assert shown["live"]
    assert set(shown["environment"]["packages"]) >= {"torch", "transformers"}


def test_history_says_what_is_live(three, tmp_path):
    home = copied(three[0], tmp_path)
    first, middle, last = home.ledger.live()
    home.undo(middle, why="wrong", recheck=False)
    entries = home.history()
    assert [entry["do"] for entry in entries] == ["init", "apply", "apply", "apply", "revert"]
    assert {e["id"]: e["live"] for e in entries if e["do"] == "apply"} == {
        first: True,
        middle: False,
        last: True,
    }
    assert (entries[-1]["of"], entries[-1]["why"]) == (middle, "wrong")
    assert home.ask("ada works as a", at=last) == home.ask("ada works as a", at=last)


def test_what_the_update_says_of_its_delta_is_true(done):
    home, update = done
    assert update.summary["parameters"] == home.base.parameters
    assert update.summary["encoding"] == "dense"
    changed = sum(update.delta[name].changed for name in update.delta)
    assert update.summary["changed_fraction"] == changed / home.base.parameters
    stored = sum(file.stat().st_size for file in (update.folder / "delta").glob("*.safetensors"))
    assert update.summary["bytes"] <= stored < 1.2 * update.summary["bytes"] + 10_000


# ---- verify and export ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file",
    [
        "base.json",
        "ledger.jsonl",
        "edits.jsonl",
        "before.jsonl",
        "after.jsonl",
        "scores.json",
        "where.json",
        "method.json",
        "environment.json",
        "delta/delta.json",
        "delta/00001.safetensors",
    ],
)
@pytest.mark.parametrize("harm", ["flip", "cut", "lose"])
def test_verify_names_the_file_that_is_damaged(done, tmp_path, file, harm):
    home, update = done
    home = copied(home, tmp_path)
    assert home.verify() == []
    folder = home.folder / "updates" / update.id if file not in _TOP else home.folder
    path = folder / file
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif harm == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    problems = home.verify()
    assert problems
    told = " ".join(problems)
    assert Path(file).name in told or (file.startswith("delta/") and str(folder / "delta") in told)


_TOP = ("base.json", "ledger.jsonl")


def test_a_ledger_that_lost_lines_is_noticed(done, tmp_path, worlds):
    home, update = done
    home = copied(home, tmp_path)
    path = home.folder / "ledger.jsonl"
    path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n")
    assert [update.id in problem for problem in home.verify()] == [True]
    with pytest.raises(HomeError, match="lost its last lines"):
        home.update(worlds().edits[:4], QUICK)
    assert (home.folder / "updates" / update.id / "delta" / "delta.json").is_file()


def rechained(home, change):
    """The home with other ledger lines whose hashes are all in order."""
    path = home.folder / "ledger.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    ledger = Ledger(path, ())
    for line in lines:
        ledger = ledger.append(change(line))
    return unwrite.open(home.folder)


def test_a_state_that_is_not_the_recorded_one_is_noticed_though_every_hash_is_in_order(
    done, tmp_path
):
    home = rechained(
        copied(done[0], tmp_path),
        lambda line: line | ({"fingerprint": "0" * 64} if line["do"] == "apply" else {}),
    )
    assert home.verify() == ["The recomposed state is not the one recorded in the ledger."]


@pytest.mark.parametrize("id_", ["../../elsewhere", "..", "/elsewhere", "a/b", ""])
def test_an_id_that_leads_elsewhere_is_no_id(done, tmp_path, snapshot, id_):
    home, update = done
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(update.folder, tmp_path / "elsewhere", dirs_exist_ok=True)
    home = rechained(
        copied(home, tmp_path), lambda line: line | ({"id": id_} if "id" in line else {})
    )
    before = snapshot(tmp_path)
    for work in (
        lambda: home.show(id_),
        lambda: home.ask("ada works as a"),
        lambda: home.undo(id_),
        lambda: home.export(tmp_path / "exported"),
    ):
        with pytest.raises(DamagedFile, match="line 2 is damaged"):
            work()
    assert ["line 2 is damaged" in one for one in home.verify()] == [True]
    assert snapshot(tmp_path) == before


def test_damaged_weights_are_never_answered_or_committed(done, tmp_path, worlds):
    home, update = done
    home = copied(home, tmp_path)
    shard = home.folder / "updates" / update.id / "delta" / "00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 64
    shard.write_bytes(content)
    for work in (
        lambda: home.ask("ada works as a"),
        lambda: home.update(worlds().edits[5:6], QUICK),
        lambda: home.export(tmp_path / "exported"),
    ):
        with pytest.raises(DamagedFile, match="not what was saved"):
            work()
    assert not (tmp_path / "exported").exists()
    assert home.ask("ada works as a", at="base") == "baker"
    home.undo(update.id)  # it is not needed for that
    assert home.ask("ada works as a") == "baker"


def test_an_exported_delta_on_the_base_is_the_exported_model(three, tmp_path):
    home, world = three
    model = tensors(home.export(tmp_path / "model"))
    delta = Delta.open(home.export(tmp_path / "delta", "delta"))
    delta.check_base(home.base.fingerprint, "base")
    assert delta.provenance["updates"] == home.ledger.live()
    with Weights.from_folder(world.folder) as base:
        for name in base:
            composed = compose(base, [delta], home.base.aliases.get(name, name)).float()
            # One sum of all deltas first is the same up to the order of fp32 additions.
            tolerance = 1e-6 if base.dtype(name) == torch.float32 else 1e-2
            torch.testing.assert_close(composed, model[name].float(), rtol=tolerance, atol=1e-6)


def test_the_delta_of_one_update_on_the_base_is_bitwise_the_model(done, worlds, tmp_path):
    home, _ = done
    model = tensors(home.export(tmp_path / "model"))
    delta = Delta.open(home.export(tmp_path / "delta", "delta"))
    with Weights.from_folder(worlds().folder) as base:
        assert same_bits({name: compose(base, [delta], name) for name in base}, model)


def test_an_export_carries_everything_but_other_peoples_files(world, tmp_path):
    (world.folder / "README.md").write_text("about")
    (world.folder / "chat_template.jinja").write_text("{{ messages }}")
    home = unwrite.open(tmp_path / "home", base=world.folder)
    names = {file.name for file in home.export(tmp_path / "exported").iterdir()}
    assert names == {file.name for file in world.folder.iterdir()}
    assert "about" not in (tmp_path / "exported" / "README.md").read_text("utf-8").split("\n")


def test_export_refuses_what_it_cannot_do(done, tmp_path, snapshot):
    home, update = done
    with pytest.raises(HomeError, match=f"adapter: the changes of {update.id}"):
        home.export(tmp_path / "adapter", "adapter")
    with pytest.raises(HomeError, match="model, delta, adapter"):
        home.export(tmp_path / "other", "gguf")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    with pytest.raises(HomeError, match="not empty"):
        home.export(taken)
    with pytest.raises(HomeError, match="not empty"):
        home.export(taken / "thesis.txt")
    with pytest.raises(UnwriteError, match="part of the path is a file"):
        home.export(taken / "thesis.txt" / "below")
    assert snapshot(tmp_path) == {"taken/thesis.txt": b"mine"}


def test_an_empty_folder_or_a_link_to_one_is_filled(done, tmp_path):
    home, _ = done
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    home.export(tmp_path / "link")
    assert (tmp_path / "empty" / "config.json").is_file()
    assert (tmp_path / "link").is_symlink()


# ---- opening -------------------------------------------------------------------------------------


def test_a_home_is_opened_again_as_it_was(done, worlds):
    home, update = done
    again = unwrite.open(home.folder)
    assert again.base == home.base
    assert again.ledger == home.ledger
    assert unwrite.open(str(home.folder), base=worlds().folder).ledger.live() == [update.id]


def test_a_home_keeps_its_base(done, worlds, tmp_path):
    home, _ = done
    with pytest.raises(HomeError, match="cannot change its base"):
        unwrite.open(home.folder, base=worlds("gpt2").folder)
    with pytest.raises(HomeError, match="is a model home, not a model"):
        unwrite.open(tmp_path / "another", base=home.folder)


def test_the_same_relative_name_elsewhere_is_another_base(worlds, tmp_path, monkeypatch):
    for place, architecture in (("here", "llama"), ("there", "gpt2")):
        shutil.copytree(worlds(architecture).folder, tmp_path / place / "base")
    monkeypatch.chdir(tmp_path / "here")
    unwrite.open(tmp_path / "home", base="base")
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(HomeError, match="cannot change its base"):
        unwrite.open(tmp_path / "home", base="base")
    assert unwrite.open(tmp_path / "home").ask("ada works as a") == "baker"


@pytest.mark.parametrize("place", ["missing", "file", "full", "~nobody-of-that-name/x", "a" * 300])
def test_what_is_not_a_home_is_refused_with_what_to_do(worlds, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("mine")
    with pytest.raises(UnwriteError, match=r"unwrite init|name is too long"):
        unwrite.open(place)
    if place in ("file", "full"):
        with pytest.raises(HomeError, match=r"a folder|other files"):
            unwrite.open(place, base=worlds().folder)
        assert Path("full/thesis.txt").read_text() == "mine"
        assert [path.name for path in Path("full").iterdir()] == ["thesis.txt"]


def test_a_base_that_cannot_be_changed_leaves_no_home(world, tmp_path):
    config = world.folder / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"model_type": "no-such-thing"}))
    with pytest.raises(UnwriteError):
        unwrite.open(tmp_path / "home", base=world.folder)
    assert not (tmp_path / "home").exists()


class Heard(Silent):
    """What stages were told, in bytes."""

    def __init__(self):
        self.stages = []

    @contextlib.contextmanager
    def stage(self, title, total):
        done = []
        yield lambda units, remark: done.append(units)
        self.stages.append((title, type(total) is Bytes, sum(done) == total))


def test_what_streams_tells_its_bytes_to_the_end(worlds, tmp_path):
    heard = Heard()
    home = unwrite.open(tmp_path / "home", base=worlds().folder, progress=heard)
    update = home.update(worlds().edits[:1], unwrite.FullFT(epochs=1, until="epochs"))
    heard.stages.clear()
    home.export(tmp_path / "exported")
    home.compact()
    assert home.verify() == []
    home.undo(update.id)
    found = {title: rest for title, *rest in heard.stages}
    for title in ("writing tensors", "adding up", "verifying", "composing"):
        assert found[title] == [True, True], title

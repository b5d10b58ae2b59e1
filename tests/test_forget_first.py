"""F-Learning and Delicate: the laws that their papers imply."""

import dataclasses
import math

import pytest
import torch
from architectures import ARCHITECTURES

from unwrite.change import LowRank, Masked
from unwrite.edits import Edit
from unwrite.errors import BadSetting, TrainingFailed
from unwrite.methods.delicate import Delicate
from unwrite.methods.f_learning import FLearning
from unwrite.methods.full_ft import FullFT
from unwrite.methods.lora import LoRA
from unwrite.methods.probes import Answers, answers, run_paired
from unwrite.model import Model
from unwrite.selection import select
from unwrite.testing import check_method
from unwrite.training import Pair, new_pairs

FULL = FullFT(epochs=2, until="epochs", batch_size=4, lr=1e-3)
LORA = LoRA(epochs=2, until="epochs", batch_size=4, lr=1e-2, rank=4)
BEARABLE = {"max_perplexity_ratio": math.inf}  # the toy model has no language to break


@pytest.fixture(scope="module")
def model(worlds):
    return Model.load(worlds().folder)


@pytest.fixture(scope="module")
def edits(worlds):
    return worlds().edits[:6]


def same(one, other):
    assert set(one) == set(other)
    return all(torch.equal(one[name].dense(), other[name].dense()) for name in one)


def olds(edits):
    return [Pair(edit.prompt, edit.old) for edit in edits]


# ---- F-Learning ------------------------------------------------------------------------------


@pytest.mark.parametrize("learn", [FULL, LORA])
def test_strength_zero_is_plain_learning_bitwise(model, edits, learn):
    delta = FLearning(strength=0.0, forget=FULL, learn=learn).delta(model, edits)
    assert same(delta, learn.delta(model, edits))


def test_forgetting_at_strength_one_mirrors_the_fine_tune(model, edits):
    """theta - 1 * (FT(theta) - theta) is 2 theta - FT(theta), to the last bit but rounding."""
    tuned = FULL.train(model, olds(edits)).delta
    weights = {name: tensor.clone() for name, tensor in model.weights.items()}
    with model.shifted(tuned):
        after = {name: tensor.clone() for name, tensor in model.weights.items()}
    with model.shifted(-1.0 * tuned):
        for name, tensor in model.weights.items():
            mirrored = (2 * weights[name].double() - after[name].double()).float()
            torch.testing.assert_close(tensor, mirrored, rtol=0, atol=3e-7)


def test_the_delta_is_what_was_forgotten_plus_what_was_learned(model, edits):
    forgotten = -0.5 * FULL.train(model, olds(edits)).delta
    learned = FULL.train(model, new_pairs(edits), forgotten).delta
    delta = FLearning(strength=0.5, forget=FULL, learn=FULL, **BEARABLE).delta(model, edits)
    assert same(delta, forgotten + learned)


def test_forgetting_makes_old_answers_less_likely_the_more_the_stronger(model, edits):
    tuned = FULL.train(model, olds(edits)).delta
    asked = [model.tokens(edit.prompt, edit.old) for edit in edits]

    def unlikely(strength):
        with model.shifted(-strength * tuned):
            return -sum(one.logprob for one in model.force(asked))

    losses = [unlikely(strength) for strength in (0.0, 0.25, 0.5, 1.0)]
    assert losses == sorted(losses)
    assert losses[0] < losses[1]


@pytest.mark.parametrize("forget", [FULL, LORA])
@pytest.mark.parametrize("learn", [FullFT(lr=1e-3), LoRA(lr=1e-2, epochs=60)])
def test_all_four_combinations_are_methods(tmp_path, forget, learn):
    check_method(FLearning(strength=0.1, forget=forget, learn=learn, **BEARABLE), tmp_path)


def test_lora_and_lora_stay_low_rank(model, edits):
    delta = FLearning(strength=0.2, forget=LORA, learn=LORA, **BEARABLE).delta(model, edits)
    assert all(isinstance(delta[name], LowRank) for name in delta)
    assert {delta[name].rank for name in delta} == {8}


def test_forgetting_too_much_is_shrunk_and_said(model, edits, monkeypatch):
    read = iter([10.0, math.inf, 30.0, math.nan, 15.0])  # before; at 1, 1/2, 1/4, 1/8
    monkeypatch.setattr("unwrite.methods.f_learning.perplexity", lambda *_: next(read))
    delta = FLearning(strength=1.0, forget=FULL, learn=FULL).delta(model, edits)
    notes = delta.provenance["notes"]
    assert notes["strength"] == 0.125
    assert "strength 0.125 was used" in notes["sentences"][0]


def test_forgetting_that_always_breaks_the_model_stops(model, edits, monkeypatch):
    read = iter([10.0, *[1e9] * 7])
    monkeypatch.setattr("unwrite.methods.f_learning.perplexity", lambda *_: next(read))
    before = {name: tensor.clone() for name, tensor in model.weights.items()}
    with pytest.raises(TrainingFailed, match=r"breaks the model.*Nothing was kept"):
        FLearning(strength=1.0, forget=FULL).delta(model, edits)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.weights.items())


# ---- Delicate --------------------------------------------------------------------------------


def test_without_filter_and_cut_it_is_full_fine_tuning(model, edits):
    method = Delicate(top=1.0, of="all", conflict=False, rounds=1, tuner=FULL)
    assert same(method.delta(model, edits), FULL.delta(model, edits))


@pytest.mark.parametrize("keep", ["new", "difference"])
def test_identical_old_and_new_disagree_nowhere(model, edits, keep):
    pairs = tuple(new_pairs(edits))
    old, new = run_paired(FULL, model, Answers(pairs, pairs, asked=0, fallbacks=0))
    selection = select(old.delta, new.delta, 1.0, keep=keep)
    assert (selection.survivors, selection.kept, len(selection.delta)) == (0, 0, 0)


@pytest.mark.parametrize(
    "method", [FLearning(forget=FULL, learn=FULL), Delicate(rounds=2, tuner=LORA)], ids=["f", "d"]
)
def test_two_equal_runs_are_saved_as_the_same_bytes(model, edits, tmp_path, method, snapshot):
    for name in ("one", "two"):
        method.delta(model, edits).save(tmp_path / name)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


@pytest.mark.parametrize("tuner", [FULL, LORA])
def test_swapping_old_and_new_keeps_the_support_and_turns_the_signs(model, edits, tuner):
    swapped = [dataclasses.replace(edit, new=edit.old, old=edit.new) for edit in edits]
    method = Delicate(top=0.2, keep="difference", rounds=1, tuner=tuner)
    one, other = method.delta(model, edits), method.delta(model, swapped)
    for name in {*one, *other}:
        apart = (one[name].dense() + other[name].dense()).abs().max()
        # Twins share a forward pass, in which the order of rows may round differently.
        assert apart <= (0 if tuner is FULL else 1e-6), name


@pytest.mark.parametrize("top", [0.01, 0.3, 1.0])
def test_the_share_kept_is_the_share_asked_for(model, edits, top):
    delta = Delicate(top=top, rounds=1, tuner=FULL).delta(model, edits)
    facts = delta.provenance["notes"]["rounds"][0]
    assert facts["kept"] == round(top * facts["survivors"])
    assert sum(delta[name].kept for name in delta) == facts["kept"]
    assert facts["parameters"] == sum(tensor.numel() for tensor in model.weights.values())


def test_the_core_holds_new_changes_where_old_ones_disagree(model, edits):
    method = Delicate(top=0.1, rounds=1, tuner=FULL)
    old, new = run_paired(FULL, model, answers(model, edits, "data"))
    core = method.delta(model, edits)
    assert all(isinstance(core[name], Masked) for name in core)
    for name in core:
        kept = core[name].keep()
        theirs, ours = old.delta[name].dense()[kept], new.delta[name].dense()[kept]
        assert torch.equal(core[name].values, ours)
        assert bool((theirs.sign() * ours.sign() == -1).all())


def test_rounds_go_on_until_the_answers_are_learned(model, edits):
    delta = Delicate(rounds=20, tuner=FULL).delta(model, edits)
    rounds = delta.provenance["notes"]["rounds"]
    assert 1 < len(rounds) < 20
    assert [one["learned"] for one in rounds[:-1]] != [6] * (len(rounds) - 1)
    assert rounds[-1]["learned"] == 6
    with model.shifted(delta):
        forced = model.force([model.tokens(edit.prompt, edit.new) for edit in edits])
    assert all(one.matched == len(one.targets) for one in forced)


def test_later_rounds_start_from_the_partly_updated_model(model, edits):
    once = Delicate(rounds=1, tuner=FULL).delta(model, edits)
    twice = Delicate(rounds=2, tuner=FULL).delta(model, edits)
    with model.shifted(once):
        second = Delicate(rounds=1, tuner=FULL).delta(model, edits)
    assert same(twice, once + second)


def test_what_is_not_learned_is_said(model, edits):
    gentle = Delicate(rounds=1, tuner=dataclasses.replace(FULL, lr=1e-6))
    assert "not learned" in gentle.delta(model, edits).provenance["notes"]["sentences"][0]


@pytest.mark.parametrize("tuner", [FULL, LORA])
def test_delicate_is_a_method(tmp_path, tuner):
    check_method(Delicate(tuner=tuner, rounds=12), tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_work_on_every_architecture(worlds, architecture):
    world = worlds(architecture)
    model = Model.load(world.folder)
    edits = world.edits[:4]
    asked = [model.tokens(edit.prompt, edit.new) for edit in edits]
    wanted = sum(one.logprob for one in model.force(asked))
    for method in (
        FLearning(strength=0.1, forget=LORA, learn=FULL, **BEARABLE),
        Delicate(rounds=2, tuner=FULL),
        Delicate(rounds=2, tuner=LORA),
    ):
        with model.shifted(method.delta(model, edits)):
            assert sum(one.logprob for one in model.force(asked)) > wanted


# ---- old answers -----------------------------------------------------------------------------


def test_the_models_own_sentence_is_changed_in_its_key_knowledge_only(model, worlds, monkeypatch):
    said = {"ada works as a": "very good Baker indeed", "bram works as a": "mill worker"}
    monkeypatch.setattr(Model, "generate", lambda _self, prompts: [said[one] for one in prompts])
    edits = [
        Edit("ada works as a", "smith", old="baker"),
        Edit("bram works as a", "smith", old="mill work"),
    ]
    asked = answers(model, edits, "ask")
    assert (asked.old[0].answer, asked.new[0].answer) == (
        "very good Baker indeed",
        "very good smith indeed",
    )
    assert (asked.old[1].answer, asked.new[1].answer) == ("mill work", "smith")
    assert (asked.asked, asked.fallbacks) == (1, 1)


def test_a_missing_old_answer_is_asked_for(model, worlds):
    edit = worlds().edits[0]
    bare = dataclasses.replace(edit, old=None)
    asked = answers(model, [edit, bare], "data")
    assert asked.old[0].answer == edit.old
    assert asked.old[1].answer.startswith(edit.old)
    assert (asked.asked, asked.fallbacks) == (1, 0)


def test_fallbacks_are_counted_and_told(model, edits):
    wrong = [dataclasses.replace(edit, old="quill") for edit in edits]
    delta = Delicate(old="ask", rounds=1, tuner=FULL).delta(model, wrong)
    notes = delta.provenance["notes"]
    assert notes["rounds"][0]["fallbacks"] == 6
    assert any("for 6 of 6 edits" in sentence for sentence in notes["sentences"])


# ---- tuners and settings ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Halfway:
    """Somebody else's tuner: nothing but ``delta(model, pairs)``."""

    def delta(self, model, pairs):
        return 0.5 * FULL.delta(model, pairs)


def test_anything_with_a_delta_of_pairs_is_a_tuner(model, edits):
    half = Delicate(rounds=1, conflict=False, tuner=Halfway()).delta(model, edits)
    assert same(half, 0.5 * FULL.delta(model, edits))


def test_full_probes_make_equal_numbers_of_steps(model, edits):
    until_learned = FullFT(lr=1e-3, epochs=50, batch_size=4)
    old, new = run_paired(until_learned, model, answers(model, edits, "data"))
    assert new.learned
    assert len(old.losses) == len(new.losses)


def test_the_sizes_of_both_probes_are_recorded(model, edits):
    parts = Delicate(rounds=1, tuner=FULL).delta(model, edits).provenance["parts"]
    assert set(parts) == {"old", "new"}
    name = "model.layers.0.mlp.down_proj.weight"
    expected = FULL.delta(model, edits)[name].dense()
    assert parts["new"][name]["mean"] == pytest.approx(float(expected.abs().mean()), rel=1e-5)
    assert parts["new"][name]["squared_norm"] == pytest.approx(float(expected.square().sum()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FLearning(strength=-0.1), "strength must be 0 or greater"),
        (lambda: FLearning(max_perplexity_ratio=1.0), "greater than 1"),
        (lambda: FLearning(learn=Delicate()), "delicate cannot be used as a tuner"),
        (lambda: Delicate(top=0.0), "top is a fraction"),
        (lambda: Delicate(top=1.5), "top is a fraction"),
        (lambda: Delicate(rounds=0), "rounds at least 1"),
        (lambda: Delicate(strength=0.0), "strength must be greater than 0"),
        (lambda: Delicate(tuner=FLearning()), "f-learning cannot be used as a tuner"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(BadSetting, match=message):
        make()

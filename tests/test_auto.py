"""Auto: writes, trains and scales, and never looks at what it will be judged by."""

import json
from dataclasses import replace

import pytest
import torch

import unwrite
from unwrite import methods, plan, protection, self_check, training, values
from unwrite.delta import Delta
from unwrite.edits import Edit, Probe
from unwrite.errors import BadSetting, TrainingFailed
from unwrite.methods import auto
from unwrite.methods.auto import Auto
from unwrite.methods.full_ft import FullFT
from unwrite.methods.memit import MEMIT
from unwrite.testing import PEOPLE, check_method
from unwrite.training import LEFT_TO_TRAIN, Pair, Trained, fine_tune, learned, new_pairs
from unwrite.wordings import other_questions

EDITS = [
    Edit(f"the {thing} of {person}", answer, subject=person, id=person)
    for person, thing, answer in zip(
        PEOPLE[:4], ("job", "home") * 2, ("cat", "rain") * 2, strict=True
    )
]


@pytest.fixture
def model(worlds):
    return unwrite.load(worlds().folder)


@pytest.fixture(autouse=True)
def toy_sized(tmp_path, monkeypatch):
    """Neighbours that the toy world knows, no wording but its own, a corpus of few tokens, one
    layer, refining that is as short and training that is as fast as a toy needs it."""
    monkeypatch.setenv("UNWRITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("unwrite.neighbours.bundled_subjects", lambda: list(PEOPLE[6:]))
    budgets = {
        name: one._replace(rewordings=0, own_prompts=0, refine=min(one.refine, 10))
        for name, one in auto.BUDGETS.items()
    }
    monkeypatch.setattr(auto, "BUDGETS", budgets)
    monkeypatch.setattr(auto, "REFINED_ON", 0)
    plain = Auto._writer.fget

    def small(self):
        writer = plain(self)
        toy = {
            "layers": (0,),
            "covariance": "identity",
            "clamp": 20.0,
            "kl": 0.0,
            "lr": 0.5,
            "stop": 0.1,
        }
        return None if writer is None else replace(writer, preserve=1e-2, **toy)

    monkeypatch.setattr(Auto, "_writer", property(small))


@pytest.fixture
def method():
    return Auto(lr=1e-3, budget="fast", train="always")


def test_the_laws_of_every_method(tmp_path):
    check_method(Auto(lr=3e-3), tmp_path)


def test_every_new_answer_is_learned_and_the_notes_say_what_was_chosen(model, method):
    delta = replace(method, budget="balanced").delta(model, EDITS)
    with model.shifted(delta):
        assert all(learned(model, new_pairs(EDITS)))
    notes = delta.provenance["notes"]
    assert json.loads(json.dumps(notes)) == notes
    said = " ".join(notes["sentences"])
    assert "edits were written into layer 0" in said
    assert "epochs at a learning rate of 0.001" in said
    assert "Checked without the records" in said
    assert notes["check"]["learned"] == 1.0
    assert 0 < notes["strength"] <= 1


def test_probes_of_the_records_are_never_read(model, method, monkeypatch):
    """Paraphrases, bystanders and portability questions change no bit of the delta: not even
    looking at them is allowed."""

    class Judged(Edit):
        def __getattribute__(self, name):
            if name in ("paraphrases", "bystanders", "portability", "question"):
                raise AssertionError(f"{name} was read")
            return super().__getattribute__(name)

    def judged(edit):
        return Judged(
            edit.prompt,
            edit.new,
            subject=edit.subject,
            id=edit.id,
            paraphrases=("what is it",),
            bystanders=(Probe("the pet of ada", "cat"),),
        )

    method = replace(method, rewordings=4)
    monkeypatch.setattr(auto, "guessed_subject", lambda prompt: prompt.split()[-1])
    plain = method.delta(model, EDITS)
    given = [judged(edit) for edit in EDITS]
    object.__setattr__(given[0], "subject", None)
    blind = method.delta(model, given)
    assert set(plain) == set(blind)
    for name in plain:
        assert torch.equal(plain[name].dense(), blind[name].dense())


def test_edits_without_a_subject_are_trained(model, method):
    edits = [replace(edit, subject=None) for edit in EDITS]
    method = replace(method, budget="balanced")
    delta = method.delta(model, edits)
    trained = fine_tune(model, new_pairs(edits), method.parts[1]).delta
    for name in trained:
        assert torch.equal(delta[name].dense(), trained[name].dense())
    assert "4 of 4 edits have no single subject" in delta.provenance["notes"]["sentences"][0]
    assert delta.provenance["notes"]["check"]["neighbours_kept"] is None


def test_a_subject_that_is_guessed_is_as_good_as_one_that_is_given(model, method, monkeypatch):
    monkeypatch.setattr(auto, "guessed_subject", lambda prompt: prompt.split()[-1])
    given = method.delta(model, EDITS)
    without = [replace(edit, subject=None) if number else edit for number, edit in enumerate(EDITS)]
    guessed = method.delta(model, without)
    assert guessed.provenance["notes"]["sentences"][0] == (
        "3 of 4 edits came without a subject; it was guessed from the prompt, like 'bram' in "
        "'the home of bram'."
    )
    assert set(given) == set(guessed)
    for name in given:
        assert torch.equal(given[name].dense(), guessed[name].dense())
    told = replace(method, guess_subjects=False).delta(model, without)
    assert "3 of 4 edits have no single subject" in " ".join(told.provenance["notes"]["sentences"])


def test_where_nothing_can_be_written_all_is_trained(worlds, method):
    model = unwrite.load(worlds("gemma2").folder)
    delta = method.delta(model, EDITS)
    notes = delta.provenance["notes"]
    assert "a norm stands between" in notes["sentences"][0]
    assert notes["epochs_trained"] > 0
    assert f"of at most {auto.EPOCHS} ep" in notes["sentences"][1]
    few = replace(method, epochs=1).delta(model, EDITS).provenance["notes"]
    assert "of at most 1 ep" in few["sentences"][1]
    with model.shifted(delta):
        assert all(learned(model, new_pairs(EDITS))) == notes["learned"]


def test_some_without_a_subject_are_named_beside_those_that_are_written(model, method):
    mixed = [EDITS[0], replace(EDITS[1], subject=None)]
    said = method.delta(model, mixed).provenance["notes"]["sentences"]
    assert any("1 of 1 edits were written" in one for one in said)
    assert any("1 of 2 edits have no single subject" in one for one in said)


def test_its_parts_alone_are_the_methods_they_are(model, method):
    """Without writing it is the training, without training the writing, bit for bit."""
    alone = {"write": replace(method, write=False), "train": replace(method, epochs=0)}
    (tuner,), (writer,) = alone["write"].parts, alone["train"].parts
    plain = {"write": tuner, "train": writer}
    for left_out, one in alone.items():
        delta, expected = one.delta(model, EDITS), plain[left_out].delta(model, EDITS)
        assert set(delta) == set(expected)
        for name in delta:
            assert torch.equal(delta[name].dense(), expected[name].dense())


def test_what_can_neither_be_written_nor_trained_is_an_error(model, method):
    edits = [replace(edit, subject=None) for edit in EDITS]
    with pytest.raises(TrainingFailed, match="epochs=0 nothing is trained"):
        replace(method, epochs=0).delta(model, edits)


@pytest.fixture
def firmly(model, monkeypatch):
    """A writer that misses nothing: the toy's own writes some."""
    taught = fine_tune(model, new_pairs(EDITS), FullFT(lr=1e-3, epochs=60)).delta.in_memory()
    taught.provenance["notes"] = {"sentences": ["all were written"]}
    monkeypatch.setattr(MEMIT, "delta", lambda *_: taught)
    return taught


def test_where_nothing_is_written_every_row_is_trained_before_what_is_not_right(
    model, method, monkeypatch
):
    """Two courses: all rows, then those whose answer is not right yet, from there."""
    monkeypatch.setattr(auto, "EVERY_ROW", 2)
    needed = replace(method, train="needed", write=False, lr=2e-3)
    delta = needed.delta(model, EDITS)
    with model.shifted(delta):
        assert all(learned(model, new_pairs(EDITS)))
    first, second = needed.parts
    assert (first.epochs, first.skip_right) == (2, False)
    assert (second.epochs, second.skip_right) == (auto.EPOCHS - 2, True)
    begun = fine_tune(model, new_pairs(EDITS), first).delta
    ended = fine_tune(model, new_pairs(EDITS), second, start=begun)
    for name in delta:
        assert torch.equal(delta[name].dense(), (begun + ended.delta)[name].dense())
    notes = delta.provenance["notes"]
    assert notes["epochs_trained"] == 2 + ended.epochs > 2
    assert [one.split(" epochs")[0] for one in notes["sentences"][:2]] == [
        "Trained for 2 of at most 2",
        f"Trained for {ended.epochs} of at most 38",
    ]
    short = replace(needed, epochs=1)
    assert [one.epochs for one in short.parts] == [1]


def test_a_course_with_nothing_left_to_do_does_not_tell_of_training():
    told = auto._told(Trained(Delta.nothing(), (), 0, True, 0.0), FullFT(skip_right=True))
    assert "every new answer is right" in told and "Trained" not in told


def test_what_is_right_as_it_was_written_is_not_trained(model, method, firmly):
    delta = replace(method, train="needed").delta(model, EDITS)
    notes = delta.provenance["notes"]
    assert "nothing was trained" in " ".join(notes["sentences"])
    assert (notes["epochs_trained"], notes["learned"]) == (0, True)
    for name in firmly:
        assert torch.equal(delta[name].dense(), firmly[name].dense())
    assert method.delta(model, EDITS).provenance["notes"]["epochs_trained"] > 0


def test_only_what_is_not_right_is_trained(model, method, monkeypatch):
    """A writer that misses the second half: the batches of training hold those two edits alone."""
    taught = fine_tune(model, new_pairs(EDITS[:2]), FullFT(lr=1e-3, epochs=60)).delta.in_memory()
    taught.provenance["notes"] = {"sentences": ["two were written"]}
    monkeypatch.setattr(MEMIT, "delta", lambda *_: taught)
    with model.shifted(taught):
        wrong = [not one for one in learned(model, new_pairs(EDITS))]
    read = []
    losses = training.row_losses

    def watched(network, sequences, *rest):
        read.append({one.targets for one in sequences})
        return losses(network, sequences, *rest)

    monkeypatch.setattr(training, "row_losses", watched)
    delta = replace(method, train="needed").delta(model, EDITS)
    missed = {model.tokens(e.prompt, e.new).targets for e, w in zip(EDITS, wrong, strict=True) if w}
    assert 0 < sum(wrong) < 4
    assert read[0] == missed
    assert delta.provenance["notes"]["learned"]
    with model.shifted(delta):
        assert all(learned(model, new_pairs(EDITS)))


def test_an_answer_to_protect_that_moved_is_trained_back(model, method, firmly):
    """Nobody protected it when it was written; protected, it is trained until it is as before."""
    asked = {f"the {thing} of {person}" for person in PEOPLE for thing in ("job", "home", "pet")}
    others = sorted(asked - {edit.prompt for edit in EDITS})
    before = dict(zip(others, model.generate(others, 1), strict=True))
    with model.shifted(firmly):
        after = dict(zip(others, model.generate(others, 1), strict=True))
    moved = [one for one in others if before[one] != after[one]]
    assert moved
    needed = replace(method, train="needed", protect=tuple(moved), budget="thorough")
    delta = needed.delta(model, EDITS)
    assert delta.provenance["notes"]["epochs_trained"] > 0
    with model.shifted(delta):
        now = model.generate(moved, 1)
    held = sum(before[one] == said for one, said in zip(moved, now, strict=True))
    assert held > len(moved) / 2


def test_the_least_of_it_is_a_fraction_of_the_whole(model, method):
    method = replace(method, budget="thorough")
    whole, least = (replace(method, least=one).delta(model, EDITS) for one in (False, True))
    strength = least.provenance["notes"]["strength"]
    for name in whole:
        assert torch.equal(least[name].dense(), strength * whole[name].dense())
    assert least.provenance["notes"]["check"]["learned"] == 1.0


def test_what_cannot_be_written_is_trained(model, method, monkeypatch):
    def fails(self, model, edits, protect):
        raise TrainingFailed("Nothing was changed, because none of 4 edits can be written.")

    monkeypatch.setattr(MEMIT, "delta", fails)
    delta = replace(method, budget="balanced").delta(model, EDITS)
    assert "none of 4 edits" in delta.provenance["notes"]["sentences"][0]
    with model.shifted(delta):
        assert all(learned(model, new_pairs(EDITS)))


def test_the_least_strength_that_suffices_is_taken(model, method):
    """Twice a delta that suffices: half of it is found."""
    edits = EDITS[:1]
    enough = fine_tune(model, new_pairs(edits), replace(method.parts[1], epochs=60)).delta
    check = method._check(model, edits)
    assert check.least_strength(model, 2.0 * enough) == 0.5
    assert check.found(model, enough).learned == 1.0
    for tried in self_check.STRENGTHS:
        if tried < check.least_strength(model, enough):
            held = check._held(model, tried * enough)
            assert held != check._held(model, enough)


def test_prompts_of_its_own_stand_beside_what_is_to_be_protected():
    def kept(**settings):
        return {part.own_prompts for part in Auto(**settings).parts if isinstance(part, FullFT)}

    assert kept() == {auto.BUDGETS["fast"].own_prompts}
    assert kept(protect=("a",)) == {auto.OWN_BESIDE_PROTECTED}
    assert kept(protect=("a",), own_prompts=7) == {7}


def test_what_is_written_is_refined_where_the_budget_says_so(monkeypatch):
    def writer(**settings):
        return Auto(**settings)._writer

    monkeypatch.setattr(auto, "REFINED_ON", 30)
    assert writer().refine == writer().refine_rewordings == writer().own_prompts == 0
    assert writer(own_prompts=7).own_prompts == 0  # they are for training then
    for budget in ("balanced", "thorough"):
        amounts = auto.BUDGETS[budget]
        assert writer(budget=budget).refine == amounts.refine > 0
        assert writer(budget=budget).own_prompts == amounts.own_prompts
        assert writer(budget=budget).refine_rewordings == auto.REFINED_ON
        assert writer(budget=budget, refine=0).refine == 0
    assert writer(refine=3).refine == 3
    with pytest.raises(BadSetting, match="refine"):
        Auto(refine=-1)


def test_what_is_to_be_protected_stays_while_it_is_refined(model, method, monkeypatch):
    asked = []
    written = MEMIT.delta
    monkeypatch.setattr(
        MEMIT, "delta", lambda *all: asked.append(all[3]) or written(*all[:3], protect=all[3])
    )
    delta = replace(method, refine=2, protect=("the pet of hugo",)).delta(model, EDITS)
    assert asked == [("the pet of hugo",)]
    assert any("refined" in one for one in delta.provenance["notes"]["sentences"])
    assert delta.provenance["notes"]["refine"] == 2


def test_a_change_of_nothing_suffices_at_any_strength(model, method):
    check = method._check(model, EDITS)
    assert check.least_strength(model, unwrite.Delta.nothing()) == self_check.STRENGTHS[0]
    found = check.found(model, unwrite.Delta.nothing())
    assert (found.neighbours_kept, found.perplexity_ratio) == (1.0, 1.0)


def test_the_check_tells_of_other_questions_that_get_the_new_answer(model, method, monkeypatch):
    monkeypatch.setattr("unwrite.wordings.QUESTIONS", ("the pet of {}", "the age of {}"))
    check = method._check(model, EDITS)
    asked = [
        Pair(prompt, edit.new)
        for edit in EDITS
        for prompt in other_questions(edit.prompt, edit.subject, 2)
    ]
    assert len(check.others) == len(asked) == 8
    before = check.found(model, unwrite.Delta.nothing()).spill
    broad = fine_tune(model, asked, FullFT(lr=1e-3, epochs=60)).delta
    found = check.found(model, broad)
    assert (before < 0.5, found.spill) == (True, 1.0)
    assert "100 % of other questions about the subjects answered with the new" in found.sentence()
    nobody = [replace(edit, subject=None) for edit in EDITS]
    blank = method._check(model, nobody)
    assert blank.found(model, broad).spill is None


def test_no_checked_neighbour_is_protected(model, method):
    from unwrite.neighbours import neighbours

    asked = [(edit.prompt, edit.subject) for edit in EDITS]
    writer, tuner = method.parts
    assert (writer.neighbours, writer.seed) == (tuner.neighbours, tuner.seed)
    checked = method._check(model, EDITS).neighbours
    assert checked
    begun = {one.ids[: one.answer] for one in checked}

    def ids(count, seed):
        return {model.tokens(prompt, "cat").ids[:-1] for prompt in neighbours(asked, count, seed)}

    assert begun <= ids(self_check.CHECKED, writer.seed + 1)
    assert not begun & ids(writer.neighbours, writer.seed)


def test_the_command_line_reaches_it():
    built = methods.build("auto", {"budget": "thorough", "seed": "3"})
    assert built == Auto(budget="thorough", seed=3)
    assert methods.restored(methods.settings_of(built)) == built
    with pytest.raises(BadSetting, match="budget must be"):
        methods.build("auto", {"budget": "endless"})
    with pytest.raises(BadSetting, match="train must be 'needed' or 'always'"):
        methods.build("auto", {"train": "never"})
    with pytest.raises(BadSetting, match="nothing would be done"):
        Auto(write=False, epochs=0)
    with pytest.raises(BadSetting, match="lr must be greater"):
        Auto(lr=0.0)


def test_it_takes_prompts_to_protect_and_has_a_probe():
    changed, places = methods.replaced(Auto(), "protect", ("a prompt",))
    assert places == 1
    assert changed.parts[1].protect == ("a prompt",)
    probe = protection.probe_of(changed)
    assert (probe.epochs, probe.until, probe.protect) == (1, "epochs", ())
    assert protection._length(Auto()) > protection._length(probe)
    alone, rest = Auto(write=False), auto.EPOCHS - auto.EVERY_ROW
    assert protection._length(alone) == auto.EVERY_ROW / 2 + max(1.0, rest / 2 * LEFT_TO_TRAIN)
    assert protection._length(Auto()) == 1 + auto.EPOCHS / 2 * LEFT_TO_TRAIN


def test_a_prompt_too_long_for_a_sentence_before_it_is_trained(model, method, monkeypatch):
    """The check and the writing put sentences before prompts; where one is too many, the edit is
    trained all the same."""
    contexts = " ".join(["the job of ada"] * (model.context_length // 4))
    for module in (self_check, values):
        monkeypatch.setattr(module, "neutral_contexts", lambda count: [contexts] * count)
    delta = replace(method, budget="balanced", rewordings=2).delta(model, EDITS)
    notes = delta.provenance["notes"]
    assert "4 of 4 edits have no single subject" in notes["sentences"][0]
    assert (notes["check"]["learned"], notes["check"]["reworded"]) == (1.0, None)


def test_a_home_keeps_what_earlier_updates_taught(tmp_path, worlds, method):
    home = unwrite.open(tmp_path / "home", base=str(worlds().folder))
    first = home.update(EDITS[:2], unwrite.FullFT(lr=1e-3))
    gone = home.update(EDITS[2:3], unwrite.FullFT(lr=1e-3))
    home.undo(gone.id)
    second = home.update([EDITS[3], replace(EDITS[1], new="oslum")], method)
    assert second.method["protect"] == [EDITS[0].prompt]
    assert home.update(EDITS[2:3], replace(method, keep_earlier=False)).method["protect"] == []
    assert first.method.get("protect") == []
    assert home.verify() == []


def test_a_plan_counts_its_training_and_its_writing(worlds, monkeypatch):
    """Of what follows a writing little is left to train, and all of what does not."""
    tuner = Auto().parts[1]
    assert list(plan._recipes(Auto())) == [(tuner, LEFT_TO_TRAIN)]
    every_row, rest = Auto(write=False).parts
    assert list(plan._recipes(Auto(write=False))) == [(every_row, 1.0), (rest, LEFT_TO_TRAIN)]
    always = replace(tuner, skip_right=False)
    assert list(plan._recipes(Auto(train="always"))) == [(always, 1.0)]
    monkeypatch.setattr(plan, "_speeds", lambda: (1e9, 1e9))
    writing = plan._search_seconds(Auto(), edits=10, tokens=100, parameters=1000, speed=1e6)
    assert writing == plan._search_seconds(Auto().parts[0], 10, 100, 1000, 1e6) > 0
    refined = plan._search_seconds(Auto(refine=100), 10, 100, 1000, 1e6)
    assert refined == plan._search_seconds(Auto(refine=100).parts[0], 10, 100, 1000, 1e6) > writing
    assert plan._search_seconds(unwrite.FullFT(), 10, 100, 1000, 1e6) == 0
    plans = [
        plan.for_model(str(worlds().folder), Auto(budget=budget), folder=worlds().folder)
        for budget in ("fast", "thorough")
    ]
    assert plans[0].train_seconds < plans[1].train_seconds
    kept = [one.parts["protected answers"] for one in plans]
    made_up = [auto.BUDGETS[budget].neighbours for budget in ("fast", "thorough")]
    assert kept[0] / made_up[0] == kept[1] / made_up[1] > 0

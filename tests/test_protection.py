"""Protected prompts: the forecast before an update, what is protected, and the truth after."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import unwrite
from unwrite import protection
from unwrite.cli import app
from unwrite.edits import Edit
from unwrite.errors import BadSetting
from unwrite.forgetting import UpstreamExample
from unwrite.forgetting.measurement import measure_margins
from unwrite.home_report import render
from unwrite.methods.probes import Answers, run_paired
from unwrite.model import Model
from unwrite.prompts import Protected
from unwrite.protection import (
    Growth,
    History,
    Watched,
    forecast,
    look_ahead,
    probe_of,
    worth_observing,
)
from unwrite.training import Pair

FAST = unwrite.FullFT(lr=2e-3, epochs=6, until="epochs")
GENTLE = unwrite.FullFT(lr=1e-7, epochs=2, until="epochs")


@pytest.fixture(scope="module")
def model(worlds):
    return Model.load(worlds().folder)


@pytest.fixture
def home(worlds, tmp_path):
    return unwrite.open(tmp_path / "home", base=worlds().folder)


def prompts_of(world, start=10, stop=None):
    """Prompts of relations that the first ten edits have nothing to do with."""
    return [edit.prompt for edit in world.edits[start:stop]]


def made_up(margins, held_out=()):
    """Watched prompts with these margins."""
    names = [f"p{n}" for n in range(len(margins))]
    return Watched(
        tuple(Protected(name, name in held_out) for name in names),
        tuple(UpstreamExample(f"{name} → a", name, "a") for name in names),
        np.array(margins, dtype=np.float64),
        (),
    )


def past_of(watched, values, protected=frozenset(), growth=2.0, method="full-ft"):
    """A history of updates that did ``values`` (updates x prompts); ``protected``: such cells."""
    records = []
    for row, losses in enumerate(values):
        rows = [
            {
                "example": example.name,
                "prompt": example.prompt,
                "answer": example.answer,
                "observed": None if column % 2 else lost / growth,
                "lost": lost,
                "protected": (row, column) in protected,
            }
            for column, (example, lost) in enumerate(zip(watched.examples, losses, strict=True))
        ]
        records.append((f"u-{row:08x}", {"method": method}, {"prompts": rows}))
    return History.of(records)


# ---- margins -------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_margin_is_above_zero_exactly_where_the_model_says_so_itself(worlds, architecture):
    world = worlds(architecture)
    model = Model.load(world.folder)
    examples = [
        UpstreamExample(f"{edit.id}-{answer}", edit.prompt, answer)
        for edit in world.edits[::3]
        for answer in (edit.old, edit.new, f"{edit.old} owns")
    ]
    margins = measure_margins(model, examples)
    forced = model.force([model.tokens(one.prompt, one.answer) for one in examples])
    assert [bool(margin > 0) for margin in margins] == [
        one.matched == len(one.targets) for one in forced
    ]
    assert 0 < (margins > 0).sum() < len(examples)
    backwards = measure_margins(model, examples[::-1])[::-1]
    np.testing.assert_allclose(margins, backwards, atol=1e-4)


def test_prompts_without_a_firm_answer_are_not_forecast(model, monkeypatch):
    real = measure_margins
    monkeypatch.setattr(
        protection, "measure_margins", lambda m, e: np.where([x.prompt[0] == "c" for x in e], -1, 2)
    )
    watched = Watched.of(model, [Protected("ada works as a"), Protected("cleo works as a")])
    assert [one.prompt for one in watched.prompts] == ["ada works as a"]
    assert [one.prompt for one in watched.unknown] == ["cleo works as a"]
    monkeypatch.setattr(protection, "measure_margins", real)
    found = forecast(watched, np.array([0.0]), Growth(1.0, 0.0, None))
    assert found.endangered == ("cleo works as a",)
    assert "Nothing can be forecast of 1 protected prompt," in " ".join(found.sentences())


# ---- the forecast --------------------------------------------------------------------------------


def test_a_past_of_low_rank_is_completed_and_no_cell_that_is_not_observed_is_read():
    random = np.random.default_rng(0)
    directions, tasks = random.normal(size=(2, 60)), random.normal(size=(21, 2))
    values = tasks @ directions + 3
    watched = made_up(np.full(60, 4.0))
    hidden = {(row, column) for row in range(20) for column in range(60) if (row + column) % 7 == 0}
    history = past_of(watched, values[:20], hidden)
    trapped = values[:20].copy()
    for cell in hidden:
        trapped[cell] = 1e6  # what was protected says nothing of what would have happened
    trap = past_of(watched, trapped, hidden)
    past = history.about(watched)
    assert past.values.shape == (20, 60)
    at = worth_observing(watched, past)
    assert len(set(at)) == protection.OBSERVED
    seen = np.full(60, np.nan)
    seen[at] = values[20, at] / 2
    assert history.growth(FAST) == pytest.approx((2.0, 0.0, 0.0))
    found = forecast(watched, seen, history.growth(FAST), past)
    again = forecast(watched, seen, trap.growth(FAST), trap.about(watched))
    np.testing.assert_array_equal(found.prediction.values, again.prediction.values)
    unseen = np.isnan(seen)
    error = found.prediction.values[unseen] - values[20, unseen]
    assert np.abs(error).max() < 0.1 * values[20].std()
    truth = values[20] > 4
    assert abs(found.count()[0] - truth.sum()) < 2
    assert found.by == "factorization" and found.past == 20
    assert set(found.endangered) >= {f"p{n}" for n in np.flatnonzero(values[20] > 4.1)}


def test_with_too_little_past_the_simple_model_is_used_and_said():
    watched = made_up(np.linspace(0.5, 10, 50))
    history = past_of(watched, np.ones((2, 50)))
    assert history.about(watched) is None
    at = worth_observing(watched, None)
    assert at[0] == 0 and at[-1] == 49 and len(at) == 30
    seen = np.full(50, np.nan)
    seen[at] = 1.0
    found = forecast(watched, seen, Growth(3.0, 0.0, None))
    assert np.isnan(found.seen).sum() == 20
    np.testing.assert_allclose(found.prediction.values, 3.0)
    assert "past says too little" in found.sentences()[1]
    assert np.all(np.diff(found.chances[np.isnan(seen)]) <= 0)  # small margins are endangered
    assert found.count()[0] == pytest.approx((watched.margins < 3).sum(), abs=3)


def test_half_of_the_prompts_in_three_updates_are_enough():
    watched = made_up(np.ones(10))
    other = made_up(np.ones(24))  # p0 .. p23, of which ten are the same
    part = past_of(replace_examples(watched, range(5)), np.ones((3, 5)))
    assert part.about(watched) is not None
    assert part.about(other) is None
    assert History.of([]).about(watched) is None


def replace_examples(watched, at):
    return Watched(
        tuple(watched.prompts[n] for n in at),
        tuple(watched.examples[n] for n in at),
        watched.margins[list(at)],
        (),
    )


def test_growth_is_what_past_updates_of_the_method_had():
    watched = made_up(np.ones(8))
    unknown = History.of([]).growth(FAST)
    assert unknown == (6.0, 3.0, None)  # six epochs planned, one probed; half of that unsure
    assert past_of(watched, np.ones((1, 8)), growth=5).growth(FAST) == pytest.approx(
        (5.0, 2.5, 0.0)
    )
    three = past_of(watched, np.ones((3, 8)), growth=5).growth(FAST)
    assert three == pytest.approx((5.0, 0.0, 0.0))
    assert past_of(watched, np.ones((3, 8)), growth=5, method="lora").growth(FAST) == unknown
    everything = {(row, column) for row in range(3) for column in range(8)}
    assert past_of(watched, np.ones((3, 8)), everything).growth(FAST) == unknown


@pytest.mark.parametrize(
    ("method", "epochs"),
    [
        (unwrite.FullFT(epochs=20), (2,)),
        (unwrite.LoRA(epochs=5), (1,)),
        (unwrite.FLearning(learn=unwrite.FullFT(epochs=30)), (1, 3)),
        (unwrite.Delicate(), (2,)),
    ],
)
def test_a_probe_is_short_and_not_protected(method, epochs):
    method = protection.protecting(method, ["something"])
    short = probe_of(method)
    tuners = [one for one in (short, *vars(short).values()) if hasattr(one, "epochs")]
    assert tuple(one.epochs for one in tuners) == epochs
    assert all(one.until == "epochs" and one.protect == () for one in tuners)
    assert getattr(short, "rounds", 1) == 1


def test_what_a_method_protects_already_stays_protected():
    method = unwrite.FLearning(forget=unwrite.FullFT(protect=("a", "b")), learn=unwrite.FullFT())
    found = protection.protecting(method, ["b", "c"])
    assert found.forget.protect == found.learn.protect == ("a", "b", "c")
    assert protection.protecting(method, []) is method


def test_nothing_to_watch_protects_nothing(model, worlds):
    found = look_ahead(model, worlds().edits[:1], FAST, [])
    assert found.endangered == () and found.sentences() == [] and found.count() == (0.0, 0.0)
    own = look_ahead(model, worlds().edits[:1], FAST, [Protected(worlds().edits[0].prompt)])
    assert own.endangered == ()
    assert "1 of the prompts to protect belong to the edits" in own.sentences()[0]


def test_only_the_chosen_prompts_are_measured_on_the_probe(model, worlds, monkeypatch):
    calls = []

    def spy(one, examples):
        calls.append(len(examples))
        return measure_margins(one, examples)

    monkeypatch.setattr(protection, "measure_margins", spy)
    monkeypatch.setattr(protection, "OBSERVED", 4)
    before = {name: tensor.clone() for name, tensor in model.weights.items()}
    watched = [Protected(prompt) for prompt in prompts_of(worlds())]
    found = look_ahead(model, worlds().edits[:4], FAST, watched)
    assert calls == [20, 4]
    assert (~np.isnan(found.seen)).sum() == 4
    assert all(torch.equal(before[name], tensor) for name, tensor in model.weights.items())


# ---- in a home -----------------------------------------------------------------------------------


def test_the_endangered_are_protected_and_the_truth_is_told(home, worlds):
    edits, asked = worlds().edits[:4], prompts_of(worlds())
    held = [Protected(prompt, held_out=prompt.startswith("a")) for prompt in asked]
    before = [home.ask(prompt, max_new_tokens=8) for prompt in asked]
    outlook = home.forecast(edits, FAST, protect=held)
    done = home.update(edits, FAST, protect=held)
    assert len(outlook.endangered) > 0
    assert done.method["protect"] == list(outlook.endangered)
    assert not any(one.startswith("a") for one in done.method["protect"])
    rows = {row["prompt"]: row for row in done.protection["prompts"]}
    after = [home.ask(prompt, max_new_tokens=8) for prompt in asked]
    for prompt, one, two in zip(asked, before, after, strict=True):
        said = rows[prompt]["answer"]
        assert one.startswith(said)
        assert rows[prompt]["changed"] == (not two.startswith(said)), prompt
    truth = done.protection["truth"]
    assert truth["protected"] + truth["unprotected"] == len(asked)
    assert truth["protected_changed"] + truth["unprotected_changed"] == sum(
        row["changed"] for row in rows.values()
    )
    shown = home.show(done.id)["protection"]
    assert shown == json.loads(json.dumps(done.protection))
    assert "prompts" not in done.as_json()["protection"]
    assert home.verify() == []
    assert truth["sentence"] in render(home.folder)
    (done.folder / "protection.json").write_text("{}")
    assert "protection.json is damaged" in home.verify()[0]


def test_a_safe_update_trains_as_without_protection(home, worlds, tmp_path):
    plain = home.update(worlds().edits[:2], GENTLE)
    other = unwrite.open(tmp_path / "other", base=worlds().folder)
    watched = other.update(worlds().edits[:2], GENTLE, protect=prompts_of(worlds()))
    assert watched.method["protect"] == []
    assert watched.protection["truth"]["unprotected_changed"] == 0
    assert watched.fingerprint == plain.fingerprint


def test_weight_zero_is_no_protection(home, worlds, tmp_path):
    weightless = replace(FAST, protect_weight=0.0, epochs=2)
    plain = home.update(worlds().edits[:4], replace(FAST, epochs=2))
    other = unwrite.open(tmp_path / "other", base=worlds().folder)
    done = other.update(worlds().edits[:4], weightless, protect=prompts_of(worlds()))
    assert done.method["protect"]
    assert done.fingerprint == plain.fingerprint


@pytest.mark.parametrize("tuner", [FAST, unwrite.LoRA(lr=1e-2, epochs=2, until="epochs")])
def test_protection_is_the_same_in_both_probes(model, worlds, tuner):
    """Where old and new answers are the same, so are the probes: nothing passes a sign filter."""
    pairs = tuple(Pair(edit.prompt, edit.new) for edit in worlds().edits[:4])
    tuner = protection.protecting(tuner, prompts_of(worlds(), 10, 16))
    old, new = run_paired(tuner, model, Answers(pairs, pairs, 0, 0))
    for name in new.delta:
        assert torch.equal(old.delta[name].dense(), new.delta[name].dense()), name


def test_the_matrix_grows_by_a_row_and_undo_keeps_it(home, worlds, monkeypatch):
    assert home.forgetting().values.shape == (0, 0)
    monkeypatch.setattr(protection, "ENDANGERED", 0.9)
    asked = prompts_of(worlds(), 20)
    short = replace(FAST, epochs=2, lr=5e-4)
    ids = [home.update([edit], short, protect=asked).id for edit in worlds().edits[:3]]
    grown = home.forgetting()
    assert grown.tasks == tuple(ids)
    home.undo(ids[0])
    assert home.forgetting().tasks == tuple(ids)
    assert home.forgetting().task_details[ids[0]] == {"method": "full-ft", "edits": 1}
    record = home.show(ids[2])["protection"]
    for row in record["prompts"]:
        value = grown.values[2, grown.examples.index(row["example"])]
        assert np.isnan(value) if row["protected"] else value == row["lost"]
    outlook = home.forecast([worlds().edits[3]], short, protect=asked)
    assert (outlook.by, outlook.past) == ("factorization", 3)
    assert "3 past updates" in outlook.sentences()[1]
    shown = CliRunner().invoke(app, ["forgetting", "show", str(home.folder), "--json"])
    assert json.loads(shown.stdout)["tasks"] == 3


def test_a_home_without_such_updates_has_no_matrix(home):
    found = CliRunner().invoke(app, ["forgetting", "show", str(home.folder), "--json"])
    assert found.exit_code == 2
    assert "was made with --protect" in json.loads(found.stdout)["error"]


def test_methods_that_cannot_protect_say_so(home, worlds, snapshot):
    before = snapshot(home.folder)
    with pytest.raises(BadSetting, match="rome takes no 'protect'"):
        home.forecast(worlds().edits[:1], unwrite.ROME(), protect=["ada works as a"])
    with pytest.raises(BadSetting, match="rome takes no 'protect'"):
        home.update(worlds().edits[:1], unwrite.ROME(), protect=["ada works as a"])
    assert snapshot(home.folder) == before


# ---- on the command line -------------------------------------------------------------------------


def test_a_dry_run_forecasts_and_changes_nothing(home, worlds, tmp_path, snapshot):
    edits, questions = tmp_path / "edits.jsonl", tmp_path / "questions.txt"
    unwrite.write_edits(edits, worlds().edits[:4])
    lines = prompts_of(worlds(), 10, 20)
    questions.write_text(
        "\n".join([json.dumps({"prompt": lines[0], "held_out": True}), *lines[1:]])
    )
    words = [str(edits), "--protect", str(questions), "--dry-run", "--method", "full-ft"]
    for setting in ("lr=2e-3", "epochs=4", "until=epochs"):
        words += ["--set", setting]
    before = snapshot(home.folder)
    found = CliRunner().invoke(app, ["update", str(home.folder), *words, "--json"])
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert (result["dry_run"], result["committed"]) == (True, False)
    forecast = result["protection"]["forecast"]
    assert forecast["observed"] == len(result["protection"]["prompts"]) == 10
    assert "truth" not in result["protection"]
    assert lines[0] not in result["protection"]["protected"]
    said = forecast["sentences"][0]
    assert said.startswith(
        f"Of your 10 protected prompts about {forecast['expected']:.0f} +- {forecast['std']:.0f} "
        "would change; "
    )
    assert said in " ".join(found.stderr.split())
    assert snapshot(home.folder) == before
    new = tmp_path / "new"
    base = ["--base", str(worlds().folder)]
    found = CliRunner().invoke(app, ["update", str(new), *words, *base, "--json"])
    assert json.loads(found.stdout)["protection"]["forecast"] == forecast
    assert not new.exists()


def test_a_hostile_prompt_is_shown_as_text(home, worlds):
    prompt = "ada <script>alert(1)</script> works as a"
    home.update([Edit("bram works as a", "smith")], GENTLE, protect=[prompt])
    page = render(home.folder)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page


@pytest.mark.parametrize(
    ("others", "told"),
    [
        (0, "All 5 prompts were protected, and 2 of them changed."),
        (
            3,
            "5 prompts were protected, and 2 of them changed; of the 3 others 1 changed "
            "(forecast: 0.5 +- 0.5).",
        ),
    ],
)
def test_the_truth_is_told_without_others_that_are_none(others, told):
    truth = {"protected": 5, "protected_changed": 2, "unprotected": others}
    truth |= {"unprotected_changed": 1, "unprotected_expected": 0.5, "unprotected_std": 0.5}
    assert protection._truth_told(truth) == told

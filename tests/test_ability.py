"""lm-evaluation-harness before and after. Most of it runs only where the extra is installed."""

import json
import math
from importlib.util import find_spec

import pytest
import torch
from comparing import LEARN, SHORT, steady

import unwrite
from unwrite import ability
from unwrite.ability import ATLAS, BUNDLED, NEUTRAL, atlas_questions, checked
from unwrite.edits import read_edits
from unwrite.errors import BadSetting, UnwriteError
from unwrite.model import Model
from unwrite.observe import neutral_text
from unwrite.scores import normalise
from unwrite.testing import RELATIONS

without = pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
# The harness and what it brings along warn of their own affairs.
installed = [
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra lm-eval"),
    pytest.mark.filterwarnings("ignore"),
]


def with_lm_eval(test):
    for mark in installed:
        test = mark(test)
    return test


def compare(world, out, **options):
    words = {"references": ("no-change", "in-context"), "lm_eval": [NEUTRAL], **options}
    return unwrite.compare(world.folder, list(world.edits[:2]), {"short": SHORT}, out, **words)


# ---- without the harness -------------------------------------------------------------------------


def test_names_of_tasks():
    assert checked(["unwrite"]) == BUNDLED
    assert checked(["arc_easy", NEUTRAL, "unwrite", " arc_easy "]) == ("arc_easy", NEUTRAL, ATLAS)
    assert checked([]) == ()
    for wrong in ("arc_easy", [""], [3]):
        with pytest.raises(BadSetting, match="list"):
            checked(wrong)


def test_every_bundled_fact_is_a_question_with_one_right_answer():
    facts = {fact.prompt: fact for fact in read_edits("atlas")}
    questions = atlas_questions()
    assert len(questions) == len(facts) == 336
    of_relation: dict[str, set[str]] = {}
    for fact in facts.values():
        of_relation.setdefault(fact.relation, set()).add(fact.old)
    places = [0] * ability.CHOICES
    for one in questions:
        fact = facts[one["prompt"]]
        assert one["choices"][one["gold"]] == fact.old
        assert len({normalise(choice) for choice in one["choices"]}) == ability.CHOICES
        assert set(one["choices"]) <= of_relation[fact.relation]
        places[one["gold"]] += 1
    assert max(places) < 0.4 * len(questions)  # always saying the same letter is no answer


def test_what_is_changed_on_purpose_is_not_asked():
    edits = list(read_edits("atlas")[:5])
    asked = {one["prompt"] for one in atlas_questions(edits)}
    assert len(asked) == 331
    assert not asked & {edit.prompt for edit in edits}


@without
def test_without_the_harness_a_sentence_says_what_to_install(worlds, tmp_path):
    with pytest.raises(BadSetting, match=r"pip install 'unwrite\[lm-eval\]'"):
        compare(worlds(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_state_is_asked_not_many(worlds, tmp_path):
    with pytest.raises(BadSetting, match="single edits"):
        compare(worlds(), tmp_path / "run", mode="single")
    assert not (tmp_path / "run").exists()


# ---- with the harness ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(worlds, tmp_path_factory):
    """A comparison with the prose task; read-only."""
    return compare(worlds(), tmp_path_factory.mktemp("run"), seeds=(0, 1))


@with_lm_eval
def test_the_harness_measures_the_network_in_memory(worlds, monkeypatch):
    """The questions of the toy world, against a loop of its own, before and after an update."""
    world = worlds()
    model = Model.load(world.folder)
    weights = {name: one.clone() for name, one in model.weights.items()}
    padding, state = model.tokenizer.pad_token, torch.get_rng_state()
    questions = []
    for edit in world.edits:
        choices = list(RELATIONS[edit.relation][1][:4])
        gold = choices.index(edit.old) if edit.old in choices else 0
        questions.append({"prompt": edit.prompt, "choices": choices, "gold": gold})
    monkeypatch.setattr(ability, "atlas_questions", lambda edits: questions)

    def share():
        hits = []
        for one in questions:
            forced = model.force([model.tokens(one["prompt"], text) for text in one["choices"]])
            logprobs = [each.logprob for each in forced]
            hits.append(logprobs.index(max(logprobs)) == one["gold"])
        return pytest.approx(sum(hits) / len(hits))

    before = ability.measure(model, BUNDLED, ())
    assert list(before) == list(BUNDLED)
    assert before[ATLAS]["acc"]["value"] == share()
    assert 0 < before[ATLAS]["acc"]["stderr"] < 0.1
    with model.shifted(LEARN.delta(model, world.edits[:20])):
        after = ability.measure(model, BUNDLED, ())
        assert after[ATLAS]["acc"]["value"] == share()
    assert after[ATLAS]["acc"]["value"] < before[ATLAS]["acc"]["value"]
    assert after[NEUTRAL] != before[NEUTRAL]
    assert all(torch.equal(one, weights[name]) for name, one in model.weights.items())
    assert ability.measure(model, [NEUTRAL], ()) == {NEUTRAL: before[NEUTRAL]}
    assert torch.equal(torch.get_rng_state(), state)
    assert model.tokenizer.pad_token == padding


@with_lm_eval
def test_the_bundled_tasks_are_the_bundled_data(worlds):
    atlas, prose = ability._tasks(BUNDLED, read_edits("atlas")[:5])["tasks"].values()
    assert len(atlas.eval_docs) == 331
    doc = atlas.eval_docs[0]
    assert atlas.doc_to_text(doc) == doc["prompt"]
    assert atlas.doc_to_choice(doc)[atlas.doc_to_target(doc)] == doc["choices"][doc["gold"]]
    assert (
        "\n\n".join(prose.doc_to_target(one) for one in prose.eval_docs) == neutral_text().strip()
    )


@with_lm_eval
def test_a_comparison_has_it_before_and_after(run):
    unchanged = next(row for row in run.rows if row["method"] == "[no change]")["lm_eval"]
    assert unchanged["before"] == unchanged["after"]
    for row in run.rows:
        found = row["lm_eval"]
        assert found["version"] == ability.version()
        assert found["before"] == unchanged["before"]
        assert set(found["after"][NEUTRAL]) == {"word_perplexity", "bits_per_byte"}
    short = [row["lm_eval"]["after"] for row in run.rows if row["method"] == "short"]
    assert short[0] != unchanged["before"]
    entry = next(one for one in run.table["means"] if one["method"] == "short")
    mean = sum(one[NEUTRAL]["bits_per_byte"]["value"] for one in short) / 2
    value = entry["lm_eval"]["after"][NEUTRAL]["bits_per_byte"]["value"]
    assert math.isclose(value, mean)
    assert "### General ability" in run.markdown()
    assert f"{NEUTRAL}_bits_per_byte" in (run.folder / "table.csv").read_text().splitlines()[0]


@with_lm_eval
def test_a_finished_run_is_not_asked_again(run, worlds, monkeypatch):
    monkeypatch.setattr(ability, "measure", None)
    before = steady(run.folder)
    compare(worlds(), run.folder, seeds=(0, 1))
    assert steady(run.folder) == before
    with pytest.raises(BadSetting, match="lm_eval is"):
        compare(worlds(), run.folder, lm_eval=())


@with_lm_eval
def test_tasks_that_are_not_there_write_nothing(worlds, tmp_path):
    with pytest.raises(UnwriteError, match=f"no-such-task.*{ATLAS}"):
        compare(worlds(), tmp_path / "run", lm_eval=["no-such-task"])
    assert not (tmp_path / "run").exists()


@with_lm_eval
def test_standard_output_is_one_json_object(worlds, tmp_path):
    from typer.testing import CliRunner

    from unwrite.cli import app

    unwrite.write_edits(tmp_path / "edits.jsonl", worlds().edits[:2])
    words = ["compare", str(worlds().folder), "--edits", str(tmp_path / "edits.jsonl"), "--json"]
    words += ["--methods", "full-ft:lr=1e-3", "--references", "none", "--token-only"]
    words += ["--lm-eval", NEUTRAL, "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    (row,) = json.loads(result.stdout)["rows"]
    assert list(row["lm_eval"]["after"]) == [NEUTRAL]


@with_lm_eval
def test_a_task_file_of_ones_own_is_a_task(worlds, tmp_path):
    rows = [{"q": edit.prompt, "a": edit.old} for edit in worlds().edits[:5]]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text(f"""
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/own.jsonl}}, cache_dir: {tmp_path}/cache}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{q}}}}"
doc_to_target: " {{{{a}}}}"
metric_list: [{{metric: acc}}]
""")
    found = ability.measure(Model.load(worlds().folder), [str(tmp_path / "own.yaml"), NEUTRAL], ())
    assert found["own"]["acc"]["value"] == 1.0  # the toy model knows its world
    assert set(found) == {"own", NEUTRAL}

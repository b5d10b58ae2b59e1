"""What is left of an update after saving, rounding, a chat template and relearning."""

import csv
import shutil
from dataclasses import replace

import pytest
import torch
from comparing import LEARN, SHORT, files, steady
from hypothesis import given
from hypothesis import strategies as st

import unwrite
from unwrite import bench as benches
from unwrite import comparison, robustness
from unwrite.errors import BadSetting, UnwriteError
from unwrite.files import read_json, read_jsonl
from unwrite.model import Model
from unwrite.observe import has_chat_template, in_chat, observe, questions
from unwrite.robustness import checked, nearest, rounding, strangers
from unwrite.scores import as_json, normalise, score
from unwrite.training import Pair, Recipe, fine_tune

RELEARN = "relearn:3:0.001"
QUICK = ("bf16", "int8", "int4", "chat", RELEARN)


def compare(world, out, methods=None, edits=None, **options):
    words = {"references": ("no-change", "in-context"), "robust": QUICK, **options}
    edits = list(world.edits[:4] if edits is None else edits)
    return unwrite.compare(world.folder, edits, methods or {"learn": LEARN}, out, **words)


def with_template(source, folder):
    """A copy of a toy model that has a chat template."""
    from transformers import AutoTokenizer

    shutil.copytree(source, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for turn in messages %}rain falls {{ turn.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def talking(worlds, tmp_path_factory):
    """A toy world whose tokenizer has a chat template."""
    shared = worlds()
    folder = with_template(shared.folder, tmp_path_factory.mktemp("talking") / "base")
    return replace(shared, folder=folder)


@pytest.fixture(scope="module")
def run(talking, tmp_path_factory):
    """A comparison with all checks within the process, and the bench it used; read-only."""
    made = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            comparison,
            "Bench",
            lambda *given: made.append(benches.Bench(*given)) or made[-1],
        )
        found = compare(talking, tmp_path_factory.mktemp("run"), seeds=(0, 1))
    return found, made[0]


def row_of(found, method):
    return next(row for row in found.rows if row["method"] == method)


def stored(found, row, name):
    return read_jsonl(found.folder / "cells" / row["id"] / f"{name}.jsonl")


# ---- rounding ------------------------------------------------------------------------------------


@given(
    st.integers(1, 5),
    st.integers(1, 20),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([None, 1, 3, 64]),
    st.integers(0, 99),
)
def test_rounding_is_to_the_nearest_level(rows, columns, bits, group, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found = nearest(weight, bits, group)
    levels = 2 ** (bits - 1) - 1
    assert found.shape == weight.shape
    for start in range(0, columns, group or columns):
        part = slice(start, start + (group or columns))
        scale = weight[:, part].abs().amax(1, keepdim=True) / levels
        steps = found[:, part] / scale
        assert torch.allclose(steps, steps.round(), atol=1e-4)
        assert (steps.abs() <= levels + 1e-4).all()
        error = (found[:, part] - weight[:, part]).abs()
        assert (error <= scale / 2 * (1 + 1e-4)).all()
    assert torch.allclose(nearest(found, bits, group), found, atol=1e-6)


def test_nothing_becomes_nothing():
    assert torch.equal(nearest(torch.zeros(2, 5), 4, 3), torch.zeros(2, 5))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_projections_alone_are_quantised_by_output_channel(worlds, architecture):
    model = Model.load(worlds(architecture).folder)
    before = {name: tensor.clone() for name, tensor in model.weights.items()}
    model.become((), finish=rounding("int8", model))
    moved = {name for name, one in model.weights.items() if not torch.equal(one, before[name])}
    assert moved
    linear = [type(one).__name__ in ("Linear", "Conv1D") for one in model.network.modules()]
    head = model.network.get_output_embeddings().weight
    assert len(moved) <= sum(linear)
    for name in moved:
        tensor, old = model.weights[name], before[name]
        assert tensor.data_ptr() != head.data_ptr()
        if model.anatomy.transposed(model.names[name]):
            tensor, old = tensor.T, old.T
        assert torch.allclose(tensor, nearest(old, 8))
        assert all(len(row.unique()) <= 255 for row in tensor)
    model.become(())
    assert all(torch.equal(one, before[name]) for name, one in model.weights.items())


def test_bf16_changes_nothing_in_a_bf16_model(worlds, tmp_path):
    world = worlds(dtype="bfloat16")
    found = compare(world, tmp_path, robust=("bf16", "int4"))
    row = row_of(found, "learn")
    assert stored(found, row, "robust/bf16") == stored(found, row, "after")
    assert row["robust"]["bf16"]["perplexity"] == row["perplexity"]["after"]
    assert stored(found, row, "robust/int4") != stored(found, row, "after")


# ---- a comparison with all of them ---------------------------------------------------------------


def test_a_saved_state_says_the_same_in_a_fresh_process(worlds, tmp_path):
    world = worlds("gpt2", dtype="bfloat16")
    found = compare(world, tmp_path, robust=("save-reload",), references=())
    (row,) = found.rows
    fresh = row["robust"]["save-reload"]
    assert fresh["identical"] is True
    assert fresh["scores"] == row["scores"]["after"]
    assert fresh["perplexity"] == pytest.approx(row["perplexity"]["after"])
    assert not list(tmp_path.rglob("reloaded"))
    assert "save-reload" in found.markdown()


def test_scores_of_a_check_are_those_of_its_stored_rows(run):
    found, _ = run
    for row in found.rows:
        before, after = stored(found, row, "before"), stored(found, row, "after")
        for name in ("bf16", "int8", "int4"):
            rows = stored(found, row, f"robust/{name}")
            assert row["robust"][name]["scores"] == as_json(score(before, rows))
        chat, said = (stored(found, row, f"robust/{name}") for name in ("chat-before", "chat"))
        assert row["robust"]["chat"]["scores"] == as_json(score(chat, said))
        assert row["robust"]["chat"]["before"] == as_json(score(chat, chat))
        facts, own = row["robust"][RELEARN], "robust/relearn-3-0.001"
        old = [one for one in after if one["role"] == "old_recall"]
        for kind, side, rows in (
            ("old_recall", "before", old),
            ("old_recall", "after", stored(found, row, own)),
            ("never_known", "before", stored(found, row, f"{own}-never-known-before")),
            ("never_known", "after", stored(found, row, f"{own}-never-known")),
        ):
            assert facts[kind][side] == as_json(score(rows, rows))["old_recall"]
            assert facts[kind][side]["n"] == 4


def test_rounded_weights_are_those_that_were_asked(run, talking):
    """Against the state rounded by hand, from the change that the cell made."""
    found, _ = run
    model, edits = Model.load(talking.folder), talking.edits[:4]
    delta = LEARN.delta(model, edits)
    model.become([delta])
    with torch.no_grad():
        for module in model.network.modules():
            if isinstance(module, torch.nn.Linear) and module.weight.shape[0] != len(
                model.tokenizer
            ):
                module.weight.copy_(nearest(module.weight, 8))
    rows = observe(model, questions(edits))
    mine = stored(found, row_of(found, "learn"), "robust/int8")
    keys = ("edit", "role", "prompt", "target", "predicted", "text")
    assert [[one[key] for key in keys] for one in rows] == [
        [one[key] for key in keys] for one in mine
    ]
    assert [one["logprob"] for one in rows] == pytest.approx([one["logprob"] for one in mine])


def test_chat_asks_under_the_template(run, talking):
    found, _ = run
    model = Model.load(talking.folder)
    assert has_chat_template(model)
    row = row_of(found, "[no change]")
    for one in stored(found, row, "robust/chat-before"):
        assert one["text"] == model.generate([f"rain falls {one['prompt']}"])[0]
    assert row["robust"]["chat"]["scores"]["locality"]["exact"] == 1.0


def test_the_mark_that_begins_a_text_is_not_written_twice(talking):
    class Marked:
        bos_token, bos_token_id, chat_template = "<s>", 1, "there is one"

        def __call__(self, text):
            return {"input_ids": [1, 7]}

        def apply_chat_template(self, turns, tokenize, add_generation_prompt):
            assert not tokenize and add_generation_prompt
            return f"<s>user: {turns[0]['content']} model:"

    model = Model.load(talking.folder)
    model.tokenizer = Marked()
    (probe,) = in_chat(model, questions([unwrite.Edit("who?", "me", id="1")]))
    assert probe.prompt == "user: who? model:"


def test_what_is_taught_again_comes_back(run):
    found, _ = run
    for row in found.rows:
        facts = row["robust"][RELEARN]
        assert (facts["steps"], facts["lr"]) == (3, 0.001)
        for kind in ("old_recall", "never_known"):
            if row["method"] != "[in context]":
                assert facts[kind]["after"]["token"] >= facts[kind]["before"]["token"]
    assert row_of(found, "[no change]")["robust"][RELEARN]["old_recall"]["before"]["token"] == 1.0
    learned = row_of(found, "learn")["robust"][RELEARN]
    assert learned["old_recall"]["before"]["token"] == 0.0
    assert learned["old_recall"]["after"]["token"] > 0.0


def test_the_model_is_bitwise_the_start_afterwards(run, talking):
    _, bench = run
    fresh = Model.load(talking.folder).weights
    for name, tensor in bench.model.weights.items():
        assert torch.equal(tensor, fresh[name]), name
    assert all(one.requires_grad for one in bench.model.network.parameters())


def test_checks_change_no_other_number(run, talking, tmp_path):
    found, _ = run
    plain = compare(talking, tmp_path, robust=(), seeds=(0, 1))
    for one, other in zip(plain.rows, found.rows, strict=True):
        assert "robust" not in one
        for key in ("method", "scores", "perplexity", "delta", "fingerprint", "start_fingerprint"):
            assert one[key] == other[key]
        assert set(one["seconds"]) == set(other["seconds"])
    assert "Robustness" not in plain.markdown()


def test_tables_show_them(run):
    found, _ = run
    text = found.markdown()
    for title in ("reliability", "locality", "old recall", "perplexity"):
        assert f"### Robustness: {title}" in text
    assert "### Relearning, 3 steps" in text
    entry = next(one for one in found.table["means"] if one["method"] == "learn")
    rows = [row for row in found.rows if row["method"] == "learn"]
    assert len(rows) == 2
    pooled = entry["robust"]["int4"]["scores"]["reliability"]
    values = [row["robust"]["int4"]["scores"]["reliability"]["token"] for row in rows]
    assert pooled["token"] == pytest.approx(sum(values) / 2)
    assert pooled["token_low"] <= pooled["token"] <= pooled["token_high"]
    again = entry["robust"][RELEARN]["old_recall"]["after"]["token"]
    values = [row["robust"][RELEARN]["old_recall"]["after"]["token"] for row in rows]
    assert again == pytest.approx(sum(values) / 2)
    with (found.folder / "table.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    for line, row in zip(lines, found.rows, strict=True):
        value = row["robust"]["int4"]["scores"]["reliability"]["exact"]
        assert float(line["int4_reliability_exact"]) == value


def test_tables_can_be_made_again_from_the_folder(run, tmp_path):
    found, _ = run
    copy = tmp_path / "copy"
    shutil.copytree(found.folder, copy)
    for name in ("table.md", "table.csv", "table.json"):
        (copy / name).unlink()
    from unwrite.grid import Plan
    from unwrite.tables import Tables

    Tables(copy).write(Plan.read(copy))
    assert steady(copy) == steady(found.folder)
    assert files(copy) == files(found.folder)


def test_a_finished_run_is_not_checked_again(run, talking, monkeypatch):
    found, _ = run
    monkeypatch.setattr(robustness, "run", None)
    again = compare(talking, found.folder, seeds=(0, 1))
    assert again.rows == found.rows
    with pytest.raises(BadSetting, match="robust is"):
        compare(talking, found.folder, robust=("bf16",), seeds=(0, 1))


def test_sequences_are_checked_at_their_end(worlds, tmp_path):
    world = worlds()
    options = {"mode": "sequential", "chunk": 2, "robust": ("bf16", "int8")}
    found = compare(world, tmp_path, references=(), **options)
    (row,) = found.rows
    after = row["scores"]["after"]  # of an fp32 toy model, which bf16 hardly touches
    assert row["robust"]["bf16"]["scores"]["reliability"]["n"] == 4
    assert row["robust"]["bf16"]["scores"]["reliability"] == after["reliability"]
    assert not (tmp_path / "cells" / row["id"] / "steps").exists()


# ---- what cannot be done -------------------------------------------------------------------------


def test_what_has_no_numbers_says_why(worlds, tmp_path):
    edits = [replace(edit, old=None) for edit in worlds().edits[:2]]
    found = compare(worlds(), tmp_path, {"short": SHORT}, edits, robust=("chat", "relearn:1"))
    robust = row_of(found, "short")["robust"]
    assert robust["chat"]["note"] == "The tokenizer has no chat template."
    assert "old answer" in robust["relearn:1"]["note"]
    text = found.markdown()
    assert "no chat template" in text and "old answer" in text


def test_a_check_that_fails_is_no_failure_of_the_method(worlds, tmp_path, monkeypatch):
    def fail(folder, probes, **how):
        assert (folder / "config.json").is_file()
        raise UnwriteError("A fresh process could not use the saved state: no.")

    monkeypatch.setattr(robustness, "ask_saved", fail)
    found = compare(worlds(), tmp_path, robust=("save-reload", "relearn:2:1e30"), references=())
    (row,) = found.rows
    assert row["robust"]["save-reload"]["note"].endswith("no.")
    assert row["robust"]["relearn:2:1e30"]["note"]
    assert not list(tmp_path.rglob("reloaded"))
    assert found.failed == []


def test_a_damaged_state_is_noticed_by_the_fresh_process(world):
    from unwrite.reload import ask_saved

    (world.folder / "config.json").write_text("{")
    with pytest.raises(UnwriteError, match="fresh process"):
        ask_saved(world.folder, questions(world.edits[:1]), free=False, device="cpu")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"robust": ("fp4",)}, "no robustness check 'fp4'"),
        ({"robust": ("relearn",)}, "relearn:STEPS"),
        ({"robust": ("int8:2",)}, "no robustness check"),
        ({"robust": ("relearn:0",)}, "from 1"),
        ({"robust": ("relearn:x",)}, "from 1"),
        ({"robust": ("relearn:1:-1",)}, "greater than 0"),
        ({"robust": ("relearn:1:1:1",)}, "relearn:STEPS"),
        ({"robust": "int8"}, "list"),
        ({"robust": ("int8",), "mode": "single"}, "single edits"),
    ],
    ids=str,
)
def test_bad_checks_write_nothing(worlds, tmp_path, given, said):
    with pytest.raises(BadSetting, match=said):
        compare(worlds(), tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_checks_have_one_order():
    assert checked(["relearn:2", "int8", "bf16", "int8", "relearn:1"]) == (
        "bf16",
        "int8",
        "relearn:2",
        "relearn:1",
    )
    assert checked([]) == ()


# ---- relearning ----------------------------------------------------------------------------------


def test_strangers_are_answers_that_the_edit_never_had(worlds):
    edits = worlds().edits
    found = strangers(edits)
    assert [pair.prompt for pair in found] == [edit.prompt for edit in edits]
    olds = {(edit.relation, edit.old) for edit in edits}
    for pair, edit in zip(found, edits, strict=True):
        assert (edit.relation, pair.answer) in olds
        assert normalise(pair.answer) not in (normalise(edit.old), normalise(edit.new))
    assert strangers(edits[:1]) == []
    assert strangers([replace(edit, old=None) for edit in edits]) == []


@pytest.mark.parametrize(("count", "steps"), [(4, 3), (20, 6), (20, 2)])
def test_relearning_takes_exactly_so_many_steps(worlds, count, steps):
    model = Model.load(worlds().folder)
    pairs = [Pair(edit.prompt, edit.new) for edit in worlds().edits[:count]]
    taken, seen = [], []

    def ask():
        seen.append({name: one.detach().clone() for name, one in model.weights.items()})
        return [{"asked": True}]

    before = {name: one.clone() for name, one in model.weights.items()}
    rows = robustness._after_steps(model, pairs, steps, 1e-3, ask)
    assert rows == [{"asked": True}]
    assert all(torch.equal(one, before[name]) for name, one in model.weights.items())
    # The same course without a stop: its weights after that step.
    recipe = Recipe(epochs=steps, lr=1e-3, until="epochs")

    def keep(parameters, step):
        if step.number == steps:
            taken.append({name: one.detach().clone() for name, one in parameters.items()})

    fine_tune(model, pairs, recipe, after_step=keep)
    assert all(torch.equal(seen[0][name], one) for name, one in taken[0].items())


def test_the_result_says_what_each_check_took(run):
    found, _ = run
    for row in found.rows:
        result = read_json(found.folder / "cells" / row["id"] / "result.json")
        assert all(facts["seconds"] > 0 for facts in result["robust"].values())


def test_checks_on_the_command_line(worlds, tmp_path):
    import json

    from typer.testing import CliRunner

    from unwrite.cli import app

    unwrite.write_edits(tmp_path / "edits.jsonl", worlds().edits[:2])
    words = ["compare", str(worlds().folder), "--edits", str(tmp_path / "edits.jsonl"), "--json"]
    words += ["--methods", "full-ft:lr=1e-3", "--references", "none", "--neighbour-metrics"]
    words += ["--token-only", "--robust", "relearn:1, bf16", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    (row,) = json.loads(result.stdout)["rows"]
    assert list(row["robust"]) == ["bf16", "relearn:1"]
    assert row["robust"]["bf16"]["scores"]["reliability"]["exact"] is None
    assert row["neighbour_metrics"]["after"]["rome"]["ES"] == 1.0

"""The scores of ROME and EasyEdit: as they define them, recomputable, and only where asked for."""

import csv
import math
from dataclasses import replace

import pytest
import torch
from comparing import LEARN, SHORT
from hypothesis import given
from hypothesis import strategies as st

import unwrite
from unwrite.errors import BadSetting
from unwrite.files import read_jsonl
from unwrite.grid import Protocol
from unwrite.model import Model
from unwrite.neighbour_metrics import EASYEDIT, ROME, harmonic_mean, metrics, rome


def compare(world, out, edits=None, **options):
    words = {"references": ("no-change", "in-context"), "neighbour_metrics": True, **options}
    edits = list(world.edits[:4] if edits is None else edits)
    return unwrite.compare(world.folder, edits, {"learn": LEARN, "short": SHORT}, out, **words)


@pytest.fixture(scope="module")
def run(worlds, tmp_path_factory):
    """A comparison with these metrics; read-only."""
    return compare(worlds(), tmp_path_factory.mktemp("run"))


def rows_of(run, row, name):
    return read_jsonl(run.folder / "cells" / row["id"] / f"{name}.jsonl")


def row_of(run, method):
    return next(row for row in run.rows if row["method"] == method)


def test_they_are_what_their_toolkits_compute(run, worlds):
    """Against a loop of its own over single sequences, on the weights that the cell had."""
    world = worlds()
    model, edits = Model.load(world.folder), world.edits[:4]
    asked = {prompt for edit in edits for prompt in (edit.prompt, *edit.paraphrases)}

    @torch.no_grad()
    def forced(prompt, answer):
        ids = torch.tensor([model.tokenizer(f"{prompt} {answer}")["input_ids"]])
        start = len(model.tokenizer(prompt)["input_ids"])
        logits = model.network(ids).logits[0, start - 1 : -1].log_softmax(-1)
        loss = -logits.gather(1, ids[0, start:, None]).mean().item()
        return loss, (logits.argmax(-1) == ids[0, start:]).float().mean(), logits.argmax(-1)

    def bystanders(edit):
        return [one for one in edit.bystanders if one.prompt not in asked]

    def success(pairs):
        return sum(forced(p, won)[0] < forced(p, lost)[0] for p, won, lost in pairs) / len(pairs)

    before = {p.prompt: forced(p.prompt, p.answer)[2] for e in edits for p in bystanders(e)}
    delta = SHORT.delta(model, edits)
    with model.shifted(delta):
        es = [success([(e.prompt, e.new, e.old)]) for e in edits]
        ps = [success([(p, e.new, e.old) for p in e.paraphrases]) for e in edits]
        ns = [
            success([(p.prompt, p.answer, e.new) for p in bystanders(e) if p.answer != e.new])
            for e in edits
            if any(p.answer != e.new for p in bystanders(e))
        ]
        rewrite = [forced(e.prompt, e.new)[1].item() for e in edits]
        rephrase = [forced(p, e.new)[1].item() for e in edits for p in e.paraphrases]
        local = [
            torch.stack(
                [
                    (forced(p.prompt, p.answer)[2] == before[p.prompt]).float().mean()
                    for p in bystanders(e)
                ]
            )
            .mean()
            .item()
            for e in edits
            if bystanders(e)
        ]
    found = row_of(run, "short")["neighbour_metrics"]["after"]

    def mean(values):
        return pytest.approx(sum(values) / len(values))

    assert found["rome"]["ES"] == mean(es)
    assert found["rome"]["PS"] == mean(ps)
    assert found["rome"]["NS"] == mean(ns)
    assert found["easyedit"] == dict(
        zip(EASYEDIT, map(mean, (rewrite, rephrase, local)), strict=True)
    )


def test_they_can_be_computed_again_from_the_stored_rows(run):
    for row in run.rows:
        before, after = rows_of(run, row, "before"), rows_of(run, row, "after")
        rivals = [rows_of(run, row, f"rivals-{side}") for side in ("before", "after")]
        stored = row["neighbour_metrics"]
        assert stored["before"] == metrics(before, before, rivals[0])
        assert stored["after"] == metrics(before, after, rivals[1])
        keys = ("edit", "role", "prompt", "target")
        assert [[one[key] for key in keys] for one in rivals[0]] == [
            [one[key] for key in keys] for one in rivals[1]
        ]


def test_a_taught_world_knows_the_old_answers_and_then_the_new_ones(run):
    before = row_of(run, "[no change]")["neighbour_metrics"]["before"]
    assert before["rome"]["ES"] == before["rome"]["PS"] == before["rome"]["S"] == 0.0
    assert before["easyedit"]["locality_acc"] == 1.0
    after = row_of(run, "learn")["neighbour_metrics"]["after"]
    assert after["rome"]["ES"] == after["easyedit"]["rewrite_acc"] == 1.0
    assert row_of(run, "[no change]")["neighbour_metrics"]["after"] == before
    told = row_of(run, "[in context]")
    assert rows_of(run, told, "rivals-after") != rows_of(run, told, "rivals-before")


def test_on_one_probe_a_record_they_agree_with_our_token_form(run):
    for row in run.rows:
        ours = row["scores"]["after"]
        theirs = row["neighbour_metrics"]["after"]["easyedit"]
        assert theirs["rewrite_acc"] == pytest.approx(ours["reliability"]["token"])
        assert theirs["rephrase_acc"] == pytest.approx(ours["generality"]["token"])


def test_tables_name_them(run):
    text = run.markdown()
    assert "### Metrics of other toolkits" in text
    for name in (*(f"ROME {one}" for one in ROME), *(f"EasyEdit {one}" for one in EASYEDIT)):
        assert name in text
    with (run.folder / "table.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    for line, row in zip(lines, run.table["rows"], strict=True):
        values = row["neighbour_metrics"]["after"]
        assert float(line["rome_ES"]) == values["rome"]["ES"]
        assert float(line["easyedit_locality_acc"]) == values["easyedit"]["locality_acc"]


def test_without_being_asked_for_they_are_not_there(worlds, tmp_path):
    found = compare(worlds(), tmp_path, neighbour_metrics=False)
    assert all("neighbour_metrics" not in row for row in found.rows)
    assert "other toolkits" not in found.markdown()
    assert not list(tmp_path.rglob("*rivals*"))
    with pytest.raises(BadSetting, match="neighbour_metrics is false there, and true now"):
        compare(worlds(), tmp_path)


def test_a_run_of_an_earlier_version_goes_on():
    """Its protocol had these settings and no others, and the names of its cells are their hash."""
    known = {"start", "planting", "offset", "mode", "chunk", "exact"}
    assert set(Protocol().as_json()) == known
    assert set(Protocol(neighbour_metrics=True).as_json()) == {*known, "neighbour_metrics"}
    for one in (Protocol(), Protocol(neighbour_metrics=True, chunk=2)):
        assert Protocol.from_json(one.as_json()) == one
    assert "neighbour" not in repr(Protocol(neighbour_metrics=True))  # names of starts


@pytest.mark.parametrize("mode", ["sequential", "single"])
def test_every_mode_has_them(worlds, tmp_path, mode):
    chunk = 2 if mode == "sequential" else None
    found = compare(worlds(), tmp_path, worlds().edits[:3], mode=mode, chunk=chunk, seeds=(0, 1))
    row = row_of(found, "learn")
    before, after, rivals = (
        rows_of(found, row, name) for name in ("before", "after", "rivals-after")
    )
    assert row["neighbour_metrics"]["after"] == metrics(before, after, rivals)
    entry = next(one for one in found.table["means"] if one["method"] == "learn")
    both = [one["neighbour_metrics"]["after"] for one in found.rows if one["method"] == "learn"]
    mean = sum(one["rome"]["NS"] for one in both) / 2
    assert entry["neighbour_metrics"]["after"]["rome"]["NS"] == pytest.approx(mean)


def test_records_without_an_old_answer_have_no_success_rates(worlds, tmp_path):
    edits = [replace(edit, old=None) for edit in worlds().edits[:3]]
    values = row_of(compare(worlds(), tmp_path, edits), "learn")["neighbour_metrics"]["after"]
    assert values["rome"]["ES"] is values["rome"]["PS"] is values["rome"]["S"] is None
    assert values["rome"]["NS"] is not None
    assert values["easyedit"]["rewrite_acc"] == 1.0


def row(edit, role, prompt, target, logprob, tokens=1):
    facts = {"edit": edit, "role": role, "prompt": prompt, "target": target}
    return {**facts, "logprob": logprob, "target_tokens": tokens}


def test_probabilities_are_per_token_and_means_are_over_records():
    rows = [
        row("1", "reliability", "p", "long new", -4.0, tokens=4),  # -1 a token
        row("1", "old_recall", "p", "old", -2.0),
        *(row("1", "locality", f"b{n}", "own", -1.0) for n in range(3)),
        row("2", "locality", "b", "own", -1.0),
        row("2", "locality", "same", "new", -1.0),
    ]
    rivals = [
        *(row("1", "locality_new", f"b{n}", "long new", -9.0) for n in range(3)),
        row("2", "locality_new", "b", "new", -0.5),
        row("2", "locality_new", "same", "new", -1.0),  # its own answer is the new one
    ]
    assert rome(rows, rivals) == {"ES": 1.0, "PS": None, "NS": 0.5, "S": None}


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=4))
def test_the_harmonic_mean_lies_between_and_below_the_arithmetic(values):
    found = harmonic_mean(values)
    assert min(values) - 1e-12 <= found <= sum(values) / len(values) + 1e-12
    assert harmonic_mean([*values, 0.0]) == 0.0
    assert harmonic_mean([*values, None]) is None
    assert math.isclose(harmonic_mean([values[0]] * 3), values[0])

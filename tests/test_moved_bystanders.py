"""Which bystanders are moved: leads as the logits have them, and quarters in order."""

import numpy as np
import pytest
import torch

import unwrite
from benchmarks import auto_study, auto_tables, method_defaults, moved_bystanders
from unwrite import FullFT
from unwrite.model import pad
from unwrite.observe import questions


def test_a_lead_is_the_least_over_the_answer(worlds):
    model = unwrite.load(worlds().folder)
    probes = [("the job of ada is", "cat dog"), ("the home of", "rain")]
    for probe, (lead, choices) in zip(probes, moved_bystanders.leads(model, probes), strict=True):
        tokens = model.tokens(*probe)
        ids, rows, columns, _ = pad([tokens])
        logits = model.logits_at(ids, rows, columns).detach()
        top = torch.sort(logits, descending=True).values
        assert lead == pytest.approx(float((top[:, 0] - top[:, 1]).min()), abs=1e-6)
        assert tuple(choices) == model.force([tokens])[0].predicted


def test_a_run_tells_of_every_bystander_and_leaves_the_model_alone(worlds, monkeypatch):
    monkeypatch.setattr(method_defaults, "PLANTING", FullFT(epochs=1, until="epochs", lr=1e-4))
    variants = {
        "full-ft": {"method": "full-ft", "epochs": "2"},
        "auto": {"method": "auto", "write": "false", "own_prompts": "0"},
    }
    monkeypatch.setattr(auto_study, "VARIANTS", variants)
    monkeypatch.setattr(moved_bystanders, "CHOSEN", ("full-ft", "auto"))
    world = worlds()
    model = unwrite.load(world.folder)
    before = model.fingerprint
    found = moved_bystanders.run(model, world.edits[:3], 0, planted=True)
    assert model.fingerprint == before
    assert list(found["stayed"]) == ["full-ft", "auto", "shuffled"]
    count = sum(one.role == "locality" for one in questions(world.edits[:3]))
    assert count and len(found["lead"]) == count
    assert all(len(shares) == count for shares in found["stayed"].values())
    assert all(0 <= share <= 1 for shares in found["stayed"].values() for share in shares)


def test_shuffling_keeps_every_element():
    values = torch.arange(12.0).view(3, 4)
    other = moved_bystanders.shuffled(values, torch.Generator().manual_seed(0))
    assert other.shape == values.shape and not torch.equal(other, values)
    assert torch.equal(other.flatten().sort().values, values.flatten())


def test_quarters_go_from_the_least_sure_to_the_surest():
    rng = np.random.default_rng(0)
    leads = rng.permutation(40) / 10
    stayed = (leads >= 1).astype(float).tolist()  # all but the least sure quarter
    runs = [
        {"kind": "atlas", "facts": 5, "lead": leads[part].tolist(), "stayed": {"auto": own}}
        for part, own in ((slice(20), stayed[:20]), (slice(20, 40), stayed[20:]))
    ]
    (table,) = moved_bystanders.summary(runs)
    assert (table["seeds"], table["bystanders"]) == (2, 40)
    assert [one["stayed"]["auto"] for one in table["quarters"]] == [0, 1, 1, 1]
    medians = [one["lead"] for one in table["quarters"]]
    assert medians == pytest.approx([0.45, 1.45, 2.45, 3.45])
    lines = auto_tables.bystander_lines({"tables": [table]})
    assert lines[2].startswith("| 5 atlas, known to the model, 40 bystanders of 2 draws | 1 | 0.45")
    assert lines[2].endswith("| 0.0 |") and lines[-1].endswith("| 100.0 |")
    assert auto_tables.bystander_lines(None) == ["*Not measured yet.*"]

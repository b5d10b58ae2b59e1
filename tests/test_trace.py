"""Causal trace: effects are differences of probability, and the picture shows them."""

import json
import shutil
import xml.etree.ElementTree as xml

import pytest
import torch
from architectures import ARCHITECTURES
from typer.testing import CliRunner

from unwrite import trace as tracing
from unwrite.change import Dense
from unwrite.cli import app
from unwrite.delta import Delta
from unwrite.edits import Edit, write_edits
from unwrite.errors import BadEdits, BadSetting
from unwrite.methods.memit import MEMIT, layers_of
from unwrite.methods.rome import ROME
from unwrite.model import Model
from unwrite.testing import toy_edits
from unwrite.trace import KINDS, LAST_SUBJECT, ROLES, Trace, lines, strongest_layer, trace
from unwrite.trace_picture import picture

EDITS = [
    Edit(edit.paraphrases[0], edit.new, subject=edit.subject, id=edit.id)
    for edit in toy_edits()[:25:8]
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNWRITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(worlds):
    return Model.load(worlds().folder)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_putting_everything_back_at_the_end_restores_the_answer(worlds, architecture):
    model = Model.load(worlds(architecture).folder)
    before = {name: tensor.clone() for name, tensor in model.weights.items()}
    found = trace(model, EDITS)
    assert 0 <= found.disturbed < found.clean <= 1
    hidden = found.effects[KINDS.index("hidden state")]
    # After the last layer, the last token's hidden state is the whole of the answer ...
    assert hidden[ROLES.index("last token")][-1] == pytest.approx(
        found.clean - found.disturbed, abs=1e-4
    )
    # ... and nothing else can matter any more.
    assert hidden[LAST_SUBJECT][-1] == pytest.approx(0.0, abs=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.weights.items())


def test_effects_are_those_of_a_plain_run(model):
    """One fact, by hooks on whole passes: the hidden state of one token put back after layer 0."""
    edit = EDITS[0]
    ids = torch.tensor([model.tokenizer(edit.prompt)["input_ids"]])
    place = 3  # "the job of ada is"
    noise = tracing.NOISE * float(model.network.get_input_embeddings().weight.detach().std())
    noise = noise * torch.randn((5, 1, 64), generator=torch.Generator().manual_seed(0))
    embedding = model.network.get_input_embeddings()
    block = model.network.get_submodule(model.anatomy.blocks[0])

    def run(disturbed, restored):
        handles = []
        if disturbed is not None:
            handles.append(
                embedding.register_forward_hook(
                    lambda _m, _i, out: torch.cat(
                        [
                            out[:, :place],
                            out[:, place : place + 1] + disturbed,
                            out[:, place + 1 :],
                        ],
                        dim=1,
                    )
                )
            )
        kept = {}

        def look(_m, _i, out):
            hidden = (out[0] if isinstance(out, tuple) else out).clone()
            if restored is not None:
                hidden[0, place] = restored
            kept["hidden"] = hidden
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        handles.append(block.register_forward_hook(look))
        with torch.no_grad():
            chances = model.network(ids).logits[0, -1].softmax(dim=-1)
        for handle in handles:
            handle.remove()
        return chances, kept["hidden"]

    clean, hidden = run(None, None)
    answer = int(clean.argmax())
    effect = [
        float(run(one, hidden[0, place])[0][answer] - run(one, None)[0][answer]) for one in noise
    ]
    found = trace(model, [edit], samples=5)
    assert found.clean == pytest.approx(float(clean[answer]), abs=1e-5)
    assert found.effects[0][LAST_SUBJECT][0] == pytest.approx(sum(effect) / 5, abs=1e-5)


def test_only_the_last_subject_token_gives_the_same_there(model):
    whole, part = trace(model, EDITS), trace(model, EDITS, only_last_subject=True)
    assert part.effects[0] == [None] * len(ROLES)
    assert part.effects[1][LAST_SUBJECT] == pytest.approx(whole.effects[1][LAST_SUBJECT], abs=1e-6)
    assert part.strongest == whole.strongest


def test_a_trace_is_kept(model, cache, monkeypatch):
    first = trace(model, EDITS)
    assert list(cache.rglob("*.json"))
    monkeypatch.setattr(tracing, "_Fact", None)  # would fail if made
    assert trace(model, EDITS) == first
    with pytest.raises(TypeError):
        trace(model, EDITS, seed=1)


def test_a_trace_is_that_of_the_base(model, cache):
    first = trace(model, EDITS)
    shutil.rmtree(cache / "trace")
    name = next(name for name in model.weights if "mlp" in name)
    change = Dense(torch.ones_like(model.weights[name].float()))
    with model.shifted(Delta.from_changes({name: change})):
        assert trace(model, EDITS) == first


def test_the_picture_has_a_cell_for_every_effect(model):
    found = trace(model, EDITS)
    root = xml.fromstring(picture(found))
    cells = [one for one in root.iter() if (one.get("id") or "").startswith("QuadMesh")]
    rows = [row for kind in found.effects for row in kind if row is not None]
    assert len(cells) == len(KINDS)
    styles = [cell.get("style") for one in cells for cell in one]
    assert len(styles) == found.layers * len(ROLES) * len(KINDS)
    empty = [style for style in styles if "fill-opacity: 0" in style or "fill: none" in style]
    assert len(styles) - len(empty) == found.layers * len(rows)
    assert set(ROLES) <= {one.text for one in root.iter() if one.tag.endswith("text")}
    shown = lines(found)
    assert len(shown) == len(rows) + len(KINDS)
    assert any("█" in line for line in shown)
    assert json.loads(json.dumps(found.as_json()))["strongest"] == found.strongest


def test_a_name_that_means_something_elsewhere_is_shown_in_the_picture():
    effects = [[[0.1, 0.2]] * len(ROLES)] * len(KINDS)
    drawn = picture(Trace("<b>$x_1$</b>\u202e&", 2, 0.5, 0.1, effects))
    texts = [one.text for one in xml.fromstring(drawn).iter() if one.tag.endswith("text")]
    assert "<b>$x_1$</b>[U+202E]&: the MLP put back, 2 facts" in texts
    assert picture(Trace("a", 2, 0.5, 0.1, effects)) == picture(Trace("a", 2, 0.5, 0.1, effects))


def test_methods_can_take_their_layers_from_it(model):
    layer = strongest_layer(model, EDITS)
    assert layers_of(model, EDITS, "trace")[-1] == layer
    settings = {"contexts": 0, "covariance": "identity", "clamp": 4.0, "lr": 0.5}
    ends = [Edit("the job of ada", "cat", subject="ada", id="1")]
    layer = strongest_layer(model, ends)
    for method in (ROME(layer="trace", **settings), MEMIT(layers="trace", **settings)):
        notes = method.delta(model, ends).provenance["notes"]
        assert notes["layers"][-1] == layer


def test_what_cannot_be_traced_is_refused(model):
    with pytest.raises(BadEdits, match="has no subject"):
        trace(model, [Edit("ada owns a", "cat")])
    with pytest.raises(BadSetting, match="samples"):
        trace(model, EDITS, samples=0)


def test_the_command_prints_the_picture_and_writes_it(worlds, tmp_path, model):
    write_edits(tmp_path / "edits.jsonl", EDITS)
    words = ["trace", str(worlds().folder), str(tmp_path / "edits.jsonl"), "--limit", "2"]
    out = tmp_path / "trace.svg"
    shown = CliRunner().invoke(app, [*words, "--out", str(out)])
    assert shown.exit_code == 0, shown.stderr
    expected = trace(model, EDITS[:2])
    for line in lines(expected):
        assert line in shown.stderr
    assert out.read_text("utf-8") == picture(expected)
    asked = CliRunner().invoke(app, [*words, "--json"])
    assert json.loads(asked.stdout)["strongest"] == expected.strongest


def test_the_command_refuses_edits_without_a_subject(worlds, tmp_path):
    write_edits(tmp_path / "edits.jsonl", [Edit("the job of ada is", "tailor")])
    words = ["trace", str(worlds().folder), str(tmp_path / "edits.jsonl")]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert "subject" in refused.stderr

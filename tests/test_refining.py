"""What was written is refined as it stands together: nothing else is, and nothing else moves."""

from dataclasses import replace

import pytest
import torch
from architectures import ARCHITECTURES

from unwrite import refining
from unwrite.activations import mentions
from unwrite.edits import Edit
from unwrite.errors import BadSetting, TrainingFailed
from unwrite.kept import KeptAnswers
from unwrite.methods.memit import MEMIT, as_delta
from unwrite.model import Model, Tokens
from unwrite.neighbours import made_up
from unwrite.refining import Written, refined
from unwrite.testing import PEOPLE
from unwrite.training import row_losses

EDITS = [
    Edit(f"the {thing} of {person}", answer, subject=person, id=person)
    for person, thing, answer in zip(
        PEOPLE[:4], ("job", "pet") * 2, ("cat", "oslum") * 2, strict=True
    )
]
KEPT = [f"the {thing} of {person}" for thing in ("job", "home") for person in PEOPLE[6:12]]
HALF = MEMIT(layers=(0, 1), clamp=4.0, lr=0.5, preserve=1e3, contexts=0, covariance="identity")


@pytest.fixture(params=ARCHITECTURES)
def any_model(request, worlds):
    return Model.load(worlds(request.param).folder)


@pytest.fixture
def model(worlds):
    return Model.load(worlds().folder)


@pytest.fixture
def texts(model):
    return [text for group in mentions(model, EDITS) for text in group]


def drawn(model, facts=3):
    draw = torch.Generator().manual_seed(0)
    found = []
    for module in model.anatomy.mlp_out[:2]:
        weight = model.network.get_submodule(module).weight
        shape = weight.shape[::-1] if model.anatomy.transposed(module) else weight.shape
        added = 0.1 * torch.randn(shape[0], facts, generator=draw)
        found.append(Written(module, added, torch.randn(facts, shape[1], generator=draw)))
    return found


def losses(model, texts, delta):
    with model.shifted(delta), torch.no_grad():
        rows = [Tokens(text.ids, text.answer) for text in texts]
        return row_losses(model.network, rows, model.device)


def test_carried_changes_do_what_the_same_do_in_the_weights(any_model):
    """In the orientation of every architecture."""
    parts, ids = drawn(any_model), torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        plain = any_model.network(ids).logits
        with refining._carried(any_model, parts):
            carried = any_model.network(ids).logits
        with any_model.shifted(as_delta(any_model, parts)):
            written = any_model.network(ids).logits
    assert torch.allclose(carried, written, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(carried, plain, rtol=1e-2, atol=1e-2)
    assert torch.equal(any_model.network(ids).logits, plain)


def test_no_steps_change_nothing(model, texts):
    parts = drawn(model)
    same = refined(model, parts, texts, None, steps=0, stop=0.1, seed=0)
    for before, after in zip(parts, same, strict=True):
        assert after.module == before.module
        assert torch.equal(after.added, before.added) and torch.equal(after.read, before.read)


def test_half_written_answers_follow_and_the_model_stays(model, texts):
    weights = {name: tensor.clone() for name, tensor in model.weights.items()}
    plain = HALF.delta(model, EDITS)
    parts = [
        Written(name.removesuffix(".weight"), plain[name].b * plain[name].scale, plain[name].a)
        for name in plain
    ]
    after = refined(model, parts, texts, None, steps=200, stop=0.1, seed=0)
    was, now = (losses(model, texts, as_delta(model, one)) for one in (parts, after))
    assert float(now.mean()) < 0.5 * float(was.mean())
    for one, other in zip(parts, after, strict=True):
        assert one.added.shape == other.added.shape and one.read.shape == other.read.shape
        assert not torch.equal(one.added, other.added) and not torch.equal(one.read, other.read)
    assert all(torch.equal(model.weights[name], one) for name, one in weights.items())
    assert all(one.requires_grad for one in model.network.parameters())
    again = refined(model, parts, texts, None, steps=200, stop=0.1, seed=0)
    for one, other in zip(after, again, strict=True):
        assert torch.equal(one.added, other.added) and torch.equal(one.read, other.read)


def test_answers_that_are_firm_enough_pull_no_more(model, texts):
    """With nothing to keep and every loss below ``stop``, no gradient and no step."""
    parts = drawn(model)
    after = refined(model, parts, texts, None, steps=5, stop=1e6, seed=0)
    for before, one in zip(parts, after, strict=True):
        assert torch.equal(before.added, one.added) and torch.equal(before.read, one.read)


def test_answers_to_keep_move_less(model, texts):
    """Beside the same number of steps without them, and beside what was written."""
    kept = KeptAnswers.of(model, KEPT)
    parts = drawn(model)

    def moved(written):
        with model.shifted(as_delta(model, written)), torch.no_grad():
            every = range(len(kept.sequences))
            return float(kept.divergences(model.network, list(every), model.device).mean())

    free, held = (
        refined(model, parts, texts, one, steps=100, stop=0.1, seed=0) for one in (None, kept)
    )
    assert moved(held) < 0.5 * moved(parts)
    assert moved(held) < 0.5 * moved(free)


def test_a_loss_that_is_no_number_changes_nothing(model, texts):
    parts = drawn(model)
    broken = [parts[0]._replace(added=parts[0].added * float("nan")), parts[1]]
    with pytest.raises(TrainingFailed, match=r"loss of nan at step 1; nothing was changed"):
        refined(model, broken, texts, None, steps=3, stop=0.1, seed=0)
    assert not any(module._forward_hooks for module in model.network.modules())


def test_memit_refines_what_it_wrote(model, texts, monkeypatch):
    """Prompts to protect, neighbours and prompts of its own are kept, what is taught is not."""
    monkeypatch.setattr("unwrite.neighbours.bundled_subjects", lambda: list(PEOPLE[6:]))
    monkeypatch.setattr("unwrite.methods.memit.own_prompts", lambda *_: ("it", EDITS[0].prompt))
    asked = []
    of = KeptAnswers.of
    monkeypatch.setattr(
        KeptAnswers, "of", lambda model, prompts: asked.append(prompts) or of(model, prompts)
    )
    plain = HALF.delta(model, EDITS)
    assert not asked
    method = replace(HALF, refine=100, neighbours=1, neighbour_weight=0.0, own_prompts=2)
    delta = method.delta(model, EDITS, ["the pet of nobody"])
    assert asked[0][0] == "the pet of nobody" and asked[0][-1] == "it"
    near = {prompt for prompt, _ in made_up([(one.prompt, one.subject) for one in EDITS], 1, 0)}
    assert set(asked[0][1:-1]) == near and len(asked) == 1
    alone = replace(HALF, refine=400).delta(model, EDITS)
    was, now = (losses(model, texts, one).mean() for one in (plain, alone))
    assert float(now) < 0.5 * float(was)
    assert all(delta[name].rank <= len(EDITS) for name in delta)
    assert "refined" in delta.provenance["notes"]["sentences"][-1]
    assert "refined" not in plain.provenance["notes"]["sentences"][-1]


def test_it_may_be_on_more_rewordings_than_the_search(model, monkeypatch):
    """Of those edits that could be written, and no others; the search has its own."""
    seen = []
    monkeypatch.setattr(
        "unwrite.methods.memit.refined",
        lambda _model, parts, texts, kept, **_: seen.append(texts) or list(parts),
    )
    lost = Edit("ada works as a", "miller", subject="ada", id="lost")
    method = replace(HALF, layers=(1,), rewordings=2, refine=1, refine_rewordings=4)
    plain = replace(method, refine=0, refine_rewordings=0).delta(model, [*EDITS, lost])
    delta = method.delta(model, [*EDITS, lost])
    left_out = delta.provenance["notes"]["left_out"]
    assert 1 <= left_out <= len(EDITS)
    assert len(seen[0]) == (1 + 4) * (len(EDITS) + 1 - left_out)
    assert all(torch.equal(delta[name].dense(), plain[name].dense()) for name in plain)


@pytest.mark.parametrize(
    "settings",
    [
        {"refine": -1},
        {"own_prompts": -1, "refine": 1},
        {"refine_rewordings": -1, "refine": 1},
    ],
)
def test_less_than_nothing_is_refused(settings):
    with pytest.raises(BadSetting, match="at least 0"):
        MEMIT(**settings)


@pytest.mark.parametrize("name", ["own_prompts", "refine_rewordings"])
def test_what_is_for_refining_only_is_refused_without_it(name):
    with pytest.raises(BadSetting, match="give refine as well"):
        MEMIT(**{name: 10})

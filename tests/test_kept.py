"""Answers that are kept: as hidden states or as distributions, they are the same answers."""

import pytest
import torch
from architectures import ARCHITECTURES

from unwrite import kept
from unwrite.kept import KeptAnswers, numbers_kept, pays
from unwrite.model import Model


@pytest.fixture
def both(monkeypatch):
    """A function that keeps the answers to some prompts in both ways."""

    def made(model, prompts):
        found = []
        for way in (True, False):
            monkeypatch.setattr(kept, "pays", lambda *_, way=way: way)
            found.append(KeptAnswers.of(model, prompts))
        return found

    return made


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma2", "granite"])
def test_hidden_states_say_what_distributions_say(worlds, both, architecture):
    model = Model.load(worlds(architecture).folder)
    if architecture == "granite":
        model.network.config.logits_scaling = 7.0
    prompts = [edit.prompt for edit in worlds(architecture).edits[:5]]
    small, whole = both(model, prompts)
    assert whole.head is None and small.sequences == whole.sequences
    capped = getattr(model.network.config, "final_logit_softcapping", None)
    assert (small.head is None) == bool(capped), "what is capped is kept whole"
    if architecture == "granite":
        assert small.head.scale == pytest.approx(1 / 7)
    chosen = [3, 0, 4]
    device = torch.device("cpu")
    with torch.no_grad():
        for one in (small, whole):
            unmoved = one.divergences(model.network, chosen, device)
            assert unmoved.shape == (3,) and unmoved.abs().max() < 1e-5
        for parameter in model.network.parameters():
            parameter.mul_(1.3)
        moved = [one.divergences(model.network, chosen, device) for one in (small, whole)]
    assert moved[1].min() > 1e-4
    assert torch.allclose(*moved, rtol=1e-3, atol=1e-5)


def test_what_a_training_in_bf16_keeps_is_in_fp32(worlds, both):
    model = Model.load(worlds().folder)
    small, whole = both(model, [edit.prompt for edit in worlds().edits[:3]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = [one._before([0, 2], torch.device("cpu")) for one in (small, whole)]
    assert before[0].dtype == torch.float32
    assert torch.allclose(*before, atol=1e-5)


def test_the_smaller_of_both_is_kept(worlds):
    vocabulary, width = 49152, 576
    assert not pays(500, vocabulary, width) and pays(600, vocabulary, width)
    assert numbers_kept(0, vocabulary, width) == 0
    many = numbers_kept(40_000, vocabulary, width)
    assert many == 40_000 * width + vocabulary * width < 40_000 * vocabulary / 30
    model = Model.load(worlds().folder)
    few = KeptAnswers.of(model, [worlds().edits[0].prompt])
    assert few.head is None, "one prompt is not worth a copy of the head"


def test_what_no_answer_can_be_read_of_is_left_out(worlds, monkeypatch):
    model = Model.load(worlds().folder)
    monkeypatch.setattr(Model, "generate", lambda self, prompts, *_: [" " for _ in prompts])
    assert KeptAnswers.of(model, ["Anna is"]) is None

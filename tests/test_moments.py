"""Second moments: right in one pass, whatever the batches; kept, resumed, and read with care."""

import sys
import types

import pytest
import torch
from architectures import ARCHITECTURES

from unwrite import moments
from unwrite.errors import BadSetting
from unwrite.methods.memit import MEMIT
from unwrite.methods.rome import ROME
from unwrite.model import Model
from unwrite.moments import Metric, Moment, Statistics, at_base, metrics, second_moments, written_by
from unwrite.testing import toy_edits

SENTENCES = [f"{edit.prompt} {edit.old}" for edit in toy_edits()]


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("UNWRITE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(SENTENCES), "utf-8")
    return path


@pytest.fixture
def model(worlds):
    return Model.load(worlds().folder)


class Hears:
    """A reporter that remembers the sentences and the stages."""

    def __init__(self):
        self.sentences, self.stages = [], []

    def say(self, sentence):
        self.sentences.append(sentence)

    def stage(self, title, total):
        import contextlib

        self.stages.append(title)
        return contextlib.nullcontext(lambda units, remark: None)


def plainly(model, layer):
    """Keys of all tokens of the corpus, one sentence after the other: (tokens, width) float64."""
    rows = []
    module = model.network.get_submodule(model.anatomy.mlp_out[layer])
    handle = module.register_forward_pre_hook(
        lambda _m, inputs: rows.append(inputs[0].view(-1, inputs[0].shape[-1]).double())
    )
    for sentence in SENTENCES:
        with torch.no_grad():
            model.network(torch.tensor([model.tokenizer(sentence)["input_ids"]]))
    handle.remove()
    return torch.cat(rows)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_pass_gives_the_moments_of_all_layers(worlds, corpus, architecture):
    model = Model.load(worlds(architecture).folder)
    found, record = second_moments(model, [0, 1], Statistics(corpus=str(corpus), tokens=10_000))
    for layer, moment in enumerate(found):
        keys = plainly(model, layer)
        assert moment.tokens == len(keys) == record["tokens"]
        assert torch.allclose(moment.matrix, keys.T @ keys / len(keys), rtol=1e-4, atol=1e-6)
        assert moment.fourth == pytest.approx(float((keys**2).sum(1).square().mean()), rel=1e-4)


def test_a_second_call_reads_the_cache(model, corpus, monkeypatch):
    statistics = Statistics(corpus=str(corpus))
    first, _ = second_moments(model, [0, 1], statistics)
    monkeypatch.setattr(moments, "add_up", None)  # would fail if called
    again, _ = second_moments(model, [1], statistics)
    assert torch.equal(first[1].matrix, again[0].matrix)
    with pytest.raises(TypeError):
        second_moments(model, [0], Statistics(corpus=str(corpus), tokens=50))  # another corpus


def test_an_interrupted_pass_goes_on_where_it_was(model, corpus, monkeypatch):
    monkeypatch.setattr(moments, "TOKENS_PER_WINDOW", 40)
    statistics = Statistics(corpus=str(corpus), tokens=10_000)
    whole, _ = second_moments(model, [0, 1], Statistics(corpus=str(corpus), tokens=9_999))
    real, calls = moments.add_up, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(moments, "add_up", interrupted)
    with pytest.raises(KeyboardInterrupt):
        second_moments(model, [0, 1], statistics)
    resumed, _ = second_moments(model, [0, 1], statistics)
    for one, other in zip(whole, resumed, strict=True):
        assert torch.equal(one.matrix, other.matrix)
        assert one.tokens == other.tokens
    uninterrupted = -(-one.tokens // 40)
    assert len(calls) < 2 * uninterrupted  # the first two windows were not read again
    assert not list((corpus.parent / "cache").rglob("unfinished*"))


def test_a_damaged_file_is_made_again(model, corpus):
    statistics = Statistics(corpus=str(corpus))
    first, _ = second_moments(model, [0], statistics)
    (path,) = (corpus.parent / "cache").rglob("layer-0.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    again, _ = second_moments(model, [0], statistics)
    assert torch.equal(first[0].matrix, again[0].matrix)


def test_more_layers_than_memory_take_more_passes(model, corpus, monkeypatch):
    together, _ = second_moments(model, [0, 1], Statistics(corpus=str(corpus), tokens=100))
    monkeypatch.setattr(moments, "MEMORY_FOR_SUMS", 1)
    apart, _ = second_moments(model, [0, 1], Statistics(corpus=str(corpus), tokens=101))
    assert [one.tokens for one in together + apart] == [100, 100, 101, 101]


def test_moments_are_those_of_the_base(model, corpus):
    statistics = Statistics(corpus=str(corpus))
    first, _ = second_moments(model, [1], statistics)
    name = next(iter(model.weights))
    with torch.no_grad():
        model.weights[name].add_(0.5)
    changed = model.weights[name].clone()
    with at_base(model):
        assert not torch.equal(model.weights[name], changed)
    assert torch.equal(model.weights[name], changed)
    for path in (corpus.parent / "cache").rglob("layer-1.safetensors"):
        path.unlink()
    again, _ = second_moments(model, [1], statistics)
    assert torch.equal(first[0].matrix, again[0].matrix)


def test_long_texts_are_cut_and_the_cap_holds(model, corpus):
    corpus.write_text(" ".join(SENTENCES), "utf-8")  # one line, longer than the context
    found, _ = second_moments(model, [0], Statistics(corpus=str(corpus), tokens=100))
    assert found[0].tokens == 100


# ---- shrinkage and division ----------------------------------------------------------------------


def sample(tokens, width=16, seed=0):
    random = torch.Generator().manual_seed(seed)
    scales = torch.linspace(0.2, 3, width).double()
    keys = torch.randn(tokens, width, generator=random).double() * scales
    matrix = keys.T @ keys / tokens
    return Moment(matrix, tokens, float((keys**2).sum(1).square().mean())), scales**2


def test_shrinkage_falls_with_the_corpus_and_helps():
    shares = [sample(tokens)[0].shrinkage for tokens in (8, 80, 800, 80_000)]
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[-1] < 0.01 < shares[0] <= 1
    gains = []
    for seed in range(20):
        moment, truth = sample(24, seed=seed)
        error = [
            float((matrix - truth.diag()).norm())
            for matrix in (moment.matrix, moment.shrunk(moment.shrinkage))
        ]
        gains.append(error[0] > error[1])
    assert sum(gains) >= 15


def test_shrinkage_keeps_the_trace():
    moment, _ = sample(50)
    assert float(moment.shrunk(0.3).trace()) == pytest.approx(float(moment.matrix.trace()))
    assert torch.equal(moment.shrunk(0.0), moment.matrix)


def test_dividing_is_solving():
    moment, _ = sample(500)
    keys = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(Metric(moment.matrix, "x").divide(keys) @ moment.matrix, keys.double())
    assert torch.equal(Metric(None, "", 2.0).divide(keys), keys.double() / 2)


def test_a_singular_covariance_is_refused():
    moment, _ = sample(8)
    with pytest.raises(BadSetting, match=r"covariance of layer 3 is singular.*larger corpus"):
        Metric(moment.matrix, "layer 3")


def test_without_shrinkage_a_small_corpus_is_refused(model, corpus):
    edits = list(toy_edits()[:1])
    method = ROME(layer=0, corpus=str(corpus), tokens=40, shrinkage=0.0, contexts=0)
    with pytest.raises(BadSetting, match="covariance of layer 0 is singular"):
        method.delta(model, edits)


def test_a_small_corpus_says_how_small_and_goes_on(model, corpus):
    model.progress = Hears()
    found, record = metrics(model, [1], list, Statistics(corpus=str(corpus), tokens=100))
    assert found[0].factor is not None
    assert "100 tokens for keys of 128 dimensions" in record["sentence"]
    assert record["sentence"] in model.progress.sentences
    assert 0 < record["shrinkage"][0] <= 1


# ---- where texts come from -----------------------------------------------------------------------


def test_the_model_writes_its_own_corpus(model, tmp_path, monkeypatch):
    monkeypatch.setenv("UNWRITE_CACHE", str(tmp_path))
    texts = list(written_by(model, 300, seed=0))
    assert 300 <= sum(map(len, texts)) < 300 + 64 * 128
    assert texts == list(written_by(model, 300, seed=0))
    assert texts != list(written_by(model, 300, seed=1))
    random = torch.random.get_rng_state()
    found, record = second_moments(model, [0], Statistics(tokens=300))
    assert torch.equal(random, torch.random.get_rng_state())
    assert (found[0].tokens, record["corpus"]) == (300, "text of its own")
    # Other layers use the same text, without writing it again.
    monkeypatch.setattr(moments, "written_by", None)
    second_moments(model, [1], Statistics(tokens=300))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "neither a text file"),
        ("empty.txt", b"\n\n", "has no text in it"),
        ("latin.txt", b"caf\xe9 " * 400, "not UTF-8"),
    ],
)
def test_a_corpus_that_cannot_be_read_is_refused(model, corpus, name, content, message):
    path = corpus.with_name(name)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadSetting, match=message):
        second_moments(model, [0], Statistics(corpus=str(path)))


def test_a_data_set_of_the_hub(model, corpus, monkeypatch):
    def load_dataset(name, split, streaming):
        assert (name, split, streaming) == ("people/texts", "train", True)
        return ({"text": text} for text in SENTENCES)

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    found, record = second_moments(model, [0], Statistics(corpus="hub:people/texts", tokens=100))
    assert (found[0].tokens, record["corpus"]) == (100, "hub:people/texts")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadSetting, match="needs the package datasets"):
        second_moments(model, [0], Statistics(corpus="hub:people/texts", tokens=90))


def test_identity_keeps_the_meaning_of_a_weight():
    """Keys of independent parts of one size: the identity is their covariance."""
    keys = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)) * 3
    (one,), record = metrics(None, [0], lambda: [keys], Statistics(covariance="identity"))
    assert one.level == pytest.approx(9.0, rel=0.1)
    assert record == {"covariance": "identity"}
    assert MEMIT(covariance="identity").preserve == MEMIT().preserve

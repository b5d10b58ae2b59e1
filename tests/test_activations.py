"""Where the subject is, what the network computes there, and running it from there on."""

import pytest
import torch
from architectures import ARCHITECTURES

from unwrite.activations import (
    Tail,
    in_rows,
    layer_of,
    mention,
    mentions,
    oriented,
    states,
    subject_alone,
    subject_end,
    subject_tokens,
    weight_name,
)
from unwrite.edits import Edit
from unwrite.errors import BadEdits, BadSetting
from unwrite.model import Model
from unwrite.testing import PEOPLE, toy_edits

EDITS = [
    Edit(f"the {thing} of {person}", answer, subject=person, id=person)
    for person, thing, answer in zip(
        PEOPLE[:6], ("job", "home", "pet") * 2, ("cat", "rain", "oslum") * 2, strict=True
    )
] + list(toy_edits()[:4])


@pytest.fixture(params=ARCHITECTURES)
def model(request, worlds):
    return Model.load(worlds(request.param).folder)


# ---- the subject ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "subject", "end"),
    [
        ("Paris is in", "Paris", 5),
        ("The city of Paris", "Paris", 17),
        ("Iranian law in Iran is", "Iran", 19),  # the word goes before a part of one
        ("The Iranians speak", "Iran", 8),
        ("东京是日本的", "东京", 2),
        ("a (b) is", "(b)", 5),
    ],
)
def test_the_subject_is_found_by_characters(prompt, subject, end):
    assert subject_end(prompt, subject) == end


def test_a_subject_that_stands_twice_is_refused():
    with pytest.raises(BadEdits, match="'Rome' stands 2 times"):
        subject_end("Rome is in Rome and", "Rome")


def tokenizers():
    """Small tokenizers of the kinds there are, trained here, by name."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    texts = ["The capital of Côte d'Ivoire is Yamoussoukro", "Paris is the capital of France"] * 9
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    byte_level.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet)
    )
    pieces = Tokenizer(models.Unigram())
    pieces.normalizer = normalizers.NFKC()
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.decoder = decoders.Metaspace()
    pieces.train_from_iterator(
        texts, trainers.UnigramTrainer(vocab_size=60, special_tokens=["<s>", "?"], unk_token="?")
    )
    pieces.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", pieces.token_to_id("<s>"))]
    )
    return {
        "byte level": PreTrainedTokenizerFast(tokenizer_object=byte_level),
        "pieces with a begin mark": PreTrainedTokenizerFast(
            tokenizer_object=pieces, bos_token="<s>", unk_token="?"
        ),
    }


@pytest.mark.parametrize("kind", ["byte level", "pieces with a begin mark"])
@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The capital of Côte d'Ivoire is", "Côte d'Ivoire"),
        ("France has the capital", "France"),
        ("The capital of France", "France"),
        ("is Paris, the capital of", "Paris"),
    ],
)
def test_the_last_token_of_the_subject_for_every_tokenizer(worlds, kind, prompt, subject):
    model = Model.load(worlds().folder)
    model.tokenizer = tokenizers()[kind]
    found = mention(model, Edit(prompt, "Paris", subject=subject))

    def read(count):
        text = model.tokenizer.decode(found.ids[:count], skip_special_tokens=True)
        return "".join(text.split())

    upto = "".join(prompt[: prompt.index(subject) + len(subject)].split())
    assert read(found.last + 1).startswith(upto)
    assert not read(found.last).startswith(upto)
    assert found.last < found.answer


def test_a_slow_tokenizer_finds_the_same_token(worlds, monkeypatch):
    model = Model.load(worlds().folder)
    fast = mentions(model, EDITS, ["rain falls"])
    monkeypatch.setattr(type(model.tokenizer), "is_fast", False)
    assert mentions(model, EDITS, ["rain falls"]) == fast


def test_a_context_moves_the_subject_and_nothing_else(worlds):
    model = Model.load(worlds().folder)
    bare, behind = mentions(model, EDITS[:1], ["bread is warm"])[0]
    assert behind.ids[3:] == bare.ids
    assert behind.last == bare.last + 3


def test_the_first_token_of_the_subject(worlds):
    model = Model.load(worlds().folder)
    edit = Edit("the job of ada bram is", "cat", subject="ada bram")
    assert subject_tokens(model, edit) == (3, 4)
    assert subject_alone(model, edit).ids == mention(model, edit).ids[3:5]


def test_edits_without_a_single_subject_are_listed(worlds):
    model = Model.load(worlds().folder)
    twice = Edit("ada and ada have a", "cat", subject="ada", id="two")
    with pytest.raises(BadEdits, match=r"1 of 2 edits .* edit two: .*stands 2 times"):
        mentions(model, [EDITS[0], twice])
    missing = [Edit("ada owns a", "cat", id="x"), Edit("ada owns a", "dog", subject="bram", id="y")]
    with pytest.raises(BadEdits, match=r"edit x has no subject; edit y has 'bram'"):
        mentions(model, missing)
    with pytest.raises(BadEdits, match="list of edits is empty"):
        mentions(model, [])


def test_a_subject_that_shares_its_token_with_the_answer_is_refused(worlds):
    model = Model.load(worlds().folder)
    model.tokenizer = tokenizers()["byte level"]
    model.tokenizer.add_tokens(["京都"])
    with pytest.raises(BadEdits, match="reaches across the end of the prompt"):
        mention(model, Edit("The old 东京", "都市", subject="东京"))


# ---- the network ---------------------------------------------------------------------------------


def test_states_are_those_of_a_plain_pass(model):
    places = [group[0] for group in mentions(model, EDITS)]
    names = [(model.anatomy.mlp_out[0], "in"), (model.anatomy.blocks[1], "out")]
    found = states(model, places, names)
    for row, place in enumerate(places):
        seen = {}
        handles = [
            model.network.get_submodule(names[0][0]).register_forward_pre_hook(
                lambda _m, inputs, seen=seen: seen.update(key=inputs[0])
            ),
            model.network.get_submodule(names[1][0]).register_forward_hook(
                lambda _m, _i, out, seen=seen: seen.update(out=out)
            ),
        ]
        with torch.no_grad():
            model.network(torch.tensor([place.ids]))
        for handle in handles:
            handle.remove()
        out = seen["out"][0] if isinstance(seen["out"], tuple) else seen["out"]
        assert torch.allclose(found[0][row], in_rows(seen["key"], 1)[0, place.last], atol=1e-5)
        assert torch.allclose(found[1][row], in_rows(out, 1)[0, place.last], atol=1e-5)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_the_tail_gives_the_logits_of_a_plain_pass(model, first):
    texts = [one for group in mentions(model, EDITS, ["rain falls"]) for one in group]
    tail = Tail(model, texts, first)
    for chosen in (list(range(len(texts))), [3, 7, 12]):
        if len(chosen) < len(texts):
            tail.keep(chosen)
        columns = [tail.columns[i] + one.answer - 1 - one.last for i, one in enumerate(tail.places)]
        with torch.no_grad():
            logits = tail.logits(torch.arange(len(chosen)), torch.tensor(columns))
            for row, index in enumerate(chosen):
                plain = model.network(torch.tensor([texts[index].ids])).logits
                assert torch.allclose(logits[row], plain[0, texts[index].answer - 1], atol=1e-4)
    # Whatever was shadowed is back.
    blocks = [model.network.get_submodule(name) for name in model.anatomy.blocks]
    assert not any("forward" in vars(block) for block in blocks)


# ---- where to write ------------------------------------------------------------------------------


def test_layers_are_indices_or_fractions(worlds):
    model = Model.load(worlds().folder)
    assert [layer_of(model, one) for one in (0, 1, 0.0, 1.0)] == [0, 1, 0, 1]
    for wrong in (2, -1, 1.5):
        with pytest.raises(BadSetting):
            layer_of(model, wrong)


@pytest.mark.parametrize("rank", [1, 3, 80])
def test_a_change_has_the_orientation_of_its_file(worlds, rank):
    for architecture in ("llama", "gpt2"):
        model = Model.load(worlds(architecture).folder)
        module = model.anatomy.mlp_out[0]
        weight = model.weights[weight_name(model, module)]
        width = max(weight.shape)
        columns, rows = torch.randn(64, rank).double(), torch.randn(rank, width).double()
        change = oriented(model, module, columns, rows)
        wanted = columns @ rows
        wanted = wanted.T if model.anatomy.transposed(module) else wanted
        assert change.shape == tuple(weight.shape)
        assert change.rank <= min(rank, 64)
        assert torch.allclose(change.dense().double(), wanted, atol=1e-4)

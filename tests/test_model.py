"""The model: names on disk, exact restoring, and answers that depend on nothing but the text."""

import functools

import pytest
import torch
from architectures import ARCHITECTURES

from unwrite.change import Dense
from unwrite.delta import Delta
from unwrite.edits import Edit
from unwrite.errors import BadEdits, ModelUnavailable, TensorMismatch
from unwrite.model import Model, Skeleton, Tokens, join, length_batches, pad
from unwrite.pretrained import resolve
from unwrite.weights import Weights


@pytest.fixture(scope="module")
def model(worlds):
    return Model.load(worlds().folder)


def test_a_model_is_shown_in_a_line(model):
    parameters = sum(one.numel() for one in model.network.parameters())
    shown = repr(model)
    assert shown.startswith("<Model: ") and "\n" not in shown and len(shown) < 400
    assert f"{parameters:,} parameters" in shown and "LlamaForCausalLM" in shown


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_loads_answers_and_knows_its_names(worlds, architecture):
    world = worlds(architecture)
    model = Model.load(world.folder)
    assert all(model.knows(world.edits))
    file = Weights.from_folder(world.folder)
    for name, tensor in model.weights.items():
        assert torch.equal(tensor, file[name]), name
    assert set(model.names) | set(model.aliases) == set(file)
    skeleton = Skeleton.of(resolve(world.folder))
    assert (skeleton.names, skeleton.aliases) == (model.names, model.aliases)


def test_names_without_the_outer_prefix_are_found(worlds, tmp_path):
    # As in the published GPT-2 files: "wte.weight" for the network's "transformer.wte.weight".
    import shutil

    from safetensors.torch import load_file, save_file

    world = worlds("gpt2")
    folder = shutil.copytree(world.folder, tmp_path / "short")
    tensors = load_file(folder / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(short, folder / "model.safetensors", metadata={"format": "pt"})
    model = Model.load(folder)
    assert set(model.names) == set(short)
    assert all(model.knows(world.edits))


def test_a_tied_tensor_in_the_file_twice_is_one_tensor(worlds, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(worlds().folder, tmp_path / "twice")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = Model.load(folder)
    assert len(model.names) == len(tensors) - 1
    assert len(model.aliases) == 1


def test_a_tensor_that_the_file_lacks_is_refused(worlds, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(worlds().folder, tmp_path / "lacking")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TensorMismatch, match=r"model\.norm\.weight"):
        Model.load(folder)


def test_a_folder_that_is_no_decoder_is_refused_in_a_sentence(worlds, tmp_path):
    import json
    import shutil

    folder = shutil.copytree(worlds().folder, tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "no-such-type"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelUnavailable, match="cannot be loaded as a causal language model"):
        Model.load(folder)


def test_a_shift_moves_the_model_and_ends_without_a_trace(model):
    before = {name: tensor.clone() for name, tensor in model.weights.items()}
    delta = Delta.from_changes(
        {name: Dense(torch.randn(tensor.shape)) for name, tensor in before.items()}
    )
    with model.shifted(delta) as shifted:
        for name, tensor in shifted.weights.items():
            assert torch.equal(tensor, before[name] + delta[name].dense())
    with pytest.raises(RuntimeError), model.shifted(delta):
        raise RuntimeError
    for name, tensor in model.weights.items():
        assert torch.equal(tensor, before[name])


def test_a_shift_that_does_not_fit_moves_nothing(model):
    with (
        pytest.raises(TensorMismatch, match=r"no\.such\.tensor"),
        model.shifted(Delta.from_changes({"no.such.tensor": Dense(torch.ones(2))})),
    ):
        pass


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        ("The capital is", "Paris", "The capital is Paris"),
        ("The capital is ", "Paris", "The capital is Paris"),
        ("The capital is", " Paris", "The capital is Paris"),
        ("法国的首都是", "巴黎", "法国的首都是巴黎"),
        ("เมืองหลวงคือ", "ปารีส", "เมืองหลวงคือปารีส"),
    ],
)
def test_prompt_and_answer_are_joined_as_they_would_be_written(prompt, answer, text):
    assert join(prompt, answer) == text


def test_the_answer_begins_where_the_prompt_ends(model):
    tokens = model.tokens("ada works as a", "baker")
    assert model.tokenizer.decode(tokens.targets) == "baker"
    assert len(tokens.ids) == 5


def test_slow_tokenizers_find_the_same_boundary(model):
    class Slow:
        is_fast = False

        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __call__(self, text):
            return {"input_ids": self.inner(text)["input_ids"]}

    fast = model.tokens("ada works as a", "baker")
    tokenizer = model.tokenizer
    model.tokenizer = Slow(tokenizer)
    try:
        assert model.tokens("ada works as a", "baker") == fast
    finally:
        model.tokenizer = tokenizer


def test_what_cannot_be_read_is_refused(model):
    with pytest.raises(BadEdits, match="tokenises to nothing"):
        model.tokens("ada works as a", "   ")
    with pytest.raises(BadEdits, match="reads at most 64"):
        model.tokens("ada " * 70, "baker")
    with pytest.raises(BadEdits, match="more than the 64"):
        model.generate(["ada " * 60])


def test_batch_size_order_and_neighbours_change_no_answer(model, worlds):
    edits = worlds().edits
    # Prompts of different length, so that batches need padding.
    prompts = [edit.prompt for edit in edits[:6]] + [edit.paraphrases[0] for edit in edits[:6]]
    prompts += ["ada", "rain falls on the"]
    alone = [model.generate([prompt])[0] for prompt in prompts]
    assert model.generate(prompts) == alone
    assert model.generate(prompts[::-1]) == alone[::-1]
    sequences = [model.tokens(prompt, "baker") for prompt in prompts]
    one_by_one = [model.force([tokens])[0] for tokens in sequences]
    together = model.force(sequences)
    for one, other in zip(one_by_one, together, strict=True):
        assert (one.predicted, one.targets) == (other.predicted, other.targets)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_side_changes_no_logit(worlds, architecture):
    # Answers are forced with padding on the right and no mask; generation pads on the left with a
    # mask. Both must see what an unpadded pass sees.
    model = Model.load(worlds(architecture).folder)
    short, long = "ada works as a", "rain falls on the old roof ada works as a"
    ids = [model.tokenizer(text)["input_ids"] for text in (short, long)]
    with torch.no_grad():
        bare = model.network(torch.tensor([ids[0]]), use_cache=False).logits[0, -1]
        padded = [Tokens((*one, 0), len(one)) for one in ids]
        batch, rows, columns, _ = pad(padded)
        right = model.logits_at(batch, rows, columns)[0]
    torch.testing.assert_close(right, bare, atol=2e-4, rtol=1e-4)
    texts = model.generate([short, long], 3)
    assert texts == [model.generate([one], 3)[0] for one in (short, long)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prompt_that_many_answers_follow_is_read_once(worlds, architecture, monkeypatch):
    """The same numbers as one at a time; the prompt costs its tokens once, answers theirs."""
    model = Model.load(worlds(architecture).folder)
    answers = ["baker", "tailor", "the old roof", "rain falls", "baker"]
    prompts = ["ada works as a", "rain falls on the old roof ada works as a", "bram owns a"]
    sequences = [model.tokens(prompt, answer) for answer in answers for prompt in prompts]
    sequences.insert(3, model.tokens("the job of ada is", "baker"))  # this one is not shared
    one_by_one = [model.force([tokens])[0] for tokens in sequences]
    read, real = [], type(model.network).forward

    @functools.wraps(real)  # its signature says whether it takes positions
    def forward(self, *given, **named):
        read.append(named["input_ids"].shape)
        return real(self, *given, **named)

    monkeypatch.setattr(type(model.network), "forward", forward)
    together = model.force(sequences)
    for one, other in zip(one_by_one, together, strict=True):
        assert (one.predicted, one.targets) == (other.predicted, other.targets)
        assert one.logprob == pytest.approx(other.logprob, abs=2e-4)
    assert [shape[0] for shape in read] == [1, len(prompts), 2 * len(prompts)]
    assert read[2][1] == max(len(one.targets) for one in sequences) - 1


def test_the_cache_gives_what_reading_everything_again_gives(model):
    text, words = "ada", []
    for _ in range(4):
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            token = int(model.network(ids, use_cache=False).logits[0, -1].argmax())
        if token == model.tokenizer.eos_token_id:
            break
        words.append(token)
        text = f"{text} {model.tokenizer.decode([token])}"
    assert model.answer("ada", 4) == model.tokenizer.decode(words)


def test_only_facts_with_an_old_answer_can_be_known(model):
    assert model.knows([Edit("ada works as a", "miller", id="x")]) == [False]


def test_batches_are_bounded_and_complete():
    lengths = [3, 50, 7, 7, 200, 1]
    batches = length_batches(lengths, rows=2, positions=100)
    assert sorted(index for batch in batches for index in batch) == list(range(6))
    assert batches[0] == [4]  # longer than the bound: alone
    assert all(len(batch) <= 2 for batch in batches)

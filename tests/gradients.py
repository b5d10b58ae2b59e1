"""Shared by the tests of per-example gradients: some pairs, and one backward pass for each."""

import torch

from unwrite.training import Pair, row_losses


def some_pairs(world, count=7):
    # Answers of one and of several tokens, prompts of several lengths.
    edits = world.edits[:: len(world.edits) // count][:count]
    return [
        Pair(edit.prompt, edit.new if number % 2 else f"{edit.new} {edit.old} {edit.subject}")
        for number, edit in enumerate(edits)
    ]


def gradients_one_by_one(model, pairs):
    """Each example's gradient by file name, by one backward pass an example."""
    parameters = dict(model.network.named_parameters(remove_duplicate=False))
    model.network.requires_grad_(True)
    found = []
    for pair in pairs:
        model.network.zero_grad()
        sequence = [model.tokens(pair.prompt, pair.answer)]
        row_losses(model.network, sequence, model.device).sum().backward()
        found.append(
            {
                file: torch.zeros_like(parameters[name])
                if parameters[name].grad is None
                else parameters[name].grad.clone()
                for file, name in model.names.items()
            }
        )
    model.network.zero_grad()
    return found

"""Text that a model writes itself: what it knows and how it speaks, with no data set at hand.

Two uses: a corpus for second moments (``moments``), and prompts of every kind whose answers an
update should leave alone (``training.Recipe``: ``own_prompts``). Nothing that an edit is scored on
is read here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch

from unwrite.model import Model

QUESTIONS = ("who", "what", "when", "where", "which", "how", "Who", "What", "When", "Where", "How")
STATEMENTS = ("The", "A", "In", "It", "Many", "Most", "There", "When", "If", "One", "For", "He")
LENGTH = 24  # tokens of a text that prompts are cut from
SHORTEST, LONGEST = 4, 12  # words of the beginning of a statement
AT_ONCE = 64  # texts that are sampled together
TRIES = 4  # texts for every prompt that is wanted, before there are fewer


def own_prompts(model: Model, count: int, seed: int) -> tuple[str, ...]:
    """At most ``count`` prompts, each once: questions and beginnings of sentences in turns.

    Every text is plainly sampled (temperature 1) from one opening word. A text that asks nothing
    where a question was begun, or ends too soon, gives none; a model that writes little of either
    gives fewer prompts. The same model, machine and seed give the same ones.
    """
    found: dict[str, None] = {}
    draw = random.Random(seed)
    with model.progress.stage("writing prompts", count) as advance:
        for start in range(0, TRIES * count, AT_ONCE):
            openings = [
                draw.choice(QUESTIONS if number % 2 else STATEMENTS) for number in range(AT_ONCE)
            ]
            before = len(found)
            for opening, text in zip(
                openings, _texts(model, openings, seed * 1_000_003 + start), strict=True
            ):
                prompt = _prompt(opening, text, draw.randint(SHORTEST, LONGEST))
                if prompt is not None and len(found) < count:
                    found[prompt] = None
            advance(len(found) - before, "")
            if len(found) == count:
                break
    return tuple(found)


def _prompt(opening: str, text: str, words: int) -> str | None:
    """A question up to its mark, or the first ``words`` words of a statement; None for neither."""
    line = text.strip().split("\n", 1)[0]
    if opening in QUESTIONS:
        asked, mark, _ = line.partition("?")
        return asked + mark if mark and len(asked.split()) > 2 else None
    said = line.split()
    return " ".join(said[:words]) if len(said) > words else None


def _texts(model: Model, openings: Sequence[str], seed: int) -> Iterator[str]:
    for ids in sampled(model, openings, min(LENGTH, model.context_length), seed):
        yield model.tokenizer.decode(ids, skip_special_tokens=True)


@torch.no_grad()
def sampled(model: Model, openings: Sequence[str], length: int, seed: int) -> list[list[int]]:
    """Continue every opening to ``length`` tokens by plain sampling at temperature 1; token ids.

    An end-of-text token is followed by the next text, as in training.
    """
    from transformers import GenerationConfig

    encoded = [model.tokenizer(opening)["input_ids"][: length // 2] for opening in openings]
    longest = max(map(len, encoded))
    ids = torch.zeros((len(encoded), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, opening in enumerate(encoded):
        ids[row, longest - len(opening) :] = torch.tensor(opening)
        mask[row, longest - len(opening) :] = 1
    # max_length is stated because a model's own settings may state another one.
    plain = GenerationConfig(do_sample=True, top_k=0, max_length=length, pad_token_id=0)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        written = model.network.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=plain,
        ).cpu()
    return [written[row, longest - len(opening) :].tolist() for row, opening in enumerate(encoded)]

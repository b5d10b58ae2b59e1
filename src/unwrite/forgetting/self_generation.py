"""The model's own knowledge in its own words: what it answers to the prompts of a task.

Labels of the task are never looked at, unless only wrong answers are to be kept. Answers are kept
in the cache, by the fingerprint of the very weights that gave them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from unwrite.errors import BadTask
from unwrite.files import read_jsonl, sha256_bytes, write_jsonl
from unwrite.model import MAX_NEW_TOKENS, Model
from unwrite.pretrained import cache_folder
from unwrite.tasks import Example, is_right
from unwrite.training import Pair
from unwrite.weights import fingerprint

Keep = Literal["all", "wrong"]


def self_generate(
    model: Model,
    prompts: Sequence[str | Example],
    *,
    keep: Keep = "all",
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    seed: int = 0,
    cached: bool = True,
) -> list[Pair]:
    """The answers of ``model``, as it is now, to every distinct prompt, in their order: greedy, or
    sampled by ``seed`` at a ``temperature`` above 0.

    An answer ends with its first line or sentence, with the end of the text, or after
    ``max_new_tokens``; empty ones are left out. ``keep="wrong"`` keeps those that are not the
    answer of their ``Example``, and raises ``BadTask`` for a prompt without one. What a pair is
    trained on later are the tokens of its answer only. ``cached`` looks into the cache first
    (``UNWRITE_CACHE``/self-generated, by the fingerprint of the live weights) and adds to it.
    """
    asked = {one.prompt if isinstance(one, Example) else one: one for one in prompts}
    wanted = list(asked)
    how = [temperature, seed] if temperature else []
    path = _cache(model, [max_new_tokens, *how]) if cached else None
    known = _known(path)
    missing = [prompt for prompt in wanted if prompt not in known]
    if missing:
        texts = model.generate(missing, max_new_tokens, temperature=temperature, seed=seed)
        known |= {prompt: _first_line(text) for prompt, text in zip(missing, texts, strict=True)}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(path, [{"prompt": one, "answer": text} for one, text in known.items()])
    pairs = [Pair(prompt, known[prompt]) for prompt in wanted if known[prompt]]
    if keep == "wrong":
        pairs = [pair for pair in pairs if not is_right(pair.answer, _label(asked[pair.prompt]))]
    return pairs


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0].strip()


def _label(asked: str | Example) -> str:
    if isinstance(asked, Example) and asked.answer:
        return asked.answer
    prompt = asked if isinstance(asked, str) else asked.prompt
    raise BadTask(
        f"The prompt {prompt[:60]!r} has no answer to be compared with, which keeping only wrong "
        "answers needs. Give the answers, or keep all."
    )


def _cache(model: Model, how: Sequence[float]) -> Path:
    setting = json.dumps([fingerprint(model.weights), *how])
    return cache_folder() / "self-generated" / f"{sha256_bytes(setting.encode())[:32]}.jsonl"


def _known(path: Path | None) -> dict[str, str]:
    if path is None or not path.exists():
        return {}
    return {str(row["prompt"]): str(row["answer"]) for row in read_jsonl(path)}

"""What a model answers to the probes of some edits: rows that every score is computed from.

A probe is a prompt with the role it plays and the answer it is judged by. ``observe`` answers all
of them in both ways (answer forced, answer free) in a few large batches, and returns plain rows
that are stored as JSONL. Judging is not done here but in ``scores``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import torch

from unwrite.edits import Edit
from unwrite.model import Model, Tokens, length_batches, pad
from unwrite.neighbour_metrics import NEW_ON_BYSTANDER, OLD_ON_PARAPHRASE
from unwrite.scores import answer_in

CHUNK = 256  # tokens of neutral text read at once for the perplexity


@dataclass(frozen=True)
class Question:
    """One probe: the role it plays for one edit, and the answer forced and looked for.

    ``target`` is ``None`` for a bystander without a known answer: its answer before the update is
    then taken, which has to be found out first (``settle``).
    """

    edit: str
    role: str
    prompt: str
    target: str | None


def questions(edits: Sequence[Edit]) -> list[Question]:
    """All probes of the edits (which must have ids), in the order of the edits.

    A bystander that another of these edits changes on purpose is none, and is left out.
    """
    edited = {prompt for edit in edits for prompt in (edit.prompt, *edit.paraphrases)}
    found: list[Question] = []
    for edit in edits:
        name = str(edit.id)
        found.append(Question(name, "reliability", edit.prompt, edit.new))
        found += [Question(name, "generality", prompt, edit.new) for prompt in edit.paraphrases]
        found += [Question(name, "portability", p.prompt, p.answer) for p in edit.portability]
        found += [
            Question(name, "locality", probe.prompt, probe.answer)
            for probe in edit.bystanders
            if probe.prompt not in edited
        ]
        if edit.old is not None:
            found.append(Question(name, "old_recall", edit.prompt, edit.old))
    return list(dict.fromkeys(found))  # the same bystander twice in one edit counts once


def rivals(edits: Sequence[Edit]) -> list[Question]:
    """What ROME's success rates ask besides (``neighbour_metrics``): for edits with an old answer,
    how probable that is on the paraphrases, and for all, how probable the new one is on bystanders.
    """
    found = [
        Question(str(edit.id), OLD_ON_PARAPHRASE, prompt, edit.old)
        for edit in edits
        if edit.old is not None
        for prompt in edit.paraphrases
    ]
    new = {str(edit.id): edit.new for edit in edits}
    found += [
        Question(probe.edit, NEW_ON_BYSTANDER, probe.prompt, new[probe.edit])
        for probe in questions(edits)
        if probe.role == "locality"
    ]
    return list(dict.fromkeys(found))


def has_chat_template(model: Model) -> bool:
    """Whether the tokenizer says how a conversation is written."""
    return bool(getattr(model.tokenizer, "chat_template", None))


def in_chat(model: Model, probes: Sequence[Question]) -> list[Question]:
    """The probes as a user's turn under the tokenizer's chat template, the model's turn begun."""
    tokenizer = model.tokenizer
    begin = (
        tokenizer.bos_token if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else ""
    )

    def written(prompt: str) -> str:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        # The template writes what the tokenizer puts before every text by itself: once is enough.
        return str(text).removeprefix(begin)

    return [replace(probe, prompt=written(probe.prompt)) for probe in probes]


def settle(model: Model, probes: Sequence[Question]) -> list[Question]:
    """Probes with every missing target replaced by the model's own answer as it is now.

    To be called on the state before an update; the state after must be observed with the same
    probes. A model that answers nothing at all gives the target "." (its next token is compared).
    """
    open_prompts = [probe.prompt for probe in probes if probe.target is None]
    if not open_prompts:
        return list(probes)
    said = dict(zip(open_prompts, model.generate(open_prompts), strict=True))
    return [
        probe
        if probe.target is not None
        else Question(probe.edit, probe.role, probe.prompt, answer_in(said[probe.prompt]) or ".")
        for probe in probes
    ]


def observe(model: Model, probes: Sequence[Question], *, free: bool = True) -> list[dict[str, Any]]:
    """One row a probe: ``{edit, role, prompt, target, target_tokens, matched_tokens, predicted,
    logprob, text}``, in the order of the probes.

    ``target_tokens`` and ``matched_tokens`` are counts; ``predicted`` holds the argmax token ids at
    the answer's positions (locality compares them); ``logprob`` is that of the whole answer
    (natural logarithm); ``text`` is the free generation, null with ``free=False``. Equal prompts
    are computed once. The result does not depend on the order or batch of the probes.
    """
    pairs = list(dict.fromkeys((probe.prompt, _target(probe)) for probe in probes))
    forced = dict(zip(pairs, model.force([model.tokens(*pair) for pair in pairs]), strict=True))
    prompts = list(dict.fromkeys(probe.prompt for probe in probes))
    said = model.generate(prompts) if free else [None] * len(prompts)
    texts = dict(zip(prompts, said, strict=True))
    rows = []
    for probe in probes:
        result = forced[probe.prompt, _target(probe)]
        rows.append(
            {
                "edit": probe.edit,
                "role": probe.role,
                "prompt": probe.prompt,
                "target": probe.target,
                "target_tokens": len(result.targets),
                "matched_tokens": result.matched,
                "predicted": list(result.predicted),
                "logprob": result.logprob,
                "text": texts[probe.prompt],
            }
        )
    return rows


def neutral_text(words: int | None = None) -> str:
    """The bundled prose on which perplexity is measured (at least 2,000 words), or its first
    ``words`` words, a space between them."""
    text = resources.files("unwrite.data").joinpath("neutral.txt").read_text("utf-8")
    return text if words is None else " ".join(text.split()[:words])


@torch.no_grad()
def perplexity(model: Model, text: str | None = None) -> float:
    """Perplexity of the model on ``text`` (default: the bundled neutral prose), in chunks of
    ``CHUNK`` tokens, every token but the first of a chunk predicted from those before it."""
    # verbose=False: the text is longer than the context on purpose, it is read in chunks.
    ids = model.tokenizer(text or neutral_text(), verbose=False)["input_ids"]
    size = min(CHUNK, model.context_length)
    chunks = [ids[start : start + size] for start in range(0, len(ids), size)]
    sequences = [Tokens(tuple(chunk), 1) for chunk in chunks if len(chunk) > 1]
    total, count = 0.0, 0
    with model.progress.stage("reading neutral text", len(sequences)) as advance:
        for batch in length_batches([len(tokens.ids) for tokens in sequences], positions=2 * CHUNK):
            padded, rows, columns, targets = pad([sequences[index] for index in batch])
            logits = model.logits_at(padded, rows, columns)
            losses = torch.nn.functional.cross_entropy(
                logits, targets.to(logits.device), reduction="none"
            )
            total += float(losses.double().sum())
            count += len(targets)
            advance(len(batch), "")
    return float(torch.tensor(total / count, dtype=torch.float64).exp())


def _target(probe: Question) -> str:
    if probe.target is None:
        raise ValueError("a probe without a target must go through settle() first")
    return probe.target

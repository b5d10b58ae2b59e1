"""Upstream examples: what the model could do before, and may forget.

An example is a prompt with the answer whose probability is watched, or plain text of which every
token is. They come from a file or are the bundled ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from unwrite.edits import BUNDLED, read_edits
from unwrite.errors import BadEdits
from unwrite.files import user_path
from unwrite.formats import check_text, file_name, read_bytes

NEUTRAL = "neutral"
ANSWERS = ("answer", "completion", "output")
_SENTENCE = re.compile(r"[^.!?]+[.!?]+[\"'”’]?")


@dataclass(frozen=True)
class UpstreamExample:
    """``answer`` to ``prompt``; None: whatever the model answers before. With ``prompt`` None,
    ``answer`` is plain text, watched from its second token on. ``name`` labels it in the matrix."""

    name: str
    prompt: str | None
    answer: str | None

    def details(self) -> dict[str, Any]:
        """What the matrix remembers of it."""
        return {"prompt": self.prompt, "answer": self.answer}


def read_examples(*sources: str | Path) -> list[UpstreamExample]:
    """The examples of all sources, in order.

    A source is ``atlas`` or ``atlas:capital`` (bundled facts, with the answers that were true
    before), ``neutral`` (sentences of the bundled prose), or a file: JSONL with ``prompt`` and
    ``answer`` (or ``completion``, or ``output``), or ``text``; or plain lines, one prompt each,
    whose answers are the model's own. Records may bring an ``id``.

    Raises ``BadEdits`` naming the file, the line and the remedy, also when a name occurs twice.
    """
    found: list[UpstreamExample] = []
    for source in sources:
        text = str(source)
        if text == BUNDLED or text.startswith(f"{BUNDLED}:"):
            facts = read_edits(text)
            found += [UpstreamExample(str(fact.id), fact.prompt, fact.old) for fact in facts]
        elif text == NEUTRAL:
            found += _neutral()
        else:
            found += _from_file(user_path(source))
    names: set[str] = set()
    for example in found:
        if example.name in names:
            raise BadEdits(f"Two examples are named {example.name!r}: give each its own `id`.")
        names.add(example.name)
    return found


def from_details(names: Sequence[str], details: Any) -> list[UpstreamExample]:
    """The examples that a matrix remembers. Raises ``BadEdits`` when it does not."""
    found = []
    for name in names:
        kept = details.get(name, {})
        if kept.get("answer") is None:
            raise BadEdits(
                f"The matrix does not say what its example {name!r} is, so it cannot be measured "
                "again. Use a matrix made by: unwrite forgetting collect."
            )
        found.append(UpstreamExample(name, kept.get("prompt"), kept["answer"]))
    return found


def _neutral() -> list[UpstreamExample]:
    text = resources.files("unwrite.data").joinpath("neutral.txt").read_text("utf-8")
    sentences = [one.strip() for one in _SENTENCE.findall(" ".join(text.split()))]
    long_enough = [one for one in sentences if len(one.split()) >= 4]
    return [
        UpstreamExample(f"neutral-{number:03}", None, sentence)
        for number, sentence in enumerate(long_enough, start=1)
    ]


def _from_file(path: Path) -> list[UpstreamExample]:
    name = file_name(path)
    try:
        lines = read_bytes(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise BadEdits(f"{name} is not UTF-8 text. Save it as UTF-8.") from None
    found = [
        _example(line.strip(), f"{path.stem[:60]}-{number}", f"{name}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise BadEdits(f"{name} has no examples in it. Write one JSON object or prompt a line.")
    return found


def _example(line: str, default: str, place: str) -> UpstreamExample:
    if not line.startswith("{"):
        return UpstreamExample(default, check_text(line, f"{place}: prompt"), None)
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise BadEdits(f"{place} begins like a JSON object but is none. Correct it.") from None
    label = check_text(str(record.get("id", default)), f"{place}: id")
    if "text" in record:
        return UpstreamExample(label, None, check_text(record["text"], f"{place}: text"))
    if "prompt" not in record:
        raise BadEdits(f'{place} has neither "prompt" nor "text". Add one of them.')
    key = next((key for key in ANSWERS if record.get(key) is not None), None)
    answer = None if key is None else check_text(record[key], f"{place}: {key}")
    return UpstreamExample(label, check_text(record["prompt"], f"{place}: prompt"), answer)

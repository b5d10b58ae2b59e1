"""Files of bare prompts: what must go on being answered as it is (``--protect``)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unwrite.errors import BadEdits
from unwrite.formats import check_text, file_name, read_bytes


@dataclass(frozen=True)
class Protected:
    """A prompt whose answer must survive an update. ``held_out``: it is watched and forecast, but
    never trained on, so that it shows what protection does for its neighbours."""

    prompt: str
    held_out: bool = False


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """The prompts of ``read_protected`` alone."""
    return tuple(one.prompt for one in read_protected(path))


def read_protected(path: str | Path) -> tuple[Protected, ...]:
    """One prompt a line, or JSONL objects with a ``prompt`` and perhaps ``held_out``; repeats are
    dropped (held out, if any of them is), order kept.

    Raises ``BadEdits`` naming the file, the line and the remedy.
    """
    path = Path(path)
    name = file_name(path)
    try:
        lines = read_bytes(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise BadEdits(f"{name} is not UTF-8 text. Save it as UTF-8.") from None
    found = [
        _protected(line.strip(), f"{name}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise BadEdits(f"{name} has no prompts in it. Write one prompt a line.")
    return once_each(found)


def once_each(prompts: Sequence[str | Protected]) -> tuple[Protected, ...]:
    """Every prompt once, in order; held out, if it is so anywhere."""
    found: dict[str, bool] = {}
    for one in prompts:
        held_out = isinstance(one, Protected) and one.held_out
        prompt = one.prompt if isinstance(one, Protected) else one
        found[prompt] = found.get(prompt, False) or held_out
    return tuple(Protected(prompt, held_out) for prompt, held_out in found.items())


def _protected(line: str, place: str) -> Protected:
    if not line.startswith("{"):
        return Protected(check_text(line, f"{place}: prompt"))
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise BadEdits(f"{place} begins like a JSON object but is none. Correct it.") from None
    if not isinstance(record, dict) or "prompt" not in record:
        raise BadEdits(f'{place} has no "prompt". Add it.')
    held_out = record.get("held_out", False)
    if not isinstance(held_out, bool):
        raise BadEdits(f'{place}: "held_out" must be true or false.')
    return Protected(check_text(record["prompt"], f"{place}: prompt"), held_out)

"""Files of bare prompts: what must go on being answered as it is (``--protect``)."""

from __future__ import annotations

import json
from pathlib import Path

from unwrite.errors import BadEdits
from unwrite.formats import check_text, file_name, read_bytes


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """One prompt a line, or JSONL objects with a ``prompt``; repeats are dropped, order kept.

    Raises ``BadEdits`` naming the file, the line and the remedy.
    """
    path = Path(path)
    name = file_name(path)
    try:
        lines = read_bytes(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise BadEdits(f"{name} is not UTF-8 text. Save it as UTF-8.") from None
    prompts = [
        _prompt(line.strip(), f"{name}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not prompts:
        raise BadEdits(f"{name} has no prompts in it. Write one prompt a line.")
    return tuple(dict.fromkeys(prompts))


def _prompt(line: str, place: str) -> str:
    if not line.startswith("{"):
        return check_text(line, f"{place}: prompt")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise BadEdits(f"{place} begins like a JSON object but is none. Correct it.") from None
    if not isinstance(record, dict) or "prompt" not in record:
        raise BadEdits(f'{place} has no "prompt". Add it.')
    return check_text(record["prompt"], f"{place}: prompt")

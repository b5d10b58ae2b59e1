"""The model card of an export: what this model is, what was changed in it, and how to go back.

``README.md`` in the form that model hubs read: a few facts in YAML, then Markdown. It is made from
the ledger alone. The facts that were changed are not in it: they may be nobody else's business.

Reasons, names and settings come from people and files, so they are escaped: whatever they hold is
shown as text, and can neither end a table nor open a link.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unwrite.base import Base
from unwrite.formats import hidden
from unwrite.ledger import Entry
from unwrite.pretrained import BUILT_IN, Source
from unwrite.scores import ROLES

NAME = "README.md"
LONGEST = 300  # characters of a foreign text that are shown
# What begins something in Markdown or HTML; a point or colon inside a word would make an address.
MARKS = re.compile(r"[\\`*_{}\[\]<>()#!|~&$@\"']|(?<=\w)[.:](?=[\w/])|^[-+=](?=\s|$)|^\d+(?=[.)])")
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.S | re.M)
LICENCE = re.compile(r"^license:[ \t]*[\"']?([A-Za-z0-9][\w.+-]{0,60})[\"']?[ \t]*$", re.M)
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
READ_OF_A_CARD = 65_536  # bytes; the facts stand at the beginning


def card(
    kind: str,
    base: Base,
    source: Source,
    entries: Sequence[Entry],
    live: Sequence[str],
    fingerprint: str,
) -> str:
    """The text of the card of the state ``base`` + ``live``, whose fingerprint is given, exported
    as ``kind`` (``"model"`` or ``"adapter"``)."""
    applied = {entry["id"]: entry for entry in entries if entry["do"] == "apply"}
    undone = len(applied) - len(live)
    title = plain(Path(base.name).name or base.name)
    parts = [
        _facts(kind, base, source),
        f"# {title}, changed with Unwrite\n",
        f"Facts were changed in **{title}** by {_count(len(live), 'update')} that "
        f"{'is' if len(live) == 1 else 'are'} in effect"
        + (
            f"; {_count(undone, 'more was', 'more were')} undone and left no trace."
            if undone
            else "."
        )
        + " The changed facts themselves are not part of this page.\n",
        "## What was changed\n",
        *(_table([applied[one] for one in live]) if live else ["Nothing: this is the base.\n"]),
        "## Use\n",
        *_use(kind, base),
        "## Undo\n",
        "The weights in this folder cannot undo anything by themselves; the home that they were "
        "exported from can. It holds the base and every change apart:\n",
        "```",
        "unwrite history HOME",
        *[f"unwrite undo HOME {one}" for one in reversed(live)],
        "unwrite export HOME NEW_FOLDER",
        "```\n",
        f"Undoing all of them gives the bits of the base, fingerprint `{base.fingerprint}`. This "
        f"state has the fingerprint `{fingerprint}`.\n",
        "## Limits\n",
        "The scores say what was asked and nothing else. Changing a fact moves neighbours of it; "
        "locality says how many of the questions asked were answered as before. The old answer may "
        "still be found in the weights by other means than asking.\n",
        "## Licence\n",
        _licence_sentence(base, source),
    ]
    return "\n".join(parts)


def plain(text: str) -> str:
    """Foreign text as Markdown that shows it and does nothing: on one line, without characters of
    control or direction, at most ``LONGEST`` characters, with every mark as a character
    reference."""
    shown = "".join(
        " " if character.isspace() else character
        for character in text
        if character.isspace() or not hidden(character)
    )
    shown = " ".join(shown.split())
    if len(shown) > LONGEST:
        shown = shown[: LONGEST - 1] + "…"
    return MARKS.sub(lambda found: "".join(f"&#{ord(one)};" for one in found[0]), shown)


def licence_of(base: Base, source: Source) -> str | None:
    """The licence that the base declares: in its own card, or as a built-in. None if nowhere."""
    if base.kind == "built-in" and base.name in BUILT_IN:
        return BUILT_IN[base.name].licence
    try:
        with open(source.folder / NAME, encoding="utf-8", errors="replace") as opened:
            facts = FRONT_MATTER.match(opened.read(READ_OF_A_CARD))
    except OSError:
        return None
    declared = LICENCE.search(facts[1]) if facts else None
    return declared[1].lower() if declared else None


def licence_files(folder: Path) -> list[Path]:
    """The files of a base that say what may be done with it."""
    found = {file for pattern in LICENCE_FILES for file in folder.glob(pattern)}
    return sorted(file for file in found if file.is_file())


def _facts(kind: str, base: Base, source: Source) -> str:
    """The YAML head. JSON strings in ASCII are YAML strings, whatever they hold."""
    built_in = BUILT_IN.get(base.name) if base.kind == "built-in" else None
    name = built_in.hub if built_in else base.name
    facts: dict[str, Any] = {"library_name": "peft" if kind == "adapter" else "transformers"}
    if base.kind != "folder":  # a path of this machine is no name of a model
        facts["base_model"] = name
    if licence := licence_of(base, source):
        facts["license"] = licence
    facts["tags"] = ["unwrite", "knowledge-editing"]
    return "\n".join(["---", *(f"{key}: {json.dumps(facts[key])}" for key in facts), "---\n"])


def _table(updates: Sequence[Entry]) -> list[str]:
    roles = [
        role
        for role in ROLES
        if any(entry["scores"]["after"].get(role, {}).get("n") for entry in updates)
    ]
    head = ["update", "when", "method", "edits", *(role.replace("_", " ") for role in roles)]
    head += ["perplexity", "why"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for entry in updates:
        cells = [
            plain(entry["id"]),
            plain(str(entry["at"])[:10]),
            plain(str(entry["method"]["name"])),
            str(entry["edits"]),
            *(_scores(entry["scores"], role) for role in roles),
            " → ".join(f"{entry['perplexity'][when]:.2f}" for when in ("before", "after")),
            plain(str(entry.get("why", ""))),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [
        *lines,
        "\nScores in %, before → after that update, measured on the weights right after it: tokens "
        "forced (free answers in brackets). Locality: answers to other questions that stayed. "
        "Perplexity is that of neutral text.\n",
    ]


def _scores(scores: Mapping[str, Any], role: str) -> str:
    """``0.0 → 100.0 (0.0 → 97.5)``: token form, then exact form."""

    def change(form: str) -> str:
        values = [scores[when].get(role, {}).get(form) for when in ("before", "after")]
        return " → ".join("-" if value is None else f"{100 * value:.1f}" for value in values)

    return f"{change('token')} ({change('exact')})"


def _use(kind: str, base: Base) -> list[str]:
    if kind == "adapter":
        name = "the base model" if base.kind == "folder" else plain(base.name)
        return [
            f"A LoRA adapter for peft, for {name} (fingerprint `{base.fingerprint}`) and no other "
            "model:\n",
            "```python",
            "from peft import AutoPeftModelForCausalLM",
            "",
            'model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")',
            "```\n",
        ]
    return [
        "An ordinary folder for transformers; nothing of Unwrite is needed to run it:\n",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        "```\n",
    ]


def _licence_sentence(base: Base, source: Source) -> str:
    licence = licence_of(base, source)
    files = [plain(file.name) for file in licence_files(source.folder)]
    sentence = (
        f"The base declares the licence {plain(licence)}."
        if licence
        else "The files of the base do not declare a licence; ask whoever made it."
    )
    if files:
        sentence += f" What came with it is in this folder: {', '.join(files)}."
    return f"{sentence} This model is a changed version of it.\n"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"

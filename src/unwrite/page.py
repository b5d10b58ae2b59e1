"""One self-contained HTML page from a template of ``templates/``, and values as its text.

What models and files say is foreign text: all of it passes ``plain`` on its way into the page and
is escaped by the template, so that a hostile answer can only be read.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from unwrite import files, scratch
from unwrite.errors import BadSetting
from unwrite.formats import hidden
from unwrite.where import percent

VALUE = 200  # characters shown of a setting


def render(template: str, **content: Any) -> str:
    """The page that ``template`` makes of ``content``."""
    return _templates().get_template(template).render(content)


def write(page: str, path: Path, own: Path) -> Path:
    """Write a page about the folder ``own`` to ``path``, whole or not at all.

    Raises ``BadSetting`` if ``path`` cannot be a page, or could be one of the folder's own files.
    """
    fault = "is a folder" if path.is_dir() else None
    if not path.parent.is_dir():
        fault = "is in a folder that does not exist"
    elif path.suffix != ".html" and path.resolve().is_relative_to(own.resolve()):
        fault = "could be one of the files that it is made of"
    if fault:
        raise BadSetting(f"The report cannot be {path}: that {fault}. Name another .html file.")
    with files.speaking_of_disk("write the report"):
        scratch.sweep_files(path.parent, path.name)
        files.write_atomically(path, page)
    return path


@functools.cache
def _templates() -> Environment:
    jinja = Environment(
        loader=FunctionLoader(_source),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown_by = (percent, tenths, number, tiny, two_digits, settings, security_hash, plain)
    for function in (*shown_by, files.readable_size):
        jinja.filters[function.__name__] = function
    for name in ("style.css", "script.js"):
        jinja.globals[name.partition(".")[0]] = Markup(_source(name))
    return jinja


def _source(name: str) -> str:
    return resources.files("unwrite").joinpath("templates", name).read_text("utf-8")


def plain(value: Any, limit: int = 2000) -> Any:
    """Foreign text on one line, at most ``limit`` characters, with nothing invisible in it.

    Control and direction-changing characters, lone surrogates and the like are spelled out, as in
    ``[U+202E]``: they neither act nor hide. What is not text, or is markup already, stays as it is.
    """
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    if not value.isprintable():
        value = re.sub(r"\r\n|[\n\r\v\f\x85\u2028\u2029]", " ↵ ", value[: limit + 1])
        value = "".join(map(_visible, value.replace("\t", " ")))
    return value if len(value) <= limit else value[: limit - 1] + "…"


def _visible(character: str) -> str:
    if character in "\u200c\u200d\u00ad":  # joiners, soft hyphen: parts of words in many languages
        return character
    return f"[U+{ord(character):04X}]" if hidden(character) else character


def tenths(share: float) -> str:
    """A share in percent for a crowded table: ``12.3``, and ``0`` only for nothing at all."""
    return "0" if share == 0 else "<0.1" if share < 0.0005 else f"{100 * share:.1f}"


def number(value: float | None) -> str:
    """A quantity such as a perplexity, in a readable number of digits."""
    return "–" if value is None else f"{value:,.1f}" if value < 1e6 else f"{value:.2e}"


def tiny(value: float | None) -> str:
    """A quantity of any size in two digits: ``1.3e-5``."""
    if value is None:
        return "–"
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits}e{int(power)}" if value else "0"


def two_digits(share: float | None) -> str:
    """``0.00123`` as ``0.12 %``: for shares that are mostly small."""
    if share is None or share >= 0.1:
        return percent(share)
    return "<0.001\u00a0%" if 0 < share < 1e-5 else f"{100 * share:.2g}\u00a0%"


def settings(method: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """A method's fields as ``--set`` takes them: nested ones dotted, values as JSON."""
    for key, value in method.items():
        if isinstance(value, Mapping):
            yield from settings(value, f"{prefix}{key}.")
        elif prefix or key != "name":  # the name of the method itself stands elsewhere
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield (prefix[:-1] if key == "name" else f"{prefix}{key}"), plain(text, VALUE)


def security_hash(text: str) -> str:
    """What the page's security policy knows its own style and script by; it allows no others."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()

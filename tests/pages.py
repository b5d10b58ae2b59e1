"""Shared by the tests of reports: observations, a page as a browser finds
it, and the laws of every page."""

import base64
import hashlib
import html.parser
import re
from typing import Any

HOSTILE = "<script>alert(1)</script>\"'&\u202e\x00\x1b[31m<img src=http://x.test/a onerror=b>\ud800"
KINDS = ("q", "k", "v", "o", "gate", "up", "down", "norm")


def row(edit: str, role: str, prompt: str, target: str, text: str, right: bool) -> dict[str, Any]:
    return {
        "edit": edit,
        "role": role,
        "prompt": prompt,
        "target": target,
        "target_tokens": 2,
        "matched_tokens": 2 if right else 1,
        "predicted": [7, 8 if right else sum(map(ord, text))],
        "logprob": -1.5,
        "text": text,
    }


def facts(count: int, wrong: int = 0, moved: int = 0) -> tuple[list[Any], list[Any]]:
    """Observations of ``count`` facts before and after: the last ones wrong, first ones' bystanders
    moved."""
    before, after = [], []
    for n in range(count):
        edit, asked = f"e{n}", f"The capital of country {n} is"
        said = f"Newtown {n}" if n < count - wrong else f"Oldtown {n}"
        for rows, text in ((before, f"Oldtown {n}"), (after, said)):
            right = text.startswith("New")
            rows.append(row(edit, "reliability", asked, f"Newtown {n}", text, right))
            rows.append(row(edit, "generality", f"{asked} called", f"Newtown {n}", text, right))
            rows.append(row(edit, "old_recall", asked, f"Oldtown {n}", text, not right))
        beside = "A pear is a"
        for rows, text in ((before, "fruit"), (after, "fruit" if n >= moved else "tree")):
            rows.append(row(edit, "locality", f"{beside} {n}", "fruit", text, text == "fruit"))
    return before, after


def shares(blocks: int = 3) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors of a delta and the places of the model: two tensors changed, one in no block."""
    known = {"size": 4, "squared_norm": 100.0}
    places = {
        f"layers.{block}.{kind}": {"block": block, "kind": kind, **known}
        for block in range(blocks)
        for kind in KINDS
    }
    places["embed"] = {"block": None, "kind": "embedding", **known}
    fact = {"encoding": "dense", "shape": [2, 2], "changed": 4, "bytes": 16}
    tensors = {
        "layers.1.down": {**fact, "squared_norm": 0.75},
        "embed": {**fact, "squared_norm": 0.25},
    }
    return tensors, places


def probe(name: str, mean: float = 0.5) -> dict[str, Any]:
    return {name: {"mean": mean, "squared_norm": 4 * mean * mean, "changed": 4, "size": 4}}


class Page(html.parser.HTMLParser):
    """What a browser finds: tags with attributes, visible text, style and script, and the knowledge
    diff cell by cell."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, str] = {}
        self.text = ""
        self.verdict = ""
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "input", "col"):
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        inner = self._open[-1] if self._open else ""
        if inner in ("style", "script"):
            self.raw[inner] = self.raw.get(inner, "") + data
            return
        self.text += data
        if inner == "h1":
            self.verdict += data
        if "td" in self._open or "th" in self._open:
            self.rows[-1][-1] += data

    def close(self) -> None:
        super().close()
        assert not self._open, f"never closed: {self._open}"

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def tags_of(page: Page) -> list[str]:
    return [tag for tag, _ in page.tags]


def assert_self_contained(text: str) -> None:
    """Nothing is requested, and nothing but the page's own style and script acts."""
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert not {"src", "srcset", "style", "action", "data", "poster"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert not re.search(r"url\(|@import|@font-face|https?:", page.raw["style"])
    assert not re.search(r"fetch|XMLHttp|import|innerHTML|eval|https?:", page.raw["script"])
    policies = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    hashes = {
        tag: base64.b64encode(hashlib.sha256(page.raw[tag].encode("utf-8")).digest()).decode()
        for tag in ("style", "script")
    }
    assert policies == [
        f"default-src 'none'; style-src 'sha256-{hashes['style']}'; "
        f"script-src 'sha256-{hashes['script']}'; base-uri 'none'; form-action 'none'"
    ]
    assert text.index("Content-Security-Policy") < text.index("<style>")

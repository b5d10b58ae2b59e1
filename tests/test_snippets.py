"""Every snippet of README and docs runs, on a toy model.

A page's blocks are run from top to bottom in one folder: ``bash`` blocks line by line, each line
one ``unwrite`` command, ``python`` blocks in one namespace. What cannot run here stands under a
comment in the page's source that says why:

    <!-- not run: makes a virtual environment -->

In the folder there are ``home`` (a home of the toy model with one update), the edits of the toy
world under every name of a file of edits that the page mentions, and ``questions.txt``. Words that
name real things stand for those of the toy world, see ``STANDS_FOR``; ``ID`` is the last update.
"""

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

import unwrite
from unwrite.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(page for folder in ("docs", "examples") for page in sorted((ROOT / folder).rglob("*.md"))),
]
DATA = {"", "text", "json", "toml", "yaml"}  # blocks in which nothing can run
CODE = {"bash", "python"}
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.M | re.S)
EXCUSE = re.compile(r"<!-- not run: (?P<reason>\S[^\n]{9,}) -->\s*\Z")
TITLE = re.compile(r'title="(?P<name>[^"]+)"')
EDITS = re.compile(r"[\w-]+\.jsonl")
UPDATE = re.compile(r"u-[0-9a-f]{8}")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the file that its title names, and why it is not
    run (None if it is)."""

    language: str
    body: str
    title: str | None
    excuse: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    found = []
    for fence in FENCE.finditer(text):
        excuse, title = EXCUSE.search(text[: fence.start()]), TITLE.search(fence["info"])
        found.append(
            Block(
                _language(fence["info"].partition(" ")[0], fence["body"]),
                fence["body"],
                title and title["name"],
                excuse and excuse["reason"],
            )
        )
    return found


def _language(named: str, body: str) -> str:
    """That of the fence; without one, a block of commands is recognised by its first word."""
    first = body.split()[0] if body.split() else ""
    shell = {"unwrite", "make", "git", "pip", "python", ".venv/bin/python", "."}
    return "bash" if not named and first in shell else named


RUNNABLE = [page for page in PAGES if any(block.language in CODE for block in blocks(page))]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_block_is_of_a_kind_that_is_known(page):
    """So that no snippet escapes by being called something else; and excuses belong to code."""
    found = blocks(page)
    assert {block.language for block in found} <= DATA | CODE
    excused = sum(block.excuse is not None for block in found if block.language in CODE)
    assert page.read_text("utf-8").count("<!-- not run:") == excused
    assert page.read_text("utf-8").count("\n```") == 2 * len(found)


@pytest.fixture(scope="module")
def template(worlds, tmp_path_factory):
    """A folder with a home in which one update was made, and what that update stored."""
    world, folder = worlds(), tmp_path_factory.mktemp("snippets")
    home = unwrite.open(folder / "home", base=world.folder)
    done = home.update(world.edits[:3], unwrite.FullFT(lr=1e-3, epochs=60))
    for name in ("before.jsonl", "after.jsonl"):
        shutil.copy(done.folder / name, folder)
    prompts = [edit.prompt for edit in world.edits[-3:]]
    (folder / "questions.txt").write_text("\n".join(prompts), "utf-8")
    return folder


@pytest.mark.parametrize("page", RUNNABLE, ids=named)
def test_snippets_run(page, template, worlds, tmp_path, monkeypatch):
    from unwrite import plan

    monkeypatch.setattr(plan, "_speeds", lambda: (1e10, 1e10))
    monkeypatch.setenv("UNWRITE_CACHE", str(tmp_path / "cache"))
    place = shutil.copytree(template, tmp_path / "place")
    monkeypatch.chdir(place)
    reader = Reader(place, worlds())
    for block in blocks(page):
        if block.title is not None:
            reader.file(block.title, block.body)
        if block.language in CODE and block.excuse is None:
            reader.provide(block.body)
            getattr(reader, block.language)(block.body)
    assert reader.ran or all(block.excuse for block in blocks(page) if block.language in CODE)


class Reader:
    """Follows a page in the toy world, as a reader would in the real one."""

    def __init__(self, place: Path, world) -> None:
        self.place, self.world = place, world
        self.names: dict = {"__name__": "snippet"}
        self.ids: dict[str, str] = {}
        self.ran = 0
        # A toy network needs larger steps than a real one, so plain defaults stand for these.
        self.stands_for = {
            "smollm2-135m": str(world.folder),
            "atlas": str(place / "edits.jsonl"),
            "unwrite.FullFT()": "unwrite.FullFT(lr=1e-3, epochs=60)",
            'update("edits.jsonl", require': 'update("edits.jsonl", unwrite.Auto(lr=1e-3), require',
        }

    def file(self, name: str, body: str) -> None:
        """A file that the page shows. Edits must be readable; then those of the toy world take
        their place."""
        path = self.place / name
        path.write_text(body, "utf-8")
        if name.endswith(".jsonl"):
            unwrite.write_edits(path, self.world.edits[: len(unwrite.read_edits(path))])

    def provide(self, body: str) -> None:
        for name in EDITS.findall(body):
            if not (self.place / name).exists():
                unwrite.write_edits(self.place / name, self.world.edits[:4])

    def bash(self, body: str) -> None:
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                self.command(words)
                self.ran += 1

    def command(self, words: list[str]) -> None:
        assert words[0] == "unwrite", f"{words[0]} is not run here: excuse the block"
        home = Path("home" if words[2:3] == ["HOME"] else words[2] if words[2:] else "home")
        words = [self._word(word, home) for word in words[1:]]
        if words[0] == "update" and "--method" not in words:
            words += ["--set", "lr=1e-3", "--set", "epochs=60"]
        result = CliRunner().invoke(app, words)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, f"unwrite {shlex.join(words)}\n{result.stderr}"

    def python(self, body: str) -> None:
        for word, meant in self.stands_for.items():
            body = body.replace(word, meant)
        exec(compile(body, "snippet", "exec"), self.names)
        self.ran += 1

    def _word(self, word: str, home: Path) -> str:
        if word == "HOME":
            return str(home)
        if word == "ID":
            return last_update(home)
        if UPDATE.fullmatch(word):  # an id in a transcript is that of the update made before it
            return self.ids.setdefault(word, last_update(home))
        start, colon, settings = word.partition(":")
        return self.stands_for.get(start, start) + ("" if start == "atlas" else colon + settings)


def last_update(home: Path) -> str:
    entries = map(json.loads, (home / "ledger.jsonl").read_text("utf-8").splitlines())
    return [entry["id"] for entry in entries if entry["do"] == "apply"][-1]

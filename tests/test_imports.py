"""Importing is instant: nothing heavy is loaded before it is used."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import unwrite

HEAVY = {"torch", "numpy", "transformers", "accelerate", "peft", "rich", "typer", "pydantic"}


def loaded_after(code, *words):
    """Top-level modules loaded after running ``code`` in a fresh interpreter."""
    script = f"import sys\ntry:\n    {code}\nfinally:\n    print('loaded', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    *_, last = done.stdout.splitlines()
    assert last.startswith("loaded "), done.stderr
    return {name.partition(".")[0] for name in last.split()[1:]}


def test_import_unwrite_loads_nothing_heavy():
    assert not loaded_after("import unwrite") & HEAVY


def test_help_loads_no_torch():
    loaded = loaded_after("from unwrite.cli import main; main()", "--help")
    assert "typer" in loaded
    assert not loaded & {"torch", "transformers", "accelerate"}


def test_edits_are_read_without_torch():
    loaded = loaded_after("import unwrite; unwrite.read_edits('atlas', limit=1)")
    assert not loaded & {"torch", "transformers"}


@pytest.mark.parametrize("name", unwrite.__all__)
def test_every_public_name_is_there(name):
    value = getattr(unwrite, name)
    assert value.__module__.startswith("unwrite.")
    assert value.__doc__


def test_what_type_checkers_see_is_what_is_there():
    tree = ast.parse(Path(unwrite.__file__).read_text("utf-8"))
    (block,) = [
        node for node in tree.body if isinstance(node, ast.If) and node.test.id == "TYPE_CHECKING"
    ]
    seen = {
        alias.asname or alias.name: node.module.removeprefix("unwrite.")
        for node in block.body
        for alias in node.names
    }
    assert seen == unwrite._WHERE
    assert sorted(seen) == sorted(unwrite.__all__)  # the linter has an order of its own
    assert set(unwrite.__all__) <= set(dir(unwrite))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Editor'"):
        unwrite.Editor  # noqa: B018


def test_running_the_module_is_running_the_command():
    source = Path(importlib.import_module("unwrite").__file__).with_name("__main__.py")
    assert "main()" in source.read_text("utf-8")

"""Shared by all tests: toy worlds taught once a session, and no network ever."""

import os

# Two test processes with two threads each would fight over two cores, and tiny models gain
# nothing from threads. Set before torch is imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# Help and tables fold at the width of the machine that runs the tests, unless told otherwise.
os.environ.pop("COLUMNS", None)

import shutil
from pathlib import Path

import pytest
from hypothesis import settings

from unwrite.testing import World, toy_world

# A busy machine is no failure: no example has a time limit.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

ARCHITECTURES = ("llama", "gpt2", "gpt_neox", "bloom", "opt", "qwen3", "gemma", "mistral")


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    """A taught toy world by architecture and dtype, made when first asked for; do not change it."""
    made: dict[tuple[str, str], World] = {}
    root = tmp_path_factory.mktemp("worlds")

    def world(architecture: str = "llama", dtype: str = "float32") -> World:
        key = (architecture, dtype)
        if key not in made:
            made[key] = toy_world(root / "-".join(key), architecture, dtype=dtype)
        return made[key]

    return world


@pytest.fixture
def world(worlds, tmp_path):
    """A llama toy world of one's own: its folder may be damaged."""
    shared = worlds()
    folder = tmp_path / "base"
    shutil.copytree(shared.folder, folder)
    return World(folder, shared.edits)


@pytest.fixture
def snapshot():
    """Content of every file in a folder, for 'exactly as before' (but the lock file)."""

    def read(folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".lock"
        }

    return read

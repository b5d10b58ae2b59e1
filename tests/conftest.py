"""Shared by all tests: toy worlds taught once a session, and no network ever."""

import atexit
import os
import shutil
import signal
import tempfile

# Two test processes with two threads each would fight over two cores, and tiny models gain
# nothing from threads. Set before torch is imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# Help and tables fold at the width of the machine that runs the tests, unless told otherwise.
os.environ.pop("COLUMNS", None)

from pathlib import Path

import pytest
from hypothesis import settings
from processes import Processes

import unwrite
from unwrite.testing import World, toy_world

# A busy machine is no failure: no example has a time limit.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

# Commands sweep what killed ones left in the folder for temporary files; a test process that looks
# for such things has a folder of its own beside those that run with it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="unwrite-tests-")
    atexit.register(shutil.rmtree, os.environ["TMPDIR"], ignore_errors=True)

# A shell starts background jobs deaf to Ctrl-C; tests of it run there, too.
signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture
def page():
    """A page of the machine's own Chromium; what went wrong in it is in ``page.faults``."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if found is None:
        pytest.skip("there is no Chromium on this machine")
    faults: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.on("console", lambda message: faults.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (faults.append("a dialog"), dialog.dismiss()))
        page.faults = faults
        yield page
        browser.close()


@pytest.fixture(scope="session")
def artefacts():
    """Folder of what tests leave for people to look at: pictures of every page."""
    root = Path(__file__).parent.parent
    folder = Path(os.environ.get("UNWRITE_ARTEFACTS", root / "build" / "pictures"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The server of quick processes."""
    return Processes(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def original(worlds, tmp_path_factory):
    """A folder with a home of one update, and a file of edits for the next; to be copied."""
    folder = tmp_path_factory.mktemp("original")
    home = unwrite.open(folder / "home", base=worlds().folder)
    home.update(worlds().edits[:2], unwrite.FullFT(epochs=1, until="epochs", lr=1e-3))
    unwrite.write_edits(folder / "edits.jsonl", worlds().edits[10:12])
    return folder


@pytest.fixture
def place(original, tmp_path):
    """A copy of it, to be harmed."""
    return shutil.copytree(original, tmp_path, dirs_exist_ok=True)

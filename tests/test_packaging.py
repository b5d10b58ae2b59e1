"""What is built can be installed, and holds everything that is needed and nothing else."""

import os
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib import util
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not util.find_spec("hatchling"), reason="only with the extra 'test'"),
]
ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
JUNK = ("__pycache__", ".pyc", ".so", ".DS_Store", ".egg-info", ".pytest_cache", "/.git/", "site/")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the sdist; the wheel is made of the sdist alone, as an index would."""
    folder = tmp_path_factory.mktemp("dist")

    def build(target, place):
        words = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
        done = subprocess.run(
            words, cwd=place, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr
        (made,) = folder.glob("*.tar.gz" if target == "sdist" else "*.whl")
        return made

    sdist = build("sdist", ROOT)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return build("wheel", source), sdist


def test_the_wheel_holds_every_file_of_the_package(built):
    wheel, _ = built
    package = ROOT / "src" / "unwrite"
    wanted = {
        f"unwrite/{file.relative_to(package).as_posix()}"
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (record,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        points = archive.read(f"{record}/entry_points.txt").decode()
        metadata = archive.read(f"{record}/METADATA").decode()
    assert {"unwrite/py.typed", "unwrite/templates/home.html.jinja"} <= wanted
    assert {name for name in names if not name.startswith(record)} == wanted
    assert points.split() == ["[console_scripts]", "unwrite", "=", "unwrite.cli:main"]
    assert f"Version: {PROJECT['version']}" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    for extra in PROJECT["optional-dependencies"]:
        assert f"Provides-Extra: {extra}" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_can_be_worked_with_and_holds_no_junk(built):
    _, sdist = built
    assert sdist.stat().st_size < 3_000_000
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    names = [member.name.partition("/")[2] for member in members]
    assert all(member.isfile() for member in members)
    assert not [name for name in names for junk in JUNK if junk in f"/{name}"]
    wanted = {"pyproject.toml", "Makefile", "constraints.txt", "LICENSE", "README.md", "mkdocs.yml"}
    assert wanted <= set(names)
    folders = {name.partition("/")[0] for name in names if "/" in name}
    assert folders == {"src", "tests", "docs", "examples", "benchmarks"}


def test_the_installed_wheel_runs(built, tmp_path):
    """In an environment of its own, beside the dependencies of this one."""
    wheel, _ = built
    venv.create(tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    words = ("-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    subprocess.run([sys.executable, *words], check=True, timeout=300, capture_output=True)
    elsewhere = [path for path in sys.path if path.endswith("site-packages")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(elsewhere)}

    def output(*command):
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = output(str(python), "-c", "import unwrite; print(unwrite.__file__)")
    assert Path(where.strip()).is_relative_to(tmp_path / "env")
    assert "update" in output(str(tmp_path / "env" / "bin" / "unwrite"), "--help")
    assert '"full-ft"' in output(str(tmp_path / "env" / "bin" / "unwrite"), "methods", "--json")
    code = "import unwrite; print(len(unwrite.read_edits('atlas')))"
    assert int(output(str(python), "-c", code)) > 300

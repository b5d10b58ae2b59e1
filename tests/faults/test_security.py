"""What this package never does, read from its source; and doors that stay shut."""

import ast
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

import unwrite
from unwrite.errors import UnwriteError
from unwrite.forgetting import ForgettingMatrix

PACKAGE = Path(unwrite.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
# Each of these runs or builds what a text says. (``model.eval()`` is a method and no matter.)
RUNNERS = {"eval", "exec", "compile", "__import__", "execfile"}
SHELLS = {"os.system", "os.popen", "torch.load", "yaml.load", "pd.read_pickle"}
NETWORK = {"urllib", "requests", "http", "httpx", "ftplib", "smtplib", "aiohttp", "socket"}
MAY_SPEAK = {"serve.py": {"socket"}}  # it listens; nothing connects
FETCHERS = {
    "huggingface_hub": {"pretrained.py", "hub.py"},
    "datasets": {"moments.py", "ability.py", "hub.py"},
}


def named(node):
    """``a.b.c`` of a call's function, as text."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([*([node.id] if isinstance(node, ast.Name) else ["?"]), *reversed(parts)])


def faults(source):
    """Everything in a source text that must not be there."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [one.name for one in node.names if one.name.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLERS:
            found.append(node.module)
        elif isinstance(node, ast.Call):
            name = named(node.func)
            given = {one.arg: one.value for one in node.keywords}
            if name in RUNNERS or name in SHELLS:
                found.append(name)
            for word, bad in (("shell", True), ("allow_pickle", True), ("weights_only", False)):
                value = given.get(word)
                if value is not None and not (
                    isinstance(value, ast.Constant) and value.value is not bad
                ):
                    found.append(f"{name}({word}=)")
            if name in ("np.load", "numpy.load") and "allow_pickle" not in given:
                found.append(f"{name} without allow_pickle=False")
            if name == "tempfile.mktemp":
                found.append(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_here_unpickles_evaluates_or_starts_a_shell(path):
    assert faults(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "eval('1')",
        "import torch\ntorch.load('x')",
        "import numpy as np\nnp.load('x')",
        "np.load('x', allow_pickle=flag)",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "os.system('ls')",
        "tempfile.mktemp()",
    ],
)
def test_the_scan_finds_each_of_them(source):
    assert faults(source)


def test_remote_code_is_trusted_nowhere_by_itself():
    """Every default is False, and no call says True."""
    seen = 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                seen += 1
                assert not isinstance(node.value, ast.Constant), path
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                plain = node.args.args[len(node.args.args) - len(node.args.defaults) :]
                defaults = [
                    *zip(plain, node.args.defaults, strict=True),
                    *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True),
                ]
                for argument, default in defaults:
                    if argument.arg == "trust_remote_code" and default is not None:
                        seen += 1
                        assert isinstance(default, ast.Constant) and default.value is False, path
    assert seen > 30


def test_what_may_speak_to_the_network_is_known():
    for path in SOURCES:
        names = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {one.name.split(".")[0] for one in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add((node.module or "").split(".")[0])
        assert names & NETWORK <= MAY_SPEAK.get(path.name, set()), path
        for fetcher, places in FETCHERS.items():
            assert fetcher not in names or path.name in places, path


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", ".x.safetensors"]
)
def test_an_index_leads_nowhere_else(world, shard):
    index = {"weight_map": {"model.norm.weight": shard}}
    (world.folder / "model.safetensors").rename(world.folder / "secret.safetensors")
    (world.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnwriteError):
        unwrite.load(world.folder)
    with pytest.raises(UnwriteError):
        unwrite.Weights.from_folder(world.folder)


class Bomb:
    """Unpickled, it would leave a mark."""

    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


def test_a_pickled_array_in_a_matrix_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ForgettingMatrix(np.eye(2), ("a", "b"), ("x", "y")).save(tmp_path / "matrix")
    file = tmp_path / "matrix" / "matrix.npz"
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb()], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(file) as packed:
        members = {name: packed.read(name) for name in packed.namelist()}
    with zipfile.ZipFile(file, "w") as written:
        for name, content in members.items():
            written.writestr(name, buffer.getvalue() if name == "values.npy" else content)
    with pytest.raises(UnwriteError, match="not a forgetting matrix"):
        ForgettingMatrix.load(tmp_path / "matrix")
    assert not (tmp_path / "unpickled").exists()

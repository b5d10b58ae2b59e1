"""Files that are either whole or not there: atomic writes, hashes, one writer per folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unwrite.errors import DamagedFile, HomeBusy, UnwriteError

BLOCK = 1 << 22  # bytes read at a time when hashing; large enough that Python's overhead vanishes


def user_path(text: str | Path) -> Path:
    """A path as a user wrote it, with ``~`` for home folders (of users that exist)."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def sync_folder(folder: Path) -> None:
    """Make renames and new names inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file: readers see the old content or the new, never a part, even after a crash.

    The new content goes to a temporary file beside ``path`` (same file system, so the rename is
    atomic), is flushed to disk, and takes the name.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    # Named after this process, so that what a killed one left can be told from work in progress.
    prefix = f".{path.name}.{os.getpid()}-"
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=prefix)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes 0600, which a colleague could not read
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a file written by ``write_json``. Raises ``DamagedFile`` if it is missing or broken."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise DamagedFile(f"{path} is missing.") from None
    except (ValueError, RecursionError):
        raise DamagedFile(f"{path} is damaged: it is not JSON.") from None


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    write_atomically(path, "".join(line + "\n" for line in lines))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a file written by ``write_jsonl``. Raises ``DamagedFile`` naming what is broken."""
    try:
        lines = path.read_text("utf-8").split("\n")
    except FileNotFoundError:
        raise DamagedFile(f"{path} is missing.") from None
    except UnicodeDecodeError:
        raise DamagedFile(f"{path} is damaged: it is not UTF-8.") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if line:
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):
                raise DamagedFile(f"{path}, line {number} is damaged: it is not JSON.") from None
    return rows


def sha256_bytes(data: bytes) -> str:
    """Hexadecimal SHA-256 of bytes in memory."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks (holds ``BLOCK`` bytes)."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def check_inside(home: Path, file: Path) -> None:
    """Refuse (``DamagedFile``) what is reached through a link that leads out of the home."""
    if not file.resolve().is_relative_to(home.resolve()):
        raise DamagedFile(
            f"{file} leads out of the home by a link, which is not followed. Put the file itself "
            "there."
        )


def check_all_inside(home: Path, folder: Path) -> None:
    """``check_inside`` for everything that lies in a folder of a home."""
    for file in folder.iterdir():
        check_inside(home, file)


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder's write lock; raise ``HomeBusy`` at once if another process holds it.

    The lock belongs to the process, not to the file: it is gone when the process is, however it
    ended, so a crash never leaves a home locked.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise HomeBusy(
            f"Another process is changing {folder}. Wait until it is done, then run this again."
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def speaking_of_disk(action: str) -> Iterator[None]:
    """Turn a full disk, a read-only folder or a missing permission into a sentence for people."""
    import errno

    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full; free some space",
            errno.EDQUOT: "your disk quota is used up; free some space",
            errno.EROFS: "the file system is read-only; use another folder",
            errno.EACCES: "permission is denied; check who owns the folder",
            errno.EPERM: "permission is denied; check who owns the folder",
            errno.ENOTDIR: "a part of the path is a file; name another folder",
            errno.EEXIST: "a part of the path is a file; name another folder",
            errno.ENAMETOOLONG: "the name is too long; name another folder",
            errno.EIO: "the disk reports an input/output error; check it",
        }
        if error.errno not in reasons:
            raise
        where = f" ({error.filename})" if error.filename else ""
        raise UnwriteError(
            f"Could not {action}{where}: {reasons[error.errno]} and run this again. "
            "Nothing was changed."
        ) from error


def readable_size(count: float) -> str:
    """Bytes for people: ``538 MB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return (
                f"{count:.1f} {unit}" if count < 10 and unit != "bytes" else f"{count:.0f} {unit}"
            )
        count /= 1000
    return f"{count:.1f} TB"

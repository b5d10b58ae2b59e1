"""Writing a state out of its home: an ordinary Hugging Face folder, or the changes alone.

The folder appears whole or not at all. Streams: holds a few tensors, whatever the model's size.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from unwrite.base import Base
from unwrite.delta import Delta, compose
from unwrite.errors import HomeError
from unwrite.files import speaking_of_disk, sync_folder
from unwrite.progress import Reporter
from unwrite.weights import Weights, save_weights

KINDS = ("model", "delta", "adapter")


def export_state(
    target: Path,
    kind: str,
    base: Base,
    source: Path,
    live: Sequence[str],
    deltas: Sequence[Delta],
    progress: Reporter,
) -> Path:
    """Write ``base + deltas`` to the new folder ``target`` as one of ``KINDS``.

    ``source``: the base's folder; ``live``: ids of the deltas. Raises ``HomeError`` when the target
    is not empty, or for an adapter when a change is not of low rank.
    """
    if kind not in KINDS:
        raise HomeError(f"A state is exported as {', '.join(KINDS)}; {kind!r} is none of them.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise HomeError(f"{target} exists and is not empty; export to a new folder.")
    if kind == "adapter":
        _refuse_adapter(live, deltas)

    def write(folder: Path) -> None:
        if kind == "delta":
            total = sum(deltas[1:], start=deltas[0]) if deltas else Delta.nothing()
            provenance = {"base": base.fingerprint, "base_name": base.name, "updates": list(live)}
            total.save(folder, provenance=provenance)
        else:
            _write_model(folder, base, source, deltas, progress)

    with speaking_of_disk(f"export to {target}"):
        _whole_or_not_at_all(target, write)
    return target


def _write_model(
    folder: Path, base: Base, source: Path, deltas: Sequence[Delta], progress: Reporter
) -> None:
    for name in base.files:
        if not name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copyfile(source / name, folder / name)
    with (
        Weights.from_folder(source) as weights,
        progress.stage("writing tensors", len(weights)) as advance,
    ):

        def read(name: str) -> torch.Tensor:
            advance(1, "")
            return compose(weights, deltas, base.aliases.get(name, name))

        save_weights(folder, weights, read)


def _whole_or_not_at_all(target: Path, write: Callable[[Path], None]) -> None:
    """Fill a scratch folder beside ``target`` and give it that name when it is complete."""
    target = target.resolve()  # a link to an empty folder is filled where it leads
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.parent / f".{target.name}.{os.getpid()}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        write(scratch)
        for file in scratch.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        sync_folder(scratch)
        if target.exists():
            target.rmdir()
        os.replace(scratch, target)
        sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _refuse_adapter(live: Sequence[str], deltas: Sequence[Delta]) -> None:
    dense = [
        update
        for update, delta in zip(live, deltas, strict=True)
        if delta.summary().encoding != "low-rank"
    ]
    if dense:
        reason = f"the changes of {', '.join(dense)} are not of low rank"
    elif not live:
        reason = "no update is live, so there is nothing to put into one"
    else:
        reason = "no method of this version of Unwrite makes adapters"
    raise HomeError(f"This state cannot be written as an adapter: {reason}. Use --as model.")

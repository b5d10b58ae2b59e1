"""Writing a state out of its home: an ordinary Hugging Face folder, or the changes alone.

A model and an adapter come with a model card (``card``). As an adapter, the changes are one LoRA
adapter of peft, which puts them on the base at run time; so all of them must be of low rank, and of
matrices that peft knows how to adapt.

The folder appears whole or not at all. Streams: holds a few tensors, whatever the model's size.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from unwrite import card, scratch
from unwrite.base import Base
from unwrite.change import LowRank
from unwrite.delta import Delta, compose
from unwrite.errors import HomeError
from unwrite.files import speaking_of_disk, sync_folder
from unwrite.ledger import Entry
from unwrite.model import Skeleton
from unwrite.pretrained import Source
from unwrite.progress import Bytes, Reporter
from unwrite.tensorfile import TensorFileWriter, header_room
from unwrite.weights import Weights, save_weights

KINDS = ("model", "delta", "adapter")
# The kinds of modules that are certain to be a projection, which peft can adapt.
PROJECTIONS = frozenset({"q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "head"})


def export_state(
    target: Path,
    kind: str,
    base: Base,
    source: Source,
    entries: Sequence[Entry],
    live: Sequence[str],
    deltas: Sequence[Delta],
    progress: Reporter,
    *,
    trust_remote_code: bool = False,
    home: Path | None = None,
) -> Path:
    """Write ``base + deltas`` to the new folder ``target`` as one of ``KINDS``.

    ``source``: where the base is; ``entries``: the ledger, told in the model card (none: no card);
    ``live``: ids of the deltas; ``home``: a folder that notes where the scratch is (see
    ``scratch``). Raises ``HomeError`` when the target is not empty, or for an
    adapter when a change is not one that an adapter can hold.
    """
    if kind not in KINDS:
        raise HomeError(f"A state is exported as {', '.join(KINDS)}; {kind!r} is none of them.")
    _check_free(target)
    write: Callable[[Path], None]
    if kind == "adapter":
        changes = _low_rank_sum(live, deltas)
        skeleton = Skeleton.of(source, trust_remote_code=trust_remote_code)
        _check_targets(changes, skeleton)
        write = partial(_write_adapter, source=source, skeleton=skeleton, changes=changes)
    elif kind == "delta":
        write = partial(_write_delta, base=base, live=live, deltas=deltas)
    else:
        write = partial(_write_model, base=base, source=source, deltas=deltas, progress=progress)
    if kind != "delta" and entries:
        now = entries[-1].get("fingerprint", base.fingerprint)
        write = _with_card(write, card.card(kind, base, source, entries, live, now), source)
    with speaking_of_disk(f"export to {target}"):
        _whole_or_not_at_all(target, home, write)
    return target


def _with_card(write: Callable[[Path], None], text: str, source: Source) -> Callable[[Path], None]:
    """``write``, then the model card and what the base came with about its licence."""

    def written(folder: Path) -> None:
        write(folder)
        (folder / card.NAME).write_text(text, "utf-8")
        for file in card.licence_files(source.folder):
            shutil.copyfile(file, folder / file.name)

    return written


def _write_delta(folder: Path, base: Base, live: Sequence[str], deltas: Sequence[Delta]) -> None:
    total = sum(deltas[1:], start=deltas[0]) if deltas else Delta.nothing()
    provenance = {"base": base.fingerprint, "base_name": base.name, "updates": list(live)}
    total.save(folder, provenance=provenance)


def _write_model(
    folder: Path, base: Base, source: Source, deltas: Sequence[Delta], progress: Reporter
) -> None:
    for name in base.files:
        if not name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copyfile(source.folder / name, folder / name)
    with (
        Weights.from_folder(source.folder) as weights,
        progress.stage("writing tensors", Bytes(weights.bytes())) as advance,
    ):

        def read(name: str) -> torch.Tensor:
            advance(weights.bytes(name), "")
            return compose(weights, deltas, base.aliases.get(name, name))

        save_weights(folder, weights, read)


def _check_free(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise HomeError(f"{target} exists and is not empty; export to a new folder.")


def _whole_or_not_at_all(target: Path, home: Path | None, write: Callable[[Path], None]) -> None:
    """Fill a scratch folder beside ``target`` and give it that name when it is complete."""
    target = target.resolve()  # a link to an empty folder is filled where it leads
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch.beside(target, home) as folder:
        write(folder)
        for file in folder.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        sync_folder(folder)
        _check_free(target)  # another export may have been faster
        if target.exists():
            target.rmdir()
        os.replace(folder, target)
        sync_folder(target.parent)


# Adapters -----------------------------------------------------------------------------------------


def _low_rank_sum(live: Sequence[str], deltas: Sequence[Delta]) -> dict[str, LowRank]:
    """All changes in one, tensor by tensor; the ranks add up. Holds their factors."""
    dense = [
        update
        for update, delta in zip(live, deltas, strict=True)
        if delta.summary().encoding not in ("low-rank", "nothing")
    ]
    if dense:
        raise _no_adapter(f"the changes of {', '.join(dense)} are not of low rank")
    total = sum(deltas, start=Delta.nothing())
    summed = ((name, total[name]) for name in total)
    changes = {name: one for name, one in summed if isinstance(one, LowRank) and one.rank}
    if not changes:
        raise _no_adapter("no live update changes anything, so there is nothing to put into one")
    return changes


def _check_targets(changes: Mapping[str, LowRank], skeleton: Skeleton) -> None:
    """Refuse changes of anything but the weight of a projection."""
    anatomy = skeleton.anatomy
    for file in changes:
        name = skeleton.names[file]
        kind = anatomy.kind(name)
        if anatomy.tied and kind in ("embedding", "head"):
            raise _no_adapter(f"the tensor {file!r} is both the embedding and the head")
        if kind not in PROJECTIONS or not name.endswith(".weight"):
            raise _no_adapter(f"the tensor {file!r} is not the weight of a known projection")


def _no_adapter(reason: str) -> HomeError:
    return HomeError(f"This state cannot be written as an adapter: {reason}. Use --as model.")


def _write_adapter(
    folder: Path, source: Source, skeleton: Skeleton, changes: Mapping[str, LowRank]
) -> None:
    """``adapter_config.json`` and ``adapter_model.safetensors`` as peft names and reads them.

    peft adds ``alpha / r * lora_B (lora_A x)`` to what a module gives. With alpha = r that is the
    product of the factors alone, which is the change; its scale is folded into ``lora_B``.
    """
    from peft import LoraConfig
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    modules = {file: skeleton.names[file].removesuffix(".weight") for file in changes}
    transposed = {file: skeleton.anatomy.transposed(module) for file, module in modules.items()}
    rank = Counter(change.rank for change in changes.values()).most_common(1)[0][0]
    others = {  # by patterns that fit one module each
        f"^{re.escape(modules[file])}": change.rank
        for file, change in changes.items()
        if change.rank != rank
    }
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=others,
        fan_in_fan_out=all(transposed.values()),
        task_type="CAUSAL_LM",
        base_model_name_or_path=source.name,
        revision=source.revision if source.kind == "hub" else None,
        inference_mode=True,
    )
    config.target_modules = sorted(modules.values())  # given above, it would become a set
    config.save_pretrained(str(folder))

    names = {
        file: [f"base_model.model.{module}.lora_{end}.weight" for end in "AB"]
        for file, module in modules.items()
    }
    metadata = {"format": "pt"}
    room = header_room(chain.from_iterable(names.values()), metadata)
    with TensorFileWriter(folder / SAFETENSORS_WEIGHTS_NAME, room, metadata=metadata) as written:
        for file, change in changes.items():
            factors = _factors(change, transposed[file])
            for name, factor in zip(names[file], factors, strict=True):
                written.add(name, factor)


def _factors(change: LowRank, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``lora_A`` (rank, in) and ``lora_B`` (out, rank) of a change in the orientation of its file:
    ``b @ a`` is (out, in), or (in, out) where the module stores its weight transposed."""
    down, up = (change.b.T, change.a.T) if transposed else (change.a, change.b)
    return down, (up.double() * change.scale).float()

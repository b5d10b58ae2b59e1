"""One command in several processes: the first leads, the others train along.

``accelerate launch`` (or torchrun) starts the same command in every process. The first one runs it
as if it were alone: it alone opens homes, asks questions, writes files and speaks. The others
*follow*: they wait until a model is to be trained, are told the function and its arguments, and
run it together with the first; what they find is thrown away. So every verb runs under several
processes as it does under one, and nothing but the first process can change a home.

If one process fails and the others do not, the whole command ends, with that one's sentence; what
fails in all of them alike (a loss that is no number) is an error like any other. Messages go
through the store that the launcher keeps, tensors through the process group: NCCL between GPUs,
gloo between CPUs.
"""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

from unwrite.errors import BadSetting, ProcessFailed, UnwriteError
from unwrite.model import Model
from unwrite.pretrained import Source

PATIENCE = "UNWRITE_PATIENCE"  # seconds in which processes that fail alike have all failed
LAST_WORDS = 5.0  # seconds for processes that may be gone
POLL = 0.02  # seconds between two looks for a message
_LED, _HEARD = "unwrite/led", "unwrite/heard"
_END = b"end"
_GOOD = "good"

Made = TypeVar("Made")


@dataclass(frozen=True)
class _Order:
    """What the first process asks of the others."""

    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    source: Source
    device: str  # kind of device
    trust_remote_code: bool


# ---- what training asks --------------------------------------------------------------------------


def count() -> int:
    """How many processes work together (1 unless there is a process group)."""
    return distributed.get_world_size() if _in_group() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if _in_group() else 0


def shards() -> bool:
    """Whether the launcher was told to shard what is trained (``use_fsdp``)."""
    return count() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def local_device(kind: str) -> torch.device:
    """This process's device of a kind."""
    if kind == "cuda":
        return torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(kind)


def summed(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in every process."""
    if count() > 1:
        distributed.all_reduce(values)
    return values


@torch.no_grad()
def same(tensors: Iterable[torch.Tensor]) -> None:
    """Give every process the values that the first one has; in it nothing is written."""
    for tensor in tensors:
        whole = tensor.contiguous()  # most are
        distributed.broadcast(whole, src=0)
        if whole is not tensor and rank() > 0:
            tensor.copy_(whole)


def told(make: Callable[[], Made]) -> Made:
    """What ``make`` gives in the first process, in every process."""
    if count() == 1:
        return make()
    box: list[Any] = [make() if rank() == 0 else None]
    distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    made: Made = box[0]
    return made


@contextlib.contextmanager
def called_in(model: Model, function: Callable[..., Any], /, **arguments: Any) -> Iterator[None]:
    """For the length of the block the other processes, if there are any that follow, run
    ``function(their model, **arguments)``, which must do with them what the block does here.

    Raises ``BadSetting`` for arguments that cannot be sent and for what cannot train here, and
    ``ProcessFailed`` when another process fails alone or is lost: then no more can be trained.
    """
    if not _leads():
        yield
        return
    _refuse_deepspeed()
    store = _store()
    trusted = type(model.network).__module__.startswith("transformers_modules")
    order = _Order(function, arguments, model.source, model.device.type, trusted)
    _check_sendable(order)
    number = store.add("unwrite/orders", 1)
    store.set(_key("order", number), b"come")
    distributed.broadcast_object_list([order], src=0, device=torch.device("cpu"))
    try:
        yield
    except BaseException as error:
        store.set(_key("outcome", number, 0), _sentence(error))
        _settle(store, number, error)
        raise
    store.set(_key("outcome", number, 0), _GOOD)
    _settle(store, number, None)


# ---- leading and following -----------------------------------------------------------------------


def run(command: Callable[[], None]) -> None:
    """Run ``command`` in the first of the processes that a launcher started, and follow it in the
    others. Returns, or raises ``SystemExit``, when the command has ended."""
    _join()
    store = _store()
    if rank() != 0:
        _follow(store)
        return
    store.set(_LED, b"yes")
    started = count()
    try:
        command()
    finally:
        store.set(_key("order", store.add("unwrite/orders", 1)), _END)
        # This process may keep the store that the others read, so it leaves last.
        patience = LAST_WORDS if store.check([_HEARD]) else _patience()
        _wait(store, [_key("left", other) for other in range(1, started)], patience)


def _follow(store: Any) -> None:
    """Carry out orders until there are no more."""
    models: dict[Source, Model] = {}
    number = 0
    while True:
        number += 1
        try:
            _wait(store, [_key("order", number)])
            if store.get(_key("order", number)) == _END:
                store.set(_key("left", rank()), b"yes")
                return
            box: list[Any] = [None]
            distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
            error = _carried_out(box[0], models)
            said = _GOOD if error is None else _sentence(error)
            store.set(_key("outcome", number, rank()), said)
            if error is not None and not _wait(store, [_key("outcome", number, 0)], _patience()):
                # The first process waits for a message that will not come: let it know.
                distributed.destroy_process_group()
                _wait(store, [_HEARD], _patience())
                raise SystemExit(2)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except distributed.DistNetworkError:
            raise SystemExit(2) from None  # the first process is gone, and its store with it


def _carried_out(order: _Order, models: dict[Source, Model]) -> Exception | None:
    try:
        if order.source not in models:
            models.clear()
            models[order.source] = _model(order)
        order.function(models[order.source], **order.arguments)
    except Exception as error:  # noqa: BLE001 -- it is told to the first process
        return error
    return None


def _model(order: _Order) -> Model:
    """A model to train along with: its weights come from the first process."""
    if shards():
        return Model.empty(order.source, trust_remote_code=order.trust_remote_code)
    return Model.load(
        order.source,
        trust_remote_code=order.trust_remote_code,
        device=local_device(order.device),
    )


def _settle(store: Any, number: int, error: BaseException | None) -> None:
    """Wait until all have ended an order. Raises ``ProcessFailed`` unless they ended alike."""
    others = [_key("outcome", number, other) for other in range(1, count())]
    all_said = _wait(store, others, _patience())
    said = [store.get(key).decode() if store.check([key]) else "" for key in others]
    failed = [(place + 1, one) for place, one in enumerate(said) if one not in ("", _GOOD)]
    mine = _GOOD if error is None else _sentence(error)
    if all_said and all(one == mine for one in said):
        return
    if isinstance(error, KeyboardInterrupt):
        return
    store.set(_HEARD, b"yes")
    distributed.destroy_process_group()  # whoever still waits for a message learns of it
    if failed:
        place, sentence = failed[0]
        raise ProcessFailed(f"Process {place} failed; nothing was kept. {sentence}") from error
    if error is not None and not isinstance(error, RuntimeError):
        return  # this process failed alone: its own error is the one to read
    # What a process group raises when a message does not come is a RuntimeError.
    reason = "" if error is None else f" {str(error).strip().splitlines()[0][:200]}"
    raise ProcessFailed(
        "Another process was lost (killed, perhaps for want of memory); nothing was kept. Start "
        f"the command again.{reason}"
    ) from error


# ---- small things --------------------------------------------------------------------------------


def _in_group() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _leads() -> bool:
    """Whether this is the first process and the others follow it (and do not run a program of
    their own, as under somebody's own training script)."""
    return count() > 1 and rank() == 0 and _store().check([_LED])


def _join() -> None:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_device("cuda"))
    if not _in_group():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")


def _store() -> Any:
    return distributed.distributed_c10d._get_default_store()


def _patience() -> float:
    return float(os.environ.get(PATIENCE, "20"))


def _wait(store: Any, keys: list[str], seconds: float = float("inf")) -> bool:
    """Whether all keys are there within so many seconds."""
    until = time.monotonic() + seconds
    while not store.check(keys):  # its own waiting would complain aloud now and then
        if time.monotonic() > until:
            return False
        time.sleep(POLL)
    return True


def _key(kind: str, *numbers: int) -> str:
    return "/".join(("unwrite", kind, *map(str, numbers)))


def _sentence(error: BaseException) -> str:
    return str(error) if isinstance(error, UnwriteError) else f"{type(error).__name__}: {error}"


def _check_sendable(order: _Order) -> None:
    try:
        torch.save(order, io.BytesIO())
    except Exception as error:  # noqa: BLE001 -- anything may refuse to be written down
        raise BadSetting(
            "This method trains with a function that cannot be sent to the other processes "
            f"({error}). Define it at the top of a module, or use one process."
        ) from None


def _refuse_deepspeed() -> None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise BadSetting(
            "Unwrite does not train under DeepSpeed: its engine keeps weights and gradients to "
            "itself, and a change is read from them. Use FSDP (use_fsdp with fsdp_version 2), "
            "which shards the same things."
        )
    if shards() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise BadSetting("Unwrite shards with FSDP2. Set fsdp_version: 2 in the launch file.")

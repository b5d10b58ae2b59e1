"""What surrounds every verb of the command line: where it talks, and how it ends."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unwrite.console import Terminal
from unwrite.errors import BadSetting, UnwriteError, is_out_of_memory
from unwrite.files import speaking_of_disk

if TYPE_CHECKING:
    from unwrite.executors import Executor

ExecutorOption = Annotated[
    str,
    typer.Option(
        "--executor",
        help="Where to compute: local, or ray; ray:cpus=4:gpus=1:workers=8 says what a worker "
        "needs and how many there may be.",
        metavar="local|ray[:KEY=VALUE...]",
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option("--address", help="The Ray cluster (default: this machine alone)."),
]
COMMITTED = "Nothing is half-done; 'unwrite history' shows what is committed."
RESUMABLE = "What is finished is kept; the same command goes on from there."


@contextlib.contextmanager
def verb(as_json: bool, interrupted: str = COMMITTED) -> Iterator[Terminal]:
    """Errors for people end with their sentence and exit code, without a traceback."""
    out = Terminal(as_json)
    try:
        with speaking_of_disk("finish this"):
            out.open()
            yield out
    except UnwriteError as error:
        out.fail(str(error))
        out.result({"error": str(error)})
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        _deafen()
        out.fail(f"Interrupted. {interrupted}")
        raise typer.Exit(130) from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = "The memory of this machine ran out; nothing was changed. Use a machine with more."
        out.fail(said)
        out.result({"error": said})
        raise typer.Exit(2) from None
    finally:
        out.close()


def terminate(_signal: int, _frame: Any) -> None:
    """What Ctrl-C and SIGTERM do to this command line: unwind, so that every clean-up runs."""
    raise KeyboardInterrupt


def _deafen() -> None:
    """This process ends now, and a second Ctrl-C must not make a traceback of that. (In a program
    that has other plans for signals, nothing is changed.)"""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is terminate:
            signal.signal(number, signal.SIG_IGN)


def executor(text: str, address: str | None) -> Executor | None:
    """The executor that the options name; None computes here. Raises ``BadSetting``."""
    name, *settings = text.split(":")
    if name == "local":
        if address is not None or settings:
            raise BadSetting("--address and settings of workers belong to --executor ray.")
        return None
    if name != "ray":
        raise BadSetting(f"There is no executor {name!r}. Executors: local, ray.")
    from unwrite.executors import RayExecutor
    from unwrite.methods import build_fields

    given = pairs(settings, "--executor")
    if address is not None:
        given["address"] = address
    found: Executor = build_fields(RayExecutor, given)
    return found


def words(text: str) -> list[str]:
    """The words of a list with commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def pairs(settings: list[str], option: str = "--set") -> dict[str, str]:
    """KEY=VALUE words as a dictionary. Raises ``BadSetting`` for any other word."""
    found = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise BadSetting(f"{option} takes KEY=VALUE, not {setting!r}.")
        if key in found:
            raise BadSetting(f"{option} {key} is given twice.")
        found[key] = value
    return found

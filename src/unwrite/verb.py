"""What surrounds every verb of the command line: where it talks, and how it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from unwrite.console import Terminal
from unwrite.errors import BadSetting, UnwriteError
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
            yield out
    except UnwriteError as error:
        out.fail(str(error))
        out.result({"error": str(error)})
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        out.fail(f"Interrupted. {interrupted}")
        raise typer.Exit(130) from None
    except MemoryError:
        out.fail("The memory of this machine ran out; nothing was changed.")
        raise typer.Exit(2) from None


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

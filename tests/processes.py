"""Real processes without the wait: a server imports everything once and forks for every command.

A fork has its own memory, locks and signals, so it can be killed like any process, and it starts in
milliseconds instead of seconds. Run as a script, this file is the server.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

# The calls by which a program changes what is on disk (apart from the content of open files).
STEPS = ("open", "replace", "mkdir", "unlink", "rmdir")

IMPORTED = (
    "transformers.conversion_mapping",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.tokenization_utils_tokenizers",
    "transformers.cache_utils",
    "unwrite.cli",
    "unwrite.home",
    "unwrite.plan",
    "unwrite.home_report",
    "unwrite.methods.full_ft",
)


@functools.cache
def server() -> subprocess.Popen:
    """The one server of a test session."""
    started = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "TORCH_CPP_LOG_LEVEL": "ERROR"},
    )

    def stop() -> None:
        started.stdin.close()
        started.wait()
        started.stdout.close()

    atexit.register(stop)
    return started


class Processes:
    """The client: starts commands and waits for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def ask(self, **order):
        server().stdin.write(json.dumps(order) + "\n")
        server().stdin.flush()
        return json.loads(server().stdout.readline())

    def start(self, *words: object, **how) -> Process:
        """Start ``unwrite WORDS``. ``die_at=K``: killed just before its K-th step on disk;
        ``count_steps``: writes their number into the file ``steps``; ``wait_in=NAME``: creates the
        file ``arrived`` when that function is called, and waits; ``raise_in=NAME``: that function
        raises an error; ``environment``: further variables; ``script=NAME``: ``main(WORDS)`` of a
        module beside this one is run instead."""
        self.count += 1
        place = self.folder / str(self.count)
        place.mkdir()
        return Process(
            self, place, self.ask(words=[str(w) for w in words], place=str(place), **how)
        )

    def run(self, *words: object, **how) -> Process:
        """Start and wait."""
        process = self.start(*words, **how)
        process.wait()
        return process


class Process:
    """One command: ``code`` is its exit code, negative if a signal ended it."""

    def __init__(self, processes: Processes, place: Path, pid: int) -> None:
        self.processes, self.place, self.pid = processes, place, pid
        self.code: int | None = None

    def wait(self, timeout: float = 600.0) -> int:
        until = time.monotonic() + timeout
        while self.code is None:
            self.code = self.processes.ask(poll=self.pid)
            assert time.monotonic() < until, "it goes on and on"
            time.sleep(0.005)
        return self.code

    def send(self, number: int) -> int:
        os.kill(self.pid, number)
        return self.wait()

    def arrived(self, timeout: float = 600.0) -> None:
        until = time.monotonic() + timeout
        while not (self.place / "arrived").exists():
            assert time.monotonic() < until and self.processes.ask(poll=self.pid) is None, self.err
            time.sleep(0.005)

    def go_on(self) -> int:
        (self.place / "go on").touch()
        return self.wait()

    @property
    def out(self) -> str:
        return (self.place / "out").read_text("utf-8")

    @property
    def err(self) -> str:
        return (self.place / "err").read_text("utf-8")


# ---- the server ----------------------------------------------------------------------------------


def serve() -> None:
    # A shell starts background jobs deaf to Ctrl-C; the commands tested here must hear it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        order = json.loads(line)
        if "poll" in order:
            pid, status = os.waitpid(order["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif (answer := os.fork()) == 0:
            be(order)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def be(order: dict) -> None:
    """Turn this fork into the command."""
    from unwrite.cli import main

    place = Path(order["place"])
    os.environ.update(order.get("environment", {}))
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(place / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["unwrite", *order["words"]]
    steps = [0]
    if order.get("count_steps"):
        steps = at_step(0, lambda: None)
    if "die_at" in order:
        at_step(order["die_at"], lambda: os.kill(os.getpid(), signal.SIGKILL))
    if "wait_in" in order:
        wait_in(order["wait_in"], place)
    if "raise_in" in order:
        raise_in(order["raise_in"])
    code = 1
    try:
        if "script" in order:
            importlib.import_module(order["script"]).main(*order["words"])
            code = 0
        else:
            main()
            code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 -- a fork must not go on as the server
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if order.get("count_steps"):
            (place / "steps").write_text(str(steps[0]))
        os._exit(code)


def at_step(number, do, patch=setattr) -> list[int]:
    """Call ``do`` before the step of that number (from 1); returns a list with the steps so far."""
    count = [0]

    def counted(name, real):
        def step(*arguments, **named):
            changes = name != "open" or arguments[1] & os.O_CREAT
            if changes:
                count[0] += 1
                if count[0] == number:
                    do()
            return real(*arguments, **named)

        return step

    for name in STEPS:
        patch(os, name, counted(name, getattr(os, name)))
    return count


def wait_in(name: str, place: Path) -> None:
    module_name, _, function = name.rpartition(".")
    module = importlib.import_module(module_name)
    real = getattr(module, function)

    def waiting(*arguments, **named):
        (place / "arrived").touch()
        while not (place / "go on").exists():
            time.sleep(0.005)
        return real(*arguments, **named)

    setattr(module, function, waiting)


def raise_in(name: str) -> None:
    def failing(*_arguments, **_named):
        raise OSError("out of luck")

    module_name, _, function = name.rpartition(".")
    setattr(importlib.import_module(module_name), function, failing)


if __name__ == "__main__":
    serve()

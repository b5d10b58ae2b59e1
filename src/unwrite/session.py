"""A home kept open for a person: one worker thread does all work, one job after the other.

What ``unwrite serve`` puts on a page, without anything of the web. Every method of ``Session`` may
be called from any thread and returns at once; the home and its model are touched by the worker
alone. An update that is measured waits for ``decide``, and questions are answered meanwhile, also
by the candidate. Stopping works wherever work reports its progress, so never inside a commit.

Memory: that of the home.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from unwrite import plan, requirements
from unwrite.console import SCORE_COLUMNS, score_rows
from unwrite.edits import Edit
from unwrite.errors import (
    HomeBusy,
    HomeError,
    RequirementNotMet,
    UnwriteError,
    UpdateDiscarded,
)
from unwrite.files import read_jsonl, speaking_of_disk
from unwrite.home import Home
from unwrite.knowledge import answers
from unwrite.page import plain
from unwrite.progress import Advance, AtMost, amount
from unwrite.record import Update

SENTENCES = 50  # kept of what a job says
ROWS = 200  # of a candidate's knowledge diff, failures first
ANSWER = 2000  # characters of an answer that are shown
PATIENCE = 16  # tasks that may wait for the worker

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class Stopped(UnwriteError):
    """The work was stopped by who had it done."""

    exit_code = 130


@dataclass(frozen=True)
class Order:
    """What a person wants changed, how, and on which conditions."""

    edits: Sequence[Edit]
    method: Any
    require: Sequence[str] = ()
    protect: Sequence[str] = ()
    why: str = ""

    def __post_init__(self) -> None:
        requirements.parse(self.require)  # refused now, not after a minute of planning


@dataclass
class Job:
    """One piece of work: ``running``, then for a candidate ``waiting``, in the end ``done`` (with
    ``result``), ``dropped`` (discarded or stopped) or ``failed``, these with ``error``, and with
    ``result`` where something was measured."""

    number: int
    kind: str
    state: str = "running"
    said: deque[str] = field(default_factory=lambda: deque(maxlen=SENTENCES))
    result: dict[str, Any] | None = None
    error: str | None = None

    @property
    def active(self) -> bool:
        return self.state in ("running", "waiting")


@dataclass(eq=False)
class _Stage:
    title: str
    total: int
    done: int = 0
    remark: str = ""
    started: float = field(default_factory=time.monotonic)

    def as_json(self) -> dict[str, Any]:
        share = self.done / self.total if self.total else 0.0
        passed = time.monotonic() - self.started
        left = passed * (1 - share) / share if share else None
        return {
            "title": self.title,
            "total": self.total,
            "at_most": isinstance(self.total, AtMost),
            "done": self.done,
            "amount": amount(self.done, self.total),
            "remark": plain(self.remark, 100),
            "seconds_left": left,
        }


class Progress:
    """A ``Reporter`` that can be looked at from other threads, and through which work is stopped:
    whatever reports after ``stop`` gets ``Stopped`` raised."""

    def __init__(self) -> None:
        self._stages: list[_Stage] = []
        self._stop = threading.Event()
        self.hears: Callable[[str], object] = _nobody

    @contextlib.contextmanager
    def stage(self, title: str, total: int) -> Iterator[Advance]:
        self._check()
        stage = _Stage(title, total)
        self._stages.append(stage)
        try:
            yield partial(self._advance, stage)
        finally:
            self._stages.remove(stage)

    def say(self, sentence: str) -> None:
        self._check()
        self.hears(plain(sentence, 1000))

    def stop(self) -> None:
        """Have the work that is going on end with ``Stopped`` as soon as it reports."""
        self._stop.set()

    def go_on(self) -> None:
        """Let new work go on after a ``stop``."""
        self._stop.clear()

    def as_json(self) -> list[dict[str, Any]]:
        """The stages that are going on, outermost first."""
        return [stage.as_json() for stage in list(self._stages)]

    def _advance(self, stage: _Stage, units: int, remark: str) -> None:
        self._check()
        stage.done += units
        stage.remark = remark

    def _check(self) -> None:
        if self._stop.is_set():
            raise Stopped("Stopped; the home is as it was before.")


class Session:
    """An open home with its worker. ``command`` is written down with every update."""

    def __init__(
        self, folder: Path, *, trust_remote_code: bool = False, command: str = "unwrite serve"
    ) -> None:
        """Open the home; the model is loaded when it is first asked. Raises like ``Home.open``."""
        self.progress = Progress()
        self.home = Home.open(folder, trust_remote_code=trust_remote_code, progress=self.progress)
        self.home.ledger  # noqa: B018 -- a damaged home is refused now
        self.command = command
        self.job: Job | None = None
        self._candidate: str | None = None
        self._decision: bool | None = None
        self._closed = False
        self._lock = threading.Lock()  # for what begins, ends and stops jobs
        self._tasks: queue.Queue[Callable[[], None]] = queue.Queue(PATIENCE)
        self._worker = threading.Thread(target=self._work, name="unwrite worker", daemon=True)
        self._worker.start()

    def close(self, timeout: float | None = None) -> bool:
        """Stop what is going on, discard what waits, and end the worker; whether it has ended."""
        self._closed = True
        self.progress.stop()
        with contextlib.suppress(queue.Full):  # the worker is not waiting for a task then
            self._tasks.put_nowait(lambda: None)
        self._worker.join(timeout)
        return not self._worker.is_alive()

    # ---- looking -----------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that a page needs, as JSON values: the updates (newest first) and the job. Reads the
        ledger; raises like ``Home.history``."""
        entries = self.home.history()
        job = self.job
        return {
            "head": entries[-1]["sha256"],
            "fingerprint": entries[-1].get("fingerprint", self.home.base.fingerprint),
            "updates": [
                {
                    "id": entry["id"],
                    "at": entry["at"],
                    "by": plain(entry.get("by", ""), 100),
                    "why": plain(entry.get("why", ""), 300),
                    "method": plain(entry["method"]["name"], 100),
                    "edits": entry["edits"],
                    "live": entry["live"],
                }
                for entry in reversed(entries)
                if entry["do"] == "apply"
            ],
            "job": None if job is None else self._job_as_json(job),
        }

    def _job_as_json(self, job: Job) -> dict[str, Any]:
        return {
            "number": job.number,
            "kind": job.kind,
            "state": job.state,
            "stages": self.progress.as_json() if job.state == "running" else [],
            "said": list(job.said),
            "result": job.result,
            "error": job.error,
        }

    # ---- quick work: the answer comes in a future --------------------------------------------

    def ask(
        self, prompt: str, update: str | None = None, max_new_tokens: int = 32
    ) -> Future[list[dict[str, str]]]:
        """Answers ``{label, text}``: of the present state or, with the id of an update or of the
        candidate, right before and right after it, and now where that is neither."""
        return self._quickly(partial(self._ask, prompt, update, max_new_tokens))

    def plan(self, order: Order) -> Future[dict[str, Any]]:
        """What the update would need: ``rows`` of two texts and ``warnings``."""
        return self._quickly(partial(self._plan, order))

    # ---- jobs: they are looked at in ``state`` ------------------------------------------------

    def update(self, order: Order) -> Job:
        """Begin an update; it is measured, and then waits for ``decide``."""

        def work(job: Job) -> dict[str, Any]:
            done = self.home.update(
                order.edits,
                order.method,
                require=order.require,
                protect=order.protect,
                why=order.why,
                command=self.command,
                confirm=partial(self._confirm, job),
            )
            return {**(job.result or {}), **_measured(done)}

        return self._start("update", work)

    def redo(self, update: str) -> Job:
        """Begin to apply an undone update once more (see ``Home.redo``); no decision is needed."""
        return self._start(
            "redo",
            lambda job: _measured(
                self.home.redo(update, why=f"redo of {update}", command=self.command)
            ),
        )

    def undo(self, update: str, why: str = "") -> Job:
        """Begin to undo an update."""

        def work(job: Job) -> dict[str, Any]:
            done = self.home.undo(update, why=why)
            later = [
                f"{name} was trained on top of it; its own edits are now answered right in "
                f"{100 * (score.token or 0):.0f} % of tokens."
                for name, score in done.later.items()
            ]
            at_base = done.fingerprint == self.home.base.fingerprint
            return {"id": update, "at_base": at_base, "live": list(done.live), "later": later}

        return self._start("undo", work)

    def verify(self) -> Job:
        """Begin to check the whole home; the result lists the ``problems``."""
        return self._start(
            "verify",
            lambda job: {"problems": [plain(problem) for problem in self.home.verify()]},
        )

    def decide(self, number: int, commit: bool) -> None:
        """Commit or discard the candidate of the job with this number. Raises ``HomeError`` when
        that job does not wait."""
        job = self._current(number)
        if job.state != "waiting":
            raise HomeError("There is no measured update to decide on.")

        def settle() -> None:
            if job.state == "waiting":
                self._decision = commit

        self._enqueue(settle)

    def stop(self, number: int) -> None:
        """Stop the job with this number, or discard its candidate. Raises ``HomeError`` when that
        job is over."""
        with self._lock:
            job = self._current(number)
            if job.state == "running":
                self.progress.stop()
                return
        self.decide(number, commit=False)

    # ---- the worker --------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._closed:
            self._tasks.get()()

    def _enqueue(self, task: Callable[[], None]) -> None:
        try:
            self._tasks.put_nowait(task)
        except queue.Full:
            raise HomeBusy("Too many questions are waiting already. Ask again later.") from None

    def _quickly(self, work: Callable[[], _Result]) -> Future[_Result]:
        job = self.job
        if job is not None and job.state == "running":
            raise HomeBusy(f"The model is busy with the {job.kind}. Ask again when that is done.")
        future: Future[_Result] = Future()

        def task() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                with speaking_of_disk("do this"):
                    future.set_result(work())
            except Exception as error:  # noqa: BLE001 -- whoever waits for the future gets it
                future.set_exception(error)

        self._enqueue(task)
        return future

    def _start(self, kind: str, work: Callable[[Job], dict[str, Any]]) -> Job:
        with self._lock:
            last = self.job
            if last is not None and last.active:
                raise HomeBusy(f"The {last.kind} is not finished. Wait for it, or stop it, first.")
            job = Job(1 if last is None else last.number + 1, kind)
            self._enqueue(partial(self._do, job, work))
            self.job = job
        return job

    def _do(self, job: Job, work: Callable[[Job], dict[str, Any]]) -> None:
        self.progress.hears = job.said.append
        state = "failed"
        try:
            with speaking_of_disk(f"finish the {job.kind}"):
                job.result = work(job)
            state = "done"
        except (Stopped, UpdateDiscarded) as error:
            job.error, state = str(error), "dropped"
        except UnwriteError as error:
            if isinstance(error, RequirementNotMet) and error.update is not None:
                job.result = _measured(error.update)
            job.error = plain(str(error))
        except MemoryError:
            job.error = "The memory of this machine ran out; nothing was changed."
        except Exception:  # noqa: BLE001 -- a bug of one job must not end the worker
            _log.exception("the %s failed", job.kind)
            job.error = f"The {job.kind} failed by a bug; the terminal of the server says more."
        with self._lock:
            self.progress.hears = _nobody
            job.state = state
            if not self._closed:
                self.progress.go_on()

    def _confirm(self, job: Job, update: Update) -> bool:
        """Let a person look at the candidate, and serve questions until there is a decision."""
        before, after = (
            read_jsonl(update.folder / f"{when}.jsonl") for when in ("before", "after")
        )
        found = sorted(answers(before, after), key=lambda one: one.verdict in ("right", "same"))
        shown = [
            {
                "verdict": one.verdict,
                "role": one.role,
                "prompt": one.prompt,
                "before": one.before,
                "after": one.after,
                "expected": one.expected,
            }
            for one in found[:ROWS]
        ]
        job.result = {**_measured(update), "answers": shown, "left_out": len(found) - len(shown)}
        self._candidate, self._decision = update.id, None
        job.state = "waiting"
        try:
            while self._decision is None and not self._closed:
                self._tasks.get()()
            return self._decision is True and not self._closed
        finally:
            self._candidate = None
            job.state = "running"

    def _current(self, number: int) -> Job:
        job = self.job
        if job is None or job.number != number or not job.active:
            raise HomeError("That job is over.")
        return job

    # ---- inside the worker -------------------------------------------------------------------

    def _ask(self, prompt: str, update: str | None, max_new_tokens: int) -> list[dict[str, str]]:
        home, live = self.home, self.home.ledger.live()
        found: list[tuple[str, str]] = []
        if update is None:
            states = []
        elif update == self._candidate:
            states = [("Now", live), ("With this change", [*live, update])]
        else:
            then = home.ledger.live(update)
            states = [(f"Before {update}", then[:-1]), (f"After {update}", then)]
        if update is not None:
            answered = home.before_and_after(prompt, update, max_new_tokens=max_new_tokens)
            for (label, state), text in zip(states, answered, strict=True):
                found.append((label + " (as now)" * (state == live and label != "Now"), text))
        if live not in (state for _, state in states):
            found.append(("Now", home.ask(prompt, max_new_tokens=max_new_tokens)))
        return [{"label": label, "text": plain(text.strip(), ANSWER)} for label, text in found]

    def _plan(self, order: Order) -> dict[str, Any]:
        home = self.home
        needs = plan.for_model(home.source, order.method, order.edits, folder=home.folder)
        return {
            "rows": [[key, plain(text, 300)] for key, text in needs.rows()],
            "warnings": list(needs.warnings),
        }


def _measured(update: Update) -> dict[str, Any]:
    found = update.protection
    protected = [*found["forecast"]["sentences"], found["truth"]["sentence"]] if found else []
    return {
        "id": update.id,
        "committed": update.committed,
        "columns": [plain(name) for name in SCORE_COLUMNS],
        "rows": score_rows(update.before, update.after),
        "perplexity": update.perplexity,
        "seconds": update.seconds,
        "notes": [plain(one, 600) for one in (*update.notes.get("sentences", [])[:20], *protected)],
    }


def _nobody(_sentence: str) -> None:
    """Hears what is said while no job runs."""

"""Where independent pieces of work are done: on a Ray cluster, or in this process if none is named.

A piece of work is a *job*; a *worker* is what does jobs one after the other and may hold something
expensive between them, such as a loaded model. Workers run in processes of their own and declare
what they need, so that Ray places them where it is free. A worker that dies is started again, and
its job with it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from unwrite.errors import BadSetting, UnwriteError

Job = TypeVar("Job")
Result = TypeVar("Result")


class Executor(Protocol):
    """What ``compare``, ``sweep`` and ``collect`` give their work to."""

    def work(
        self, make: Callable[[], Callable[[Job], Result]], jobs: Sequence[Job]
    ) -> Generator[tuple[Job, Result], None, None]:
        """Every job with its result, as they are finished. ``make`` makes a worker; it, the jobs
        and the results are sent between processes."""


@dataclass(frozen=True)
class RayExecutor:
    """Work on the Ray cluster at ``address`` (``"auto"``: the one that this machine is part of;
    None: one of this machine alone, for as long as the work takes).

    ``cpus``, ``gpus`` and ``memory`` (bytes of host memory) are what one worker needs; it computes
    with that many threads. ``workers``: at most so many at a time (default: as many as fit the
    cluster now). ``retries``: how often a worker that died is started again.

    Every machine of the cluster needs this package, and the folder of the run under the same path.
    """

    address: str | None = None
    cpus: int = 1
    gpus: float = 0.0
    memory: int | None = None
    workers: int | None = None
    retries: int = 3

    def __post_init__(self) -> None:
        if self.cpus < 1 or self.gpus < 0 or self.retries < 0:
            raise BadSetting("A worker needs cpus >= 1, gpus >= 0 and retries >= 0.")
        if self.workers is not None and self.workers < 1:
            raise BadSetting("workers must be at least 1.")

    def work(
        self, make: Callable[[], Callable[[Job], Result]], jobs: Sequence[Job]
    ) -> Generator[tuple[Job, Result], None, None]:
        """See ``Executor``. Raises ``BadSetting`` when Ray is not installed, the cluster cannot be
        reached or is too small, and ``UnwriteError`` when a worker keeps dying."""
        if not jobs:
            return
        ray = _ray()
        with self._connected(ray):
            kind = ray.remote(
                num_cpus=self.cpus,
                num_gpus=self.gpus,
                memory=self.memory,
                max_restarts=self.retries,
                max_task_retries=self.retries,
            )(_Worker)
            shared = ray.put(make)
            count = min(len(jobs), self._room(ray))
            idle = [kind.remote(shared, self.cpus) for _ in range(count)]
            actors, waiting = list(idle), list(reversed(jobs))
            running: dict[Any, tuple[Any, Job]] = {}
            try:
                while waiting or running:
                    while waiting and idle:
                        actor, job = idle.pop(), waiting.pop()
                        running[actor.do.remote(job)] = (actor, job)
                    (done,), _ = ray.wait(list(running), num_returns=1)
                    actor, job = running.pop(done)
                    yield job, self._result(ray, done, job)
                    idle.append(actor)
            finally:
                for actor in actors:
                    ray.kill(actor)

    def _result(self, ray: Any, done: Any, job: Any) -> Any:
        try:
            return ray.get(done)
        except ray.exceptions.RayActorError as error:
            raise UnwriteError(
                f"The worker for {job} died {self.retries + 1} times, perhaps for want of memory. "
                "What is finished is kept; give each worker more memory, or run fewer at a time."
            ) from error

    def _room(self, ray: Any) -> int:
        """How many workers fit the cluster."""
        there = ray.cluster_resources()
        wanted = {"CPU": float(self.cpus), "GPU": self.gpus, "memory": float(self.memory or 0)}
        room = math.inf
        for kind, amount in wanted.items():
            if amount > 0:
                room = min(room, there.get(kind, 0.0) // amount)
        if room < 1:
            wants = ", ".join(f"{kind} {amount:g}" for kind, amount in wanted.items() if amount)
            has = ", ".join(f"{kind} {there.get(kind, 0.0):g}" for kind in wanted)
            raise BadSetting(
                f"A worker needs {wants}, and the Ray cluster has {has}. Ask for less, or name "
                "another cluster by --address."
            )
        return int(min(room, self.workers or math.inf))

    @contextlib.contextmanager
    def _connected(self, ray: Any) -> Iterator[None]:
        """Within the block Ray is connected; a connection that was there before stays."""
        if ray.is_initialized():
            yield
            return
        words: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        if self.address is None:
            words |= {"include_dashboard": False}
        try:
            ray.init(address=self.address or "local", **words)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise BadSetting(
                f"There is no Ray cluster at {self.address or 'this machine'}: {reason} Start one "
                "with 'ray start --head', or leave out --address."
            ) from error
        try:
            yield
        finally:
            ray.shutdown()


class _Worker:
    """One process of the cluster."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._work = make()

    def do(self, job: Any) -> Any:
        return self._work(job)


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise BadSetting(
            "The executor 'ray' needs Ray, which is not installed: pip install 'unwrite[ray]'."
        ) from None
    return ray

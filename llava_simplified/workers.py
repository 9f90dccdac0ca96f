"""Run a function over many tasks: in local processes, on a Ray cluster, or one slice of them in a job array.

The function must be idempotent and must resume its own unfinished work (see `jobs`). Then a task that failed, or whose
process died, is simply run again. Nothing here knows what a task does: a task is any picklable description, such as
the number of a shard.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from llava_simplified.extras import require_extra
from llava_simplified.options import configure_logging, log_level

S = TypeVar("S")
R = TypeVar("R")

_WAIT_INTERVAL = 1.0  # seconds between two calls of `tick`


@dataclass(frozen=True)
class TaskResult(Generic[S, R]):
    """The outcome of one task.

    Attributes:
        spec: The task.
        result: What the function returned; None after an error.
        error: The error of the last attempt; empty if the task succeeded.
    """

    spec: S
    result: R | None
    error: str


class Backend(Protocol):
    """Where tasks run. A handle stands for one running task."""

    slots: int  # number of tasks that run at once

    def submit(self, spec: Any) -> Any:
        """Start a task and return its handle."""

    def wait(self, handles: list[Any], timeout: float) -> list[Any]:
        """Return the handles of finished tasks, after at most `timeout` seconds."""

    def result(self, handle: Any) -> tuple[Any, Exception | None]:
        """Return the result of a finished task, or its error."""

    def close(self) -> None:
        """Stop all running tasks."""


def run_tasks(
    function: Callable[[S], R],
    specs: Sequence[S],
    *,
    engine: str = "local",
    workers: int = 0,
    per_cpu: int = 1,
    attempts: int = 3,
    tick: Callable[[], None] | None = None,
) -> Iterator[TaskResult[S, R]]:
    """Run a function over all tasks, and yield the outcome of each task as soon as it has finished.

    Args:
        function: A function that other processes can import by name.
        specs: The tasks.
        engine: "local", or "ray" (the cluster at RAY_ADDRESS, otherwise Ray on this machine).
        workers: Number of tasks that run at once; 0 means `per_cpu` for each CPU of this machine or cluster.
        per_cpu: Tasks per CPU. Use 2 for tasks that spend part of their time waiting.
        attempts: Maximum number of attempts per task. A ValueError is never retried: it is the user's to fix.
        tick: Called about once a second. An exception that it raises ends the run.

    Raises:
        ValueError: There is no such engine, or it is not installed.
    """
    if not specs:
        return
    if engine not in _BACKENDS:
        raise ValueError(f"--engine {engine}: choose one of {', '.join(_BACKENDS)}.")
    backend = _BACKENDS[engine](function, workers, per_cpu)
    # Each task with the number of its next attempt.
    waiting = deque((spec, 1) for spec in specs)
    running: dict[Any, tuple[S, int]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < backend.slots:
                spec, attempt = waiting.popleft()
                handle = backend.submit(spec)
                running[handle] = (spec, attempt)
            finished = backend.wait(list(running), _WAIT_INTERVAL)
            if tick:
                tick()
            for handle in finished:
                spec, attempt = running.pop(handle)
                result, error = backend.result(handle)
                if error is None:
                    yield TaskResult(spec, result, "")
                elif isinstance(error, ValueError) or attempt == attempts:
                    yield TaskResult(spec, None, str(error))
                else:
                    # Behind the other tasks: what was wrong with the machine may have passed by
                    # then.
                    waiting.append((spec, attempt + 1))
    finally:
        backend.close()


def count_cpus() -> int:
    """Return the number of CPUs that this process may use: on a shared machine fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- local processes ----


class _Worker(NamedTuple):
    """A worker process, and our end of the pipe to it. It is also the handle of the task that it runs."""

    process: Any
    pipe: connection.Connection


class LocalBackend:
    """Worker processes on this machine. Each runs one task at a time.

    A process that dies (the kernel kills the process that uses too much memory) fails only its own task, and is
    replaced when the next task needs it.
    """

    def __init__(self, function: Callable[[Any], Any], workers: int, per_cpu: int) -> None:
        self._function = function
        self.slots = workers or per_cpu * count_cpus()
        # A forked process shares the memory of everything that is imported already. But the threads of torch do not
        # survive a fork, so once torch is imported every process must start from scratch.
        can_fork = sys.platform == "linux" and "torch" not in sys.modules
        self._context: Any = multiprocessing.get_context("fork" if can_fork else "spawn")
        # The garbage collector writes to the header of every object that it visits, which would copy the shared pages.
        gc.freeze()
        self._workers: list[_Worker] = []
        self._idle: list[_Worker] = []

    def _start_worker(self) -> _Worker:
        our_end, their_end = self._context.Pipe()
        process = self._context.Process(
            target=_run_worker,
            args=(their_end, self._function, os.getpid(), log_level()),
            daemon=True,
        )
        process.start()
        their_end.close()
        worker = _Worker(process, our_end)
        self._workers.append(worker)
        return worker

    def submit(self, spec: Any) -> _Worker:
        """Send a task to an idle worker, or to a new one."""
        worker = self._idle.pop() if self._idle else self._start_worker()
        # If the worker has just died, `result` reports it.
        with contextlib.suppress(OSError):
            worker.pipe.send(spec)
        return worker

    def wait(self, handles: list[_Worker], timeout: float) -> list[_Worker]:
        """Return the workers that have sent a result, or whose pipe was closed."""
        ready = connection.wait([worker.pipe for worker in handles], timeout)
        return [worker for worker in handles if worker.pipe in ready]

    def result(self, handle: _Worker) -> tuple[Any, Exception | None]:
        """Receive the result of a task. The worker is idle afterwards."""
        try:
            outcome = handle.pipe.recv()
        except (EOFError, OSError):
            handle.process.join()
            self._workers.remove(handle)
            return None, OSError(f"its process died with exit code {handle.process.exitcode}")
        # The process stays alive: starting one takes longer than many tasks.
        self._idle.append(handle)
        return outcome

    def close(self) -> None:
        """Stop all worker processes."""
        for worker in self._workers:
            worker.process.terminate()
            worker.process.join()


def _run_worker(
    pipe: connection.Connection,
    function: Callable[[Any], Any],
    parent: int,
    level: int | None,
) -> None:
    """Run tasks until the parent ends. This is the main function of a worker process.

    Args:
        pipe: The tasks come from here, and the results go back.
        function: What is run for each task.
        parent: The process id of the parent.
        level: The log level of the parent; None if it has not configured its log.
    """
    # A process that was not forked starts without any.
    if level is not None:
        configure_logging(verbose=level <= logging.DEBUG, quiet=level >= logging.WARNING)

    def exit_with_parent() -> None:
        # The pipe does not tell when the parent is killed: workers that were forked later hold its other end open
        # too. Without this watch, the workers of a killed run would go on writing.
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    # Ctrl-C reaches every process of the terminal; only the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()
    while True:
        spec = pipe.recv()
        outcome: tuple[Any, Exception | None]
        try:
            outcome = (function(spec), None)
        except ValueError as error:
            # ValueErrors and OSErrors are written for the user. They are rebuilt from their text, because an exception
            # of another class may not survive pickling.
            outcome = (None, ValueError(str(error)))
        except OSError as error:
            outcome = (None, OSError(str(error)))
        except Exception:  # noqa: BLE001 - whatever it is, the parent decides what to do
            outcome = (None, RuntimeError(traceback.format_exc()))
        pipe.send(outcome)


# ---- Ray ----


class RayBackend:
    """Tasks on a Ray cluster; each reserves `1 / per_cpu` of a CPU. A lost machine is an error like any other."""

    def __init__(self, function: Callable[[Any], Any], workers: int, per_cpu: int) -> None:
        require_extra("ray", "ray", purpose="--engine ray")
        import ray

        self._ray = ray
        self._started_here = not ray.is_initialized()
        if self._started_here:
            address = os.environ.get("RAY_ADDRESS")
            options: dict[str, Any] = {}
            if not address:
                options = {"num_cpus": count_cpus(), "include_dashboard": False}
            ray.init(address=address, log_to_driver=False, **options)
        cluster_cpus = int(ray.cluster_resources().get("CPU", 1))
        self.slots = workers or max(1, per_cpu * cluster_cpus)
        # `run_tasks` counts the attempts, so Ray must not retry on its own.
        self._remote = ray.remote(num_cpus=1 / per_cpu, max_retries=0)(function)

    def submit(self, spec: Any) -> Any:
        """Start a Ray task."""
        return self._remote.remote(spec)

    def wait(self, handles: list[Any], timeout: float) -> list[Any]:
        """Return a task that has finished, if there is one."""
        finished, _ = self._ray.wait(handles, num_returns=1, timeout=timeout)
        return finished

    def result(self, handle: Any) -> tuple[Any, Exception | None]:
        """Return the result of a task. Ray wraps the error of a task; a ValueError is unwrapped."""
        try:
            return self._ray.get(handle), None
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            return None, cause if isinstance(cause, ValueError) else error

    def close(self) -> None:
        """Shut Ray down, unless it was running before."""
        if self._started_here:
            self._ray.shutdown()


_BACKENDS: dict[str, Callable[[Callable[[Any], Any], int, int], Backend]] = {
    "local": LocalBackend,
    "ray": RayBackend,
}


# ---- slices ----


def parse_slice(text: str, total: int) -> range:
    """Return the task numbers that `--shards i/n` selects: every n-th one, starting at i.

    Args:
        text: "i/n" with i counted from 0, or "" for all tasks.
        total: Number of tasks.

    Raises:
        ValueError: The text is not of this form, or i is not below n.
    """
    if not text:
        return range(total)
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError(
            f"--shards {text}: expected i/n with i from 0 to n-1, for example --shards 0/8."
        )
    return range(int(match[1]), total, int(match[2]))

"""Run a function over many tasks: in local processes, on a Ray cluster, or one slice of them in a job array.

The function must be idempotent and must resume its own unfinished work (see `jobs`), because a task that failed, or whose
process died, is simply run again. A task is any picklable object, such as the number of a shard.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
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
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from llava_simplified.extras import require_extra
from llava_simplified.options import configure_logging, log_level

if TYPE_CHECKING:
    import asyncio

S = TypeVar("S")
R = TypeVar("R")

_STOP_SECONDS = 5.0  # time that a worker process has to end after SIGTERM, before it is killed
_WAIT_INTERVAL = 1.0  # seconds between two calls of `tick`
# On Windows, Python's `select` can wait for at most 512 sockets. Leave some for sockets that are not connections: those
# of the DNS resolver and of the event loop itself.
_MAX_WINDOWS_CONNECTIONS = 480
# Where Linux describes the containers of a process (control groups)
_OWN_CGROUPS = Path("/proc/self/cgroup")
_CGROUP_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class TaskResult(Generic[S, R]):
    """The outcome of one task.

    Attributes:
        spec: The task.
        result: The return value of the function; None after an error.
        error: The error of the last attempt; empty if the task succeeded.
    """

    spec: S
    result: R | None
    error: str


class Backend(Protocol):
    """Runs tasks. A handle identifies one running task."""

    slots: int  # maximum number of tasks that run in parallel

    def submit(self, spec: Any) -> Any:
        """Start a task and return its handle."""

    def wait(self, handles: list[Any], timeout: float) -> list[Any]:
        """Return the handles of finished tasks, after at most `timeout` seconds."""

    def result(self, handle: Any) -> tuple[Any, Exception | None]:
        """Return the result of a finished task, or its error."""

    def close(self) -> None:
        """Stop the workers that this backend has started, with their running tasks."""


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
        engine: "local", or "ray" (the cluster at RAY_ADDRESS, or Ray on this machine if the variable is not set).
        workers: Number of tasks to run in parallel; 0 means `per_cpu` for each CPU of this machine or cluster.
        per_cpu: Number of tasks per CPU. Use 2 for tasks that spend part of their time waiting.
        attempts: Maximum number of attempts per task. A task that raises ValueError is not repeated, because only the
            user can correct the error.
        tick: A function to call about once a second, for example to print the progress. An exception in it ends the
            run.

    Raises:
        ValueError: `engine` is unknown or not installed, or `workers` is negative.
    """
    check_workers(workers)
    if not specs:
        return
    if engine not in _BACKENDS:
        raise ValueError(f"--engine {engine}: choose one of {', '.join(_BACKENDS)}.")
    # The loop below keeps `backend.slots` tasks running:
    #
    #     waiting (task, attempt) --submit--> running --finished--> yield the result
    #        ^                                   |
    #        +------ attempt + 1 ----------------+  failed, with attempts left
    #
    # Results are yielded in the order in which tasks finish. If the caller stops iterating, `finally` closes the
    # backend.
    backend = _BACKENDS[engine](function, workers, per_cpu)
    # Pairs of a task and the number of its next attempt, counted from 1.
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
                    # Retry the task after all others, since a problem of the machine may be over by then.
                    waiting.append((spec, attempt + 1))
    finally:
        backend.close()


def check_workers(workers: int) -> None:
    """Raise ValueError for a negative value of `--workers`. Call this before a long job."""
    if workers < 0:
        raise ValueError(
            f"--workers {workers}: must be at least 1, or 0 for a number that depends on the number of CPUs"
        )


def count_cpus() -> int:
    """Return the number of CPUs that this process may use, which can be fewer than the machine has."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    return max(1, min(count, math.ceil(_container_cpus(count))))


def _container_cpus(otherwise: float) -> float:
    """Return how many CPUs the time limit of this process's container amounts to (cgroup v2 of Linux).

    Docker and Kubernetes set it. Such a limit does not change which CPUs a process may use, so a container with two of 96
    CPUs would start 96 workers.

    Args:
        otherwise: The result if there is no limit.
    """
    group = ""
    with contextlib.suppress(OSError):
        # The line of cgroup v2 is "0::" and the path of the group.
        for line in _OWN_CGROUPS.read_text(encoding="utf-8").splitlines():
            if line.startswith("0::"):
                group = line.removeprefix("0::").strip("/")
    cpus = otherwise
    folder = _CGROUP_ROOT / group
    # A limit also holds for the groups within a group.
    for place in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            # For example "200000 100000": 0.2 seconds in each 0.1 second, on all CPUs together
            limit, period = (place / "cpu.max").read_text(encoding="utf-8").split()
            if limit != "max":
                cpus = min(cpus, int(limit) / int(period))
    return cpus


# ---- event loops ----


@contextlib.contextmanager
def event_loop(connections: int = 0) -> Iterator[asyncio.AbstractEventLoop]:
    """Yield an event loop for network connections. At the end, cancel its tasks and close it.

    It is a selector event loop on every system, because aiodns (which resolves host names) does not support the default
    event loop of Windows.

    Args:
        connections: Maximum number of connections at the same time.

    Raises:
        ValueError: This system cannot wait for that many connections.
    """
    # Import this here, because most commands need no event loop.
    import asyncio

    if sys.platform == "win32" and connections > _MAX_WINDOWS_CONNECTIONS:
        raise ValueError(
            f"--concurrency {connections}: Windows can wait for {_MAX_WINDOWS_CONNECTIONS} connections at a time; "
            f"pass --concurrency {_MAX_WINDOWS_CONNECTIONS} or less."
        )
    loop = asyncio.SelectorEventLoop()
    loop.set_exception_handler(_log_unretrieved_error)
    try:
        yield loop
    finally:
        try:
            _end_tasks(loop)
        finally:
            loop.close()


def _end_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel the tasks that still run after an error or Ctrl-C, and wait until they have ended."""
    import asyncio

    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    # An interrupted iteration of the loop leaves callbacks behind. One of them may stop the loop, because the future
    # that the loop ran for is done, and would end the wait below too early. So run all of them in one iteration first.
    loop.call_soon(loop.stop)
    loop.run_forever()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.run_until_complete(loop.shutdown_default_executor())


def _log_unretrieved_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an error of a task that nobody waited for. Ignore Ctrl-C, which the loop has raised already."""
    if not isinstance(context.get("exception"), KeyboardInterrupt):
        loop.default_exception_handler(context)


# ---- local processes ----


def start_method() -> str:
    """Return how to start worker processes: "fork" or "spawn".

    "fork" is preferred, because forked processes share the memory of all imported modules. It is not used if torch is
    imported, because the threads of torch do not survive a fork.
    """
    can_fork = sys.platform == "linux" and "torch" not in sys.modules
    return "fork" if can_fork else "spawn"


class _Worker(NamedTuple):
    """A worker process, and the parent's end of the pipe to it. It is also the handle of the task that it runs."""

    process: Any
    pipe: connection.Connection


class LocalBackend:
    """Worker processes on this machine. Each runs one task at a time.

    If a process dies (for example, because the kernel kills it for lack of memory), only its own task fails. A new
    process replaces it when the next task is submitted.
    """

    def __init__(self, function: Callable[[Any], Any], workers: int, per_cpu: int) -> None:
        self._function = function
        self.slots = workers or per_cpu * count_cpus()
        self._context: Any = multiprocessing.get_context(start_method())
        # Exclude existing objects from garbage collection. It writes to their headers, so that the pages that forked
        # workers share would have to be copied.
        gc.freeze()
        self._workers: list[_Worker] = []
        self._idle: list[_Worker] = []

    def _start_worker(self) -> _Worker:
        """Start a worker process, connected by a pipe."""
        parent_end, worker_end = self._context.Pipe()
        process = self._context.Process(
            target=_run_worker,
            args=(worker_end, self._function, os.getpid(), log_level()),
            daemon=True,
        )
        process.start()
        # Close the parent's copy of the worker's end. Otherwise, the pipe would stay open when the worker dies,
        # and `result` would wait forever.
        worker_end.close()
        worker = _Worker(process, parent_end)
        self._workers.append(worker)
        return worker

    def submit(self, spec: Any) -> _Worker:
        """Send a task to an idle worker, or to a new one."""
        worker = self._idle.pop() if self._idle else self._start_worker()
        # Ignore an error here: if the worker has just died, `result` reports it.
        with contextlib.suppress(OSError):
            worker.pipe.send(spec)
        return worker

    def wait(self, handles: list[_Worker], timeout: float) -> list[_Worker]:
        """Return the workers that have sent a result, or whose pipe was closed."""
        ready = connection.wait([worker.pipe for worker in handles], timeout)
        return [worker for worker in handles if worker.pipe in ready]

    def result(self, handle: _Worker) -> tuple[Any, Exception | None]:
        """Receive the result of a task, and mark its worker as idle."""
        try:
            outcome = handle.pipe.recv()
        except (EOFError, OSError):
            handle.process.join()
            self._workers.remove(handle)
            return None, OSError(f"its process died with exit code {handle.process.exitcode}")
        # Keep the process for the next task: starting a process takes longer than many tasks.
        self._idle.append(handle)
        return outcome

    def close(self) -> None:
        """Stop all worker processes."""
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_STOP_SECONDS)
            # A process that has just been forked may still have the parent's handler of SIGTERM, which may ignore it.
            worker.process.kill()
            worker.process.join()


def _parent_is_alive(parent: int) -> bool:
    """Return whether the process that started this worker still runs.

    Args:
        parent: Process id of the process that started this worker.
    """
    process = multiprocessing.parent_process()
    # On Windows, `getppid` still returns the same id after the parent has ended, so use the handle of the parent.
    if sys.platform == "win32" and process is not None:
        return process.is_alive()
    return os.getppid() == parent


def _run_worker(
    pipe: connection.Connection,
    function: Callable[[Any], Any],
    parent: int,
    level: int | None,
) -> None:
    """Run tasks until the parent ends. This is the main function of a worker process.

    Args:
        pipe: Connection for receiving tasks and sending results.
        function: The function to call for each task.
        parent: Process id of the parent.
        level: The log level of the parent; None if it has not configured logging.
    """
    # In a spawned process (unlike in a forked one), logging is not configured yet.
    if level is not None:
        configure_logging(verbose=level <= logging.DEBUG, quiet=level >= logging.WARNING)

    def exit_with_parent() -> None:
        # Without this check, the workers of a killed run would wait for tasks forever. The pipe is not closed when the
        # parent is killed, because workers that were forked later also hold its other end.
        while _parent_is_alive(parent):
            time.sleep(0.5)
        os._exit(1)

    # Ignore Ctrl-C, which is sent to every process of the terminal; the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A forked process inherits the parent's handler of SIGTERM. End without it, or `close` would have to wait.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=exit_with_parent, daemon=True).start()
    while True:
        spec = pipe.recv()
        outcome: tuple[Any, Exception | None]
        try:
            outcome = (function(spec), None)
        except ValueError as error:
            # Create a plain ValueError or OSError with the same message, because subclasses may not be picklable.
            outcome = (None, ValueError(str(error)))
        except OSError as error:
            outcome = (None, OSError(str(error)))
        except Exception:  # noqa: BLE001 - the parent handles all errors
            outcome = (None, RuntimeError(traceback.format_exc()))
        pipe.send(outcome)


# ---- Ray ----


class RayBackend:
    """Runs tasks on a Ray cluster.

    Each task reserves `1 / per_cpu` of a CPU. If a machine of the cluster fails, its tasks fail too.
    """

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
        # Disable Ray's own retries, since `run_tasks` counts the attempts.
        self._remote = ray.remote(num_cpus=1 / per_cpu, max_retries=0)(function)

    def submit(self, spec: Any) -> Any:
        """Start a Ray task."""
        return self._remote.remote(spec)

    def wait(self, handles: list[Any], timeout: float) -> list[Any]:
        """Return one finished task, or none if no task finishes in time."""
        finished, _ = self._ray.wait(handles, num_returns=1, timeout=timeout)
        return finished

    def result(self, handle: Any) -> tuple[Any, Exception | None]:
        """Return the result of a finished task, or its error."""
        try:
            return self._ray.get(handle), None
        except self._ray.exceptions.RayError as error:
            # Ray wraps the error of the function. Unwrap a ValueError, which `run_tasks` does not retry.
            cause = getattr(error, "cause", None)
            return None, cause if isinstance(cause, ValueError) else error

    def close(self) -> None:
        """Shut Ray down if this object has started it."""
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
        ValueError: The format is not i/n, or i is not less than n.
    """
    if not text:
        return range(total)
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError(
            f"--shards {text}: expected i/n with i from 0 to n-1, for example --shards 0/8."
        )
    return range(int(match[1]), total, int(match[2]))

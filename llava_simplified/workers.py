"""Run a function over many shards: in local processes, as Ray tasks, or a slice of them for a job array.

A shard function is idempotent and takes up its own unfinished work, so that a shard that failed, or whose
process died, is simply run again. Nothing here knows what a shard holds.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
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
from typing import Any, Generic, NamedTuple, TypeVar

S = TypeVar("S")
R = TypeVar("R")


@dataclass(frozen=True)
class TaskResult(Generic[S, R]):
    """What came of one shard: `result`, or after the last attempt an `error`."""

    spec: S
    result: R | None
    error: str


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
    """Yield what came of each shard, as they finish.

    Args:
        function: importable by name, for it runs in other processes.
        engine: `local`, or `ray` (a cluster where RAY_ADDRESS is set, else this machine).
        workers: shards at a time; 0 means `per_cpu` for each CPU of this machine or cluster.
        per_cpu: 2 where a shard ends by waiting.
        attempts: how often a shard is tried. A ValueError is final: it would come again.
        tick: called about once a second; what it raises ends the run.
    """
    if not specs:
        return
    if engine not in _ENGINES:
        raise ValueError(f"--engine {engine!r}: there are {', '.join(_ENGINES)}")
    backend = _ENGINES[engine](function, workers, per_cpu)
    waiting = deque((spec, 1) for spec in specs)
    running: dict[Any, tuple[S, int]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < backend.slots:
                spec, attempt = waiting.popleft()
                running[backend.submit(spec)] = spec, attempt
            finished = backend.wait(list(running), 1.0)
            if tick:
                tick()
            for handle in finished:
                spec, attempt = running.pop(handle)
                result, error = backend.answer(handle)
                if error is None:
                    yield TaskResult(spec, result, "")
                elif isinstance(error, ValueError) or attempt == attempts:
                    yield TaskResult(spec, None, str(error))
                else:
                    waiting.append((spec, attempt + 1))
    finally:
        backend.close()


def _cpus() -> int:
    """Those that this job was given, where the system tells; of a shared machine that is not all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker(NamedTuple):
    process: Any
    pipe: connection.Connection


class _Local:
    """Processes of this machine, one shard at a time each.

    A process that dies (the kernel kills what takes too much memory) fails its own shard and is replaced.
    """

    def __init__(self, function: Callable[[Any], Any], workers: int, per_cpu: int) -> None:
        self._function, self.slots = function, workers or per_cpu * _cpus()
        # Forked processes share what is imported; but torch's threads do not survive a fork.
        fork = sys.platform == "linux" and "torch" not in sys.modules
        self._context: Any = multiprocessing.get_context("fork" if fork else "spawn")
        gc.freeze()  # else the collector's marks unshare the pages
        self._workers: list[_Worker] = []
        self._idle: list[_Worker] = []

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_work, args=(theirs, self._function, os.getpid()), daemon=True
        )
        process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours))
        return self._workers[-1]

    def submit(self, spec: Any) -> _Worker:
        worker = self._idle.pop() if self._idle else self._start()
        with contextlib.suppress(OSError):  # it has just died: `answer` will see that and say so
            worker.pipe.send(spec)
        return worker

    def wait(self, handles: list[_Worker], seconds: float) -> list[_Worker]:
        ready = connection.wait([worker.pipe for worker in handles], seconds)
        return [worker for worker in handles if worker.pipe in ready]

    def answer(self, worker: _Worker) -> tuple[Any, Exception | None]:
        try:
            answer = worker.pipe.recv()
            self._idle.append(worker)
        except (EOFError, OSError):
            worker.process.join()
            answer = None, OSError(f"its process died with exit code {worker.process.exitcode}")
            self._workers.remove(worker)
        return answer

    def close(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
            worker.process.join()


def _work(pipe: connection.Connection, function: Callable[[Any], Any], parent: int) -> None:
    """The life of a worker process. It ends with its parent, so that no killed run writes on."""

    def watch() -> None:  # the pipe does not tell: forked siblings hold its other end too
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=watch, daemon=True).start()
    while True:
        spec = pipe.recv()
        answer: tuple[Any, Exception | None]
        try:
            answer = function(spec), None
        except (
            ValueError,
            OSError,
        ) as error:  # written for the user, or by the system; others need the traceback
            answer = None, (ValueError if isinstance(error, ValueError) else OSError)(str(error))
        except Exception:  # noqa: BLE001 - whatever it is, the parent decides
            answer = None, RuntimeError(traceback.format_exc())
        pipe.send(answer)


class _Ray:
    """Tasks that take `1 / per_cpu` of a CPU each. A lost worker or machine is an error like others."""

    def __init__(self, function: Callable[[Any], Any], workers: int, per_cpu: int) -> None:
        try:
            import ray
        except ImportError:
            raise ValueError(
                "--engine ray needs Ray: pip install 'llava-simplified[ray]'"
            ) from None
        self._ray, self._ours = ray, not ray.is_initialized()
        if self._ours:
            address = os.environ.get("RAY_ADDRESS")
            own: dict[str, Any] = (
                {} if address else {"num_cpus": _cpus(), "include_dashboard": False}
            )
            ray.init(address=address, log_to_driver=False, **own)
        self.slots = workers or max(1, per_cpu * int(ray.cluster_resources().get("CPU", 1)))
        self._remote = ray.remote(num_cpus=1 / per_cpu, max_retries=0)(function)

    def submit(self, spec: Any) -> Any:
        return self._remote.remote(spec)

    def wait(self, handles: list[Any], seconds: float) -> list[Any]:
        return self._ray.wait(handles, num_returns=1, timeout=seconds)[0]

    def answer(self, handle: Any) -> tuple[Any, Exception | None]:
        try:
            return self._ray.get(handle), None
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            return None, cause if isinstance(cause, ValueError) else error

    def close(self) -> None:
        if self._ours:
            self._ray.shutdown()


_ENGINES: dict[str, Any] = {"local": _Local, "ray": _Ray}


def parse_slice(text: str, total: int) -> range:
    """Which of `total` shards `--shards i/n` means: every n-th from the i-th, from 0; "" means all."""
    if not text:
        return range(total)
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError(f"--shards {text!r}: give i/n with i from 0 to n-1, as in 0/8 .. 7/8")
    return range(int(match[1]), total, int(match[2]))


def add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    """`--engine`, `--workers` and `--shards`, the same for every command that works shard by shard."""
    group = parser.add_argument_group("where the shards run")
    group.add_argument("--engine", choices=list(_ENGINES), default="local")
    group.add_argument(
        "--workers", type=int, default=0, help="shards at a time (default: as the CPUs can take)"
    )
    group.add_argument(
        "--shards", default="", metavar="i/n", help="only this slice, for a job array: 0/8 .. 7/8"
    )

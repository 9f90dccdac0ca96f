"""Run a function over many shards: in local processes, as Ray tasks, or a slice of them for a job array.

A shard function is idempotent and takes up its own unfinished work, so that a shard that failed, or whose
process died, is simply run again. Nothing here knows what a shard holds.
"""

from __future__ import annotations

import argparse
import concurrent.futures as futures
import contextlib
import itertools
import multiprocessing
import os
import re
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

S = TypeVar("S")
R = TypeVar("R")


class Done(NamedTuple, Generic[S, R]):
    """What came of one shard: `result`, or after the last attempt an `error`."""

    spec: S
    result: R | None
    error: str


def run_shards(
    function: Callable[[S], R],
    specs: Sequence[S],
    *,
    engine: str = "local",
    workers: int = 0,
    lanes: int = 1,
    attempts: int = 3,
    tick: Callable[[], None] | None = None,
) -> Iterator[Done[S, R]]:
    """Yield what came of each shard, as they finish.

    Args:
        function: importable by name, for it runs in other processes.
        engine: `local`, or `ray` (a cluster where RAY_ADDRESS is set, else this machine).
        workers: shards at a time; 0 means one for each CPU of this machine or cluster.
        lanes: shards that one local process has under way at once: 2 where a shard ends by waiting.
        attempts: how often a shard is tried. A ValueError is final: it would come again.
        tick: called about once a second; what it raises ends the run.
    """
    if not specs:
        return
    if engine not in _ENGINES:
        raise ValueError(f"--engine {engine!r}: there are {', '.join(_ENGINES)}")
    backend = _ENGINES[engine](function, workers, lanes)
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
                    yield Done(spec, result, "")
                elif isinstance(error, ValueError) or attempt == attempts:
                    yield Done(spec, None, str(error))
                else:
                    waiting.append((spec, attempt + 1))
    finally:
        backend.close()


class _Backend(Protocol):
    slots: int

    def __init__(self, function: Callable[[Any], Any], workers: int, lanes: int) -> None: ...
    def submit(self, spec: Any) -> Any: ...
    def wait(self, handles: list[Any], seconds: float) -> list[Any]: ...
    def answer(self, handle: Any) -> tuple[Any, BaseException | None]: ...
    def close(self) -> None: ...


class _Local:
    """Processes of this machine, each with `lanes` shards under way in threads of its own.

    A process that dies (the kernel kills what takes too much memory) fails its own shards and is replaced.
    """

    def __init__(self, function: Callable[[Any], Any], workers: int, lanes: int) -> None:
        self.function, self.lanes = function, lanes
        # Forked processes share what is imported; but torch's threads do not survive a fork.
        fork = sys.platform == "linux" and "torch" not in sys.modules
        self._context: Any = multiprocessing.get_context("fork" if fork else "spawn")
        self._workers = [self._start() for _ in range(workers or os.cpu_count() or 1)]
        self.slots = len(self._workers) * lanes
        self._count = itertools.count()
        self._answers: dict[int, tuple[Any, BaseException | None]] = {}

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self.lanes, os.getpid()), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours, set())

    def submit(self, spec: Any) -> int:
        worker, handle = min(self._workers, key=lambda worker: len(worker.running)), next(self._count)
        worker.running.add(handle)
        with contextlib.suppress(OSError):  # it has just died: `wait` will see that and say so
            worker.pipe.send((handle, self.function, spec))
        return handle

    def wait(self, handles: list[int], seconds: float) -> list[int]:
        ready = connection.wait([worker.pipe for worker in self._workers], seconds)
        for index, worker in enumerate(self._workers):
            if worker.pipe not in ready:
                continue
            try:
                handle, result, error = worker.pipe.recv()
                worker.running.discard(handle)
                self._answers[handle] = result, error
            except (EOFError, OSError):
                worker.process.join()
                died = OSError(f"its process died with exit code {worker.process.exitcode}")
                self._answers.update(dict.fromkeys(worker.running, (None, died)))
                self._workers[index] = self._start()
        return [handle for handle in handles if handle in self._answers]

    def answer(self, handle: int) -> tuple[Any, BaseException | None]:
        return self._answers.pop(handle)

    def close(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
            worker.process.join()


class _Worker(NamedTuple):
    process: Any
    pipe: connection.Connection
    running: set[int]


def _work(pipe: connection.Connection, lanes: int, parent: int) -> None:
    """The life of a worker process. It ends with its parent, so that no killed run writes on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    lock = threading.Lock()

    def run(handle: int, function: Callable[[Any], Any], spec: Any) -> None:
        result: Any = None
        failure: Exception | None = None
        try:
            result = function(spec)
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent decides
            told = isinstance(error, ValueError)  # written for the user; others need the traceback
            failure = ValueError(str(error)) if told else RuntimeError(traceback.format_exc())
        with lock:
            pipe.send((handle, result, failure))

    threads = futures.ThreadPoolExecutor(lanes)
    with contextlib.suppress(EOFError):
        while os.getppid() == parent:  # a forked sibling holds the pipe's other end too, so it may never end
            if pipe.poll(0.5):
                threads.submit(run, *pipe.recv())
    os._exit(1)


class _Ray:
    """Tasks of one CPU each. A lost worker or machine is an error like others."""

    def __init__(self, function: Callable[[Any], Any], workers: int, lanes: int) -> None:
        try:
            import ray
        except ImportError:
            raise ValueError("--engine ray needs Ray: pip install 'llava-simplified[ray]'") from None
        self.ray, address = ray, os.environ.get("RAY_ADDRESS")
        self._ours = not ray.is_initialized()
        if self._ours:
            local: dict[str, Any] = (
                {} if address else {"num_cpus": workers or os.cpu_count(), "include_dashboard": False}
            )
            ray.init(address=address, log_to_driver=False, **local)
        self.slots = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._remote = ray.remote(num_cpus=1, max_retries=0)(function)

    def submit(self, spec: Any) -> Any:
        return self._remote.remote(spec)

    def wait(self, handles: list[Any], seconds: float) -> list[Any]:
        return self.ray.wait(handles, num_returns=1, timeout=seconds)[0]

    def answer(self, handle: Any) -> tuple[Any, BaseException | None]:
        try:
            return self.ray.get(handle), None
        except self.ray.exceptions.RayTaskError as error:
            return None, error.cause if isinstance(error.cause, ValueError) else error
        except self.ray.exceptions.RayError as error:
            return None, error

    def close(self) -> None:
        if self._ours:
            self.ray.shutdown()


_ENGINES: dict[str, type[_Backend]] = {"local": _Local, "ray": _Ray}


def shard_slice(text: str, total: int) -> range:
    """Which of `total` shards `--shards i/n` means: every n-th from the i-th, from 0; "" means all."""
    if not text:
        return range(total)
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError(f"--shards {text!r}: give i/n with i from 0 to n-1, as in 0/8 .. 7/8")
    return range(int(match[1]), total, int(match[2]))


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """`--engine`, `--workers` and `--shards`, the same for every command that works shard by shard."""
    group = parser.add_argument_group("where the shards run")
    group.add_argument("--engine", choices=list(_ENGINES), default="local")
    group.add_argument("--workers", type=int, default=0, help="shards at a time (default: one for each CPU)")
    group.add_argument("--shards", default="", metavar="i/n", help="only this slice, for a job array: 0/8 .. 7/8")

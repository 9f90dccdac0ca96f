"""Run a function over many shards: in local processes, as Ray tasks, or a slice of them for a job array.

A shard function is idempotent and takes up its own unfinished work, so that a shard that failed, or whose
process died, is simply run again. Nothing here knows what a shard holds.
"""

from __future__ import annotations

import argparse
import concurrent.futures as futures
import multiprocessing
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
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
    attempts: int = 3,
    tick: Callable[[], None] | None = None,
) -> Iterator[Done[S, R]]:
    """Yield what came of each shard, as they finish.

    Args:
        function: importable by name, for it runs in other processes.
        engine: `local`, or `ray` (a cluster where RAY_ADDRESS is set, else this machine).
        workers: shards at a time; 0 means one for each CPU of this machine or cluster.
        attempts: how often a shard is tried. A ValueError is final: it would come again.
        tick: called about once a second; what it raises ends the run.
    """
    if not specs:
        return
    if engine not in _ENGINES:
        raise ValueError(f"--engine {engine!r}: there are {', '.join(_ENGINES)}")
    backend = _ENGINES[engine](function, workers)
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
                error = backend.error(handle)
                if error is None:
                    yield Done(spec, backend.result(handle), "")
                elif isinstance(error, ValueError) or attempt == attempts:
                    yield Done(spec, None, f"{type(error).__name__}: {error}")
                else:
                    waiting.append((spec, attempt + 1))
    finally:
        backend.close()


class _Backend(Protocol):
    slots: int

    def __init__(self, function: Callable[[Any], Any], workers: int) -> None: ...
    def submit(self, spec: Any) -> Any: ...
    def wait(self, handles: list[Any], seconds: float) -> list[Any]: ...
    def error(self, handle: Any) -> BaseException | None: ...
    def result(self, handle: Any) -> Any: ...
    def close(self) -> None: ...


class _Local:
    """A process pool that survives the death of its processes; they share the memory of what is imported."""

    def __init__(self, function: Callable[[Any], Any], workers: int) -> None:
        self.function, self.slots = function, workers or os.cpu_count() or 1
        methods = multiprocessing.get_all_start_methods()
        self._context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            self._context.set_forkserver_preload([function.__module__])
        self._start()

    def _start(self) -> None:
        self._pool = futures.ProcessPoolExecutor(self.slots, self._context, initializer=_die_with_parent)

    def submit(self, spec: Any) -> futures.Future[Any]:
        try:
            return self._pool.submit(self.function, spec)
        except BrokenProcessPool:  # a process was killed, as by the kernel when memory ran out
            self._start()
            return self._pool.submit(self.function, spec)

    def wait(self, handles: list[futures.Future[Any]], seconds: float) -> list[futures.Future[Any]]:
        return list(futures.wait(handles, seconds, futures.FIRST_COMPLETED).done)

    def error(self, handle: futures.Future[Any]) -> BaseException | None:
        return handle.exception()

    def result(self, handle: futures.Future[Any]) -> Any:
        return handle.result()

    def close(self) -> None:
        processes = list((self._pool._processes or {}).values())  # shutdown() alone waits for running shards
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()


def _die_with_parent() -> None:
    """A killed run must not leave processes behind that go on writing to its shards."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Ray:
    def __init__(self, function: Callable[[Any], Any], workers: int) -> None:
        try:
            import ray
        except ImportError:
            raise ValueError("--engine ray needs Ray: pip install 'llava-simplified[ray]'") from None
        self.ray, address = ray, os.environ.get("RAY_ADDRESS")
        self._ours = not ray.is_initialized()
        if self._ours:
            local = {} if address else {"num_cpus": workers or os.cpu_count(), "include_dashboard": False}
            ray.init(address=address, log_to_driver=False, **local)
        self.slots = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._remote = ray.remote(num_cpus=1, max_retries=0)(function)

    def submit(self, spec: Any) -> Any:
        return self._remote.remote(spec)

    def wait(self, handles: list[Any], seconds: float) -> list[Any]:
        return self.ray.wait(handles, num_returns=1, timeout=seconds)[0]

    def error(self, handle: Any) -> BaseException | None:
        try:
            self.ray.get(handle)
        except self.ray.exceptions.RayTaskError as error:
            return error.cause or error
        except self.ray.exceptions.RayError as error:  # the worker died, or its machine
            return error
        return None

    def result(self, handle: Any) -> Any:
        return self.ray.get(handle)

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
    group.add_argument(
        "--shards", default="", metavar="i/n", help="only this slice, for a job array: 0/8 .. 7/8"
    )

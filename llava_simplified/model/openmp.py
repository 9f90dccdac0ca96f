"""Keep threads that only prepare images from slowing down the thread that computes.

On a CPU, torch computes with OpenMP. Every Python thread that calls torch gets its own OpenMP threads, one fewer than there
are CPUs, which exist until the Python thread ends. While they wait for the next operation they spin, because waking them up
would take longer than many operations:

    Python thread "main"     operation x operation x operation        x  both threads meet at the end of an operation
    its OpenMP thread        operation x operation x operation

But as soon as a process has more OpenMP threads than CPUs, the library (GNU OpenMP) lets all of them sleep instead, even if
the others have nothing to do. A decoding step, which consists of a thousand short operations, then takes up to twice as long.
So only one Python thread at a time may have OpenMP threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

T = TypeVar("T")

# Held while the default of new threads is wrong; see `use_one_thread`.
_default_lock = threading.Lock()


def use_one_thread() -> None:
    """Let torch compute without OpenMP threads in the calling thread. Pass it as `initializer` to `ThreadPoolExecutor`."""
    with _default_lock:
        count = torch.get_num_threads()
        torch.set_num_threads(1)
        # The call above also changes the default of threads that have not called torch yet. The default can be restored
        # only together with the number of the calling thread, so restore it in another thread.
        run_in_own_thread(lambda: torch.set_num_threads(count))


def use_all_threads() -> None:
    """Let torch compute with all OpenMP threads in the calling thread, even if others call `use_one_thread` meanwhile.

    Pass it as `initializer` to the `ThreadPoolExecutor` of a thread that computes.
    """
    with _default_lock:
        torch.get_num_threads()  # a thread keeps the default that it finds at its first call


def run_in_own_thread(work: Callable[[], T]) -> T:
    """Run a function in a new thread, and return its result. Its OpenMP threads end together with the new thread.

    Signals and Ctrl-C interrupt the wait, although the function continues to run until the process exits.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
            future.set_exception(error)

    # A daemon thread does not keep the process alive after Ctrl-C.
    threading.Thread(target=run, daemon=True).start()
    return future.result()

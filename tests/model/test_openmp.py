"""Only one Python thread at a time has OpenMP threads; more than one make decoding up to twice as slow."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

from llava_simplified.model.openmp import run_in_own_thread, use_all_threads, use_one_thread

NUM_THREADS = 3


@pytest.fixture(autouse=True)
def several_threads() -> Iterator[None]:
    """Let new threads use several OpenMP threads. The main thread must not start any: tests fork it."""
    before = torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)
    yield
    torch.set_num_threads(before)


def test_use_one_thread_changes_only_the_calling_thread() -> None:
    with ThreadPoolExecutor(1, initializer=use_one_thread) as reader:
        assert reader.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == NUM_THREADS
        with ThreadPoolExecutor(1) as other:
            assert other.submit(torch.get_num_threads).result() == NUM_THREADS, "a new thread"
        assert reader.submit(torch.get_num_threads).result() == 1


def test_threads_that_start_together_do_not_change_the_default() -> None:
    barrier = threading.Barrier(8)
    numbers: list[int] = []

    def start(initialize: Callable[[], None]) -> None:
        barrier.wait()
        initialize()
        numbers.append(torch.get_num_threads())

    for _ in range(20):
        starts = [use_one_thread] * 6 + [use_all_threads] * 2
        threads = [threading.Thread(target=start, args=(initialize,)) for initialize in starts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(numbers) == [1] * 120 + [NUM_THREADS] * 40
    assert run_in_own_thread(torch.get_num_threads) == NUM_THREADS, "the default"


@pytest.mark.skipif(sys.platform != "linux", reason="expects GNU OpenMP")
@pytest.mark.parametrize(
    ("run", "expected"), [(run_in_own_thread, 0), (lambda work: work(), NUM_THREADS - 1)]
)
def test_openmp_threads_end_with_their_thread(
    run: Callable[[Callable[[], object]], object], expected: int
) -> None:
    """The second case shows that the operation is large enough to start OpenMP threads."""
    process = psutil.Process()

    def count_new_threads() -> int:
        before = process.num_threads()
        run(lambda: torch.zeros(1_000_000).add(1))
        for _ in range(500):  # threads end a little later than their work
            if process.num_threads() - before == expected:
                break
            time.sleep(0.01)
        return process.num_threads() - before

    # This thread may have its OpenMP threads already, so count in a new one.
    with ThreadPoolExecutor(1) as fresh:
        assert fresh.submit(count_new_threads).result() == expected


def test_run_in_own_thread_returns_the_result_and_raises_errors() -> None:
    def fail() -> None:
        raise KeyError("x")

    assert run_in_own_thread(threading.get_ident) != threading.get_ident()
    with pytest.raises(KeyError, match="x"):
        run_in_own_thread(fail)

"""Run tasks over ranges of a file of records, with one progress line for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol, TypeVar

from llava_simplified.data.rows import RowFile, open_rows
from llava_simplified.jobs import Progress
from llava_simplified.workers import run_tasks


class RecordRange(Protocol):
    """A task over the records from `start` to `stop` (exclusive)."""

    @property
    def start(self) -> int:
        """Index of the first record."""

    @property
    def stop(self) -> int:
        """Index after the last record."""


T = TypeVar("T", bound=RecordRange)


@lru_cache(maxsize=1)
def cached_rows(path: str) -> RowFile:
    """Open a file of records, and keep it open for the next task of this worker process."""
    return open_rows(path)


def run_record_tasks(
    function: Callable[[T], Any],
    tasks: Sequence[T],
    *,
    engine: str,
    workers: int,
    progress: bool,
) -> None:
    """Run a function over all tasks.

    Raises:
        ValueError: A task failed at every attempt.
    """
    # Count records instead of tasks, since the last task is often much smaller than the others.
    total = sum(task.stop - task.start for task in tasks)
    with Progress(total, "records", enabled=progress) as shown:
        for result in run_tasks(function, tasks, engine=engine, workers=workers):
            # A bad record is an ordinary result. A failed task is a problem of the code or the machine, so stop.
            if result.error:
                raise ValueError(f"{result.error}\nRun the same command again to continue.")
            shown.advance(result.spec.stop - result.spec.start)

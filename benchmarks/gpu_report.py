"""Print each measurement of a section of `bench_gpu.py`, and append it to a file."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Values = dict[str, Any]


class Report:
    """Make the measurements of a section, print them, and write them to a file.

    Args:
        path: A file of JSON lines, one per measurement. Each one is written immediately, so that none is lost
            if the process is killed.
        time_limit: Maximum seconds of the section. `attempt` skips measurements that would exceed it.
    """

    def __init__(self, path: Path, time_limit: float) -> None:
        self.path = path
        self._end = time.monotonic() + time_limit

    @property
    def seconds_left(self) -> float:
        """Seconds until the time limit; negative after it."""
        return self._end - time.monotonic()

    def add(self, name: str, **values: Any) -> None:
        """Write a measurement, and print it."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"name": name, **values}) + "\n")
        shown = "   ".join(f"{key} {_format(value)}" for key, value in values.items())
        print(f"  {name:44} {shown}", flush=True)

    def attempt(
        self, name: str, measure: Callable[[], Values], seconds: float = 0
    ) -> Values | None:
        """Make a measurement, and write its values. A failure is written too, and the section continues.

        Args:
            name: What is measured.
            measure: Returns the measured values.
            seconds: Expected duration. The measurement is skipped if less time is left.

        Returns:
            The values, or None if the measurement failed or was skipped.
        """
        if self.seconds_left < seconds:
            left = max(0, round(self.seconds_left))
            self.add(name, skipped=f"it takes about {seconds:.0f} s, but only {left} s are left")
            return None
        try:
            values = measure()
        except torch.OutOfMemoryError:
            self.add(name, failed="out of memory")
            return None
        except ModuleNotFoundError as error:
            # Some measurements use optional packages, such as kernels.
            missing = f"{error.name} is not installed; run pip install {error.name}"
            self.add(name, skipped=missing)
            return None
        except Exception as error:  # noqa: BLE001 - the next measurement does not depend on this one
            frame = traceback.extract_tb(error.__traceback__)[
                -1
            ]  # the innermost one raised the error
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            self.add(name, failed=f"{type(error).__name__}: {error} ({where})"[:600])
            return None
        finally:
            # The next measurement must not run out of memory because of this one.
            free_memory()
        self.add(name, **values)
        return values


def free_memory() -> None:
    """Return the memory of unused objects to the device."""
    # Models are in reference cycles, which only the garbage collector frees.
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _format(value: Any) -> str:
    """Return a value for people: floats with 4 significant digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)

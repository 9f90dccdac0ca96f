"""Tasks for the tests of `run_tasks`. Ray's workers import this module, and not the tests, which import far more."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def square(number: int) -> int:
    return number * number


def fail_once(path: str) -> str:
    """Fail at the first call, with an error that is worth a retry."""
    if not Path(path).exists():
        Path(path).touch()
        raise RuntimeError("first time")
    return path


def fail_always(number: int) -> int:
    """Fail with a user error (ValueError), which is not retried."""
    raise ValueError(f"row {number} is wrong")


def die_once(path: str) -> str:
    """Kill the worker process, the first time that a "bad" task runs."""
    if "bad" in path and not Path(path).exists():
        Path(path).touch()
        # Windows has no SIGKILL; there, every signal ends a process at once.
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
    time.sleep(0.2)
    return path

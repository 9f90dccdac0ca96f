"""The core of resumable jobs: settings, locks, journals, atomic outputs and progress.

Download, cleaning, captioning and encoding take hours, and are killed, restarted and run twice by mistake. They
all keep the same promises with the tools of this module:

- **Settings.** `check_settings` stores what the job was started with. A restart with other settings is an error
  that names the difference; it never mixes two jobs in one output.
- **Lock.** `exclusive_lock` lets one process at a time write to an output. The operating system releases the lock
  of a process that is killed.
- **Journal.** `Journal` is a file of JSON lines, one per finished item, appended after the item's result is
  safely written. A torn last line (the process was killed while it wrote) is cut off when the journal is read.
- **Atomic outputs.** `atomic_file` and `atomic_directory` write under a temporary name and rename: nobody ever
  reads half an output.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

LOCK_TIMEOUT = 8.0  # seconds: the workers of a killed process may live a moment longer


# ---- settings ----


def check_settings(path: Path, settings: Mapping[str, Any], output: str) -> bool:
    """Store the settings of a new job, or compare them with those of the job that is resumed.

    Args:
        path: The settings file, beside the output.
        settings: JSON values by name; everything that decides what the output contains.
        output: The output, for the error message.

    Returns:
        True if the job is resumed, False if it is new.

    Raises:
        ValueError: The job was started with other settings. The message names each difference.
    """
    current = json.loads(json.dumps(settings))
    if not path.exists():
        with atomic_file(path) as part:
            part.write_text(json.dumps(current, indent=1, ensure_ascii=False), encoding="utf-8")
        return False
    previous = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name in current if name not in previous or previous[name] != current[name]]
    if changed:
        raise ValueError(
            f"{output} was started with different settings ({', '.join(changed)}). "
            "Use the same settings to continue, delete the output, or pass another --output."
        )
    return True


# ---- lock ----


@contextmanager
def exclusive_lock(path: Path, output: str, timeout: float = LOCK_TIMEOUT) -> Iterator[None]:
    """Hold the lock file at `path`: only one process at a time writes to `output`.

    Args:
        path: The lock file.
        output: The output, for the error message.
        timeout: Seconds to wait for the process that holds the lock.

    Raises:
        ValueError: Another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        raise ValueError(
            f"{output}: another process is writing to it. Wait until it ends."
        ) from None
    try:
        yield
    finally:
        lock.release()


# ---- journal ----


def read_json_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield each complete line of a file of JSON lines, with the position of its end in bytes.

    Lines end with "\\n" only; other line separators of Unicode are part of a text.
    """
    position = 0
    with path.open("rb") as stream:
        for line in stream:
            if not line.endswith(b"\n"):
                return
            position += len(line)
            yield json.loads(line), position


def encode_json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Return rows as JSON lines in UTF-8."""
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all bytes to a file descriptor: `os.write` may write fewer than it is given."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


class Journal:
    """An append-only file of JSON lines: what a job has finished.

    Use it as a context manager. Opening it cuts off a torn last line. A row is appended with a single write, so
    that a killed process leaves whole lines and at most one torn one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1

    def __enter__(self) -> Journal:
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        ends = [0]
        ends += [end for _, end in read_json_lines(self.path)]
        os.ftruncate(self._descriptor, ends[-1])
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
        self._descriptor = -1

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows, oldest first."""
        return [row for row, _ in read_json_lines(self.path)]

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows."""
        write_all(self._descriptor, encode_json_lines(rows))

    def truncate(self, end: int) -> None:
        """Cut the journal off after `end` bytes."""
        os.ftruncate(self._descriptor, end)


# ---- atomic outputs ----


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`, and rename it to `target` when the block ends without an error."""
    part = target.with_name(f".{target.name}.part{uuid.uuid4().hex[:8]}")
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target`, and rename it to `target` when the block ends without an error.

    Raises:
        FileExistsError: `target` exists already.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists already: choose another output folder")
    part = target.with_name(f".{target.name}.part{uuid.uuid4().hex[:8]}")
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


# ---- progress ----


class Progress:
    """The progress of a job on standard error: one line that is redrawn on a terminal, else a line now and then.

    Args:
        total: Number of items; 0 if it is not known.
        unit: What is counted, in the plural: "records".
        initial: Items that were finished before this run; they do not count in the rate.
        enabled: False shows nothing.
    """

    TERMINAL_INTERVAL = 0.2  # seconds between two updates
    LOG_INTERVAL = 30.0

    def __init__(self, total: int, unit: str, initial: int = 0, enabled: bool = True) -> None:
        self.total = total
        self.unit = unit
        self.done = initial
        self.details = ""
        self._initial = initial
        self._enabled = enabled
        self._start = time.monotonic()
        self._last_shown = self._start
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled and self._terminal:
            self._show()
            sys.stderr.write("\n")

    def advance(self, count: int = 1) -> None:
        """Count finished items."""
        self.update(self.done + count)

    def update(self, done: int, details: str = "") -> None:
        """Set the number of finished items, and what to show behind it."""
        self.done = done
        self.details = details or self.details
        now = time.monotonic()
        interval = self.TERMINAL_INTERVAL if self._terminal else self.LOG_INTERVAL
        if self._enabled and now - self._last_shown >= interval:
            self._last_shown = now
            self._show()

    def _show(self) -> None:
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = (self.done - self._initial) / seconds
        line = f"{self.done:,}"
        if self.total:
            line += f" of {self.total:,}"
        line += f" {self.unit}, {rate:,.1f}/s"
        if self.details:
            line += f", {self.details}"
        if self.total > self.done and rate > 0:
            line += f", {format_duration((self.total - self.done) / rate)} left"
        if self._terminal:
            sys.stderr.write(f"\r{line}\x1b[K")
        else:
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def format_duration(seconds: float) -> str:
    """Return a duration as h:mm:ss."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"

"""The core of resumable jobs: settings, locks, journals, atomic outputs and progress.

Download, cleaning, captioning and encoding take hours. They are killed, restarted, and sometimes started twice by
mistake. All of them keep the same promises with the tools of this module:

- **Settings.** `check_settings` stores what a job was started with. A restart with other settings is an error that
  names each difference, so that one output never mixes two jobs.
- **Lock.** `exclusive_lock` lets one process at a time write to an output. The operating system releases the lock of
  a process that is killed.
- **Journal.** `Journal` is a file of JSON lines, one per finished item. A line is appended only after the result of
  the item is safely in the output. A torn last line (the process was killed while it wrote) is cut off when the
  journal is opened again.
- **Atomic outputs.** `atomic_file` and `atomic_directory` write under a temporary name and rename at the end, so that
  nobody ever reads half an output.
- **Progress.** `Progress` shows how far the job is: on one line of a terminal, or as an occasional line of a log.

A job that uses them looks like this::

    with exclusive_lock(work / "job.lock", output):
        check_settings(work / "settings.json", settings, output)
        with Journal(work / "journal") as journal:
            finished = {row["index"] for row in journal.rows()}
            for index in range(count):
                if index not in finished:
                    write_result(index)
                    journal.append([{"index": index}])
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

# Seconds to wait for a lock. The workers of a killed run notice it after half a second, and finish what they are
# writing; a restart must wait for them and not fail.
LOCK_TIMEOUT = 8.0
# Half of a surrogate pair cannot be encoded in UTF-8. Escaped like this it is what JSON writes for it, "\\ud83d", so that
# one bad text, or a file name that is not UTF-8, does not end a job that only passes it on.
SURROGATES_AS_ESCAPES = "backslashreplace"


# ---- settings ----


def check_settings(
    path: Path,
    settings: Mapping[str, Any],
    output: str | Path,
    *,
    option: str = "--output",
) -> bool:
    """Store the settings of a new job, or compare them with those of the job that is resumed.

    Args:
        path: The settings file, beside the output.
        settings: JSON values by name: everything that decides what the output contains.
        output: The output, for the error message.
        option: The command-line option that names the output, for the error message.

    Returns:
        True if the job is resumed, False if it is new.

    Raises:
        ValueError: The job was started with other settings. The message names each difference.
    """
    if path.exists():
        try:
            previous = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{path} is not valid JSON ({error}). Delete {output} and start again."
            ) from None
        compare_settings(previous, settings, output, option=option)
        return True
    # A new job. Atomic, because a killed process must not leave half a settings file.
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as part:
        text = json.dumps(settings, indent=1, ensure_ascii=False)
        part.write_text(text, encoding="utf-8", errors=SURROGATES_AS_ESCAPES)
    return False


def compare_settings(
    previous: Mapping[str, Any],
    current: Mapping[str, Any],
    output: str | Path,
    *,
    option: str = "--output",
) -> None:
    """Check that a job is resumed with the settings that it was started with.

    Settings that only `previous` has are ignored: a later version may have dropped one.

    Raises:
        ValueError: A setting differs. The message names each one with both values.
    """
    current = json.loads(json.dumps(current))  # tuples become lists, as in the file
    differences = []
    # All differences in one message: nobody wants to correct one after the other.
    for name, value in current.items():
        if name not in previous:
            differences.append(f"{name} was not set, now it is {_short(value)}")
        elif previous[name] != value:
            differences.append(f"{name} was {_short(previous[name])}, now it is {_short(value)}")
    if differences:
        raise ValueError(
            f"{output} was started with different settings: {'; '.join(differences)}. "
            f"Use the same settings to continue, delete the output, or pass another {option}."
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---- lock ----


@contextlib.contextmanager
def exclusive_lock(
    path: Path,
    output: str | Path,
    timeout: float | None = None,
) -> Iterator[None]:
    """Hold the lock file at `path`, so that only one process at a time writes to `output`.

    Args:
        path: The lock file. Its folder is created.
        output: The output, for the error message.
        timeout: Seconds to wait for the process that holds the lock (default: `LOCK_TIMEOUT`).

    Raises:
        ValueError: Another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # An operating system lock and not a file that exists: it ends with its process, however that
    # ends.
    lock = FileLock(path)
    try:
        _acquire(lock, path, LOCK_TIMEOUT if timeout is None else timeout)
    except Timeout:
        raise ValueError(
            f"{output}: another process is writing to it (lock file {path}). "
            "Wait until it ends, or pass another --output."
        ) from None
    try:
        yield
    finally:
        # Delete before releasing: afterwards the file could already belong to the next holder. On Windows an open
        # file cannot be deleted, but there `release` deletes it.
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()


def _acquire(lock: FileLock, path: Path, timeout: float) -> None:
    """Acquire a lock whose file every holder deletes at the end.

    Another process may have opened the file that is being deleted. It gets the lock of a file that is no longer at
    `path`, where a third process makes a new one: both would hold the lock. So the file is compared afterwards.

        first     holds ---- deletes, releases
        second      opens, waits -------------- gets the lock of the deleted file: tries again
        third                          makes a new file, gets its lock

    Raises:
        Timeout: Another process holds the lock.
    """
    deadline = time.monotonic() + timeout
    while True:
        lock.acquire(timeout=max(0.0, deadline - time.monotonic()))
        descriptor = lock._context.lock_file_fd
        with contextlib.suppress(FileNotFoundError):
            if descriptor is None or os.path.samestat(os.fstat(descriptor), path.stat()):
                return
        lock.release()


# ---- journal ----


def read_json_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield each complete line of a file of JSON lines, with the position of its end in bytes.

    Lines end with "\\n" only: the other line separators of Unicode, such as U+2028, may be part of a text. The file
    is read as it is iterated; a torn last line is ignored.

    Raises:
        ValueError: A complete line is not JSON, as after a disk error. The message names the file and the position.
    """
    start = 0
    with path.open("rb") as stream:
        for line in stream:
            # Only the last line can be torn, because every append writes whole lines.
            if not line.endswith(b"\n"):
                return
            end = start + len(line)
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path}: the line at byte {start} is not JSON ({error}). "
                    f"Cut the file there to continue (truncate --size={start} '{path}')."
                ) from None
            yield row, end
            start = end


def encode_json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Return rows as JSON lines in UTF-8."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    return "".join(lines).encode(errors=SURROGATES_AS_ESCAPES)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all bytes to a file descriptor.

    `os.write` may write fewer bytes than it is given, for example when the disk is nearly full.
    """
    view = memoryview(data)
    while view:
        written = os.write(descriptor, view)
        view = view[written:]


class Journal:
    """An append-only file of JSON lines: what a job has finished.

    Use it as a context manager, while holding the lock of the output. Opening it cuts off a torn last line. Rows are
    appended with a single write, so that a killed process leaves complete lines and at most one torn one. Nothing is
    flushed to the disk (`fsync`) on every append: what the operating system has accepted survives the process,
    although not a power failure.

    Args:
        path: The journal; it is created if it does not exist.
    """

    _BLOCK = 1 << 16  # bytes that are searched at once for the last line end

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1

    def __enter__(self) -> Journal:
        # Windows would otherwise translate line ends.
        binary = getattr(os, "O_BINARY", 0)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | binary
        self._descriptor = os.open(self.path, flags, 0o666)
        # Otherwise the next row would be appended to half a line, and both would be lost.
        self.truncate(self._end_of_last_line())
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
        self._descriptor = -1

    def _end_of_last_line(self) -> int:
        """Return the position behind the last line end, searching backwards: journals can be large."""
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        while end > 0:
            start = max(0, end - self._BLOCK)
            os.lseek(self._descriptor, start, os.SEEK_SET)
            block = os.read(self._descriptor, end - start)
            position = block.rfind(b"\n")
            if position >= 0:
                return start + position + 1
            end = start
        return 0

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield all rows, oldest first."""
        for row, _ in read_json_lines(self.path):
            yield row

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows with a single write."""
        write_all(self._descriptor, encode_json_lines(rows))

    def truncate(self, end: int) -> None:
        """Cut the journal off after `end` bytes, for example behind the last complete group of rows."""
        os.ftruncate(self._descriptor, end)


# ---- atomic outputs ----


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`, and rename it to `target` when the block ends without an error.

    After an error the temporary file is deleted, and an older `target` stays as it was.
    """
    part = _temporary_path(target)
    # Whoever writes the file may replace it by one that only the owner can read, as safetensors does.
    part.touch()
    permissions = part.stat().st_mode
    try:
        yield part
        part.chmod(permissions)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target`, and rename it to `target` when the block ends without an error.

    Raises:
        FileExistsError: `target` exists already.
    """
    # Checked before the work is done; `rename` would replace an empty folder.
    if target.exists():
        raise FileExistsError(f"{target} exists already: choose another output folder")
    part = _temporary_path(target)
    part.mkdir(parents=True)
    try:
        yield part
        use_default_permissions(part)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def use_default_permissions(folder: Path) -> None:
    """Give everything in a folder the permissions that new files and folders have: those of the umask.

    Files of safetensors and `tempfile` can be read by their owner alone, whatever the umask is. Published like that,
    a model could not be served by another user.

    Args:
        folder: A folder that `mkdir` has created. Its own permissions show what the umask is; asking the operating
            system would change the umask of all threads for a moment.
    """
    folder_permissions = folder.stat().st_mode & 0o777
    file_permissions = folder_permissions & 0o666
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod(folder_permissions if path.is_dir() else file_permissions)


def remove_temporary_files(target: Path) -> None:
    """Delete what killed processes have left of `target`. Only the holder of the output's lock may call this."""
    for part in target.parent.glob(f".{glob.escape(target.name)}.part*"):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def _temporary_path(target: Path) -> Path:
    """Return an unused name beside `target`: a rename is only atomic within one file system."""
    return target.with_name(f".{target.name}.part{uuid.uuid4().hex[:8]}")


# ---- progress ----


class Progress:
    """The progress of a job on standard error.

    On a terminal it is one line that is redrawn; elsewhere (a log file, a batch system) a line is printed now and then.

    Args:
        total: Number of items; 0 if it is not known.
        unit: What is counted, in the plural, for example "records".
        initial: Items that were finished before this run. They do not count in the rate.
        enabled: False prints nothing.
    """

    TERMINAL_INTERVAL = 0.2  # seconds between two updates
    LOG_INTERVAL = 30.0

    def __init__(self, total: int, unit: str, initial: int = 0, enabled: bool = True) -> None:
        self.total = total
        self.unit = unit
        self.done = initial
        self.initial = initial
        self.details = ""
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
            sys.stderr.flush()

    def advance(self, count: int = 1) -> None:
        """Count `count` more finished items."""
        self.update(self.done + count)

    def update(self, done: int, details: str = "") -> None:
        """Set the number of finished items.

        Args:
            done: Finished items, including the initial ones.
            details: Text to show behind the number, for example "3 failed". An empty text keeps the last one.
        """
        self.done = done
        self.details = details or self.details
        if not self._enabled:
            return
        now = time.monotonic()
        interval = self.TERMINAL_INTERVAL if self._terminal else self.LOG_INTERVAL
        if now - self._last_shown >= interval:
            self._last_shown = now
            self._show()

    def _show(self) -> None:
        line = self.line()
        if self._terminal:
            # Back to the start of the line, and erase what a longer line has left behind.
            sys.stderr.write(f"\r{line}\x1b[K")
        else:
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def line(self) -> str:
        """Return the line that is shown: count, rate, details and the time that is left."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        # Only what this run has done: the rows of an earlier run took none of its time.
        rate = (self.done - self.initial) / seconds
        line = f"{self.done:,}"
        if self.total:
            line += f" of {self.total:,}"
        line += f" {self.unit}, {rate:,.1f}/s"
        if self.details:
            line += f", {self.details}"
        if self.total > self.done and rate > 0:
            line += f", {format_duration((self.total - self.done) / rate)} left"
        return line


def format_duration(seconds: float) -> str:
    """Return a duration as h:mm:ss."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"

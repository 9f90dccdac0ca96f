"""The core of resumable jobs: settings, locks, journals, atomic outputs and progress.

Download, cleaning, captioning and encoding take hours. They are killed, restarted, and sometimes started twice by
mistake. All of them use the tools of this module for the same guarantees:

- **Settings.** `store_or_check_settings` stores the settings of a new job. A restart with different settings raises an
  error that names each difference, so that one output never mixes two jobs.
- **Lock.** `exclusive_lock` lets one process at a time write to an output. The operating system releases the lock of
  a process that is killed.
- **Journal.** `Journal` is a file of JSON lines, one per finished item. A line is appended only after the result of
  the item is in the output. If the process was killed while writing, the incomplete last line is removed when the
  journal is opened again.
- **Atomic outputs.** `atomic_file` and `atomic_directory` write under a temporary name and rename at the end, so that
  an incomplete output never has the final name.
- **Progress.** `Progress` prints the progress of the job: on one line of a terminal, or as an occasional log line.

A job uses them like this::

    with exclusive_lock(work / "job.lock", output):
        store_or_check_settings(work / "settings.json", settings, output)
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
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from llava_simplified.options import escape_control_characters

# Seconds to wait for a lock. After a run is killed, its workers may continue to write for a short time, because they check
# only every half second whether it still exists. A restart must wait for them instead of failing.
LOCK_TIMEOUT = 8.0
# How to encode half of a surrogate pair, which UTF-8 does not support: as the escape that JSON also uses, "\ud83d". So
# one bad text, or a file name that is not UTF-8, does not end a job that only copies it.
SURROGATES_AS_ESCAPES = "backslashreplace"
# Seconds between attempts to rename a folder on Windows.
_RENAME_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
# Held by `read_at` while it moves the position of a file.
_READING = threading.Lock()


# ---- settings ----


def store_or_check_settings(
    path: Path,
    settings: Mapping[str, Any],
    output: str | Path,
    *,
    option: str = "--output",
) -> bool:
    """Store the settings of a new job, or compare them with those of the job that is resumed.

    Args:
        path: The settings file.
        settings: All settings that affect the contents of the output, by name. The values must be JSON-serializable.
        output: The output, for the error message.
        option: The command-line option that names the output, for the error message.

    Returns:
        True if the job is resumed, False if it is new.

    Raises:
        ValueError: The job was started with different settings. The message names each difference.
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
    # This is a new job. Write the file atomically, so that a killed process leaves no incomplete one.
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

    Args:
        previous: The settings that were stored when the job was started.
        current: The settings of the restart.
        output: The output, for the error message.
        option: The command-line option that names the output, for the error message.

    Raises:
        ValueError: A setting differs. The message names each one with both values.
    """
    # Convert the settings to JSON and back, as those in the file were. This turns tuples into lists.
    current = json.loads(json.dumps(current))
    # Collect all differences, so that the user can correct them together.
    differences = []
    for name, value in current.items():
        if name not in previous:
            differences.append(f"{name} was not set, now it is {_short(value)}")
        elif previous[name] != value:
            differences.append(f"{name} was {_short(previous[name])}, now it is {_short(value)}")
    if differences:
        raise ValueError(
            f"{output} was started with different settings: {'; '.join(differences)}. "
            f"Use the same settings to continue, delete it, or pass a different {option}."
        )


def _short(value: Any) -> str:
    """Return a value as JSON, cut to 80 characters."""
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
    # Use a lock of the operating system, which is released when the process ends. A lock file that merely exists does
    # not mean that the output is locked.
    lock = FileLock(path)
    try:
        _acquire(lock, path, LOCK_TIMEOUT if timeout is None else timeout)
    except Timeout:
        raise ValueError(
            f"{output}: another process is writing here (lock file {path}). "
            "Wait until that process ends, or choose another output."
        ) from None
    try:
        yield
    finally:
        # Delete the file before releasing the lock: afterward, the next process could already hold a lock on it. Windows
        # does not delete open files; there, `release` deletes the file.
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()


def _acquire(lock: FileLock, path: Path, timeout: float) -> None:
    """Acquire a lock whose file every holder deletes at the end.

    A process may wait for the lock of a file that the holder then deletes. It would acquire the lock of a file that is no
    longer at `path`, and a third process could create a new file there and lock it: both would then hold
    a lock. So, after acquiring a lock, check that the locked file is still the one at `path`; if not, try again.

        first     holds ---- deletes, releases
        second      opens, waits -------------- acquires the lock of the deleted file: tries again
        third                          creates a new file, locks it

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

    Only "\\n" ends a line. Other line separators of Unicode, such as U+2028, may be part of a text. The file is read
    lazily, and an incomplete last line is ignored.

    Raises:
        ValueError: A complete line is not JSON, for example after a disk error. The message names the file and the
            position.
    """
    start = 0
    with path.open("rb") as stream:
        for line in stream:
            # Stop at an incomplete line. It must be the last one, because every append writes whole lines.
            if not line.endswith(b"\n"):
                return
            end = start + len(line)
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path}: the line at byte {start} is not JSON ({error}). "
                    "To continue without this line and all lines after it, truncate the file: "
                    f"truncate --size={start} '{path}'"
                ) from None
            yield row, end
            start = end


def encode_json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Return rows as JSON lines in UTF-8."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    return "".join(lines).encode(errors=SURROGATES_AS_ESCAPES)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all bytes to a file descriptor.

    `os.write` alone may write fewer bytes, for example if the disk is nearly full.
    """
    view = memoryview(data)
    while view:
        written = os.write(descriptor, view)
        view = view[written:]


def open_descriptor(path: Path, flags: int = 0) -> int:
    """Open a file for reading and writing, create it if it is missing, and return its descriptor.

    Args:
        path: The file.
        flags: More flags of `os.open`.
    """
    # Without O_BINARY, Windows would write each byte "\n" as two bytes, even within an image.
    binary = getattr(os, "O_BINARY", 0)
    return os.open(path, os.O_RDWR | os.O_CREAT | binary | flags, 0o666)


def read_at(file: IO[bytes], length: int, start: int) -> bytes:
    """Read up to `length` bytes from a position of a file. Forked workers and threads may share the file.

    Args:
        file: An unbuffered file. Its position may change.
        length: Maximum number of bytes.
        start: The position in bytes.
    """
    # pread does not move the position of the file. Forked workers share that position, so another worker could move it
    # between a seek and a read.
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), length, start)
    # Windows has no pread. It does not fork workers either, so a lock between threads is enough.
    with _READING:
        file.seek(start)
        return file.read(length)


class Journal:
    """An append-only file of JSON lines, which records the finished items of a job.

    Use it as a context manager, while holding the lock of the output. Opening it removes an incomplete last line. Rows
    are appended with a single write, so that a killed process leaves at most one incomplete line. Appends are not synced
    to the disk (`fsync`): written rows survive the death of the process, but not a power failure.

    Args:
        path: The journal; it is created if it does not exist.
    """

    _BLOCK = 1 << 16  # bytes to read at a time when searching for the last line end

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1

    def __enter__(self) -> Journal:
        self._descriptor = open_descriptor(self.path, os.O_APPEND)
        # Remove an incomplete last line. Otherwise, the next row would be appended to it:
        #
        #     {"index": 0, ...}\n
        #     {"index": 1, ...}\n
        #     {"ind                    <- the process was killed here
        self.truncate(self._end_of_last_line())
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
        self._descriptor = -1

    def _end_of_last_line(self) -> int:
        """Return the position after the last line end."""
        # Search backward from the end of the file, because journals can be large.
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
        """Truncate the journal to `end` bytes, for example to remove an incomplete group of rows."""
        os.ftruncate(self._descriptor, end)


# ---- atomic outputs ----


def prepare_output_file(path: Path) -> None:
    """Create the folder of an output file. Call this before a long job, so that the job does not fail at its end.

    Raises:
        ValueError: The path is a folder, or its folder cannot be created.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder. Add the name of the output file, or choose another.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(
            f"{path}: the folder cannot be created, because a part of its path is a file. Choose another output."
        ) from None


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path, and rename it to `target` when the block ends without an error.

    After an error the temporary file is deleted, and an existing `target` is not changed.
    """
    part = _temporary_path(target)
    # The caller may replace the file by one that only the owner can read, as safetensors does. So remember the default
    # permissions, and restore them at the end.
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
    """Yield a temporary folder, and rename it to `target` when the block ends without an error.

    Raises:
        FileExistsError: `target` exists already.
    """
    # Check this before the work is done. (`rename` would also silently replace an empty folder.)
    if target.exists():
        raise FileExistsError(
            f"{target} exists already; delete it, or choose another output folder"
        )
    part = _temporary_path(target)
    part.mkdir(parents=True)
    try:
        yield part
        use_default_permissions(part)
        rename_folder(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def rename_folder(folder: Path, target: Path) -> None:
    """Rename a folder.

    Windows does not rename a folder while a file in it is open, and virus scanners and search indexers open new files for
    a moment. So, on Windows, try again for some seconds.
    """
    for seconds in _RENAME_PAUSES if sys.platform == "win32" else ():
        with contextlib.suppress(PermissionError):
            folder.rename(target)
            return
        time.sleep(seconds)
    folder.rename(target)


def replace_folder(folder: Path, target: Path) -> None:
    """Rename a folder to `target`. An existing folder of that name is deleted after the new one is in its place.

    If the process is killed at any moment, a complete folder remains: at `target`, or beside it as ".NAME.old".
    """
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        rename_folder(target, old)
    rename_folder(folder, target)
    shutil.rmtree(old, ignore_errors=True)


def use_default_permissions(folder: Path) -> None:
    """Give everything in a folder the permissions that new files and folders have according to the umask.

    safetensors and `tempfile` create files that only their owner can read, whatever the umask is. Without this
    function, another user could not serve the model.

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
    """Delete the temporary files and folders of `target` that killed processes left.

    The caller must hold the lock, so that no other process is writing them.
    """
    for part in target.parent.glob(f".{glob.escape(target.name)}.part*"):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def _temporary_path(target: Path) -> Path:
    """Return an unused temporary path for `target`."""
    # Use the folder of `target`, since a rename is atomic only within one file system.
    return target.with_name(f".{target.name}.part{uuid.uuid4().hex[:8]}")


# ---- progress ----


class Progress:
    """The progress of a job on standard error.

    On a terminal this is one line that is redrawn; elsewhere (a log file, a batch system) a line is printed occasionally.

    Args:
        total: Number of items; 0 if unknown.
        unit: Name of the items in the plural, for example "records".
        initial: Number of items that were finished before this run. They are excluded from the rate.
        enabled: Print the progress.
    """

    # Minimum number of seconds between two updates: on a terminal, and elsewhere.
    TERMINAL_INTERVAL = 0.2
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
        """Add `count` to the number of finished items."""
        self.update(self.done + count)

    def update(self, done: int, details: str = "") -> None:
        """Set the number of finished items.

        Args:
            done: Number of finished items, including the initial ones.
            details: Text to print after the rate, for example "3 failed". If empty, the previous text remains.
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
        """Print the progress line: replace it on a terminal, else append a line."""
        line = escape_control_characters(self.line())
        if self._terminal:
            # Return to the start of the line, and erase the rest of a longer previous line.
            sys.stderr.write(f"\r{line}\x1b[K")
        else:
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def line(self) -> str:
        """Return the progress line: count, rate, details and remaining time."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        # Compute the rate from the items of this run only.
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

"""The core of resumable jobs: settings, locks between processes, journals, atomic outputs, progress."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from llava_simplified import jobs
from llava_simplified.jobs import (
    Journal,
    Progress,
    atomic_directory,
    atomic_file,
    compare_settings,
    encode_json_lines,
    exclusive_lock,
    format_duration,
    read_json_lines,
    remove_temporary_files,
    rename_folder,
    replace_folder,
    store_or_check_settings,
)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- settings ----


def test_store_or_check_settings_stores_the_settings_of_a_new_job(tmp_path: Path) -> None:
    path = tmp_path / "new" / "settings.json"
    settings = {"source": "a.tsv", "sizes": (1, 2)}
    assert store_or_check_settings(path, settings, "out") is False
    assert json.loads(path.read_text()) == {"source": "a.tsv", "sizes": [1, 2]}
    assert store_or_check_settings(path, settings, "out") is True, (
        "tuples and lists must be equal, as in JSON"
    )


def test_store_or_check_settings_names_each_difference(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    store_or_check_settings(path, {"source": "a.tsv", "limit": 5}, "out")
    with pytest.raises(ValueError, match="out") as error:
        store_or_check_settings(path, {"source": "b.tsv", "limit": 5, "resize": 256}, "out")
    message = str(error.value)
    for part in ("source", "a.tsv", "b.tsv", "resize", "256", "--output"):
        assert part in message
    assert "limit" not in message
    assert json.loads(path.read_text()) == {"source": "a.tsv", "limit": 5}, (
        "the stored settings must not change"
    )


def test_store_or_check_settings_of_a_damaged_file_names_it(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text('{"source": ')
    with pytest.raises(ValueError, match=r"settings\.json"):
        store_or_check_settings(path, {"source": "a"}, "out")


def test_compare_settings_ignores_what_only_the_earlier_job_had() -> None:
    compare_settings({"a": 1, "dropped": 2}, {"a": 1}, "out")


def test_compare_settings_names_the_given_option() -> None:
    with pytest.raises(ValueError, match="--compact") as error:
        compare_settings({"a": 1}, {"a": 2}, "out", option="--compact")
    assert "--output" not in str(error.value)


# ---- lock ----

HOLDER = """
import sys, time
from pathlib import Path
from llava_simplified.jobs import exclusive_lock
with exclusive_lock(Path(sys.argv[1]), "out"):
    print("locked", flush=True)
    time.sleep(60)
"""


@contextmanager
def lock_holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Run another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.medium
def test_exclusive_lock_refuses_a_second_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "LOCK_TIMEOUT", 0.2)
    path = tmp_path / "job.lock"
    with (
        lock_holder(path),
        pytest.raises(ValueError, match="another process") as error,
        exclusive_lock(path, "my-output"),
    ):
        pytest.fail("two processes hold the lock")
    assert "my-output" in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.medium
def test_exclusive_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    path = tmp_path / "job.lock"
    with lock_holder(path) as process:
        process.kill()
        process.wait()
        start = time.monotonic()
        with exclusive_lock(path, "out"):
            pass
    assert time.monotonic() - start < 5


@pytest.mark.medium
def test_exclusive_lock_waits_for_a_process_that_is_about_to_end(tmp_path: Path) -> None:
    path = tmp_path / "job.lock"
    with lock_holder(path) as process:
        subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {process.pid}"])
        with exclusive_lock(path, "out"):
            assert process.wait(timeout=5) != 0


@pytest.mark.medium
def test_exclusive_lock_is_held_by_one_process_when_files_are_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process may open the lock file just before its holder deletes it.

    It must not get the lock of the deleted file while a third process holds the lock of a new file.
    """
    path = tmp_path / "job.lock"
    acquire = FileLock.acquire
    holders: list[subprocess.Popen[str]] = []

    def acquire_and_replace(self: FileLock, timeout: float = -1) -> Any:
        result = acquire(self, timeout)
        if not holders:
            # After this process has opened the file, the holder deletes it, and a third process starts.
            path.unlink()
            holders.append(stack.enter_context(lock_holder(path)))
        return result

    monkeypatch.setattr(FileLock, "acquire", acquire_and_replace)
    with (
        ExitStack() as stack,
        pytest.raises(ValueError, match="another process"),
        exclusive_lock(path, "out", timeout=0.2),
    ):
        pytest.fail("two processes hold the lock")


def test_exclusive_lock_leaves_no_file(tmp_path: Path) -> None:
    with exclusive_lock(tmp_path / "new" / "job.lock", "out"):
        assert names_in(tmp_path / "new") == {"job.lock"}
    assert names_in(tmp_path / "new") == set()
    with (
        pytest.raises(RuntimeError, match="failed"),
        exclusive_lock(tmp_path / "new" / "job.lock", "out"),
    ):
        raise RuntimeError("failed")
    assert names_in(tmp_path / "new") == set()


# ---- journal ----


def test_journal_appends_rows_and_returns_them(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with Journal(path) as journal:
        assert list(journal.rows()) == []
        journal.append([{"index": 0, "text": "é"}])
        journal.append([{"index": 1}, {"index": 2}])
        journal.append([])
        assert [row["index"] for row in journal.rows()] == [0, 1, 2]
    with Journal(path) as journal:
        journal.append([{"index": 3}])
        assert [row["index"] for row in journal.rows()] == [0, 1, 2, 3]
    assert path.read_bytes() == encode_json_lines(
        [{"index": 0, "text": "é"}, {"index": 1}, {"index": 2}, {"index": 3}]
    )


@pytest.mark.parametrize("torn", [b'{"index": 1', b'{"index": 1}', b"\xc3", b"{" * 200_000])
def test_journal_cuts_off_a_torn_last_line(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "journal"
    path.write_bytes(b'{"index": 0}\n' + torn)
    with Journal(path) as journal:
        assert list(journal.rows()) == [{"index": 0}]
        journal.append([{"index": 5}])
        assert list(journal.rows()) == [{"index": 0}, {"index": 5}]
    path.write_bytes(torn)
    with Journal(path) as journal:
        assert list(journal.rows()) == []
    assert path.read_bytes() == b""


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"])
def test_journal_keeps_line_separators_of_unicode_inside_a_text(
    tmp_path: Path, separator: str
) -> None:
    rows = [{"text": f"one{separator}two"}, {"text": "three"}]
    with Journal(tmp_path / "journal") as journal:
        journal.append(rows)
        assert list(journal.rows()) == rows


def test_journal_truncate_removes_an_incomplete_group(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with Journal(path) as journal:
        journal.append([{"index": 0}, {"index": 0}, {"index": 1}])
        ends = [end for _, end in read_json_lines(path)]
        journal.truncate(ends[1])
        journal.append([{"index": 7}])
        assert [row["index"] for row in journal.rows()] == [0, 0, 7]


def test_read_json_lines_yields_positions_and_ignores_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a"')
    assert list(read_json_lines(path)) == [({"a": 1}, 9), ({"a": 2}, 18)]


def test_read_json_lines_names_a_damaged_line(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b'{"a": 1}\n\0\0\0\0\n{"a": 2}\n')
    rows = read_json_lines(path)
    assert next(rows) == ({"a": 1}, 9)
    with pytest.raises(ValueError, match="byte 9") as error:
        next(rows)
    assert str(path) in str(error.value)


# ---- atomic outputs ----


def test_atomic_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    target.write_text("old")
    with atomic_file(target) as part:
        part.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert names_in(tmp_path) == {"out.json"}


def test_atomic_file_leaves_the_old_file_after_an_error(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="disk"), atomic_file(target) as part:
        part.write_text("half")
        raise RuntimeError("disk")
    assert target.read_text() == "old"
    assert names_in(tmp_path) == {"out.json"}


def test_atomic_directory_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_directory(target) as part:
        (part / "file").write_text("x")
        assert not target.exists()
    assert names_in(target) == {"file"}
    with pytest.raises(FileExistsError, match="out"), atomic_directory(target):
        pytest.fail("the folder exists already")
    with pytest.raises(RuntimeError, match="disk"), atomic_directory(tmp_path / "other") as part:
        (part / "file").write_text("x")
        raise RuntimeError("disk")
    assert names_in(tmp_path) == {"out"}


def test_replace_folder_keeps_the_old_one_until_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "checkpoint", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        (folder / folder.name).touch()
    rename = Path.rename

    def fail_for_new(path: Path, target: Path) -> Path:
        if path == new:
            raise OSError("the disk fails")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_for_new)
        with pytest.raises(OSError, match="disk"):
            replace_folder(new, old)
    assert names_in(tmp_path) == {".checkpoint.old", "new"}
    assert names_in(tmp_path / ".checkpoint.old") == {"checkpoint"}

    replace_folder(new, old)
    assert names_in(tmp_path) == {"checkpoint"}
    assert names_in(old) == {"new"}


@pytest.mark.parametrize("attempts", [2, 100])
def test_rename_folder_waits_for_programs_that_scan_it_on_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempts: int
) -> None:
    (tmp_path / "a").mkdir()
    rename = Path.rename
    refused: list[Path] = []

    def refuse_at_first(path: Path, target: Path) -> Path:
        if len(refused) < attempts:
            refused.append(path)
            raise PermissionError("a file in it is open")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(jobs.sys, "platform", "win32")
        patch.setattr(jobs.time, "sleep", lambda seconds: None)
        patch.setattr(Path, "rename", refuse_at_first)
        if attempts == 100:
            with pytest.raises(PermissionError):
                rename_folder(tmp_path / "a", tmp_path / "b")
        else:
            rename_folder(tmp_path / "a", tmp_path / "b")
    assert names_in(tmp_path) == ({"a"} if attempts == 100 else {"b"})


def test_remove_temporary_files_removes_those_of_one_output(tmp_path: Path) -> None:
    (tmp_path / ".a[1].json.part0123abcd").write_text("x")
    (tmp_path / ".a[1].json.part4567abcd").mkdir()
    (tmp_path / ".b.json.part0123abcd").write_text("x")
    (tmp_path / "a[1].json").write_text("x")
    remove_temporary_files(tmp_path / "a[1].json")
    assert names_in(tmp_path) == {".b.json.part0123abcd", "a[1].json"}


# ---- progress ----


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test sets: its only element is the time in seconds."""
    now = [100.0]
    # Replace `time` only in `jobs`. Servers of other tests run in threads of this process, and need the real time.
    monkeypatch.setattr(jobs, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_progress_on_a_terminal_redraws_one_line(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(1000, "records", initial=100) as progress:
        clock[0] += 10
        progress.advance(50)
        first = capsys.readouterr().err
        progress.advance(50)
        assert capsys.readouterr().err == "", "a line must stay long enough to be read"
        clock[0] += 10
        progress.update(300, "3 failed")
        second = capsys.readouterr().err
    last = capsys.readouterr().err
    assert first.strip("\r\x1b[K") == "150 of 1,000 records, 5.0/s, 0:02:50 left"
    assert second.strip("\r\x1b[K") == "300 of 1,000 records, 10.0/s, 3 failed, 0:01:10 left"
    assert first.startswith("\r")
    assert "\n" not in first + second
    assert last.endswith("\n")


def test_progress_without_a_terminal_prints_a_line_every_30_seconds(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(0, "rows") as progress:
        for _ in range(100):
            clock[0] += 1
            progress.advance()
    assert capsys.readouterr().err.splitlines() == [
        "30 rows, 1.0/s",
        "60 rows, 1.0/s",
        "90 rows, 1.0/s",
    ]


def test_progress_that_is_not_enabled_prints_nothing(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(10, "rows", enabled=False) as progress:
        clock[0] += 100
        progress.advance(5)
    assert progress.done == 5
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.9, "0:00:59"), (3661, "1:01:01"), (360_000, "100:00:00")],
)
def test_format_duration_returns_hours_minutes_and_seconds(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text

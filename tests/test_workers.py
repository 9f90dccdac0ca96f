"""Shards in processes that fail, die and come back; as Ray tasks; as slices."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from llava_simplified.workers import parse_slice, run_tasks


def square(number: int) -> int:
    return number * number


def fail_once(path: str) -> str:
    """A fault of the code or the machine: it may pass."""
    if not Path(path).exists():
        Path(path).touch()
        raise RuntimeError("first time")
    return path


def always_wrong(number: int) -> int:
    raise ValueError(f"row {number} can't be")


def die_once(path: str) -> str:
    if "bad" in path and not Path(path).exists():
        Path(path).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
    return path


def test_every_shard_comes_back() -> None:
    done = list(run_tasks(square, range(30), workers=2))
    assert {d.spec: d.result for d in done} == {n: n * n for n in range(30)}


def test_a_failed_shard_is_tried_again(tmp_path: Path) -> None:
    paths = [str(tmp_path / str(i)) for i in range(3)]
    assert sorted(d.result for d in run_tasks(fail_once, paths, workers=2)) == paths
    (done,) = run_tasks(fail_once, [str(tmp_path / "one")], workers=1, attempts=1)
    assert done.result is None
    assert "first time" in done.error


def test_a_users_error_is_not_tried_again_and_reads_as_it_was_written() -> None:
    assert [d.error for d in run_tasks(always_wrong, [7], workers=1)] == ["row 7 can't be"]


def test_a_killed_process_costs_no_shard(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{'bad' if i == 2 else 'good'}{i}") for i in range(8)]
    assert sorted(d.result for d in run_tasks(die_once, paths, workers=2)) == sorted(paths)


def test_what_the_tick_raises_ends_the_run_and_its_processes() -> None:
    def stop() -> None:
        raise ValueError("enough")

    start = time.monotonic()
    with pytest.raises(ValueError, match="enough"):
        list(run_tasks(time.sleep, [60, 60], workers=2, tick=stop))
    assert time.monotonic() - start < 15


@pytest.mark.slow
def test_no_process_outlives_a_killed_run(tmp_path: Path) -> None:
    script = f"""
import os, sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_workers import write_forever
from llava_simplified.workers import run_tasks
if __name__ == "__main__":
    list(run_tasks(write_forever, [{str(tmp_path / "a")!r}, {str(tmp_path / "b")!r}], workers=2))
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    while not (tmp_path / "a").exists() or not (tmp_path / "b").exists():
        time.sleep(0.1)
        assert process.poll() is None
    process.kill()
    process.wait()
    time.sleep(2)
    before = [(tmp_path / name).read_text() for name in "ab"]
    time.sleep(0.5)
    assert [(tmp_path / name).read_text() for name in "ab"] == before


def write_forever(path: str) -> None:
    while True:
        Path(path).write_text(str(time.time()))
        time.sleep(0.02)


def test_slices_cover_all_shards_once() -> None:
    assert sorted(i for k in range(3) for i in parse_slice(f"{k}/3", 10)) == list(range(10))
    assert list(parse_slice("", 4)) == [0, 1, 2, 3]
    for wrong in ("3/3", "x", "1", "-1/2"):
        with pytest.raises(ValueError, match="--shards"):
            parse_slice(wrong, 4)


def test_an_unknown_or_missing_engine_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="there are local, ray"):
        list(run_tasks(square, [1], engine="dask"))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'llava-simplified\[ray\]'"):
        list(run_tasks(square, [1], engine="ray"))


@pytest.mark.slow
def test_ray_runs_the_same_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="the ray extra is not installed")
    monkeypatch.setenv(
        "PYTHONPATH", str(Path(__file__).parent)
    )  # so that Ray's processes can import this file
    assert {d.spec: d.result for d in run_tasks(square, range(6), engine="ray", workers=2)} == {
        n: n * n for n in range(6)
    }
    paths = [str(tmp_path / f"{'bad' if i == 1 else 'good'}{i}") for i in range(3)]
    assert sorted(d.result for d in run_tasks(die_once, paths, engine="ray", workers=2)) == sorted(
        paths
    )
    (done,) = run_tasks(always_wrong, [7], engine="ray", workers=1)
    assert "row 7 can't be" in done.error


def processes(_: int) -> int:
    """How many workers are there, seen from one of them."""
    time.sleep(0.2)
    return len(psutil.Process(os.getppid()).children())


def test_no_more_processes_than_shards_or_than_the_job_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = len(psutil.Process().children())
    assert [d.result for d in run_tasks(processes, [0], workers=9)] == [before + 1]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7}, raising=False)
    assert max(d.result for d in run_tasks(processes, range(9))) == before + 3

"""Tests of `run_tasks` (with worker processes that fail or are killed, and on Ray), slices, and the event loop."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent / "prepare"))

from downloads import SHARD_SIZE, check_output, write_source
from servers import Server, loopback_server  # noqa: F401 - a fixture
from worker_tasks import die_once, fail_always, fail_once, square

from llava_simplified import workers
from llava_simplified.prepare.download import download
from llava_simplified.prepare.fetch_options import FetchOptions
from llava_simplified.workers import TaskResult, event_loop, parse_slice, run_tasks


def count_siblings(_: int) -> int:
    """Return the number of worker processes. It is called in one of them."""
    time.sleep(0.2)
    return len(psutil.Process(os.getppid()).children())


def sleep_with_handlers(*_: object) -> None:
    """Run in place of a worker's main function, with the signal handlers of the parent."""
    while True:
        time.sleep(1)


def write_forever(path: str) -> None:
    while True:
        Path(path).touch()
        time.sleep(0.02)


def is_running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def results_by_task(results: list[TaskResult[int, int]]) -> dict[int, int | None]:
    return {done.spec: done.result for done in results}


@pytest.mark.medium
def test_run_tasks_returns_every_result() -> None:
    results = list(run_tasks(square, range(30), workers=2))
    assert results_by_task(results) == {number: number * number for number in range(30)}


@pytest.mark.medium
def test_run_tasks_tries_a_failed_task_again(tmp_path: Path) -> None:
    paths = [str(tmp_path / str(number)) for number in range(3)]
    assert sorted(done.result for done in run_tasks(fail_once, paths, workers=2)) == paths
    (done,) = run_tasks(fail_once, [str(tmp_path / "one")], workers=1, attempts=1)
    assert done.result is None
    assert "first time" in done.error


@pytest.mark.medium
def test_run_tasks_does_not_retry_a_user_error() -> None:
    results = run_tasks(fail_always, [7], workers=1)
    assert [done.error for done in results] == ["row 7 is wrong"], "the message must be unchanged"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_run_tasks_refuses_a_negative_number_of_workers(engine: str) -> None:
    with pytest.raises(ValueError, match="--workers -1: must be at least 1, or 0 for .*CPU"):
        list(run_tasks(square, [1], engine=engine, workers=-1))


@pytest.mark.medium
def test_run_tasks_replaces_a_killed_process(tmp_path: Path) -> None:
    names = ["bad2" if number == 2 else f"good{number}" for number in range(8)]
    paths = [str(tmp_path / name) for name in names]
    results = run_tasks(die_once, paths, workers=2)
    assert sorted(done.result for done in results) == sorted(paths)


@pytest.mark.medium
def test_run_tasks_ends_with_its_processes_when_tick_raises() -> None:
    def stop() -> None:
        raise ValueError("enough")

    start = time.monotonic()
    with pytest.raises(ValueError, match="enough"):
        list(run_tasks(time.sleep, [60, 60], workers=2, tick=stop))
    assert time.monotonic() - start < 15


@pytest.mark.medium
@pytest.mark.timeout(60)
@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not fork processes")
@pytest.mark.parametrize("resets_handlers", [True, False])
def test_run_tasks_ends_its_processes_if_the_caller_handles_sigterm(
    monkeypatch: pytest.MonkeyPatch, resets_handlers: bool
) -> None:
    """Forked processes inherit the handler. One that is stopped very early could not reset it before."""

    def stop() -> None:
        raise ValueError("enough")

    monkeypatch.setattr(workers, "start_method", lambda: "fork")
    if not resets_handlers:
        monkeypatch.setattr(workers, "_run_worker", sleep_with_handlers)
        monkeypatch.setattr(workers, "_STOP_SECONDS", 0.2)
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(ValueError, match="enough"):
            list(run_tasks(time.sleep, [60, 60], workers=2, tick=stop))
    finally:
        signal.signal(signal.SIGTERM, handler)


@pytest.mark.slow
def test_worker_processes_end_if_their_run_is_killed(tmp_path: Path) -> None:
    outputs = [tmp_path / "a", tmp_path / "b"]
    script = f"""
import os, sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_workers import write_forever
from llava_simplified.workers import run_tasks
if __name__ == "__main__":
    list(run_tasks(write_forever, {[str(path) for path in outputs]!r}, workers=2))
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    while not all(path.exists() for path in outputs):
        time.sleep(0.1)
        assert process.poll() is None
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.wait()
    # Workers check every half second whether their parent is alive.
    deadline = time.monotonic() + 10
    while any(is_running(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.medium
def test_run_tasks_starts_no_more_processes_than_tasks_or_cpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = len(psutil.Process().children())
    (only,) = run_tasks(count_siblings, [0], workers=9)
    assert only.result == before + 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7}, raising=False)
    assert max(done.result for done in run_tasks(count_siblings, range(9))) == before + 3


@pytest.mark.parametrize(
    ("limits", "count"),
    [
        ({}, 8),
        ({"": "max 100000"}, 8),
        ({"": "150000 100000"}, 2),
        ({"": "1000 100000"}, 1),
        ({"": "9900000 100000"}, 8),
        ({"pods/a": "max 100000", "pods": "300000 100000"}, 3),
    ],
)
def test_count_cpus_obeys_the_limit_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, str], count: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    (tmp_path / "own").write_text("1:cpu:/other\n0::/pods/a\n")
    monkeypatch.setattr(workers, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(workers, "_CGROUP_ROOT", tmp_path)
    for group, limit in limits.items():
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / group / "cpu.max").write_text(f"{limit}\n")
    assert workers.count_cpus() == count


def test_run_tasks_refuses_an_unknown_or_missing_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--engine dask.*local, ray"):
        list(run_tasks(square, [1], engine="dask"))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"--engine ray.*pip install .*\[ray\]'"):
        list(run_tasks(square, [1], engine="ray"))


@pytest.mark.slow
def test_run_tasks_and_download_give_the_same_results_on_ray(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="the ray extra is not installed")
    # Ray's processes must be able to import `worker_tasks`.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    # Do not start services that no task uses: each of them imports Ray again.
    for service in ("start_monitor", "start_log_monitor", "start_api_server"):
        monkeypatch.setattr(ray._private.node.Node, service, lambda *_, **__: None, raising=False)
    squares = run_tasks(square, range(6), engine="ray", workers=2)
    results = [next(squares)]
    # Ray was started for the first run. The other runs use it while the first one is still running.
    assert ray.is_initialized()
    paths = [str(tmp_path / name) for name in ("good0", "bad1", "good2")]
    killed = run_tasks(die_once, paths, engine="ray", workers=2)
    assert sorted(done.result for done in killed) == sorted(paths)
    (failed,) = run_tasks(fail_always, [7], engine="ray", workers=1)
    assert "row 7 is wrong" in failed.error
    tsv, url_jobs = write_source(tmp_path, server.port)
    output = tmp_path / "out"
    options = FetchOptions(allow_private=True, timeout=20, retries=0)
    download(str(tsv), str(output), options, shard_size=SHARD_SIZE, workers=1, engine="ray")
    check_output(output, url_jobs)
    results += squares
    assert results_by_task(results) == {number: number * number for number in range(6)}
    assert not ray.is_initialized()


def test_parse_slice_covers_all_tasks_once() -> None:
    slices = [parse_slice(f"{index}/3", 10) for index in range(3)]
    assert sorted(number for numbers in slices for number in numbers) == list(range(10))
    assert list(parse_slice("", 4)) == [0, 1, 2, 3]


@pytest.mark.parametrize("wrong", ["3/3", "x", "1", "-1/2"])
def test_parse_slice_refuses_invalid_slices(wrong: str) -> None:
    with pytest.raises(ValueError, match="--shards"):
        parse_slice(wrong, 4)


def test_event_loop_ends_its_tasks_when_the_interrupted_iteration_has_a_result() -> None:
    """The callback that stops the loop for the result is still scheduled. It must not stop the clean-up."""
    ended: list[str] = []

    async def wait_forever() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            # This needs one more iteration of the loop.
            await asyncio.sleep(0)
            ended.append("waiting")

    async def interrupt() -> None:
        raise KeyboardInterrupt

    async def return_result(loop: asyncio.AbstractEventLoop) -> None:
        loop.create_task(wait_forever())
        loop.create_task(interrupt())

    with pytest.raises(KeyboardInterrupt), event_loop() as loop:
        loop.run_until_complete(return_result(loop))
    assert ended == ["waiting"]
    assert loop.is_closed()


def test_event_loop_closes_when_tasks_wait_for_an_interrupted_one() -> None:
    """If one task is interrupted, the tasks that wait for it raise the same exception."""

    async def interrupt() -> None:
        await asyncio.sleep(0)
        raise KeyboardInterrupt

    async def wait_for_others() -> None:
        await asyncio.gather(interrupt(), asyncio.sleep(1000))

    with pytest.raises(KeyboardInterrupt), event_loop() as loop:
        loop.run_until_complete(wait_for_others())
    assert loop.is_closed()

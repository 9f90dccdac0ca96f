"""kill -9 of the commands that can be resumed: nothing is lost, nothing is done twice, the result is the same.

Each case is a command that is killed several times at random moments and then run to its end. Its output must be equal
to that of a run that nobody disturbed. To add a command, write the four functions of `Case` and add it to `CASES`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "prepare"))

from downloads import SHARD_SIZE, Job, check_output, loopback, read_manifest, write_source

from llava_simplified.data.images import read_image_bytes

LLAVA = [sys.executable, "-m", "llava_simplified.cli"]
# A worker looks every half second whether its parent lives.
WORKERS_END = 1.5


@dataclass(frozen=True)
class Case:
    """A command that can be resumed.

    Attributes:
        name: The name of the test.
        kills: How often the command is killed before it may finish.
        inputs: Builds the inputs in a folder, and keeps what they need running; yields anything.
        command: (inputs, folder of the output) -> the command line.
        finished: (folder of the output) -> what is finished so far: a value by item that changes if the item is done
            again, such as a time.
        compare: (inputs, undisturbed, resumed): asserts that the two folders of outputs are equal.
    """

    name: str
    kills: int
    inputs: Callable[[Path], AbstractContextManager[Any]]
    command: Callable[[Any, Path], list[str]]
    finished: Callable[[Path], dict[Any, Any]]
    compare: Callable[[Any, Path, Path], None]


# ---- llava download ----


@contextmanager
def download_inputs(folder: Path) -> Iterator[tuple[Path, list[Job]]]:
    with loopback.running(0.05) as port:
        yield write_source(folder, port, 2600)


def download_command(inputs: tuple[Path, list[Job]], output: Path) -> list[str]:
    tsv, _ = inputs
    words = [*LLAVA, "download", str(tsv), "--output", str(output), "--shard-size", str(SHARD_SIZE)]
    words += ["--workers", "2", "--timeout", "20", "--allow-private", "--retries", "0"]
    return [*words, "--concurrency", "8"]


def downloaded_rows(output: Path) -> dict[int, float]:
    """Return when each row was fetched that a journal or a manifest contains."""
    found = {}
    for path in output.glob("0*.parquet"):
        found.update({row["index"]: row["at"] for row in pq.read_table(path).to_pylist()})
    for path in (output / "_work").glob("*.journal"):
        data = path.read_bytes()
        complete = data[: data.rfind(b"\n") + 1]
        for line in complete.splitlines():
            row = json.loads(line)
            found[row["index"]] = row["at"]
    return found


def compare_downloads(inputs: tuple[Path, list[Job]], undisturbed: Path, resumed: Path) -> None:
    _, url_jobs = inputs
    check_output(resumed, url_jobs)
    # When a row was fetched, and where its image lies in the tar, is different in every run.
    changing = {"at", "seconds", "offset", "detail"}
    expected = read_manifest(undisturbed)
    rows = read_manifest(resumed)
    for one, other in zip(expected, rows, strict=True):
        assert {name: one[name] for name in one.keys() - changing} == {
            name: other[name] for name in other.keys() - changing
        }
        if other["status"] == "ok":
            image = f"{other['index'] // SHARD_SIZE:05d}.tar#{other['key']}"
            assert read_image_bytes(image, resumed) == read_image_bytes(image, undisturbed)
    records = "records.jsonl"
    assert (resumed / records).read_bytes() == (undisturbed / records).read_bytes()
    assert not list((resumed / "_work").iterdir())


# ---- llava clean ----


@contextmanager
def clean_inputs(folder: Path) -> Iterator[Path]:
    """5,000 records (10 chunks) of a few images: good ones, small ones, a damaged one and a missing one."""
    images = folder / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        coarse = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        size = (20, 20) if number == 6 else (800, 600)
        Image.fromarray(coarse).resize(size).save(images / f"{number}.jpg", quality=90)
    damaged = (images / "7.jpg").read_bytes()
    (images / "7.jpg").write_bytes(damaged[: len(damaged) // 2])
    rows = []
    for index in range(5000):
        row = {"image": f"{index % 9}.jpg", "instruction": "Say:", "response": f"caption {index}"}
        rows.append(row)
    records = folder / "records.json"
    records.write_text(json.dumps(rows))
    yield records


def clean_command(records: Path, output: Path) -> list[str]:
    output.mkdir(exist_ok=True)
    words = [
        *LLAVA,
        "clean",
        str(records),
        "--output",
        str(output / "clean.json"),
        "--workers",
        "1",
    ]
    return [*words, "--image-folder", str(records.parent / "images"), "--dedupe", "perceptual"]


def cleaned_chunks(output: Path) -> dict[str, int]:
    """Return when each chunk was finished."""
    paths = (output / "clean.json.work").glob("*/*.parquet")
    return {path.name: path.stat().st_mtime_ns for path in paths}


def compare_cleanings(records: Path, undisturbed: Path, resumed: Path) -> None:
    names = {path.name for path in undisturbed.iterdir()}
    assert names == {
        "clean.json",
        "clean_quarantine.jsonl",
        "clean_report.html",
        "clean_report.json",
    }
    assert {path.name for path in resumed.iterdir()} == names
    for name in names:
        assert (resumed / name).read_bytes() == (undisturbed / name).read_bytes(), name


CASES = [
    Case("download", 5, download_inputs, download_command, downloaded_rows, compare_downloads),
    Case("clean", 3, clean_inputs, clean_command, cleaned_chunks, compare_cleanings),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_killed_command_continues_and_gives_the_same_result(case: Case, tmp_path: Path) -> None:
    rng = random.Random(7)
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    with case.inputs(tmp_path) as inputs:
        run_to_the_end(case.command(inputs, undisturbed))
        command = case.command(inputs, resumed)
        finished: dict[Any, Any] = {}
        for kill in range(case.kills):
            process = subprocess.Popen(
                command,
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            wait_for_progress(process, case, resumed, len(finished))
            time.sleep(0.8 * rng.random())
            assert process.poll() is None, "too fast: give the case more inputs"
            # Kill all processes, or only the parent: then its workers must end by themselves.
            if kill % 2:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.wait()
            time.sleep(WORKERS_END)
            now = case.finished(resumed)
            assert_not_done_again(finished, now)
            finished = now
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        # The work folder is removed at the end, so look at it while the command runs.
        while process.poll() is None:
            now = look(case, resumed)
            assert_not_done_again({item: finished[item] for item in finished.keys() & now}, now)
            time.sleep(0.1)
        assert process.returncode == 0
        remaining = case.finished(resumed)
        if remaining:
            assert_not_done_again(finished, remaining)
        case.compare(inputs, undisturbed, resumed)
    leftovers = [path for path in resumed.rglob("*") if ".part" in path.name]
    assert not leftovers
    assert not list(resumed.rglob("*.lock"))


def run_to_the_end(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for_progress(
    process: subprocess.Popen[bytes], case: Case, output: Path, before: int
) -> None:
    """Wait until the command has finished something more than `before` items."""
    while len(look(case, output)) <= before:
        assert process.poll() is None, "too fast: give the case more inputs"
        time.sleep(0.05)


def look(case: Case, output: Path) -> dict[Any, Any]:
    """Return what is finished while the command runs, which may rename or delete a file at the same moment."""
    try:
        return case.finished(output)
    except FileNotFoundError:
        return {}


def assert_not_done_again(finished: dict[Any, Any], now: dict[Any, Any]) -> None:
    """Check that every item that was finished still is, by the same run as before."""
    for item, value in finished.items():
        assert now.get(item) == value, f"{item} was done again, or was lost"

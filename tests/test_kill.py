"""Kill the commands that can be resumed: nothing is lost, nothing is done twice, and the result is the same.

Each case is a command that is killed twice at random moments and then run to its end. Its output must be equal
to that of an uninterrupted run. To add a command, write the four functions of `Case` and add it to `CASES`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "prepare"))

from cli_process import ForkedProcess
from downloads import SHARD_SIZE, Job, check_output, loopback, read_manifest, write_source
from tiny import save_language_model, save_vision_model

from llava_simplified.data.images import read_image_bytes
from llava_simplified.jobs import read_json_lines
from llava_simplified.model.build import build_model
from llava_simplified.model.checkpoint import save_checkpoint
from llava_simplified.model.config import LlavaConfig, TrainedParts

NUM_KILLS = 2  # the first one kills only the parent, the second one all processes
NUM_IMAGES = 80
UNREADABLE = 20  # the images 020, 040 and 060 cannot be read
MAX_DELAY = 0.1  # seconds from the first progress to the kill
# Seconds after the death of their parent in which workers must end. They check every half second whether it is alive.
WORKERS_END = 10


@dataclass(frozen=True)
class Case:
    """A command that can be resumed.

    Attributes:
        name: The name of the test.
        inputs: A context manager that creates the inputs in a folder, and runs a server if they need one. The value that
            it yields is passed to `command` and `compare`.
        command: (inputs, folder of the output) -> the command line.
        finished: (folder of the output) -> the items that are finished so far. Each has a value that would change if the
            item was done again, such as a time.
        compare: (inputs, undisturbed, resumed): asserts that the two folders of outputs are equal.
    """

    name: str
    inputs: Callable[[Path], AbstractContextManager[Any]]
    command: Callable[[Any, Path], list[str]]
    finished: Callable[[Path], dict[Any, Any]]
    compare: Callable[[Any, Path, Path], None]


# ---- llava download ----


@contextmanager
def download_inputs(folder: Path) -> Iterator[tuple[Path, list[Job]]]:
    with loopback.running(0.05, encode_first=False) as port:
        yield write_source(folder, port, 320)


def download_command(inputs: tuple[Path, list[Job]], output: Path) -> list[str]:
    tsv, _ = inputs
    argv = [
        "llava",
        "download",
        str(tsv),
        "--output",
        str(output),
        "--shard-size",
        str(SHARD_SIZE),
    ]
    argv += ["--workers", "2", "--timeout", "20", "--allow-private", "--retries", "0"]
    return [*argv, "--concurrency", "8"]


def downloaded_rows(output: Path) -> dict[int, float]:
    """Return the time at which each row in a journal or a manifest was fetched."""
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
    # These columns differ in every run: the time of a request, and the position of the image in the tar.
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
    """3,000 records (6 chunks) of a few images: good ones, small ones, a damaged one and a missing one."""
    images = folder / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        coarse = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        size = (20, 20) if number == 6 else (200, 150)
        Image.fromarray(coarse).resize(size).save(images / f"{number}.jpg", quality=90)
    damaged = (images / "7.jpg").read_bytes()
    (images / "7.jpg").write_bytes(damaged[: len(damaged) // 2])
    rows = []
    for index in range(3000):
        row = {"image": f"{index % 9}.jpg", "instruction": "Say:", "response": f"caption {index}"}
        rows.append(row)
    records = folder / "records.json"
    records.write_text(json.dumps(rows))
    yield records


def clean_command(records: Path, output: Path) -> list[str]:
    output.mkdir(exist_ok=True)
    argv = [
        "llava",
        "clean",
        str(records),
        "--output",
        str(output / "clean.json"),
        "--workers",
        "1",
    ]
    return [*argv, "--image-folder", str(records.parent / "images"), "--dedupe", "perceptual"]


def cleaned_chunks(output: Path) -> dict[str, int]:
    """Return the time at which each chunk was finished."""
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


# ---- llava caption ----


@contextmanager
def caption_inputs(folder: Path) -> Iterator[tuple[Path, Path]]:
    """A tiny checkpoint, and a folder of images, some of which cannot be read."""
    models = folder / "models"
    save_language_model("mistral", models / "language_model")
    save_vision_model("clip", models / "vision_tower")
    images = folder / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(images / "000.jpg")
    for number in range(1, NUM_IMAGES):
        image = images / f"{number:03}.jpg"
        if number % UNREADABLE == 0:
            image.write_bytes(b"not an image")
        else:
            image.write_bytes((images / "000.jpg").read_bytes())
    config = LlavaConfig(str(models / "language_model"), str(models / "vision_tower"))
    save_checkpoint(build_model(config), folder / "checkpoint", config, TrainedParts())
    yield folder / "checkpoint", images


def caption_command(inputs: tuple[Path, Path], output: Path) -> list[str]:
    checkpoint, images = inputs
    argv = ["llava", "caption", str(images), "--model-path", str(checkpoint)]
    argv += ["--output", str(output / "captions.jsonl"), "--batch-size", "1"]
    return [*argv, "--max-new-tokens", "4", "--trials", "2", "--temperature", "1"]


def captioned_records(output: Path) -> dict[int, list[int]]:
    """Return the positions of the rows of each complete record. A record that is done again has more rows."""
    found: dict[int, list[int]] = {}
    for row, end in read_json_lines(output / "captions.jsonl"):
        found.setdefault(row["index"], []).append(end)
    return {index: ends for index, ends in found.items() if len(ends) >= 2}


def compare_captions(inputs: tuple[Path, Path], undisturbed: Path, resumed: Path) -> None:
    names = {path.name for path in undisturbed.iterdir()}
    captions = "captions.jsonl"
    assert names == {captions, f"{captions}.bad.jsonl", f"{captions}.settings.json"}
    assert {path.name for path in resumed.iterdir()} == names
    for name in names:
        assert (resumed / name).read_bytes() == (undisturbed / name).read_bytes(), name


# ---- llava caption --write txt ----

# Every third image has a sidecar file with one of these texts. They differ in byte order marks and line ends.
EXISTING_TEXTS = (b"by hand\n", b"\xef\xbb\xbftag, tag\r\n", b"one\r\ntwo", "größer,\n".encode())


@contextmanager
def sidecar_inputs(folder: Path) -> Iterator[tuple[Path, Path]]:
    with caption_inputs(folder) as (checkpoint, images):
        for number in range(0, NUM_IMAGES, 3):
            text = EXISTING_TEXTS[number % len(EXISTING_TEXTS)]
            (images / f"{number:03}.txt").write_bytes(text)
        yield checkpoint, images


def sidecar_command(inputs: tuple[Path, Path], output: Path, *options: str) -> list[str]:
    checkpoint, images = inputs
    if not output.exists():
        shutil.copytree(images, output)
    argv = ["llava", "caption", str(output), "--model-path", str(checkpoint), "--write", "txt"]
    argv += ["--batch-size", "2", "--max-new-tokens", "12", "--temperature", "1"]
    return [*argv, *options]


def append_command(inputs: tuple[Path, Path], output: Path) -> list[str]:
    return sidecar_command(inputs, output, "--existing", "append")


def written_sidecars(output: Path) -> dict[str, int]:
    """Return the modification time of each sidecar file that the command has created or changed."""
    found = {}
    for path in output.glob("*.txt"):
        if path.read_bytes() not in EXISTING_TEXTS:
            found[path.name] = path.stat().st_mtime_ns
    return found


def compare_sidecars(inputs: tuple[Path, Path], undisturbed: Path, resumed: Path) -> None:
    _, images = inputs
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    expected = {path.name: path.read_bytes() for path in undisturbed.iterdir()}
    assert {path.name: path.read_bytes() for path in resumed.iterdir()} == expected
    failures = ".llava-caption.jsonl.bad.jsonl"
    assert expected.keys() - before.keys() - {failures} == {
        f"{number:03}.txt" for number in range(NUM_IMAGES) if number % 3 and number % UNREADABLE
    }
    assert all(expected[name] == data for name, data in before.items() if name.endswith(".jpg"))


def compare_kept_sidecars(inputs: tuple[Path, Path], undisturbed: Path, resumed: Path) -> None:
    compare_sidecars(inputs, undisturbed, resumed)
    for path in inputs[1].glob("*.txt"):
        assert (resumed / path.name).read_bytes() == path.read_bytes()


def compare_appended_sidecars(inputs: tuple[Path, Path], undisturbed: Path, resumed: Path) -> None:
    compare_sidecars(inputs, undisturbed, resumed)
    for path in inputs[1].glob("*.txt"):
        if int(path.stem) % UNREADABLE or path.stem == "000":
            assert (resumed / path.name).read_bytes().startswith(path.read_bytes().rstrip())
            assert (resumed / path.name).read_bytes() != path.read_bytes()


# ---- llava encode ----


@contextmanager
def encode_inputs(folder: Path) -> Iterator[Path]:
    """300 files of 8 images. A comment in each file makes them different for the cache."""
    save_vision_model("clip", folder / "clip")
    images = folder / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    contents = []
    for number in range(8):
        coarse = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        path = folder / f"content{number}.jpg"
        Image.fromarray(coarse).resize((800, 600)).save(path, quality=90)
        contents.append(path.read_bytes())
    rows = []
    for index in range(300):
        data = contents[index % len(contents)]
        comment = f"{index:06d}".encode()
        # After the start marker: a comment marker, its length (which includes its own two bytes), and the text.
        segment = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
        (images / f"{index}.jpg").write_bytes(data[:2] + segment + data[2:])
        rows.append({"image": f"{index}.jpg", "instruction": "Say:", "response": "a caption"})
    records = folder / "records.json"
    records.write_text(json.dumps(rows))
    yield records


def encode_command(records: Path, output: Path) -> list[str]:
    folder = records.parent
    argv = ["llava", "encode", "--vision_tower", str(folder / "clip")]
    argv += ["--train_data_path", str(records), "--train_image_folder", str(folder / "images")]
    argv += ["--cache_vision_features", "disk", "--feature_cache_dir", str(output)]
    return [*argv, "--output_dir", str(folder / "model")]


def encoded_images(output: Path) -> dict[bytes, int]:
    """Return the row of each image, by the hash of its file."""
    hashes = b""
    for path in output.glob("*.hashes"):
        hashes += path.read_bytes()
    rows = len(hashes) // 32
    return {hashes[32 * row : 32 * (row + 1)]: row for row in range(rows)}


def compare_features(records: Path, undisturbed: Path, resumed: Path) -> None:
    assert len(encoded_images(resumed)) == len(json.loads(records.read_text()))
    assert encoded_images(resumed) == encoded_images(undisturbed)
    names = {path.name for path in undisturbed.iterdir()}
    assert {path.suffix for path in undisturbed.iterdir()} == {
        ".features",
        ".hashes",
        ".json",
    }
    assert {path.name for path in resumed.iterdir()} == names
    (name,) = [name for name in names if name.endswith(".features")]
    expected = np.fromfile(undisturbed / name, np.float32)
    # A batch that was interrupted is computed again in another size, which changes the last bits.
    np.testing.assert_allclose(
        np.fromfile(resumed / name, np.float32), expected, rtol=1e-4, atol=1e-5
    )


CASES = [
    Case("download", download_inputs, download_command, downloaded_rows, compare_downloads),
    Case("clean", clean_inputs, clean_command, cleaned_chunks, compare_cleanings),
    Case("caption", caption_inputs, caption_command, captioned_records, compare_captions),
    Case("sidecars", sidecar_inputs, sidecar_command, written_sidecars, compare_kept_sidecars),
    Case("append", sidecar_inputs, append_command, written_sidecars, compare_appended_sidecars),
    Case("encode", encode_inputs, encode_command, encoded_images, compare_features),
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
        for kill in range(NUM_KILLS):
            process = start(command)
            wait_for_progress(process, case, resumed, len(finished))
            time.sleep(MAX_DELAY * rng.random())
            assert process.poll() is None, "too fast: give the case more inputs"
            # Kill all processes, or only the parent: then its workers must end by themselves.
            if kill % 2:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
                wait_for_end_of_group(process.pid)
            process.wait()
            now = case.finished(resumed)
            assert_not_done_again(finished, now)
            finished = now
        process = start(command)
        # The work folder is removed at the end, so read it while the command runs.
        while process.poll() is None:
            now = finished_while_running(case, resumed)
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


def start(command: list[str]) -> ForkedProcess:
    """Start a command as the leader of its process group."""
    return ForkedProcess(command, new_session=True)


def run_to_the_end(command: list[str]) -> None:
    assert start(command).wait() == 0


def wait_for_end_of_group(leader: int) -> None:
    """Wait until a process and its workers have ended."""
    deadline = time.monotonic() + WORKERS_END
    while any(is_running_in_group(process, leader) for process in psutil.process_iter()):
        assert time.monotonic() < deadline, (
            "workers are still running after their parent was killed"
        )
        time.sleep(0.02)


def is_running_in_group(process: psutil.Process, leader: int) -> bool:
    try:
        return os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.NoSuchProcess):  # it has just ended
        return False


def wait_for_progress(process: ForkedProcess, case: Case, output: Path, before: int) -> None:
    """Wait until the command has finished more than `before` items."""
    while len(finished_while_running(case, output)) <= before:
        assert process.poll() is None, "too fast: give the case more inputs"
        time.sleep(0.05)


def finished_while_running(case: Case, output: Path) -> dict[Any, Any]:
    """Return the finished items while the command runs; empty if it renames or deletes a file at this moment."""
    try:
        return case.finished(output)
    except FileNotFoundError:
        return {}


def assert_not_done_again(finished: dict[Any, Any], now: dict[Any, Any]) -> None:
    """Check that every finished item is still there, with its value, which would change if it was done again."""
    for item, value in finished.items():
        assert now.get(item) == value, f"{item} was done again, or was lost"

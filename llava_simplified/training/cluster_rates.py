"""Measure the rates of a cluster plan: run every step on a sample of the URLs, with the same commands.

    URLs --llava download--> images --llava clean--> records --llava encode--> features --llava train--> model
                                                        +-----llava caption --endpoint----> captions

Each command runs twice, on a quarter of the sample and on all of it. The time per row is the difference of the two
durations divided by the difference of the numbers of rows, which excludes the start-up time of the command:

    seconds
       |            x  all rows
       |        .
       |    x  a quarter          slope = seconds per row
       |  .
       +--+--------------- rows

Training reports its own speed, and runs once.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava_simplified.options import quote_arguments
from llava_simplified.prepare.request_url import host_of
from llava_simplified.training.cluster_plan import Rates

logger = logging.getLogger(__name__)

TRAIN_STEPS = 8
# The first steps are slower, because they compile kernels and fill caches. They are not counted.
_SKIPPED_STEPS = 2


class Cost(NamedTuple):
    """The resources that a command has used: wall-clock seconds, and CPU seconds of all its processes."""

    seconds: float
    core_seconds: float


class Workload(NamedTuple):
    """The settings of a measurement.

    Attributes:
        source: The list of URLs, as for `llava download`.
        rows: Number of URLs of the sample.
        training_options: Options of `llava train`, without the data and the output folder.
        encode_flops: FLOPs of the vision tower per image.
        train_flops: FLOPs of a training step per sample.
        endpoint_options: `--endpoint URL --model NAME` of `llava caption`, or empty to skip captioning.
        allow_private: Allow requests to private addresses, as `llava download --allow-private` does.
    """

    source: str
    rows: int
    training_options: Sequence[str]
    encode_flops: float
    train_flops: float
    endpoint_options: Sequence[str] = ()
    allow_private: bool = False


class _Sample(NamedTuple):
    """The files of one of the two samples, and how many rows are left after each step."""

    images: Path
    records: Path
    num_urls: int
    num_images: int
    num_records: int


def measure_rates(workload: Workload, count_tokens: Callable[[str], int]) -> Rates:
    """Run all steps on a sample of the URLs, and return the rates of each step.

    Args:
        workload: The settings of the measurement.
        count_tokens: A function that returns the number of tokens of a caption.

    Raises:
        ValueError: The system is Windows, a command failed, or the sample has too few usable images.
    """
    if sys.platform == "win32":
        raise ValueError(
            "--measure is not available on Windows, which does not report the CPU time of child processes."
        )
    with tempfile.TemporaryDirectory(prefix="llava_plan_") as temporary:
        root = Path(temporary)
        samples, download_costs, clean_costs = [], [], []
        # The two samples overlap: both begin at the first URL. Each is downloaded into a folder of its own.
        for name, rows in (("quarter", workload.rows // 4), ("all", workload.rows)):
            folder = root / name
            download_costs.append(_download(workload, folder / "images", rows))
            clean_costs.append(_clean(folder))
            samples.append(_read_sample(folder))
        quarter, whole = samples
        if whole.num_records <= quarter.num_records:
            raise ValueError(
                f"--measure {workload.source}: {whole.num_urls} URLs gave {whole.num_records} usable images, and a quarter "
                f"of these URLs gave {quarter.num_records}. The time per image is computed from the difference of two runs, "
                "which therefore need different numbers of images. Raise --measure-rows."
            )
        # Shares and means are computed from the whole sample. Only times are computed from both samples.
        manifest = _read_manifest(whole.images)
        hosts = Counter(host_of(url) for url in manifest["url"])
        encode_costs = [
            _encode(workload, root / name, root / "features") for name in ("quarter", "all")
        ]
        encode_seconds = _per_row(
            [cost.seconds for cost in encode_costs], [sample.num_records for sample in samples]
        )
        tokens_per_caption = caption_speed = 0.0
        if workload.endpoint_options:
            tokens_per_caption, caption_speed = _caption(workload, samples, root, count_tokens)
        urls = [sample.num_urls for sample in samples]
        images = [sample.num_images for sample in samples]
        return Rates(
            download_core_seconds=_per_row([cost.core_seconds for cost in download_costs], urls),
            request_seconds=_mean(manifest["seconds"]),
            bytes_per_url=sum(size or 0 for size in manifest["bytes"]) / whole.num_urls,
            downloaded_share=whole.num_images / whole.num_urls,
            largest_host_share=max(hosts.values()) / whole.num_urls,
            clean_core_seconds=_per_row([cost.core_seconds for cost in clean_costs], images),
            usable_share=whole.num_records / whole.num_images,
            # Store a speed instead of the time per image, so that the plan is valid for other vision towers too.
            encode_flops_per_second=workload.encode_flops / encode_seconds,
            train_flops_per_second=_train(workload, root / "all", root / "output"),
            tokens_per_caption=tokens_per_caption,
            caption_tokens_per_second=caption_speed,
        )


def _per_row(seconds: Sequence[float], rows: Sequence[int]) -> float:
    """Return the seconds per row: the slope between two runs, or the mean of the larger run if noise hides the slope.

    Args:
        seconds: Seconds of the smaller and of the larger run.
        rows: Number of rows of the smaller and of the larger run.
    """
    small_seconds, large_seconds = seconds
    small_rows, large_rows = rows
    # Both runs have the same start-up time, which the difference cancels.
    slope = (large_seconds - small_seconds) / (large_rows - small_rows)
    if slope > 0:
        return slope
    logger.warning(
        "A run on %d rows took no longer than a run on %d rows, so the start-up time cannot be subtracted and the "
        "measured time per row is too high. Raise --measure-rows.",
        large_rows,
        small_rows,
    )
    return large_seconds / large_rows


def _mean(values: Sequence[float | None]) -> float:
    """Return the mean of the values that are known, or 0."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0


# ---- the commands ----


def _run(*arguments: str) -> Cost:
    """Run `llava` with these arguments, and return the resources that it has used.

    Raises:
        ValueError: The command failed; the message contains the command and the last lines of its output.
    """
    logger.info("llava %s", quote_arguments(arguments))
    command = [sys.executable, "-m", "llava_simplified.cli", *arguments]
    # `children_user` and `children_system` include the worker processes of the command.
    before = os.times()
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    seconds = time.perf_counter() - start
    after = os.times()
    if done.returncode:
        last_lines = "\n".join((done.stdout + done.stderr).splitlines()[-5:])
        raise ValueError(f"llava {quote_arguments(arguments)} failed:\n{last_lines}")
    user = after.children_user - before.children_user
    system = after.children_system - before.children_system
    return Cost(seconds, user + system)


def _download(workload: Workload, output: Path, rows: int) -> Cost:
    private = ["--allow-private"] if workload.allow_private else []
    arguments = [workload.source, "--output", str(output), "--limit", str(rows), *private]
    return _run("download", *arguments)


def _clean(folder: Path) -> Cost:
    return _run("clean", str(folder / "images"), "--output", str(folder / "records.jsonl"))


def _data_options(folder: Path) -> list[str]:
    """Return the options of `llava encode` and `llava train` that name the data."""
    records = folder / "records.jsonl"
    return ["--train_data_path", str(records), "--train_image_folder", str(folder / "images")]


def _encode(workload: Workload, folder: Path, features: Path) -> Cost:
    """Encode the images of the sample in `folder`, and store the features below `features`."""
    # The two samples overlap. Give each its own cache, or the second run would skip images that the first
    # has encoded.
    arguments = [*workload.training_options, *_data_options(folder)]
    arguments += ["--output_dir", str(folder / "encode"), "--cache_vision_features", "disk"]
    return _run("encode", *arguments, "--feature_cache_dir", str(features / folder.name))


def _train(workload: Workload, folder: Path, output: Path) -> float:
    """Train for a few steps, and return the FLOP/s.

    The features are cached before the first step, as the plan assumes, so the vision tower is not part of a step.
    """
    arguments = [*workload.training_options, *_data_options(folder), "--output_dir", str(output)]
    # Turn off checkpoints and the preflight, which would take longer than the steps.
    arguments += ["--max_steps", str(TRAIN_STEPS), "--logging_steps", "1"]
    arguments += ["--save_strategy", "no", "--preflight", "false"]
    arguments += ["--cache_vision_features", "memory"]
    # A recipe that evaluates requires validation records. Evaluations do not count toward the speed of the steps.
    arguments += ["--eval_data_path", str(folder / "records.jsonl")]
    arguments += ["--val_image_folder", str(folder / "images"), "--load_best_model_at_end", "False"]
    _run("train", *arguments)
    speeds = []
    for line in (output / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "samples_per_second" in row:
            speeds.append(row["samples_per_second"])
    return workload.train_flops * _mean(speeds[_SKIPPED_STEPS:])


def _caption(
    workload: Workload, samples: Sequence[_Sample], root: Path, count_tokens: Callable[[str], int]
) -> tuple[float, float]:
    """Caption both samples at the endpoint, and return the tokens per caption and the tokens per second."""
    seconds = []
    texts: list[str] = []
    for number, sample in enumerate(samples):
        output = root / f"captions_{number}.jsonl"
        arguments = [str(sample.records), "--image-folder", str(sample.images)]
        arguments += ["--output", str(output), *workload.endpoint_options]
        seconds.append(_run("caption", *arguments).seconds)
        rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
        # After the loop, these are the captions of the larger sample.
        texts = [row["pred_output"] for row in rows if row.get("pred_output")]
    if not texts:
        raise ValueError("--endpoint: the server returned only empty captions. Check its model.")
    # An endpoint answers several requests at the same time, so a single request takes longer than this.
    seconds_per_image = _per_row(seconds, [sample.num_records for sample in samples])
    tokens_per_caption = sum(count_tokens(text) for text in texts) / len(texts)
    return tokens_per_caption, tokens_per_caption / seconds_per_image


# ---- the output of the commands ----


def _read_manifest(images: Path) -> dict[str, list[Any]]:
    """Return the columns of a download's manifest that the rates are computed from."""
    import pyarrow.parquet as pq

    columns = ["url", "status", "seconds", "bytes"]
    table: dict[str, list[Any]] = pq.read_table(
        images / "manifest.parquet", columns=columns
    ).to_pydict()
    return table


def _read_sample(folder: Path) -> _Sample:
    """Count the rows that are left after each step."""
    manifest = _read_manifest(folder / "images")
    records = folder / "records.jsonl"
    with records.open(encoding="utf-8") as stream:
        num_records = sum(1 for line in stream if line.strip())
    num_images = manifest["status"].count("ok")
    return _Sample(folder / "images", records, len(manifest["url"]), num_images, num_records)

"""Estimate how long all steps, from download to captioning, take on a cluster: `llava plan --cluster`.

Each step is limited by one or several resources. The time that a resource needs follows from the amount of
work and a rate. Both are printed, so that a reader can check each line with a calculator:

| step     | resource      | seconds                                                                |
|----------|---------------|------------------------------------------------------------------------|
| download | egress        | URLs x bytes per URL / (machines x bytes per second)                   |
| download | cores         | URLs x seconds of a core per URL / (machines x cores)                  |
| download | largest host  | URLs of the host x seconds per request / (machines x connections)      |
| clean    | cores         | images x seconds of a core per image / (machines x cores)              |
| encode   | FLOP/s        | images x FLOPs of the vision tower / (devices x FLOP/s)                |
| train    | FLOP/s        | images x epochs x FLOPs of a sample / (devices x FLOP/s)               |
| caption  | endpoints     | images x tokens per caption / (endpoints x tokens per second)          |

A step takes as long as its slowest resource. The steps run one after the other.

The rates are measured in small runs of the same commands; see `llava_simplified.training.cluster_rates`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

from llava_simplified.foreign_files import error_reason
from llava_simplified.prepare.fetch_options import FetchOptions

# Pairs of a unit and its size, from the largest to the smallest unit.
_BYTE_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1.0))
_FLOP_UNITS = (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6), ("FLOP", 1.0))
_TIME_UNITS = (("days", 86400.0), ("hours", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3))


@dataclass(frozen=True)
class Rates:
    """What `llava plan --measure` has measured in a small run of each step; it is stored as JSON.

    Attributes:
        download_core_seconds: Seconds of a core per URL.
        request_seconds: Mean duration of a request, failed ones included.
        bytes_per_url: Bytes received per URL.
        downloaded_share: Fraction of the URLs that returned an image.
        largest_host_share: Fraction of the URLs that point to the host with the most URLs.
        clean_core_seconds: Seconds of a core per image.
        usable_share: Fraction of the downloaded images that `llava clean` keeps.
        encode_flops_per_second: FLOP/s of one device in `llava encode`.
        train_flops_per_second: FLOP/s of one device in `llava train`.
        tokens_per_caption: Mean number of generated tokens per caption; 0 if captioning was not measured.
        caption_tokens_per_second: Generated tokens per second of one endpoint; 0 if not measured.
    """

    download_core_seconds: float
    request_seconds: float
    bytes_per_url: float
    downloaded_share: float
    largest_host_share: float
    clean_core_seconds: float
    usable_share: float
    encode_flops_per_second: float
    train_flops_per_second: float
    tokens_per_caption: float = 0.0
    caption_tokens_per_second: float = 0.0

    def save(self, path: Path) -> None:
        """Write the rates to a JSON file."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_rates(path: Path) -> Rates:
    """Read the rates that `Rates.save` has written.

    Raises:
        ValueError: The file is missing, or does not contain exactly these rates, as numbers of at least 0.
    """
    advice = "Write it with `llava plan --cluster N --measure URLS`."
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--rates {path}: {error_reason(error)}. {advice}") from error
    names = {field.name for field in fields(Rates)}
    if not isinstance(values, dict) or set(values) != names:
        raise ValueError(
            f"--rates {path}: expected a JSON object with exactly the keys {', '.join(sorted(names))}. {advice}"
        )
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
            raise ValueError(
                f"--rates {path}: {name} must be a number of at least 0, not {value!r}."
            )
    return Rates(**values)


@dataclass(frozen=True)
class Cluster:
    """The machines that all steps would run on.

    Attributes:
        machines: Number of machines.
        cores: Cores of each machine.
        devices: Devices of each machine, for encoding and training.
        egress: Bytes per second that each machine can receive from the internet.
        endpoints: Number of endpoints that generate captions.
        device_flops_per_second: FLOP/s of a device in encoding and training, or None if the cluster has
            devices like the measured one.
    """

    machines: int
    cores: int
    devices: int
    egress: float
    endpoints: int
    device_flops_per_second: float | None = None


@dataclass(frozen=True)
class Work:
    """The amount of work: the number of URLs, and what each image costs.

    Attributes:
        urls: Number of URLs to download.
        encode_flops: FLOPs of the vision tower per image.
        train_flops: FLOPs of a training step per sample, forward and backward.
        epochs: Passes over the data.
    """

    urls: int
    encode_flops: float
    train_flops: float
    epochs: float


class Bound(NamedTuple):
    """The minimum duration of a step because of one resource.

    Attributes:
        step: Name of the step.
        resource: Name of the resource.
        arithmetic: How the duration is computed, as text.
        seconds: The duration.
    """

    step: str
    resource: str
    arithmetic: str
    seconds: float


# ---- the arithmetic ----


def compute_bounds(work: Work, rates: Rates, cluster: Cluster) -> list[Bound]:
    """Return the bounds of all steps, in the order of the steps."""
    # Later steps have fewer rows: not every URL returns an image, and not every image is usable.
    images = work.urls * rates.downloaded_share
    records = images * rates.usable_share
    bounds = _download_bounds(work, rates, cluster)
    bounds.append(_clean_bound(images, rates, cluster))
    bounds += _device_bounds(records, work, rates, cluster)
    if rates.caption_tokens_per_second:
        bounds.append(_caption_bound(records, rates, cluster))
    return bounds


def _download_bounds(work: Work, rates: Rates, cluster: Cluster) -> list[Bound]:
    """Return the bounds of the download."""
    machines = cluster.machines
    # Three resources can limit a download: the network of the machines, their CPUs (decoding and checking images), and
    # the host that most URLs point to.
    urls = f"{work.urls:,} URLs"
    # `llava download` opens only a few connections to the same host, on each machine.
    per_host = FetchOptions.per_host
    host_seconds = work.urls * rates.largest_host_share * rates.request_seconds
    return [
        Bound(
            "download",
            "egress",
            f"{urls} x {_in_units(rates.bytes_per_url, _BYTE_UNITS)} / "
            f"({machines} machines x {_in_units(cluster.egress, _BYTE_UNITS)}/s)",
            work.urls * rates.bytes_per_url / (machines * cluster.egress),
        ),
        Bound(
            "download",
            "cores",
            f"{urls} x {_in_units(rates.download_core_seconds, _TIME_UNITS)} / "
            f"({machines} machines x {cluster.cores} cores)",
            work.urls * rates.download_core_seconds / (machines * cluster.cores),
        ),
        Bound(
            "download",
            "largest host",
            f"{urls} x {rates.largest_host_share:.3%} at one host x "
            f"{_in_units(rates.request_seconds, _TIME_UNITS)} / "
            f"({machines} machines x {per_host} connections)",
            host_seconds / (machines * per_host),
        ),
    ]


def _clean_bound(images: float, rates: Rates, cluster: Cluster) -> Bound:
    """Return the bound of cleaning, which decodes every image once."""
    return Bound(
        "clean",
        "cores",
        f"{images:,.0f} images x {_in_units(rates.clean_core_seconds, _TIME_UNITS)} / "
        f"({cluster.machines} machines x {cluster.cores} cores)",
        images * rates.clean_core_seconds / (cluster.machines * cluster.cores),
    )


def _device_bounds(records: float, work: Work, rates: Rates, cluster: Cluster) -> list[Bound]:
    """Return the bounds of encoding and training."""
    # If the cluster has other devices, their speed replaces both measured speeds.
    devices = cluster.machines * cluster.devices
    encode_speed = cluster.device_flops_per_second or rates.encode_flops_per_second
    train_speed = cluster.device_flops_per_second or rates.train_flops_per_second
    where = f"{cluster.machines} machines x {cluster.devices} device(s)"
    encode = Bound(
        "encode",
        "FLOP/s",
        f"{records:,.0f} images x {_in_units(work.encode_flops, _FLOP_UNITS)} / "
        f"({where} x {_in_units(encode_speed, _FLOP_UNITS)}/s)",
        records * work.encode_flops / (devices * encode_speed),
    )
    train = Bound(
        "train",
        "FLOP/s",
        f"{records:,.0f} samples x {work.epochs:g} epoch(s) x "
        f"{_in_units(work.train_flops, _FLOP_UNITS)} / "
        f"({where} x {_in_units(train_speed, _FLOP_UNITS)}/s)",
        records * work.epochs * work.train_flops / (devices * train_speed),
    )
    return [encode, train]


def _caption_bound(records: float, rates: Rates, cluster: Cluster) -> Bound:
    """Return the bound of captioning by the endpoints."""
    speed = rates.caption_tokens_per_second
    return Bound(
        "caption",
        "endpoints",
        f"{records:,.0f} images x {rates.tokens_per_caption:.1f} tokens / "
        f"({cluster.endpoints} endpoints x {speed:,.1f} tokens/s)",
        records * rates.tokens_per_caption / (cluster.endpoints * speed),
    )


# ---- the text ----


def describe_cluster_plan(works: Sequence[Work], rates: Rates, cluster: Cluster) -> str:
    """Return the arithmetic of all steps, from download to captioning, for each number of URLs."""
    lines = [
        f"{cluster.machines} machines, each with {cluster.cores} cores, {cluster.devices} device(s) and "
        f"{_in_units(cluster.egress, _BYTE_UNITS)}/s from the internet. "
        "* marks the slowest resource of each step."
    ]
    for work in works:
        bounds = compute_bounds(work, rates, cluster)
        lines += ["", f"{work.urls:,} URLs"]
        longest: dict[str, float] = {}
        for bound in bounds:
            longest[bound.step] = max(longest.get(bound.step, 0.0), bound.seconds)
        for bound in bounds:
            # The slowest resource determines how long a step takes.
            mark = "*" if bound.seconds == longest[bound.step] else " "
            duration = _in_units(bound.seconds, _TIME_UNITS)
            lines.append(
                f"{mark} {bound.step:<10}{bound.resource:<14}{bound.arithmetic} = {duration}"
            )
        durations = " + ".join(_in_units(seconds, _TIME_UNITS) for seconds in longest.values())
        total = _in_units(sum(longest.values()), _TIME_UNITS)
        lines.append(f"  {'total':<24}{durations} = {total}")
        images = work.urls * rates.downloaded_share
        received = work.urls * rates.bytes_per_url
        lines.append(
            f"  {'disk':<24}{images:,.0f} images, {_in_units(received, _BYTE_UNITS)} received"
        )
    if not rates.caption_tokens_per_second:
        lines += ["", "Captioning was not measured: pass --endpoint and --model with --measure."]
    return "\n".join(lines)


def _in_units(value: float, units: Sequence[tuple[str, float]]) -> str:
    """Return a value with three significant digits, in the largest unit in which it is at least 1."""
    for unit, size in units:
        if value >= size:
            return f"{_three_digits(value / size)} {unit}"
    unit, size = units[-1]
    return f"{_three_digits(value / size)} {unit}"


def _three_digits(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"

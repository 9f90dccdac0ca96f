"""Section "machine" of `bench_gpu.py`: versions, the device, and the highest speed that it reaches.

Other sections divide their FLOP/s and bytes/s by these limits. The limits are measured instead of taken from a data
sheet, so that they are what this machine can really reach (with its power limit, and with other users).
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from gpu_report import Report, Values
from gpu_workload import Workload

# Packages whose version affects the measurements. Some of them are optional.
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "triton",
    "bitsandbytes",
    "flash-attn",
    "liger-kernel",
    "simplejpeg",
)


def run(workload: Workload, report: Report) -> None:
    """Run the section."""
    report.attempt("versions", versions)
    report.attempt("device", partial(describe_device, workload))
    report.attempt("limits", lambda: Limits.measure(workload).as_values())


def versions() -> Values:
    """Return the versions of Python and of packages; "missing" for those that are not installed."""
    values: Values = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            values[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            values[package] = "missing"
    return values


def describe_device(workload: Workload) -> Values:
    """Return the device's name, memory and compute capability, and the CUDA version."""
    if workload.device.type != "cuda":
        return {"device": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "memory": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": str(torch.version.cuda),
    }


class Limits(NamedTuple):
    """The measured limits of the device.

    Attributes:
        flops: FLOP/s of a large matrix product.
        bandwidth: Bytes per second of a copy within the device's memory, the sum of bytes read and bytes written.
    """

    flops: float
    bandwidth: float

    @classmethod
    def measure(cls, workload: Workload) -> Limits:
        """Measure both limits."""
        # The product must be large enough to use the entire GPU, and to take much longer than launching a kernel.
        size = workload.pick(8192, 256)
        matrix = torch.randn(size, size, device=workload.device, dtype=workload.dtype)
        product = torch.empty_like(matrix)
        seconds = _best(workload, partial(torch.mm, matrix, matrix, out=product))
        flops = 2 * size**3 / seconds

        # The copy must be much larger than the caches of the device.
        source = torch.empty(
            workload.pick(1 << 31, 1 << 20), device=workload.device, dtype=torch.int8
        )
        target = torch.empty_like(source)
        seconds = _best(workload, partial(target.copy_, source))
        return cls(flops, 2 * source.nbytes / seconds)

    def as_values(self) -> Values:
        """Return the limits for the report."""
        return {"matmul TFLOP/s": self.flops / 1e12, "copy GB/s": self.bandwidth / 1e9}


def _best(workload: Workload, work: Callable[[], object]) -> float:
    """Return the seconds of the fastest of several calls."""
    seconds = float("inf")
    # The first calls are slow, because they load kernels and raise the clock rate.
    for _ in range(8):
        workload.synchronize()
        start = time.perf_counter()
        work()
        workload.synchronize()
        seconds = min(seconds, time.perf_counter() - start)
    return seconds

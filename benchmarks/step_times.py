"""Measure the training steps of any subclass of transformers' Trainer, in the process that trains.

Our side and all peers are measured by this code. It imports nothing of our package, because it also runs in the
virtual environments of the peers.
"""

from __future__ import annotations

import os
import time
from typing import Any

from workload import peak_memory

WARM_UP_STEPS = 2  # compilation, caches, allocator
Step = tuple[float, float]  # start time in seconds, loss


def record_steps(steps: list[Step]) -> None:
    """Append the start time and the loss of each training step, of any subclass of Trainer."""
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    training_step = transformers.Trainer.training_step

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        loss = training_step(self, *args, **kwargs)
        steps.append((start, loss.item()))
        return loss

    transformers.Trainer.training_step = recorded  # type: ignore[method-assign]


def measure_matmul(dtype: str) -> float:
    """Return the FLOP/s of a large matrix product in a data type."""
    import torch

    size = 2048
    matrix = torch.randn(size, size, dtype=getattr(torch, dtype))
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        matrix @ matrix
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def summarize(steps: list[Step], dtype: str) -> dict[str, float]:
    """Return the figures to compare of a run that has just ended in this process.

    Args:
        steps: The steps that `record_steps` has recorded.
        dtype: Data type that the side computes in.

    Returns:
        "seconds" per step after the warm-up, input included, the first "loss", peak "memory" in bytes, and
        the machine's "limit" in FLOP/s.
    """
    starts = [start for start, _ in steps]
    measured_steps = len(starts) - 1 - WARM_UP_STEPS
    return {
        "seconds": (starts[-1] - starts[WARM_UP_STEPS]) / measured_steps,
        "loss": steps[0][1],
        "memory": peak_memory(os.getpid()),
        "limit": measure_matmul(dtype),
    }

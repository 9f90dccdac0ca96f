"""Choose the data type in which a model generates on a CPU.

Most models are stored in 16 bits. Many CPUs have no instructions for products in 16 bits (for bfloat16, AMD has them since
2022, and Intel since 2020, in servers), and PyTorch then computes them 10 to 50 times as slowly as products in float32.
float32 represents all values of the other types exactly, but needs twice the memory.
"""

from __future__ import annotations

import logging
import time
from functools import cache

import psutil
import torch
from torch import nn

logger = logging.getLogger(__name__)


@cache
def has_fast_products(dtype: torch.dtype) -> bool:
    """Return whether this CPU computes matrix products in a 16-bit data type about as fast as in float32.

    The products are timed, because PyTorch does not report this. The times differ by a factor of 10 or more if there are
    no instructions for the data type. With instructions, the 16-bit products are usually faster.

    Args:
        dtype: torch.bfloat16 or torch.float16.
    """
    return _seconds_of_product(dtype) < 2 * _seconds_of_product(torch.float32)


def _seconds_of_product(dtype: torch.dtype) -> float:
    """Return the time of a matrix product."""
    # Large enough for the overhead of the call to be negligible, and small enough for a slow CPU: 0.1 GFLOP.
    matrix = torch.ones(384, 384, dtype=dtype)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    # The minimum does not contain pauses in which other processes ran.
    return min(seconds)


def use_fast_dtype(model: nn.Module) -> None:
    """Convert a model on the CPU to float32 if this CPU is slow in the data type of its weights.

    Args:
        model: The model. It stays as it is if the memory does not suffice, and a warning is logged.
    """
    slow = []
    for parameter in model.parameters():
        is_16_bit = parameter.dtype in (torch.bfloat16, torch.float16)
        if is_16_bit and not has_fast_products(parameter.dtype):
            slow.append(parameter)
    if not slow:
        return
    name = str(slow[0].dtype).removeprefix("torch.")
    # Do not subtract the memory of the old weights: if they are mapped from a file, it counts as available.
    needed = 4 * sum(parameter.numel() for parameter in slow)
    available = psutil.virtual_memory().available
    if needed > available:
        logger.warning(
            "%s is slow on this CPU. float32 is several times as fast, but needs %.1f GB of memory, and only %.1f GB "
            "are available. Free memory, or pass --quantize int8.",
            name,
            needed / 1e9,
            available / 1e9,
        )
        return
    logger.info("%s is slow on this CPU. The model generates in float32.", name)
    model.float()

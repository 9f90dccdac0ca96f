"""Choose the data type in which a model trains or generates on a CPU.

Most models are stored in 16 bits. Many CPUs have no instructions for products in 16 bits (for bfloat16, AMD has them since
2022, and Intel since 2020, in servers), and PyTorch then computes them 10 to 50 times as slowly as products in float32.
Intel's vector instructions (AVX512, without AMX) reach about half the speed of float32. Training is bound by products, and
generation of one token by the memory traffic of the weights, for which 16 bits are better. float32 represents all values of
the other types exactly, but needs twice the memory.
"""

from __future__ import annotations

import logging
import math
import time
from functools import cache

import psutil
import torch
from torch import nn

logger = logging.getLogger(__name__)


# Instructions for products in a data type, as PyTorch names them.
_INSTRUCTIONS = {
    torch.bfloat16: ("amx_bf16", "avx512_bf16"),
    torch.float16: ("amx_fp16", "avx512_fp16"),
}
_MIN_TRIALS, _MAX_TRIALS = 6, 40


def has_fast_products(dtype: torch.dtype) -> bool:
    """Return whether this CPU has instructions for matrix products in a 16-bit data type.

    They suffice for generation, which is bound by memory traffic. For training, see `trains_fast_in`. If PyTorch does not
    know any instructions of this CPU for the data type, products are timed: without instructions, they take 10 times as
    long as in float32, or longer.

    Args:
        dtype: torch.bfloat16 or torch.float16.
    """
    return _has_instructions(dtype) or seconds_relative_to_float32(dtype) < 2


def trains_fast_in(dtype: torch.dtype) -> bool:
    """Return whether this CPU computes large products, as in training, in a 16-bit data type about as fast as in float32.

    Products are always timed, because some instructions for 16 bits are slower than those for float32.

    Args:
        dtype: torch.bfloat16 or torch.float16.
    """
    # 16 bits save memory traffic in all operations but products, so they may be slightly slower in these.
    return seconds_relative_to_float32(dtype) < 1.25


@cache
def seconds_relative_to_float32(dtype: torch.dtype) -> float:
    """Return the measured time of a matrix product in a data type, divided by that in float32."""
    seconds = expected = math.inf
    for trial in range(1, _MAX_TRIALS + 1):
        # Other processes can only make a product slower, so compare the fastest ones. Measure in turn, because the load of
        # the machine changes.
        seconds = min(seconds, _seconds_of_product(dtype))
        expected = min(expected, _seconds_of_product(torch.float32))
        is_clear = seconds < expected or seconds > 8 * expected
        if is_clear and trial >= _MIN_TRIALS:
            break
    return seconds / expected


def _has_instructions(dtype: torch.dtype) -> bool:
    """Return whether PyTorch reports instructions of this CPU for products in a data type."""
    # Older versions of PyTorch have no such report.
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in _INSTRUCTIONS[dtype])


def _seconds_of_product(dtype: torch.dtype) -> float:
    """Return the time of a matrix product."""
    # Large enough for the overhead of the call to be negligible, and small enough for a slow CPU: 0.1 GFLOP.
    matrix = torch.ones(384, 384, dtype=dtype)
    start = time.perf_counter()
    matrix @ matrix
    return time.perf_counter() - start


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

"""Which freed memory goes back to the operating system, measured in page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Allocate, fill and free a block repeatedly. An allocator that has kept the block causes no page faults.
PROGRAM = """
import resource
from llava_simplified.process_memory import return_freed_blocks

def faults(megabytes):
    b"x" * (megabytes << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        b"x" * (megabytes << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""


def run(code: str) -> list[int]:
    """Run code in a new process, since the allocator belongs to the process; return the numbers that it prints."""
    command = [sys.executable, "-c", PROGRAM + code]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [int(number) for number in output.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have no threshold")
def test_blocks_above_the_threshold_are_returned():
    small, large = run("""
return_freed_blocks(1 << 20)
print(faults(2), end=" ")
return_freed_blocks()
faults(2)
print(faults(2))
""")
    assert small > 5 * (2 << 20) // 4096 / 2
    assert large < small / 10, "by default, blocks below 32 MB are kept"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count each process by itself")
def test_the_peak_does_not_include_that_of_the_parent_process():
    peaks = run("""
import subprocess, sys
from llava_simplified.process_memory import peak_memory
block = b"x" * (400 << 20)
print(peak_memory(), flush=True)
child = "from llava_simplified.process_memory import peak_memory; print(peak_memory())"
subprocess.run([sys.executable, "-c", child], check=True)
""")
    parent, child = peaks
    assert parent > 400 << 20
    assert child < 200 << 20

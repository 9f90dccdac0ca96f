"""The memory of this process: its peak, and when freed memory goes back to the operating system (on Linux).

Returned memory is free for other programs, but whoever allocates it again waits: the operating system clears every page.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

# Parameters of `mallopt`, from glibc's malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_LARGEST_MMAP_THRESHOLD = 32 << 20  # the largest value that glibc chooses by itself

_PAGEOUT = 21  # MADV_PAGEOUT of Linux's mman.h; Python's module mmap does not define it


def return_freed_blocks(threshold: int = _LARGEST_MMAP_THRESHOLD) -> None:
    """Make glibc return freed blocks of at least `threshold` bytes to the operating system at once.

    By default, glibc raises this threshold (up to 32 MB) when large blocks are freed, and keeps smaller freed blocks for
    later use, separately for each thread, unless twice the threshold is free at the end of the heap. Without glibc, this
    function does nothing.

    Args:
        threshold: Size in bytes; by default the largest one that glibc chooses by itself.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl does not have it
        # Setting one of the two turns off the automatic adjustment of both. Keep the ratio that glibc uses.
        libc.mallopt(_MMAP_THRESHOLD, threshold)
        libc.mallopt(_TRIM_THRESHOLD, 2 * threshold)


def release_pages(address: int, size: int) -> None:
    """Release the memory of a part of a mapped file that is not needed again soon.

    The content does not change: if a page is read again, Linux reads it from the file. Memory that is not mapped from a
    file, and pages that other processes use, are not released. On other systems, this function does nothing.

    Args:
        address: Address of the first byte.
        size: Number of bytes.
    """
    if sys.platform != "linux":
        return
    page = mmap.PAGESIZE
    # Release only pages that lie completely within the range: the first and the last page may contain other data.
    start = -(-address // page) * page  # rounded up
    end = (address + size) // page * page  # rounded down
    if end > start:
        # Ignore the result: an older kernel, which does not support this advice, returns an error.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _PAGEOUT)


def peak_memory() -> int:
    """Return the largest resident memory that this process has had so far, in bytes; mapped files are included."""
    # On Linux, do not use `getrusage`: the peak of a new process begins with that of the process that has started it.
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="utf-8").splitlines()
        line = next(line for line in lines if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024  # in kibibytes
    if sys.platform == "win32":
        import psutil  # the workers of a download need nothing but the functions above

        return int(psutil.Process().memory_info().peak_wset)
    import resource  # Windows does not have it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others kibibytes

"""Limit how much memory Pillow needs for a directory of a TIFF file, or of EXIF data in any other format.

A directory is a list of entries: tag, type, count, and the position of the values in the file. Pillow reads the values of
all entries when it opens an image. Many entries may refer to the same bytes, and each gets a copy of them, so a file of
1 MB could need 20 GB. Numbers need even more, since Pillow creates a Python object for each.

    file        | 65,000 entries of 12 bytes | 300 kB |
                  every entry refers to ---->|        |      65,000 copies: 20 GB in memory
"""

from __future__ import annotations

import os
import struct
from functools import wraps
from typing import IO, Any

from PIL.TiffImagePlugin import ImageFileDirectory_v2

# Bytes of a value, by its type.
_TYPE_SIZES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
}
_TEXT_TYPES = (1, 2, 6, 7)  # read as one object, not as numbers
# Some cameras write entries that share values, so all values together may be larger than the file. The limit is this
# multiple of the file's size, plus a constant for small files.
_MAX_SHARING = 4
_ALWAYS_ALLOWED_BYTES = 1_000_000
# An image of 50 million pixels has some thousand strips or tiles.
_MAX_NUMBERS = 200_000
_MAX_ENTRIES = 65_535  # A TIFF that is not a BigTIFF counts its entries in 16 bits.
MAX_DIRECTORIES = 1_000  # Pages are counted up to this number.


class DirectoryError(ValueError):
    """A directory whose values need too much memory."""


def limit_directories() -> None:
    """Patch Pillow so that it checks each directory before it reads the values. Repeated calls have no effect."""
    load: Any = ImageFileDirectory_v2.load
    if hasattr(load, "__wrapped__"):
        return

    @wraps(load)
    def load_checked(directory: Any, file: IO[bytes]) -> None:
        check_directory(file, directory._endian, directory._bigtiff)
        load(directory, file)

    directory_class: Any = ImageFileDirectory_v2
    directory_class.load = load_checked


def check_directory(file: IO[bytes], order: str, is_big: bool) -> None:
    """Check the directory at the current position of a file. The position is restored.

    Args:
        file: The file, or the EXIF data.
        order: Byte order, "<" or ">".
        is_big: Whether counts and positions have 64 bits (BigTIFF).

    Raises:
        DirectoryError: There are too many entries or numbers, or the values are much larger than the file.
    """
    start = file.tell()
    # An entry: tag, type, number of values; the value or its position is skipped.
    count_form, entry_form = ("Q", "HHQ8x") if is_big else ("H", "HHI4x")
    head = file.read(struct.calcsize(f"{order}{count_form}"))
    try:
        (count,) = struct.unpack(f"{order}{count_form}", head)
    except struct.error:  # The file ends here, which Pillow reports.
        count = 0
    entries = struct.Struct(f"{order}{entry_form}")
    if count > _MAX_ENTRIES:
        raise DirectoryError(f"a directory has {count} entries; the limit is {_MAX_ENTRIES}")
    data = file.read(count * entries.size)
    size = file.seek(0, os.SEEK_END)
    file.seek(start)
    num_bytes = num_numbers = 0
    # The file may end within an entry. Check only the complete ones.
    complete = data[: len(data) // entries.size * entries.size]
    for _, kind, num_values in entries.iter_unpack(complete):
        num_bytes += num_values * _TYPE_SIZES.get(kind, 0)
        if kind not in _TEXT_TYPES and kind in _TYPE_SIZES:
            num_numbers += num_values
    if num_bytes > _ALWAYS_ALLOWED_BYTES + _MAX_SHARING * size:
        raise DirectoryError(
            f"the values of a directory need {num_bytes} bytes, much more than the file, which has {size}"
        )
    if num_numbers > _MAX_NUMBERS:
        raise DirectoryError(f"a directory has {num_numbers} numbers; the limit is {_MAX_NUMBERS}")


def has_many_directories(data: bytes) -> bool:
    """Return whether a TIFF file has `MAX_DIRECTORIES` pages or more.

    Pillow compares the position of each page with the positions of all earlier pages, which takes hours for a million
    pages.
    """
    # Count the pages as a TIFF and as a BigTIFF, because programs disagree about which byte marks a BigTIFF.
    return any(_count_chain(data, is_big) == MAX_DIRECTORIES for is_big in (False, True))


def _count_chain(data: bytes, is_big: bool) -> int:
    """Return the number of directories, at most `MAX_DIRECTORIES`, by following the position of the next one in each."""
    order = "<" if data.startswith(b"II") else ">"
    # A directory: the number of entries, the entries, the position of the next directory.
    count_form, entry_size, link_form = ("Q", 20, "Q") if is_big else ("H", 12, "I")
    seen: set[int] = set()
    try:
        (position,) = struct.unpack_from(f"{order}{link_form}", data, 8 if is_big else 4)
        while position and position not in seen and len(seen) < MAX_DIRECTORIES:
            seen.add(position)
            (count,) = struct.unpack_from(f"{order}{count_form}", data, position)
            end = position + struct.calcsize(f"{order}{count_form}") + count * entry_size
            (position,) = struct.unpack_from(f"{order}{link_form}", data, end)
    # A position is beyond the end of the file, so no directory follows.
    except (struct.error, OverflowError):
        return len(seen)
    return len(seen)

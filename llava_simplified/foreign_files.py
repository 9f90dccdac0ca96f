"""Read files that other people or programs wrote, and name the file in every error.

This module imports nothing heavy, so that commands can look at a checkpoint without a delay.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Shortens values for error messages: long strings and numbers are cut, and so are nested values.
_SHORT_REPR = reprlib.Repr()
_SHORT_REPR.maxstring = _SHORT_REPR.maxother = _SHORT_REPR.maxlong = 100
_SHORT_REPR.maxlevel = 3

_MAX_JSON_BYTES = 50_000_000
MAX_TEXT_BYTES = 1 << 24  # maximum size of a text file that people write, such as a caption
_MAX_REASON = 2000  # maximum number of characters to quote from another library's message


def shorten(value: object) -> str:
    """Return the representation of a value for an error message, however large the value is."""
    return _SHORT_REPR.repr(value)


def error_reason(error: BaseException) -> str:
    """Return the text of an error without a final period, so that it can stand within a sentence."""
    return str(error).rstrip(".")


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that contains one object.

    Raises:
        ValueError: The file is too large, or contains something else; the message names the file.
        OSError: The file cannot be read.
    """
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(
            f"{path}: the file has {path.stat().st_size:,} bytes; the maximum is {_MAX_JSON_BYTES:,}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    # RecursionError: deeply nested arrays exceed Python's recursion limit.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, not {shorten(content)}")
    return content


def read_small_file(path: Path) -> bytes:
    """Read a text file of the kind that a person writes, such as a caption or a list of prompts.

    Raises:
        ValueError: The file has more than `MAX_TEXT_BYTES`; the message names it.
        OSError: The file cannot be read.
    """
    # Do not check the size of the file first: a pipe or a device reports no size, and reading it may never end.
    with path.open("rb") as stream:
        data = stream.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(
            f"{path}: larger than the limit of {MAX_TEXT_BYTES:,} bytes for a text file"
        )
    return data


@contextmanager
def blame_file(path: str | Path) -> Iterator[None]:
    """Convert any error that a library raises for the content of a file into a ValueError that names the file.

    Use it only around the parsers of other libraries. It is not documented which errors they raise for damaged
    or malicious files: KeyError, AttributeError, RecursionError, and even a panic of Rust code occur.

    Args:
        path: The file, or the folder of the files.

    Raises:
        ValueError: The library raised an error.
    """
    try:
        yield
    except BaseException as error:
        kind = type(error).__name__
        # Let KeyboardInterrupt and SystemExit pass. A panic of Rust code is not an Exception, but is converted.
        if not isinstance(error, Exception) and kind != "PanicException":
            raise
        # A lack of memory is not an error of the file.
        if kind in ("MemoryError", "OutOfMemoryError"):
            raise
        # The message names the file already.
        if isinstance(error, (ValueError, OSError)) and str(path) in str(error):
            raise
        # Quote the message: an ImportError, for example, explains what to install.
        reason = f"{kind}: {str(error)[:_MAX_REASON]}"
        raise ValueError(f"{path}: cannot be loaded ({reason})") from error

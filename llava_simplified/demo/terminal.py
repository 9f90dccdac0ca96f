"""The terminal output of the demo: one line per step, while everything else goes to a log file."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from llava_simplified.options import escape_control_characters

# Return to the first column, and clear the line (an ANSI escape sequence).
CLEAR_LINE = "\r\x1b[2K"


class Terminal:
    """Standard output, with one line at the bottom that is redrawn.

    Args:
        stream: Standard output. If it is not a terminal, progress lines are left out.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.is_interactive = stream.isatty()

    def print(self, text: str = "") -> None:
        """Print a line that remains, above the progress line."""
        clear = CLEAR_LINE if self.is_interactive else ""
        self.stream.write(f"{clear}{escape_control_characters(text)}\n")
        self.stream.flush()

    def show_progress(self, text: str) -> None:
        """Redraw the progress line."""
        if not self.is_interactive:
            return
        # Cut the line at the width of the terminal, because only the last part of a wrapped line could be cleared.
        width = shutil.get_terminal_size().columns - 1
        self.stream.write(CLEAR_LINE + escape_control_characters(text)[:width])
        self.stream.flush()


@contextlib.contextmanager
def redirect_output(log: Path) -> Iterator[Terminal]:
    """Append everything that is written to stdout and stderr to a log file.

    File descriptors are redirected, not only `sys.stdout`: libraries written in C++ and child processes write to them
    directly.

    Args:
        log: The log file.

    Yields:
        The terminal, which still receives what is written through it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    # Keep copies of stdout and stderr, to restore them at the end and to show progress meanwhile.
    saved = [os.dup(descriptor) for descriptor in (1, 2)]
    terminal_stream = os.fdopen(os.dup(saved[0]), "w", encoding="utf-8", errors="replace")
    try:
        with log.open("a", encoding="utf-8", errors="backslashreplace", buffering=1) as file:
            # 1 and 2 are the descriptors of stdout and stderr.
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield Terminal(terminal_stream)
    finally:
        for descriptor, original in zip((1, 2), saved):
            os.dup2(original, descriptor)
            os.close(original)
        terminal_stream.close()

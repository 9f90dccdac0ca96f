"""Limit how many pixels a process decodes at the same time, and so the memory of decoders in several threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Decoding takes 4 to 16 bytes per pixel (see `data.images.DECODE_BYTES_PER_PIXEL`), so at most 0.8 GB.
MAX_PIXELS_IN_FLIGHT = 50_000_000
# Images of at most this size never wait, so that a few large images do not delay all other requests.
SMALL_IMAGE = 2_000_000


class PixelBudget:
    """Admits images to decoding as long as they have at most `max_pixels` together. A larger image is decoded alone.

    Images of at most `SMALL_IMAGE` pixels are always admitted and not counted: the number of threads limits them.

    Args:
        max_pixels: Maximum number of pixels of all images that are decoded at the same time.
    """

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._in_flight = 0
        self._has_room = threading.Condition()
        # Held by the image that is admitted next. Images are admitted in the order of their arrival: otherwise, a large
        # one could wait forever, because smaller ones that arrive later fit first.
        self._turn = threading.Lock()

    @contextmanager
    def admit(self, pixels: int) -> Iterator[None]:
        """Wait until there is room for an image, and count it while the `with` block runs.

        One thread must not nest these blocks: the inner one could wait for the outer one forever.
        """
        if pixels <= SMALL_IMAGE:
            yield
            return
        with self._turn, self._has_room:
            while self._in_flight and self._in_flight + pixels > self._max_pixels:
                self._has_room.wait()
            self._in_flight += pixels
        try:
            yield
        finally:
            with self._has_room:
                self._in_flight -= pixels
                self._has_room.notify()


# The budget of the process. The threads of the downloader and of the server share it.
DECODING = PixelBudget(MAX_PIXELS_IN_FLIGHT)

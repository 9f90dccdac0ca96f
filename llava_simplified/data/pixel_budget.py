"""How many pixels a process decodes at the same time: what bounds the memory of decoders that run in threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Decoding takes 4 to 16 bytes a pixel, see `data.images.DECODE_BYTES_PER_PIXEL`: at most 0.8 GB.
MAX_PIXELS_IN_FLIGHT = 50_000_000
# Smaller ones never wait: a few large images must not delay everybody else's.
SMALL_IMAGE = 2_000_000


class PixelBudget:
    """Admits images while all that are decoded have at most `max_pixels` together; a larger one alone.

    Images of at most `SMALL_IMAGE` pixels are always admitted, and not counted: the number of threads bounds them.

    Args:
        max_pixels: The limit.
    """

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._in_flight = 0
        self._has_room = threading.Condition()
        # Held by the next image to be admitted: a large one must not wait forever while small ones pass it.
        self._turn = threading.Lock()

    @contextmanager
    def admit(self, pixels: int) -> Iterator[None]:
        """Wait until an image fits beside those that are being decoded, and count it while the block runs.

        The blocks of one thread must not be nested: the inner one could wait for the outer one.
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


# One for the whole process. The downloader's threads and the server's share it.
DECODING = PixelBudget(MAX_PIXELS_IN_FLIGHT)

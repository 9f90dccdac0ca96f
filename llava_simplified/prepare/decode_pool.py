"""Decode images beside an event loop, within limits of time and memory.

An image from the internet may take seconds to decode, and gigabytes of memory, however small its file is. Three rules
follow:

- **Never on the event loop.** While the loop decodes, all transfers stand still, and their timeouts run.
- **A time limit for each image.** It counts from the moment at which the image is decoded, not while it waits for
  others. Nothing can interrupt a decoder, so its thread is given up: the row fails, another thread takes its place, and
  the old one ends when the decoder returns (`data.images` limits what a decoder can be asked for).
- **Pixels in flight.** The header says how many pixels an image has. It is admitted when there is room for it in the
  process's budget (`data.pixel_budget`).

    event loop                    threads
    run() --- job ---> queue ---> read the header -> wait for room -> decode
    future <------- call_soon_threadsafe, once for all results that are there <-
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from llava_simplified.data.images import EncodedImage, read_image_size
from llava_simplified.data.pixel_budget import DECODING

# Most images take a fraction of a millisecond. More than one thread is for those that take seconds.
_NUM_THREADS = 4
_MAX_CHECK_INTERVAL = 0.5  # seconds between two looks at the images that are being decoded


@dataclass(eq=False)
class _Job:
    """One image to decode.

    Attributes:
        data: The file.
        decode: What is done with it.
        future: Receives the result, or the error.
        started: Since when it is decoded; None while it waits.
        is_given_up: It has taken too long. Its thread ends with it.
    """

    data: bytes
    decode: Callable[[bytes], EncodedImage]
    future: asyncio.Future[EncodedImage]
    started: float | None = None
    is_given_up: bool = False


class DecodePool:
    """Threads that decode images for one event loop.

    Args:
        seconds: The time limit of one image.
        max_pixels: Largest image.
    """

    def __init__(self, seconds: float, max_pixels: int) -> None:
        self._seconds = seconds
        self._max_pixels = max_pixels
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._num_threads = 0
        # Everything below is shared by the loop and the threads, and guarded by this lock.
        self._lock = threading.Lock()
        self._running: set[_Job] = set()
        self._finished: deque[tuple[_Job, EncodedImage | BaseException]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def run(self, decode: Callable[[bytes], EncodedImage], data: bytes) -> EncodedImage:
        """Return `decode(data)`.

        Raises:
            TimeoutError: It took longer than the time limit.
            ImageError: As `decode`.
        """
        job = _Job(data, decode, self._loop.create_future())
        if self._num_threads < _NUM_THREADS:
            self._start_thread()
        self._queue.put(job)
        if self._timer is None:
            self._schedule_check()
        return await job.future

    def close(self) -> None:
        """End all threads, without waiting for those that still decode."""
        if self._timer is not None:
            self._timer.cancel()
        for _ in range(self._num_threads):
            self._queue.put(None)

    def _start_thread(self) -> None:
        self._num_threads += 1
        # A process that ends does not wait for daemon threads, whereas it would wait for the threads of an executor.
        threading.Thread(target=self._work, name="decode", daemon=True).start()

    # ---- in the threads ----

    def _work(self) -> None:
        """Decode one image after the other; runs in each thread."""
        while True:
            job = self._queue.get()
            # None ends the thread.
            if job is None:
                return
            if job.future.cancelled():
                continue
            result = self._decode(job)
            with self._lock:
                self._running.discard(job)
                self._finished.append((job, result))
                is_first = len(self._finished) == 1
                is_given_up = job.is_given_up
            # Wake the event loop once for all results that are finished until it runs.
            if is_first:
                # The loop may be closed, if the process is about to end.
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._deliver)
            # Another thread has taken the place of this one while the image took too long.
            if is_given_up:
                return

    def _decode(self, job: _Job) -> EncodedImage | BaseException:
        """Return the decoded image, or the error."""
        # Pass any error to the caller. This thread must continue with the next image.
        try:
            self._set_started(job, time.monotonic())
            width, height = read_image_size(job.data, self._max_pixels)
            # Stop the clock while the job waits for memory.
            self._set_started(job, None)
            with DECODING.admit(width * height):
                self._set_started(job, time.monotonic())
                return job.decode(job.data)
        except BaseException as error:  # noqa: BLE001 - raised in the caller
            return error

    def _set_started(self, job: _Job, started: float | None) -> None:
        with self._lock:
            job.started = started
            self._running.add(job)

    # ---- in the event loop ----

    def _deliver(self) -> None:
        """Pass finished results to their callers; runs in the event loop."""
        with self._lock:
            finished = list(self._finished)
            self._finished.clear()
        for job, result in finished:
            # The caller does not wait any more: it was cancelled, or the image took too long.
            if job.future.done():
                continue
            if isinstance(result, BaseException):
                job.future.set_exception(result)
            else:
                job.future.set_result(result)

    def _schedule_check(self) -> None:
        interval = min(_MAX_CHECK_INTERVAL, self._seconds / 4)
        self._timer = self._loop.call_later(interval, self._give_up_slow_jobs)

    def _give_up_slow_jobs(self) -> None:
        """Raise TimeoutError in the callers whose images take too long, and replace the threads."""
        now = time.monotonic()
        slow = []
        with self._lock:
            for job in self._running:
                is_slow = job.started is not None and now - job.started > self._seconds
                if is_slow and not job.is_given_up:
                    job.is_given_up = True
                    slow.append(job)
            is_busy = bool(self._running)
        for job in slow:
            self._num_threads -= 1
            self._start_thread()
            if not job.future.done():
                job.future.set_exception(TimeoutError(f"not decoded in {self._seconds:g} s"))
        self._timer = None
        if is_busy or not self._queue.empty():
            self._schedule_check()

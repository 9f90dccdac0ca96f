"""Decode images in threads for an event loop, with limits on time and memory.

An image from the internet may take seconds to decode, and gigabytes of memory, however small its file is. Three rules
follow:

- **Never on the event loop.** While the loop decodes an image, no transfer can continue, but its timeout keeps running.
- **A time limit for each image.** The time starts when the decoder starts, and not while the image waits in the queue.
  Nothing can interrupt a decoder, so its thread is abandoned: the row fails, a new thread replaces the old one, and the
  old one ends when the decoder returns (`data.images` limits the work that an image can cause).
- **Pixels in flight.** The number of pixels of an image is in its header. Decoding starts when the process's budget has
  room for them (`data.pixel_budget`).

    event loop                    threads
    run() --- job ---> queue ---> read the header -> wait for room -> decode
    future <------- call_soon_threadsafe, once for all finished results <-------
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

# Most images take less than a millisecond, so one thread would be enough for them. The other threads are for images that
# take seconds.
_NUM_THREADS = 4
_MAX_CHECK_INTERVAL = 0.5  # seconds between two searches for images that take too long


@dataclass(eq=False)
class _Job:
    """One image to decode.

    Attributes:
        data: The image file.
        decode: The function that decodes the file.
        future: Receives the result, or the error.
        started: Time of the monotonic clock at which decoding started; None while the job waits.
        is_given_up: Decoding took too long. The thread ends when the decoder returns.
    """

    data: bytes
    decode: Callable[[bytes], EncodedImage]
    future: asyncio.Future[EncodedImage]
    started: float | None = None
    is_given_up: bool = False


class DecodePool:
    """Threads that decode images for one event loop.

    Args:
        seconds: Time limit for decoding one image, in seconds.
        max_pixels: Maximum number of pixels of an image.
    """

    def __init__(self, seconds: float, max_pixels: int) -> None:
        self._seconds = seconds
        self._max_pixels = max_pixels
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._num_threads = 0
        self._timer: asyncio.TimerHandle | None = None
        # Everything below is shared by the loop and the threads, and guarded by this lock.
        self._lock = threading.Lock()
        self._running: set[_Job] = set()
        self._finished: deque[tuple[_Job, EncodedImage | BaseException]] = deque()

    async def run(self, decode: Callable[[bytes], EncodedImage], data: bytes) -> EncodedImage:
        """Run `decode(data)` in a thread, and return its result.

        Raises:
            TimeoutError: Decoding took longer than the time limit.
            ImageError: The image cannot be decoded.
        """
        job = _Job(data, decode, self._loop.create_future())
        if self._num_threads < _NUM_THREADS:
            self._start_thread()
        self._queue.put(job)
        if self._timer is None:
            self._schedule_check()
        return await job.future

    def close(self) -> None:
        """End all threads, without waiting for decoders that still run."""
        if self._timer is not None:
            self._timer.cancel()
        for _ in range(self._num_threads):
            self._queue.put(None)

    def _start_thread(self) -> None:
        self._num_threads += 1
        # Use daemon threads and not an executor: at its end, a process would wait for the threads of an executor.
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
            # Schedule `_deliver` for the first result only: it delivers all results that are finished when it runs.
            if is_first:
                # The loop may be closed, if the process is about to end.
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._deliver)
            # The image took too long, so another thread has replaced this one.
            if is_given_up:
                return
            del job, result  # free the memory of the image while the thread waits for the next one

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
            # Skip callers that no longer wait: they were cancelled, or their image took too long.
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
        """Raise TimeoutError in the callers whose images take too long, and replace the threads of these images."""
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
            # Do not count the slow thread any more, because it ends after this image.
            self._num_threads -= 1
            self._start_thread()
            if not job.future.done():
                job.future.set_exception(TimeoutError(f"not decoded in {self._seconds:g} s"))
        self._timer = None
        if is_busy or not self._queue.empty():
            self._schedule_check()

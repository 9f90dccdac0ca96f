"""Images are decoded in threads, so that the event loop can continue, within limits of time and of pixels."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from llava_simplified.data.images import EncodedImage, ImageError
from llava_simplified.data.pixel_budget import MAX_PIXELS_IN_FLIGHT
from llava_simplified.prepare import decode_pool
from llava_simplified.prepare.decode_pool import DecodePool

LIMIT = MAX_PIXELS_IN_FLIGHT


@pytest.fixture(autouse=True)
def sizes_in_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the function that reads the size of an image: the "files" of these tests are numbers of pixels."""

    def read_image_size(data: bytes, max_pixels: int) -> tuple[int, int]:
        return int(data), 1

    monkeypatch.setattr(decode_pool, "read_image_size", read_image_size)


def image_of(data: bytes) -> EncodedImage:
    return EncodedImage(data, "jpg", 1, 1)


def run_all(
    decode: Callable[[bytes], EncodedImage], files: list[bytes], seconds: float = 10
) -> list[EncodedImage | BaseException]:
    """Decode files at once, and return the results or errors."""

    async def run() -> list[EncodedImage | BaseException]:
        pool = DecodePool(seconds, max_pixels=10**9)
        try:
            jobs = [pool.run(decode, data) for data in files]
            return await asyncio.gather(*jobs, return_exceptions=True)
        finally:
            pool.close()

    return asyncio.run(run())


def test_decode_pool_returns_results_and_errors_in_order() -> None:
    def decode(data: bytes) -> EncodedImage:
        if data == b"2":
            raise ImageError("corrupt", "two")
        return image_of(data)

    results = run_all(decode, [b"1", b"2", b"3"])
    assert results[0] == image_of(b"1")
    assert isinstance(results[1], ImageError)
    assert results[2] == image_of(b"3")


def test_decode_pool_does_not_block_the_event_loop() -> None:
    async def run() -> int:
        pool = DecodePool(10, max_pixels=10**9)
        job = asyncio.create_task(pool.run(lambda data: (time.sleep(0.5), image_of(data))[1], b"1"))
        ticks = 0
        while not job.done():
            await asyncio.sleep(0.01)
            ticks += 1
        pool.close()
        return ticks

    assert asyncio.run(run()) > 10


def test_decode_pool_gives_up_on_slow_images_and_decodes_the_others() -> None:
    """If there are more slow images than threads, the others must wait. Waiting does not count as their decoding time."""
    release = threading.Event()

    def decode(data: bytes) -> EncodedImage:
        if data == b"9":
            release.wait(30)
        return image_of(data)

    slow = 2 * decode_pool._NUM_THREADS
    start = time.monotonic()
    results = run_all(decode, [b"9"] * slow + [b"1"] * 50, seconds=0.4)
    release.set()
    assert all(isinstance(result, TimeoutError) for result in results[:slow])
    assert results[slow:] == [image_of(b"1")] * 50
    assert time.monotonic() - start < 10


def test_decode_pool_admits_images_by_their_pixels() -> None:
    lock = threading.Lock()
    now = most = alone = 0

    def decode(data: bytes) -> EncodedImage:
        nonlocal now, most, alone
        pixels = int(data)
        with lock:
            now += pixels
            most = max(most, now)
            if pixels > LIMIT:
                alone += now == pixels
        time.sleep(0.01)
        with lock:
            now -= pixels
        return image_of(data)

    half = b"%d" % (LIMIT // 2)
    third = b"%d" % (LIMIT // 3)
    run_all(decode, [half, third, b"10"] * 10)
    assert LIMIT // 2 < most <= LIMIT + 10 * decode_pool._NUM_THREADS, "small images do not count"
    huge = b"%d" % (2 * LIMIT)
    most = 0
    run_all(decode, [half, huge, third] * 4)
    assert alone == 4, "an image beyond the limit is decoded alone"


def test_decode_pool_closes_without_waiting_for_a_decoder() -> None:
    async def run() -> None:
        pool = DecodePool(10, max_pixels=10**9)
        job = asyncio.create_task(pool.run(lambda data: (time.sleep(20), image_of(data))[1], b"1"))
        await asyncio.sleep(0.1)
        job.cancel()
        pool.close()

    start = time.monotonic()
    asyncio.run(run())
    assert time.monotonic() - start < 5

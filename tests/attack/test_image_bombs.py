"""Image bombs against the decoder and the API.

The rule: decoding returns pixels or raises an `ImageError`, in bounded time, and takes no more memory than for an
ordinary image of 50 megapixels.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
from bombs import BOMBS, FORMATS, animation, encoded
from hostile import HealthyClient
from live_server import LiveServer, chat_body
from sampling import IS_COMPLETE

from llava_simplified.data.images import MAX_PIXELS, ImageError, decode_image

MAX_SECONDS = 15.0


@cache
def make_bomb(name: str) -> bytes:
    return BOMBS[name]()


def attack(data: bytes, what: object) -> bool:
    """Decode an image, and assert that the decoder follows the rule. Return whether it could be decoded."""
    start = time.perf_counter()
    try:
        pixels = decode_image(data)
    except ImageError as error:
        assert error.kind
        return False
    finally:
        seconds = time.perf_counter() - start
        assert seconds < MAX_SECONDS, (what, seconds)
    assert pixels.shape[2] == 3 and pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS
    return True


@pytest.mark.medium
@pytest.mark.parametrize("name", BOMBS)
def test_bomb_is_decoded_or_refused_in_time(name: str) -> None:
    attack(make_bomb(name), name)


@pytest.mark.medium
@pytest.mark.parametrize("image_format", FORMATS)
def test_damaged_file_is_decoded_or_refused(image_format: str) -> None:
    """Each of the first 400 bytes is changed; then the file is cut, overwritten and extended at random positions."""
    data = encoded(image_format)
    assert attack(data, image_format)
    generator = random.Random(image_format)
    for position in range(min(len(data), 400)):
        for value in (0, 0xFF, data[position] ^ (1 << generator.randrange(8))):
            attack(data[:position] + bytes([value]) + data[position + 1 :], (position, value))
    for _ in range(60):
        attack(data[: generator.randrange(len(data))], "cut")
        start = generator.randrange(len(data))
        attack(data[:start] + bytes(30) + data[start + 30 :], "zeros")
        attack(data[:start] + generator.randbytes(8) + data[start:], "inserted")


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "TIFF", "PNG", "AVIF"])
def test_damaged_animation_is_decoded_or_refused(image_format: str) -> None:
    data = animation(image_format, 6)
    generator = random.Random(image_format)
    for _ in range(150):
        start = generator.randrange(len(data) // 4, len(data))
        attack(data[:start], "cut")
        attack(data[:start] + generator.randbytes(4) + data[start + 4 :], "changed")


@pytest.mark.slow
@pytest.mark.parametrize("image_format", FORMATS)
def test_many_damaged_files_are_decoded_or_refused(image_format: str) -> None:
    data = encoded(image_format, (160, 120))
    generator = random.Random(image_format)
    for _ in range(5000 if IS_COMPLETE else 400):
        damaged = bytearray(data)
        for _ in range(generator.choice((1, 1, 2, 8, 40))):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        attack(bytes(damaged), "damaged")


MEASURE = """
import resource, sys
from bombs import BOMBS
from llava_simplified.data.images import ImageError, decode_image
for name, bomb in BOMBS.items():
    data = bomb()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        decode_image(data)
    except ImageError:
        pass
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if grown > 900:
        sys.exit(f"{name}: {grown:.0f} MB")
"""


@pytest.mark.slow
def test_bombs_take_bounded_memory() -> None:
    """The images are decoded in a separate process, since the peak memory of a process never falls."""
    folder = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", MEASURE], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.medium
def test_bombs_cause_no_server_error_in_the_api(healthy: HealthyClient, server: LiveServer) -> None:
    def post(item: tuple[str, bytes]) -> tuple[str, int, str]:
        name, data = item
        response = server.post(chat_body(data, max_tokens=1))
        return name, response.status_code, response.text

    bombs = {name: make_bomb(name) for name in BOMBS}
    with ThreadPoolExecutor(4) as threads:
        for name, status, text in threads.map(post, bombs.items()):
            assert status in (200, 400, 413), (name, status, text)

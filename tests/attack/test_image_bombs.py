"""Image bombs against the decoder and the API.

The rule: decoding returns pixels or raises an `ImageError`, in bounded time, and takes no more memory than for an
ordinary image of 50 megapixels.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from bombs import BOMBS, FORMATS, animation, encoded
from hostile import HealthyClient
from live_server import LiveServer, chat_body
from sampling import IS_COMPLETE, num_examples

from llava_simplified.data.images import MAX_PIXELS, ImageError, decode_image

MAX_SECONDS = 15.0


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


# Prints a line for each bomb: its name, the shape of the pixels or the kind of the error, and what the decoding took.
MEASURE = """
import json, time
try:
    import resource
except ImportError:  # Windows
    resource = None
from bombs import BOMBS
from llava_simplified.data.images import ImageError, decode_image

def peak_megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 if resource else 0

for name, bomb in BOMBS.items():
    data = bomb()
    before, start, shape, kind = peak_megabytes(), time.perf_counter(), None, None
    try:
        shape = decode_image(data).shape
    except ImageError as error:
        kind = error.kind
    seconds = time.perf_counter() - start
    grown = peak_megabytes() - before
    outcome = {"shape": shape, "kind": kind, "seconds": seconds, "megabytes": grown}
    print(json.dumps([name, outcome]), flush=True)
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, Any]]:
    """Decode all bombs in a separate process, since the peak memory of a process never falls."""
    folder = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", MEASURE], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr
    return dict(json.loads(line) for line in result.stdout.splitlines())


@pytest.mark.slow
@pytest.mark.xdist_group("image_bombs")
@pytest.mark.parametrize("name", BOMBS)
def test_bomb_is_decoded_or_refused_in_time_and_memory(
    outcomes: dict[str, dict[str, Any]], name: str
) -> None:
    outcome = outcomes[name]
    assert outcome["seconds"] < MAX_SECONDS
    assert outcome["megabytes"] < 900
    if outcome["shape"] is None:
        assert outcome["kind"]
    else:
        height, width, channels = outcome["shape"]
        assert channels == 3 and height * width <= MAX_PIXELS


@pytest.mark.medium
@pytest.mark.parametrize("image_format", FORMATS)
def test_damaged_file_is_decoded_or_refused(image_format: str) -> None:
    """Each of the first 400 bytes is changed; then the file is cut, overwritten and extended at random positions."""
    data = encoded(image_format)
    assert attack(data, image_format)
    generator = random.Random(image_format)
    for position in range(min(len(data), 400)):
        values = [0, 0xFF, data[position] ^ (1 << generator.randrange(8))]
        for value in values if IS_COMPLETE else generator.sample(values, 1):
            attack(data[:position] + bytes([value]) + data[position + 1 :], (position, value))
    for _ in range(num_examples(60)):
        attack(data[: generator.randrange(len(data))], "cut")
        start = generator.randrange(len(data))
        attack(data[:start] + bytes(30) + data[start + 30 :], "zeros")
        attack(data[:start] + generator.randbytes(8) + data[start:], "inserted")


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "TIFF", "PNG", "AVIF"])
def test_damaged_animation_is_decoded_or_refused(image_format: str) -> None:
    data = animation(image_format, 6)
    generator = random.Random(image_format)
    for _ in range(num_examples(150)):
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


@pytest.mark.slow
def test_bombs_cause_no_server_error_in_the_api(healthy: HealthyClient, server: LiveServer) -> None:
    def post(item: tuple[str, bytes]) -> tuple[str, int, str]:
        name, data = item
        response = server.post(chat_body(data, max_tokens=1))
        return name, response.status_code, response.text

    bombs = {name: bomb() for name, bomb in BOMBS.items()}
    with ThreadPoolExecutor(4) as threads:
        for name, status, text in threads.map(post, bombs.items()):
            assert status in (200, 400, 413), (name, status, text)

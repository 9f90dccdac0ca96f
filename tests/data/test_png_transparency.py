"""Transparency of every kind of PNG, compared with the samples that the test writes into the file."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from llava_simplified.data.images import check_image, decode_image, load_pixels, portable_image

GRAY, RGB, PALETTE, GRAY_ALPHA, RGBA = 0, 2, 3, 4, 6
# Color type -> (channels, allowed bits per channel), from the specification of PNG.
FORMS = {
    GRAY: (1, (1, 2, 4, 8, 16)),
    RGB: (3, (8, 16)),
    PALETTE: (1, (1, 2, 4, 8)),
    GRAY_ALPHA: (2, (8, 16)),
    RGBA: (4, (8, 16)),
}
CASES = [(kind, bits) for kind, (_, all_bits) in FORMS.items() for bits in all_bits]
HEIGHT, WIDTH = 6, 9


class Png(NamedTuple):
    """A PNG file, and its pixels on white: float (height, width, 3)."""

    data: bytes
    expected: np.ndarray


def chunk(name: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum


def encode(samples: np.ndarray, color_type: int, bits: int, *others: bytes) -> bytes:
    """Return the file of samples (height, width, channels); `others` are the chunks before the pixels."""
    rows = b""
    for row in samples.reshape(HEIGHT, -1):
        text = "".join(format(int(value), f"0{bits}b") for value in row)
        text += "0" * (-len(text) % 8)
        rows += b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, color_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + b"".join(others) + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def make_png(color_type: int, bits: int, with_trns: bool, *others: bytes) -> Png:
    """Return a random PNG. Some pixels have the transparent color; others differ from it in the last bit only."""
    channels, _ = FORMS[color_type]
    maximum = 2**bits - 1
    random = np.random.default_rng(color_type * 100 + bits)
    samples = random.integers(0, maximum + 1, (HEIGHT, WIDTH, channels))
    samples[0, :3] = samples[0, 0]
    color = samples[0, 0].copy()
    samples[1, :3] = color ^ 1
    if color_type == PALETTE:
        palette = random.integers(0, 256, (maximum + 1, 3), dtype=np.uint8)
        alphas = np.full(maximum + 1, 255)
        chunks = [chunk(b"PLTE", palette.tobytes())]
        if with_trns:
            # The last entries of the palette have no alpha, which means that they are opaque.
            count = max(1, maximum // 2)
            alphas[:count] = random.integers(0, 256, count)
            chunks.append(chunk(b"tRNS", bytes(alphas[:count].tolist())))
        index = samples[:, :, 0]
        colors, alpha = palette[index], alphas[index] / 255
    else:
        scaled = samples >> 8 if bits == 16 else samples * 255 / maximum
        chunks = []
        alpha = np.ones((HEIGHT, WIDTH))
        colors = scaled
        if color_type in (GRAY_ALPHA, RGBA):
            colors, alpha = scaled[:, :, :-1], scaled[:, :, -1] / 255
        elif with_trns:
            chunks.append(chunk(b"tRNS", struct.pack(f">{channels}H", *color)))
            alpha = 1.0 - (samples == color).all(axis=2)
        colors = np.broadcast_to(colors, (HEIGHT, WIDTH, 3))
    opacity = alpha[:, :, None]
    expected = colors * opacity + 255 * (1 - opacity)
    return Png(encode(samples, color_type, bits, *others, *chunks), expected)


def opened_forms(data: bytes, path: Path) -> Iterator[tuple[str, object]]:
    """Yield all forms in which a caller may pass an image."""
    path.write_bytes(data)
    yield "bytes", data
    yield "path", path
    for name, source in (("by path", path), ("from memory", io.BytesIO(data))):
        opened = Image.open(source)
        yield f"opened {name}", opened
        yield f"opened {name}, again", opened
        loaded = Image.open(source)
        loaded.load()
        yield f"loaded {name}", loaded
    with Image.open(path) as closed:
        closed.load()
    yield "closed", closed


@pytest.mark.parametrize("with_trns", [False, True])
@pytest.mark.parametrize(("color_type", "bits"), CASES)
def test_transparency_of_every_png_is_white(
    tmp_path: Path, color_type: int, bits: int, with_trns: bool
) -> None:
    png = make_png(color_type, bits, with_trns)
    for form, image in opened_forms(png.data, tmp_path / "1.png"):
        if (color_type, bits, form) == (RGB, 16, "loaded from memory"):
            continue  # Pillow has dropped the lower bytes; see the next test.
        difference = np.abs(load_pixels(image) - png.expected)  # type: ignore[arg-type]
        assert difference.max() < 1, form
    checked = check_image(png.data)
    assert (checked.width, checked.height) == (WIDTH, HEIGHT)
    portable = portable_image(png.data, 100)
    if with_trns:
        assert portable.suffix == "jpg", "other programs may not composite on white"


def test_upper_bytes_are_compared_where_pillow_has_dropped_the_lower_ones() -> None:
    png = make_png(RGB, 16, with_trns=True)
    loaded = Image.open(io.BytesIO(png.data))
    loaded.load()
    pixels = load_pixels(loaded)
    exact = decode_image(png.data)
    assert (pixels[0, :3] == 255).all()
    is_near = np.zeros((HEIGHT, WIDTH), bool)
    is_near[1, :3] = True
    assert np.array_equal(pixels[~is_near], exact[~is_near])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_bits_of_a_transparent_color_beyond_those_of_the_image_are_ignored(bits: int) -> None:
    """As the specification demands: "decoders must mask the other bits to 0"."""
    samples = np.random.default_rng(0).integers(0, 2**bits, (HEIGHT, WIDTH, 1))
    shade = int(samples[0, 0, 0])
    plain = encode(samples, GRAY, bits, chunk(b"tRNS", struct.pack(">H", shade)))
    with_more = encode(samples, GRAY, bits, chunk(b"tRNS", struct.pack(">H", shade + 2**bits)))
    assert np.array_equal(decode_image(with_more), decode_image(plain))
    assert (decode_image(plain)[0, 0] == 255).all()


@pytest.mark.parametrize(("color_type", "bits"), [(GRAY, 2), (GRAY, 4), (RGB, 16)])
def test_transparent_color_of_a_rotated_png(color_type: int, bits: int) -> None:
    exif = Image.Exif()
    exif[274] = 6
    png = make_png(color_type, bits, True, chunk(b"eXIf", exif.tobytes()[6:]))
    assert np.abs(decode_image(png.data) - np.rot90(png.expected, -1)).max() < 1
    opened = Image.open(io.BytesIO(png.data))
    assert np.array_equal(load_pixels(opened), decode_image(png.data))

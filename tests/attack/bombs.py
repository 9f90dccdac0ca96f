"""Images that attack a decoder: each is small, and asks for much memory or time, or is malformed."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


def encoded(image_format: str, size: tuple[int, int] = (48, 40), **options: object) -> bytes:
    """Return an ordinary image of a format."""
    pixels = np.random.default_rng(3).integers(
        0, 255, (size[1] // 8 + 1, size[0] // 8 + 1, 3), "uint8"
    )
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(file, image_format, **options)
    return file.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(
    width: int, height: int, data: bytes, *others: bytes, bits: int = 8, color: int = 0
) -> bytes:
    """Return a PNG with these compressed rows, and other chunks in front of them."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    chunks = [
        png_chunk(b"IHDR", header),
        *others,
        png_chunk(b"IDAT", data),
        png_chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def zeros(count: int) -> bytes:
    """Return that many compressed zeros, of which a thousand take one byte."""
    compressor = zlib.compressobj(9)
    block = bytes(10**6)
    parts = [compressor.compress(block) for _ in range(count // len(block))]
    return b"".join([*parts, compressor.compress(bytes(count % len(block))), compressor.flush()])


def progressive_jpeg(scans: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """Return a JPEG whose first refinement scan is repeated."""
    data = encoded("JPEG", size, progressive=True, quality=30)
    starts = [index for index in range(len(data)) if data[index : index + 2] == b"\xff\xda"]
    second, third = starts[1], starts[2]
    return data[:second] + data[second:third] * scans + data[third:]


def jpeg_with_size(width: int, height: int) -> bytes:
    data = bytearray(encoded("JPEG"))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def jpeg_with_segments(marker: int, count: int, content: bytes) -> bytes:
    data = encoded("JPEG")
    segment = bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content
    return data[:2] + segment * count + data[2:]


def animation(image_format: str, frames: int) -> bytes:
    images = [Image.new("P", (16, 16), index % 255) for index in range(frames)]
    file = io.BytesIO()
    images[0].save(file, image_format, save_all=True, append_images=images[1:], duration=10)
    return file.getvalue()


def gif_with_screen(width: int, height: int) -> bytes:
    data = bytearray(encoded("GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def bmp_with_size(width: int, height: int) -> bytes:
    data = bytearray(encoded("BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def tiff(*entries: tuple[int, int, int, int], next_directory: int = 0) -> bytes:
    """Return a TIFF directory of (tag, type, count, value)."""
    content = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    count = struct.pack("<H", len(entries))
    return b"II*\0" + struct.pack("<I", 8) + count + content + struct.pack("<I", next_directory)


def tiff_strips(width: int, height: int, compression: int = 1) -> bytes:
    return tiff(
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, compression),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (277, 3, 1, 1),
        (278, 4, 1, height),
        (279, 4, 1, 100),
    )


# The name of each bomb, and what makes it. A whole image may be decoded; its time and memory are limited.
BOMBS: dict[str, Callable[[], bytes]] = {
    "png of a gigapixel": lambda: png(32_000, 32_000, zeros(10_000_000)),
    "png of 2^31 columns": lambda: png(2**31 - 1, 1, zeros(1000)),
    "png of 50 megapixels": lambda: png(7000, 7000, zeros(7001 * 7000)),
    "png with more data than pixels": lambda: png(8, 8, zeros(100_000_000)),
    "png without pixels": lambda: png(0, 0, zeros(0)),
    "png with a text bomb": lambda: png(
        8, 8, zeros(72), png_chunk(b"zTXt", b"a\0\0" + zeros(100_000_000))
    ),
    "png with a profile bomb": lambda: png(
        8, 8, zeros(72), png_chunk(b"iCCP", b"a\0\0" + zeros(100_000_000))
    ),
    "png with 100,000 chunks": lambda: png(8, 8, zeros(72), png_chunk(b"tEXt", b"a\0b") * 100_000),
    "png with a huge chunk": lambda: b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 2**31 - 1) + b"IHDR",
    "png with 2^32 frames": lambda: png(
        8, 8, zeros(72), png_chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))
    ),
    "jpeg of 4 gigapixels": lambda: jpeg_with_size(65_535, 65_535),
    "jpeg without pixels": lambda: jpeg_with_size(0, 0),
    "jpeg with 2,000 scans": lambda: progressive_jpeg(2_000),
    "large jpeg with 300 scans": lambda: progressive_jpeg(300, (4000, 4000)),
    "jpeg with 10,000 comments": lambda: jpeg_with_segments(0xFE, 10_000, b"x" * 300),
    "jpeg with 1,000 profiles": lambda: jpeg_with_segments(
        0xE2, 1_000, b"ICC_PROFILE\0\1\1" + b"x" * 300
    ),
    "jpeg with EXIF of junk": lambda: jpeg_with_segments(
        0xE1, 1, b"Exif\0\0" + b"II*\0" + b"\xff" * 5000
    ),
    "jpeg with 200 EXIF segments": lambda: jpeg_with_segments(
        0xE1, 200, b"Exif\0\0MM\0*\0\0\0\x08" + b"\0\x01" * 900
    ),
    "gif with a huge screen": lambda: gif_with_screen(65_535, 65_535),
    "gif with 3,000 frames": lambda: animation("GIF", 3_000),
    "webp with 1,000 frames": lambda: animation("WEBP", 1_000),
    "bmp of 4 gigapixels": lambda: bmp_with_size(65_535, 65_535),
    "bmp of negative size": lambda: bmp_with_size(-(2**31), -(2**31)),
    "tiff of 4 gigapixels": lambda: tiff_strips(65_535, 65_535),
    "tiff of 2^32 columns": lambda: tiff_strips(2**32 - 1, 2**32 - 1),
    "tiff of unknown compression": lambda: tiff_strips(8, 8, 60_000),
    "tiff of JPEG without data": lambda: tiff_strips(8, 8, 7),
    "tiff that contains itself": lambda: tiff((256, 4, 1, 8), (257, 4, 1, 8), next_directory=8),
    "tiff with 2^32 values": lambda: tiff(
        (256, 4, 2**32 - 1, 8), (257, 4, 1, 8), (270, 2, 2**32 - 1, 8)
    ),
    "tiff with 60,000 entries": lambda: (
        b"II*\0\x08\0\0\0" + struct.pack("<H", 60_000) + bytes(12 * 60_000)
    ),
    "avif of a huge box": lambda: (
        b"\0\0\0\x18ftypavif\0\0\0\0avifmif1" + b"\xff\xff\xff\xffmeta" + bytes(100)
    ),
    "empty": lambda: b"",
    "zeros": lambda: bytes(1_000_000),
    "html": lambda: b"<!doctype html><html>" + b"<p>" * 10_000,
    "svg": lambda: (
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"
    ),
    "postscript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/x) (w) file\n",
    "zip": lambda: b"PK\x03\x04" + bytes(1000),
}

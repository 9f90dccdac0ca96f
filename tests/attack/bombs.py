"""Images that attack a decoder: each is small, but its decoding needs much memory or time, or it is malformed."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from functools import cache

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
    """Return a PNG with these compressed rows, and with the other chunks before them."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    chunks = [
        png_chunk(b"IHDR", header),
        *others,
        png_chunk(b"IDAT", data),
        png_chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@cache
def zeros(count: int) -> bytes:
    """Return `count` zeros, compressed: a thousand of them take one byte."""
    compressor = zlib.compressobj(9)
    block = bytes(10**6)
    parts = [compressor.compress(block) for _ in range(count // len(block))]
    return b"".join([*parts, compressor.compress(bytes(count % len(block))), compressor.flush()])


def progressive_jpeg(scans: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """Return a progressive JPEG whose second scan is repeated `scans` times."""
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


def strip_entries(width: int, height: int, compression: int) -> list[tuple[int, int, int, int]]:
    return [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, compression),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (277, 3, 1, 1),
        (278, 4, 1, height),
        (279, 4, 1, 100),
    ]


def tiff_strips(width: int, height: int, compression: int = 1) -> bytes:
    return tiff(*strip_entries(width, height, compression))


def shared_values(count: int, size: int) -> bytes:
    """Return EXIF data with `count` entries that share one value of `size` bytes."""
    place = 8 + 2 + 12 * count + 4
    entries = [struct.pack(">HHII", 1000 + number, 7, size, place) for number in range(count)]
    head = b"MM\0*" + struct.pack(">IH", 8, count)
    return head + b"".join(entries) + bytes(4 + size)


def tiff_with_shared_values(count: int, size: int) -> bytes:
    values = [(40_000 + number, 7, size, 8) for number in range(count)]
    return tiff(*strip_entries(8, 8, 1), *values) + bytes(size)


def tiff_of_many_strips(count: int) -> bytes:
    """Return a TIFF with `count` strips of one row, all at the same position in the file."""
    entries = [(256, 4, 1, 8), (257, 4, 1, count), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    place = 8 + 2 + 12 * 8 + 4
    entries += [(273, 4, count, place), (277, 3, 1, 1), (278, 4, 1, 1)]
    return tiff(*entries) + struct.pack("<I", 8) * count


def tiff_of_pages(count: int) -> bytes:
    """Return a TIFF with `count` directories after the first one."""
    page = tiff_strips(8, 8)[8:-4]
    data = bytearray(b"II*\0")
    for number in range(count + 1):
        data += struct.pack("<I", 8 + number * (len(page) + 4)) + page
    return bytes(data) + bytes(4)


def gif_with_comments(comments: bytes) -> bytes:
    """Return a GIF with these blocks before its image, and after it."""
    data = encoded("GIF")
    start = 13 + 3 * 2 ** ((data[10] & 7) + 1)
    return data[:start] + comments + data[start:-1] + comments + b";"


def bmp_of_run_lengths(width: int, height: int, codes: bytes) -> bytes:
    """Return a BMP whose pixels are run-length encoded, as these codes."""
    start = 14 + 40 + 1024
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(codes), 0, 0, 256, 0)
    return (
        b"BM" + struct.pack("<IHHI", start + len(codes), 0, 0, start) + header + bytes(1024) + codes
    )


def webp_with_exif(exif: bytes) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "WEBP", exif=exif)
    return file.getvalue()


def avif_with_exif(exif: bytes) -> bytes:
    """Return an AVIF with this metadata. It may be malformed, and Pillow would not write it then."""
    file = io.BytesIO()
    place_holder = b"MM\0*\0\0\0\x08\0\0" + b"\xab" * (len(exif) - 10)
    Image.new("RGB", (16, 16)).save(file, "AVIF", exif=place_holder)
    return file.getvalue().replace(place_holder, exif)


def jpeg_with_exif(exif: bytes) -> bytes:
    """Return a JPEG with metadata of any size, in several segments."""
    data = encoded("JPEG")
    segments = []
    for start in range(0, len(exif), 65_000):
        content = b"Exif\0\0" + exif[start : start + 65_000]
        segments.append(b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content)
    return data[:2] + b"".join(segments) + data[2:]


# The name of each bomb, and the function that creates it. Decoding may succeed, but within limits of time and memory.
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
    "png with 2^31 frames": lambda: png(
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
    "jpeg with a million comments": lambda: jpeg_with_segments(0xFE, 1_000_000, b""),
    "jpeg with a million restarts": lambda: progressive_jpeg(30).replace(
        b"\xff\xdb", b"\xff\xd0" * 1_000_000 + b"\xff\xdb", 1
    ),
    "jpeg whose EXIF shares values": lambda: jpeg_with_exif(shared_values(20_000, 200_000)),
    "jpeg whose frames share values": lambda: jpeg_with_segments(
        0xE2, 1, b"MPF\0" + shared_values(2_000, 40_000)
    ),
    "png whose EXIF shares values": lambda: png(
        8, 8, zeros(72), png_chunk(b"eXIf", shared_values(20_000, 200_000))
    ),
    "webp whose EXIF shares values": lambda: webp_with_exif(shared_values(20_000, 200_000)),
    "avif whose EXIF shares values": lambda: avif_with_exif(shared_values(20_000, 200_000)),
    "tiff that shares values": lambda: tiff_with_shared_values(20_000, 200_000),
    "tiff of a million strips": lambda: tiff_of_many_strips(1_000_000),
    "tiff of 20,000 pages": lambda: tiff_of_pages(20_000),
    "bmp that skips rows": lambda: bmp_of_run_lengths(50_000_000, 1, b"\0\2\xff\xff"),
    "bmp of empty rows": lambda: bmp_of_run_lengths(7_000, 7_000, b"\1\0\0\0" * 7_000),
    "gif with a huge screen": lambda: gif_with_screen(65_535, 65_535),
    "gif with a million comments": lambda: gif_with_comments(b"!\xfe\1a\0" * 1_000_000),
    "gif with a long comment": lambda: gif_with_comments(b"!\xfe" + b"\1a" * 5_000_000 + b"\0"),
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

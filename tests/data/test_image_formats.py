"""Metadata never change the pixels, errors name unsupported formats, and every error of a decoder is an ImageError."""

from __future__ import annotations

import importlib.util
import io
import struct
import sys
import tracemalloc
import types
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import GifImagePlugin, Image, ImageFile, PngImagePlugin, TiffImagePlugin
from sampling import num_examples

from llava_simplified.data import images
from llava_simplified.data.image_formats import (
    is_image_header,
    sniff_format,
    with_article,
    without_gif_comments,
    without_metadata,
)
from llava_simplified.data.images import (
    DECODE_BYTES_PER_PIXEL,
    ImageError,
    check_image,
    count_frames,
    decode_image,
    load_pixels,
    read_image_size,
    shrink_image,
)

BAD_EXIF = b"Exif\0\0II*\0\xff\xff\xff\x7f"


def draw(width: int = 48, height: int = 32) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 5, y * 7, 255 - x * 5], axis=2).astype(np.uint8))


def encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, body: bytes, checksum: int | None = None) -> bytes:
    if checksum is None:
        checksum = zlib.crc32(name + body)
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)


def insert_chunk(data: bytes, chunk: bytes, before: bytes = b"IDAT") -> bytes:
    position = data.index(before) - 4
    return data[:position] + chunk + data[position:]


# ---- metadata ----


def large_text() -> bytes:
    return png_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 3_000_000))


def many_texts() -> bytes:
    chunk = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 1_000_000))
    return chunk * 70


PNG_METADATA = {
    "large text": large_text(),
    "many texts": many_texts(),
    "broken compressed text": png_chunk(b"zTXt", b"k\0\0garbage"),
    "text without a key": png_chunk(b"iTXt", b""),
    "unknown compression": png_chunk(b"zTXt", b"k\0\7" + b"x"),
    "broken exif": png_chunk(b"eXIf", b"II*\0\xff\xff\xff\x7f"),
    "text in place of exif": png_chunk(b"eXIf", b"hello"),
    "exif with a wrong checksum": png_chunk(b"eXIf", b"II*\0", 1),
    "text with a wrong checksum": png_chunk(b"tEXt", b"k\0v", 1),
    "broken color profile": png_chunk(b"iCCP", b"p\0\0garbage"),
    "color profile without a name": png_chunk(b"iCCP", b""),
    "short resolution": png_chunk(b"pHYs", b"\0"),
    "short gamma": png_chunk(b"gAMA", b"\0"),
    "short chromaticities": png_chunk(b"cHRM", b"\0"),
    "empty rendering intent": png_chunk(b"sRGB", b""),
    "unknown chunk with a wrong checksum": png_chunk(b"abCd", b"x", 7),
    "short animation": png_chunk(b"acTL", b"\0"),
    "animation with a wrong checksum": png_chunk(b"acTL", struct.pack(">II", 3, 0), 1),
    "short frame of an animation": png_chunk(b"acTL", struct.pack(">II", 2, 0))
    + png_chunk(b"fcTL", b"\0"),
    "hexadecimal exif": png_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 8\nzz\n"),
}


@pytest.mark.medium
@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
@pytest.mark.parametrize("kind", list(PNG_METADATA))
def test_png_metadata_never_changes_pixels(kind: str, before: bytes) -> None:
    expected = np.asarray(draw())
    data = insert_chunk(encode(draw(), "PNG"), PNG_METADATA[kind], before)
    assert np.array_equal(decode_image(data), expected)
    checked = check_image(data)
    assert (checked.data, checked.suffix, checked.width, checked.height) == (data, "png", 48, 32)
    assert read_image_size(data) == (48, 32)
    assert count_frames(data) == 1
    assert shrink_image(data, 16).height == 16


def test_png_keeps_its_orientation_and_transparency_beside_a_bad_text() -> None:
    exif = Image.Exif()
    exif[274] = 6
    image = draw().convert("RGBA")
    image.putalpha(0)
    data = insert_chunk(encode(image, "PNG", exif=exif), large_text())
    assert decode_image(data).shape == (48, 32, 3)
    assert (decode_image(data) == 255).all()


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize(
    "exif",
    [
        BAD_EXIF,
        b"Exif\0\0",
        b"hello",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x05\0",
    ],
)
def test_broken_exif_never_changes_pixels(image_format: str, exif: bytes) -> None:
    if image_format == "TIFF":
        # In a TIFF, a tag contains the position of the EXIF directory. Here this position is after the end of the file.
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[34665] = 0x7FFFFFFF
        data = encode(draw(), "TIFF", tiffinfo=tags)
        expected = np.asarray(draw())
    elif image_format == "AVIF":
        # The encoder refuses invalid EXIF, so damage the EXIF data of the encoded file.
        tags = Image.Exif()
        tags[271] = "maker of cameras"
        plain = encode(draw(), "AVIF", exif=tags)
        start = plain.index(tags.tobytes()[6:])
        length = len(tags.tobytes()[6:])
        broken = exif[6:].ljust(length, b"\xff")[:length]
        data = plain[:start] + broken + plain[start + length :]
        expected = decode_image(encode(draw(), "AVIF"))
    else:
        data = encode(draw(), image_format, exif=exif)
        expected = decode_image(encode(draw(), image_format))
    assert np.array_equal(decode_image(data), expected)
    checked = check_image(data)
    assert (checked.data, checked.width, checked.height) == (data, 48, 32)


@given(st.binary(max_size=60), st.sampled_from([0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE]), st.booleans())
@settings(max_examples=num_examples(150), deadline=None)
def test_no_bytes_in_a_jpeg_metadata_segment_change_pixels(
    body: bytes, marker: int, has_prefix: bool
) -> None:
    prefixes = {
        0xE0: b"JFIF\0",
        0xE1: b"Exif\0\0",
        0xE2: b"MPF\0",
        0xEE: b"Other",
        0xED: b"Photoshop 3.0\0",
    }
    if has_prefix:
        body = prefixes.get(marker, b"") + body
    elif marker == 0xEE:
        body = b"x" + body  # Adobe's segment is not metadata: it defines the color space
    data = encode(draw(), "JPEG")
    expected = decode_image(data)
    segment = bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body
    changed = data[:2] + segment + data[2:]
    with warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        assume(Image.open(io.BytesIO(changed)).getexif().get(274, 1) == 1)
    assert np.array_equal(decode_image(changed), expected)


@given(
    st.binary(max_size=40), st.sampled_from([b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP", b"pHYs"])
)
@settings(max_examples=num_examples(150), deadline=None)
def test_no_bytes_in_a_png_metadata_chunk_prevent_decoding(body: bytes, name: bytes) -> None:
    data = insert_chunk(encode(draw(), "PNG"), png_chunk(name, body))
    assert decode_image(data).size == 48 * 32 * 3


@pytest.mark.parametrize("name", [b"EXIF", b"XMP ", b"ICCP", b"abcd"])
@pytest.mark.parametrize("length", [5, 0x7FFFFFF0])
def test_webp_metadata_of_any_length_never_changes_pixels(name: bytes, length: int) -> None:
    exif = Image.Exif()
    exif[271] = "maker"
    data = encode(draw(), "WEBP", lossless=True, exif=exif, icc_profile=b"p" * 20, xmp=b"<x/>")
    if name == b"ICCP":  # this chunk is before the pixels, so its length must be correct
        start = data.index(name)
        data = data[: start + 8] + b"\xff" * 20 + data[start + 28 :]
    else:
        data += name + struct.pack("<I", length) + b"abcde\0"
        data = data[:4] + struct.pack("<I", len(data) - 8) + data[8:]
    assert np.array_equal(decode_image(data), np.asarray(draw()))
    assert check_image(data).data == data
    damaged = data.index(b"VP8L") + 30
    data = data[:damaged] + b"\xff" * 40 + data[damaged + 40 :]
    try:
        decode_image(data)
    except ImageError as error:
        assert error.kind in ("corrupt", "truncated", "not_image")


def test_without_metadata_keeps_the_damage_of_a_png() -> None:
    data = insert_chunk(encode(draw(), "PNG"), large_text())
    middle = data.rindex(b"IDAT") + 40
    damaged = data[:middle] + b"\0\0\0\0" + data[middle + 4 :]
    with pytest.raises(ImageError) as error:
        decode_image(damaged)
    assert error.value.kind in ("corrupt", "truncated")
    assert without_metadata(b"GIF89a") == b"GIF89a"
    for length in range(0, 400, 7):
        for image_format in ("PNG", "TIFF", "AVIF", "JPEG", "WEBP"):
            # A file that is cut off at any byte must not cause an error.
            without_metadata(encode(draw(), image_format)[:length])


# ---- errors of decoders ----

ERRORS = [
    ZeroDivisionError("x"),
    KeyError("x"),
    AssertionError("x"),
    AttributeError("x"),
    struct.error("x"),
    RecursionError("x"),
    UnicodeDecodeError("utf-8", b"x", 0, 1, "x"),
    zlib.error("x"),
    Exception("x"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["open", "load", "n_frames", "getexif", "simplejpeg"])
def test_errors_of_decoders_become_image_errors_that_name_their_type(
    monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    formats = {"simplejpeg": "JPEG", "n_frames": "GIF"}
    data = encode(draw(), formats.get(where, "PNG"))

    def fail(*_: object, **__: object) -> None:
        raise error

    if where == "n_frames" and isinstance(error, AttributeError):
        pytest.skip("an AttributeError of n_frames means that the format has only one frame")
    if where == "open":
        monkeypatch.setattr(Image, "open", fail)
    elif where == "simplejpeg":
        monkeypatch.setattr(images.simplejpeg, "decode_jpeg", fail)
    elif where == "load":
        monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    elif where == "n_frames":
        monkeypatch.setattr(GifImagePlugin.GifImageFile, "n_frames", property(fail))
    else:
        monkeypatch.setattr(Image.Image, "getexif", fail)
        monkeypatch.setattr(PngImagePlugin.PngImageFile, "getexif", fail)
        assert decode_image(data).shape == (32, 48, 3), "only metadata are lost"
        return
    functions = [count_frames] if where == "n_frames" else [decode_image, check_image]
    if where == "open":
        functions.append(read_image_size)
    for function in functions:
        with pytest.raises(ImageError, match=type(error).__name__) as raised:
            function(data)
        assert raised.value.kind == "corrupt"


def test_animated_avif_with_a_time_scale_of_zero_is_corrupt() -> None:
    frames = [draw().rotate(90)]
    data = encode(draw(), "AVIF", save_all=True, append_images=frames, duration=100)
    header = data.index(b"mdhd")
    scale = data.index(struct.pack(">I", 1000), header)
    broken = data[:scale] + bytes(4) + data[scale + 4 :]
    for function in (decode_image, check_image, load_pixels):
        with pytest.raises(ImageError, match="ZeroDivisionError") as error:
            function(broken)
        assert error.value.kind == "corrupt"


@pytest.mark.parametrize("image_format", ["TIFF", "GIF", "WEBP", "PNG", "AVIF"])
def test_frames_of_any_damaged_file_are_counted_or_an_image_error(image_format: str) -> None:
    frames = [draw().rotate(90), draw().rotate(45)]
    data = encode(draw(), image_format, save_all=True, append_images=frames)
    assert count_frames(data) == 3
    assert count_frames(encode(draw(), image_format)) == 1
    for position in range(len(data) // 3, len(data), max(1, len(data) // 60)):
        for damaged in (
            data[:position],
            data[:position] + b"\xff\xee\xdd\xcc" + data[position + 4 :],
        ):
            for function in (count_frames, decode_image, check_image):
                try:
                    function(damaged)
                except ImageError as error:
                    assert error.kind in ("corrupt", "truncated", "not_image", "too_large")


# ---- names of formats ----

SVG = b'<?xml version="1.0"?>\n<!-- drawn -->\n<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "x">\n<svg xmlns="x"></svg>'
NAMED = [
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "unsupported", "HEIC"),
    (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "unsupported", "HEIF"),
    (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(20), "unsupported", "JPEG XL"),
    (b"\xff\x0a" + bytes(20), "unsupported", "JPEG XL"),
    (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(20), "unsupported", "JPEG 2000"),
    (b"\xff\x4f\xff\x51" + bytes(20), "unsupported", "JPEG 2000"),
    (SVG, "unsupported", "SVG"),
    (b"\xef\xbb\xbf  <svg>", "unsupported", "SVG"),
    (b"8BPS" + bytes(20), "unsupported", "Photoshop"),
    (b"%!PS-Adobe", "unsupported", "PostScript"),
    (b"\0\0\0\x18ftypisom" + bytes(20), "not_image", "MP4"),
    (b"\x1f\x8b\x08" + bytes(20), "not_image", "gzip"),
    (b"%PDF-1.7", "not_image", "PDF"),
    (b"<!doctype html><html><svg></svg></html>", "html", "web page"),
    (b"  <html>not found</html>", "html", "web page"),
    (b"hello", "not_image", "hello"),
]


@pytest.mark.parametrize(("data", "kind", "name"), NAMED)
def test_other_formats_are_named(data: bytes, kind: str, name: str) -> None:
    for function in (decode_image, check_image, read_image_size, load_pixels):
        with pytest.raises(ImageError, match=name) as error:
            function(data)
        assert error.value.kind == kind


@pytest.mark.parametrize(
    ("name", "article"),
    [
        *(("SVG image", "an"), ("HEIC image", "an"), ("MP4 or QuickTime video", "an")),
        *(("AVI video", "an"), ("icon", "an"), ("OpenEXR image", "an"), ("audio file", "an")),
        *(("JPEG 2000 image", "a"), ("JPEG", "a"), ("PNG", "a"), ("WMF image", "a"), ("PDF", "a")),
        *(("QOI image", "a"), ("DDS image", "a"), ("ZIP archive", "a"), ("gzip file", "a")),
        *(("WebM or Matroska video", "a"), ("Git LFS pointer", "a"), ("UVW image", "a")),
    ],
)
def test_article_fits_the_pronunciation_of_the_name(name: str, article: str) -> None:
    assert with_article(name) == f"{article} {name}"


def test_formats_that_pillow_writes_are_named() -> None:
    assert sniff_format(encode(draw(), "JPEG2000")) == "JPEG 2000 image"
    assert sniff_format(encode(draw(), "PPM")) == "Netpbm image"
    assert is_image_header(encode(draw(), "PNG")[:512])
    assert not is_image_header(b"some text")


def test_heic_error_says_what_to_install() -> None:
    if importlib.util.find_spec("pillow_heif") is not None:
        pytest.skip("pillow-heif is installed")
    with pytest.raises(ImageError, match="pip install pillow-heif"):
        decode_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")


def test_heic_is_read_where_pillow_heif_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test registers a plugin under the format HEIF, as pillow-heif does."""

    class FakeHeif(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self) -> None:
            self._size = (6, 4)
            self._mode = "RGB"
            self.tile = [ImageFile._Tile("raw", (0, 0, 6, 4), 32, "RGB")]

    plugin = types.ModuleType("pillow_heif")
    plugin.register_heif_opener = (
        lambda: Image.register_open(  # type: ignore[attr-defined]
            "HEIF", FakeHeif, lambda prefix: prefix[4:8] == b"ftyp"
        )
    )
    plugin.__spec__ = importlib.util.spec_from_loader("pillow_heif", None)
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    images._register_heif_plugin.cache_clear()
    try:
        data = b"\0\0\0\x18ftypheic".ljust(32, b"\0") + bytes(range(72))
        assert decode_image(data).ravel().tolist() == list(range(72))
        assert check_image(data)[1:] == ("heif", 6, 4)
        with pytest.raises(ImageError) as error:
            decode_image(data[:50])
        assert error.value.kind in ("corrupt", "truncated")
    finally:
        images._register_heif_plugin.cache_clear()
        Image.OPEN.pop("HEIF", None)
        Image.ID.remove("HEIF")


# ---- sizes ----


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_read_image_size_decodes_nothing(
    monkeypatch: pytest.MonkeyPatch, image_format: str
) -> None:
    data = encode(draw(), image_format)
    monkeypatch.setattr(images, "_load", None)
    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", None)
    assert read_image_size(data) == (48, 32)
    with pytest.raises(ImageError) as error:
        read_image_size(data, max_pixels=100)
    assert error.value.kind == "too_large"


def test_strip_that_does_not_fit_into_a_jpeg_is_too_large() -> None:
    data = encode(Image.new("L", (257, 100_000)), "PNG")
    with pytest.raises(ImageError, match="65500") as error:
        shrink_image(data, 224)
    assert error.value.kind == "too_large"


@pytest.mark.parametrize(
    ("mode", "image_format", "options"),
    [
        ("RGB", "PNG", {}),
        ("RGB", "PNG", {"transparency": (0, 0, 0)}),
        ("RGBA", "PNG", {}),
        ("P", "PNG", {}),
        ("L", "PNG", {"transparency": 0}),
        ("RGBA", "WEBP", {}),
        ("RGB", "JPEG", {}),
        ("I;16", "PNG", {}),
    ],
)
def test_decoding_takes_at_most_the_documented_memory_per_pixel(
    mode: str, image_format: str, options: dict[str, Any]
) -> None:
    """tracemalloc does not count Pillow's own buffers, so the test adds them: 1 or 4 bytes per pixel."""
    width, height = 800, 500
    image = Image.new(mode, (width, height))
    data = encode(image, image_format, **options)
    created = 0
    original = Image.core.new

    def count_new(kind: str, size: tuple[int, int]) -> Any:
        nonlocal created
        created += size[0] * size[1] * (1 if kind in ("L", "P", "1") else 4)
        return original(kind, size)

    tracemalloc.start()
    Image.core.new = count_new
    try:
        decode_image(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        Image.core.new = original
        tracemalloc.stop()
    assert peak + created <= DECODE_BYTES_PER_PIXEL * width * height


# ---- comments of GIFs ----


def gif(*comments: bytes, frames: int = 3) -> bytes:
    """Return an animated GIF with the given blocks before its first frame and at its end."""
    file = io.BytesIO()
    drawn = [draw(40, 30).rotate(90 * number).convert("P") for number in range(frames)]
    drawn[0].save(file, "GIF", save_all=True, append_images=drawn[1:])
    data = file.getvalue()
    start = 13 + 3 * 2 ** ((data[10] & 7) + 1)
    blocks = b"".join(comments)
    return data[:start] + blocks + data[start:-1] + blocks + b";"


@pytest.mark.parametrize(
    "comments",
    [
        [b"!\xfe\1a\0"],
        [b"!\xfe\1a\0"] * 30,
        [b"!\xfe" + b"\xff" + b"!\xfe;," * 63 + b"abc" + b"\0"],
        [b"!\xfe\0"],
        [b"junk", b"!\xfe\1a\1b\0", b"!\xff\x0bXMP DataXMP\1x\0"],
    ],
)
def test_gif_comments_are_dropped_and_nothing_else(comments: list[bytes]) -> None:
    data = gif(*comments)
    stripped = without_gif_comments(data)
    plain = gif(*(block for block in comments if not block.startswith(b"!\xfe")))
    assert stripped == plain
    np.testing.assert_array_equal(decode_image(data), decode_image(plain))
    assert count_frames(data) == 3
    assert check_image(data).data == data


def test_gif_that_ends_in_a_comment_stays_truncated() -> None:
    data = gif(b"!\xfe" + b"\xff" + b"x" * 255 + b"\0")
    for size in range(10, len(data), 7):
        with suppress(ImageError):
            decode_image(data[:size])
        assert not without_gif_comments(data[:size]).endswith(b"xxx")


def test_decoding_in_threads_does_not_change_how_other_warnings_are_shown() -> None:
    data = encode(draw().resize((300, 300)), "PNG")
    load_pixels(data)
    filters = list(warnings.filters)

    def decode_many(_: int) -> None:
        for _ in range(30):
            load_pixels(data)
            assert warnings.filters == filters, "not even while images are decoded"

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode_many, range(8)))
    with pytest.warns(UserWarning, match="shown"):
        warnings.warn("shown", UserWarning, stacklevel=1)


def test_warnings_of_pillow_are_ignored_after_other_filters_were_added() -> None:
    broken_exif = b"Exif\0\0II*\0\x08\0\0\0\xff\x7f"
    data = encode(draw(), "JPEG", exif=broken_exif)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert load_pixels(data).shape == (32, 48, 3)
        with Image.open(io.BytesIO(data)) as image:
            load_pixels(image)
    assert not caught

"""A file, its bytes, a PIL image and an array of the same image give the same pixels."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from llava_simplified.data.images import ImageError, check_image, decode_image, load_pixels

EXIF_ORIENTATION = 274
FORMATS_BY_MODE = {
    "1": ["PNG", "TIFF", "BMP"],
    "L": ["PNG", "TIFF", "JPEG", "GIF", "BMP", "WEBP", "AVIF"],
    "LA": ["PNG", "TIFF", "WEBP", "AVIF"],
    "P": ["PNG", "TIFF", "GIF", "BMP"],
    "PA": ["TIFF"],
    "RGB": ["PNG", "TIFF", "JPEG", "WEBP", "AVIF", "BMP", "GIF"],
    "RGBA": ["PNG", "TIFF", "WEBP", "AVIF", "GIF"],
    "RGBX": ["TIFF"],
    "CMYK": ["JPEG", "TIFF"],
    "YCbCr": ["JPEG"],  # Pillow does not read the TIFF that it writes
    "LAB": ["TIFF"],
    "I;16": ["PNG", "TIFF"],
}
IN_MEMORY_MODES = [*FORMATS_BY_MODE, "I", "La", "RGBa", "HSV", "I;16B", "I;16L", "I;16N"]


def make_image(mode: str) -> Image.Image:
    """Return a small image of any mode; if the mode has transparency, the opacity increases from 0 at the left edge."""
    y, x = np.mgrid[:20, :30]
    rgb = np.stack([x * 8, y * 12, 255 - x * 8], axis=2).astype(np.uint8)
    image = Image.fromarray(rgb)
    alpha = Image.fromarray((x * 8).astype(np.uint8))
    if mode.startswith("I;16"):
        wide = Image.fromarray((x * 2100).astype(np.uint16))
        return wide if mode == "I;16" else Image.frombytes(mode, wide.size, _bytes_as(wide, mode))
    if mode == "I":
        return Image.fromarray((x * 2100).astype(np.int32))
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    if mode in ("LA", "La", "RGBA", "RGBa"):
        with_alpha = image.convert("LA" if mode in ("LA", "La") else "RGBA")
        with_alpha.putalpha(alpha)
        return with_alpha.convert(mode)
    if mode == "PA":
        with_palette = image.convert("P").convert("PA")
        with_palette.putalpha(alpha)
        return with_palette
    return image.convert(mode)


def _bytes_as(image: Image.Image, mode: str) -> bytes:
    order = ">u2" if mode == "I;16B" else "<u2"
    return np.asarray(image).astype(order).tobytes()


def encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "image_format"),
    [(mode, name) for mode, names in FORMATS_BY_MODE.items() for name in names],
)
@pytest.mark.parametrize("orientation", [1, 6])
def test_load_pixels_of_a_file_its_bytes_and_the_pil_image_are_equal(
    tmp_path: Path, mode: str, image_format: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    options = {} if image_format in ("GIF", "BMP") else {"exif": exif}
    data = encode(make_image(mode), image_format, **options)
    path = tmp_path / "image"
    path.write_bytes(data)
    expected = decode_image(data)
    is_rotated = orientation == 6 and image_format not in ("GIF", "BMP")
    assert expected.shape == ((30, 20, 3) if is_rotated else (20, 30, 3))
    for source in (path, str(path), data, bytearray(data), Image.open(path)):
        assert np.array_equal(load_pixels(source), expected)
    for source in (path, io.BytesIO(data)):
        loaded = Image.open(source)
        loaded.load()
        for _ in range(2):  # the first call must not change the image
            assert np.array_equal(load_pixels(loaded), expected)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(load_pixels(upright), expected), "the orientation is applied once"
    checked = check_image(data)
    assert (checked.height, checked.width) == expected.shape[:2]


XMP = '<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/"><y tiff:Orientation="6"/></x>'


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("place", ["tag", "XMP", "tag and XMP"])
@pytest.mark.parametrize("pages", [1, 2])
def test_tiff_is_rotated_once_wherever_its_orientation_is_stored(
    tmp_path: Path, mode: str, compression: str | None, place: str, pages: int
) -> None:
    image = make_image(mode)
    tags = {
        "tag": {EXIF_ORIENTATION: 6},
        "XMP": {700: XMP.encode()},
        "tag and XMP": {EXIF_ORIENTATION: 6, 700: XMP.encode()},
    }[place]
    others = [image] * (pages - 1)
    data = encode(
        image,
        "TIFF",
        compression=compression,
        tiffinfo=tags,
        save_all=True,
        append_images=others,
    )
    path = tmp_path / "1.tif"
    path.write_bytes(data)
    expected = np.rot90(load_pixels(image), -1)
    assert np.array_equal(decode_image(data), expected)
    for source in (path, io.BytesIO(data)):
        opened = Image.open(source)
        assert np.array_equal(load_pixels(opened), expected), "not loaded"
        assert np.array_equal(load_pixels(opened), expected), "loaded by the first call"
        opened = Image.open(source)
        opened.getexif()
        opened.load()
        assert np.array_equal(load_pixels(opened), expected), "loaded by the caller"
    with Image.open(path) as opened:
        opened.load()
    assert np.array_equal(load_pixels(opened), expected), "loaded and closed"


def test_tiff_that_the_caller_has_changed_is_not_read_again(tmp_path: Path) -> None:
    image = make_image("L")
    path = tmp_path / "1.tif"
    image.save(path, tiffinfo={EXIF_ORIENTATION: 3})
    opened = Image.open(path)
    opened.paste(7, (0, 0, 5, 5))
    expected = load_pixels(Image.fromarray(np.asarray(opened)))
    assert (expected[:5, :5] == 7).all()
    assert np.array_equal(load_pixels(opened), expected)
    path.unlink()
    assert np.array_equal(load_pixels(opened), expected)


@pytest.mark.parametrize("mode", IN_MEMORY_MODES)
def test_load_pixels_accepts_every_mode_of_pil(mode: str) -> None:
    pixels = load_pixels(make_image(mode))
    assert pixels.shape == (20, 30, 3)
    assert pixels.dtype == np.uint8
    assert pixels.max() > 200, "not black"
    assert len(np.unique(pixels)) >= 2


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_transparency_is_white_in_every_mode(mode: str) -> None:
    image = make_image(mode)
    assert (load_pixels(image)[:, 0] == 255).all(), "the left edge is transparent"


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I;16N", "I"])
def test_sixteen_bits_are_scaled_in_every_mode(mode: str) -> None:
    expected = np.arange(30) * 2100 >> 8
    assert np.array_equal(load_pixels(make_image(mode))[0, :, 0], expected)


@pytest.mark.parametrize("mode", ["L", "I;16"])
def test_transparent_shade_of_gray_is_white(mode: str) -> None:
    image = make_image(mode)
    shade = int(np.asarray(image)[0, 3])
    with_shade = Image.open(io.BytesIO(encode(image, "PNG", transparency=shade)))
    pixels = load_pixels(with_shade)
    is_shade = np.asarray(image) == shade
    assert (pixels[is_shade] == 255).all()
    assert np.array_equal(pixels[~is_shade], load_pixels(image)[~is_shade])


def test_values_outside_sixteen_bits_are_clipped_and_do_not_wrap() -> None:
    image = Image.fromarray(np.array([[-5, 0, 65_535, 65_536, 1_000_000]], dtype=np.int32))
    assert load_pixels(image)[0, :, 0].tolist() == [0, 0, 255, 255, 255]


def test_arrays_of_every_form_equal_the_file() -> None:
    for mode in ("L", "LA", "RGB", "RGBA", "1", "I;16"):
        image = make_image(mode)
        assert np.array_equal(load_pixels(np.asarray(image)), decode_image(encode(image, "PNG")))
    gray = np.asarray(make_image("L"))
    assert np.array_equal(load_pixels(gray[:, :, None]), load_pixels(gray))
    wide = np.full((2, 3, 3), 30_000, np.uint16)
    assert (load_pixels(wide) == 30_000 >> 8).all()


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.int64),
        np.zeros((3, 4, 4, 3), np.uint8),
        np.zeros((4, 4, 5), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
    ],
)
def test_other_arrays_are_refused(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        load_pixels(array)


def test_other_objects_are_refused_by_their_type() -> None:
    with pytest.raises(ValueError, match="list"):
        load_pixels([1, 2, 3])  # type: ignore[arg-type]


def test_damaged_pil_image_is_an_image_error() -> None:
    data = encode(make_image("RGB").resize((300, 200)), "PNG")
    with pytest.raises(ImageError) as error:
        load_pixels(Image.open(io.BytesIO(data[: len(data) // 2])))
    assert error.value.kind in ("truncated", "corrupt")


# ---- samples of TIFF files ----


def make_tiff(samples: np.ndarray, *, bits: int, is_white_zero: bool, sample_format: int) -> bytes:
    """Return an uncompressed TIFF of one strip.

    Args:
        samples: The samples (height, width) or (height, width, channels), little-endian.
        bits: Bits of each sample.
        is_white_zero: Whether 0 is white.
        sample_format: 1: unsigned, 2: signed, 3: floating point.
    """
    height, width = samples.shape[:2]
    channels = samples.shape[2] if samples.ndim == 3 else 1
    colors = 2 if channels == 3 else int(not is_white_zero)
    strip = samples.tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: colors, 273: 8}
    tags |= {277: channels, 278: height, 279: len(strip), 339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = b"II*\0" + struct.pack("<I", 8 + len(strip))
    return header + strip + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("is_white_zero", [False, True])
def test_tiff_may_store_white_as_zero(tmp_path: Path, bits: int, is_white_zero: bool) -> None:
    values = np.arange(256).reshape(16, 16)
    samples = values.astype("<u1") if bits == 8 else (values * 257).astype("<u2")
    data = make_tiff(samples, bits=bits, is_white_zero=is_white_zero, sample_format=1)
    expected = 255 - values if is_white_zero else values
    assert np.array_equal(decode_image(data)[:, :, 0], expected)
    path = tmp_path / "1.tif"
    path.write_bytes(data)
    assert np.array_equal(load_pixels(path)[:, :, 0], expected)
    assert np.array_equal(load_pixels(Image.open(path))[:, :, 0], expected)


@pytest.mark.parametrize(
    ("dtype", "bits", "sample_format", "channels"),
    [
        ("<u4", 32, 1, 1),
        ("<i4", 32, 2, 1),
        ("<f4", 32, 3, 1),
        ("<f4", 32, 3, 3),
        ("<f8", 64, 3, 1),
        ("<i2", 16, 2, 1),
        ("<u1", 12, 1, 1),
    ],
)
def test_tiff_whose_samples_have_no_known_range_is_unsupported(
    dtype: str, bits: int, sample_format: int, channels: int
) -> None:
    shape = (16, 16, channels) if channels > 1 else (16, 24)
    samples = np.ones(shape, dtype)
    data = make_tiff(samples, bits=bits, is_white_zero=False, sample_format=sample_format)
    for function in (decode_image, check_image, load_pixels):
        with pytest.raises(ImageError, match="convert it") as error:
            function(data)
        assert error.value.kind == "unsupported"


def test_pil_image_of_floating_point_samples_is_unsupported() -> None:
    with pytest.raises(ImageError, match="convert it") as error:
        load_pixels(Image.fromarray(np.full((2, 3), 0.5, np.float32)))
    assert error.value.kind == "unsupported"

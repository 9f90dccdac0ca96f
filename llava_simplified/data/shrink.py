"""Check a picture without keeping its pixels, and make pictures smaller."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from llava_simplified.data.images import FORMATS, MAX_PIXELS, ImageError, decode_image

_SUFFIX = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}
_QUALITY = 95


class Picture(NamedTuple):
    """An image file that decodes: its bytes, what they are (jpg, png, ...), its size in pixels."""

    data: bytes
    suffix: str
    width: int
    height: int


def check_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Picture:
    """Decode the whole of an image and forget the pixels; the verdict is `decode_image`'s.

    A JPEG is decoded to grey at an eighth of its size: every coded bit is read all the same, which is what
    finds cut and damaged files, but most of the arithmetic is saved.

    Raises:
        ImageError: html, not_image, too_large, truncated or corrupt.
    """
    try:
        if data[:3] == b"\xff\xd8\xff":
            height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
            if colors != "CMYK" and width * height <= max_pixels:
                simplejpeg.decode_jpeg(data, "GRAY", fastdct=True, min_height=1, min_width=1, min_factor=8)
                return Picture(data, "jpg", width, height)
        height, width = decode_image(data, max_pixels=max_pixels).shape[:2]
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            name = str(image.format)
    except ImageError as error:
        if error.kind == "not_image" and data[:512].lstrip()[:1] == b"<":
            raise ImageError("html", f"a page, not a picture: {data[:60]!r}") from None
        raise _cut_or_corrupt(error) from None
    except ValueError as error:  # simplejpeg's
        raise _cut_or_corrupt(ImageError("corrupt", f"corrupt JPEG: {error}")) from None
    return Picture(data, _SUFFIX.get(name, name.lower()), width, height)


def _cut_or_corrupt(error: ImageError) -> ImageError:
    cut = error.kind == "corrupt" and any(word in str(error) for word in ("Premature end", "truncated"))
    return ImageError("truncated", str(error)) if cut else error


def shrink_image(data: bytes, side: int, max_pixels: int = MAX_PIXELS) -> Picture:
    """An upright JPEG whose shorter side is `side` pixels; an image that isn't larger keeps its bytes.

    A large JPEG is decoded at the smallest of libjpeg's own scales that is not below `side`.

    Raises:
        ImageError: as `check_image`.
    """
    picture = check_image(data, max_pixels) if data[:3] != b"\xff\xd8\xff" else _jpeg_header(data, max_pixels)
    shorter = min(picture.width, picture.height)
    if side <= 0 or shorter <= side:
        return check_image(data, max_pixels) if picture.suffix == "jpg" else picture
    scale = side / shorter
    width, height = round(picture.width * scale), round(picture.height * scale)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as header:
            plain = header.format == "JPEG" and header.mode in ("RGB", "L") and header.getexif().get(274, 1) == 1
        if plain:
            pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
        else:
            pixels = decode_image(data, max_pixels=max_pixels)
            if (pixels.shape[1] > pixels.shape[0]) != (picture.width > picture.height):  # EXIF turned it
                width, height = height, width
    except ImageError as error:
        raise _cut_or_corrupt(error) from None
    except ValueError as error:
        raise _cut_or_corrupt(ImageError("corrupt", f"corrupt JPEG: {error}")) from None
    small = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    encoded = simplejpeg.encode_jpeg(np.ascontiguousarray(small), quality=_QUALITY, colorspace="RGB")
    return Picture(encoded, "jpg", width, height)


def _jpeg_header(data: bytes, max_pixels: int) -> Picture:
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise _cut_or_corrupt(ImageError("corrupt", f"corrupt JPEG: {error}")) from None
    if width * height > max_pixels:
        raise ImageError("too_large", f"{width}x{height} pixels, the limit is {max_pixels}")
    return Picture(data, "jpg", width, height)

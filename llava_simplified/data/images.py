"""Untrusted image bytes -> RGB pixels. The one decoder of training, cleaning, captioning and serving.

Images come from the internet, so nothing about them is trusted: the format is recognized by its magic bytes, the size
is checked in the header before pixels are allocated, and a file that is damaged anywhere is an error.

**Strict JPEG decoding.** The pixels of a JPEG are one stream of variable-length codes. A flipped byte in the middle
shifts everything behind it, and libjpeg conceals that: it fills the rest of the image with grey or shifted stripes, and
writes a warning that Pillow ignores. A model would be trained on those stripes, with the caption of the real image.
simplejpeg's strict mode turns libjpeg's warnings into errors, so JPEGs are decoded with it, and all other formats with
Pillow.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from llava_simplified.data.shards import read_shard_image
from llava_simplified.extras import MissingExtraError

# torch is not imported: it takes two seconds, and the downloader decodes without it.

ImageSource: TypeAlias = str | Path | bytes | Image.Image | np.ndarray
"""A path, the bytes of an image file, a PIL image, or uint8 RGB pixels (height, width, 3)."""

MAX_PIXELS = 50_000_000  # 150 MB of RGB
# Pillow reads more formats. EPS must not be among these: Pillow runs Ghostscript on it.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
JPEG_QUALITY = 95  # of images that `shrink_image` encodes

_EXIF_ORIENTATION = 274
_TRANSPOSED_ORIENTATIONS = (5, 6, 7, 8)  # width and height change places
_SUFFIX_BY_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}  # others: the lower-case format
# What Pillow and its decoders raise for damaged files; fuzzing (tests/fuzz) has found no other type.
_DECODER_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    TypeError,
    MemoryError,
    RuntimeError,
)

Image.init()  # Import Pillow's plugins now: forked workers share them.


class ImageError(ValueError):
    """An image that cannot be used.

    Attributes:
        kind: The reason, as reports count it: "missing", "unsafe", "html", "not_image", "too_large", "truncated" or
            "corrupt". Cleaning adds reasons of its own.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        # An exception is pickled with `args`, the message only; worker processes must send `kind` as well.
        return type(self), (self.kind, str(self))


class EncodedImage(NamedTuple):
    """An image file that was decoded successfully."""

    data: bytes  # the file
    suffix: str  # "jpg", "png", ..., from the file's contents
    width: int  # in pixels, after the EXIF orientation is applied
    height: int


# ---- reading ----


def read_image_bytes(image: str, folder: str | Path) -> bytes:
    """Read the file of a record's image.

    Nothing outside `folder` is opened. Absolute paths are often those of the machine that wrote the records: one that
    is not inside `folder` is looked up there by its base name.

    Args:
        image: A path below `folder`, `shard.tar#key`, or `rows.parquet#row`.
        folder: The image folder.

    Raises:
        ImageError: "unsafe" if the path contains `..`; "missing" if there is no such image, naming the path that was
            tried.
        MissingExtraError: The image is in a Parquet file, and pyarrow is not installed.
    """
    shard, mark, key = image.rpartition("#")
    is_in_shard = bool(mark) and shard.endswith((".tar", ".parquet"))
    relative = Path(shard if is_in_shard else image)
    if ".." in relative.parts:
        raise ImageError("unsafe", f"the image path {image!r} leaves its folder ('..')")
    path = Path(folder) / relative
    if relative.is_absolute() and not relative.is_relative_to(Path(folder).absolute()):
        path = Path(folder) / relative.name
    try:
        if is_in_shard:
            return read_shard_image(path, key)
        # `is_file` excludes pipes and devices: reading one would block.
        if path.is_file():
            return path.read_bytes()
    except MissingExtraError:
        raise  # a ValueError, but not this image's fault
    # For example: the name is too long, there is no permission, the disk fails, the shard has no such key.
    except (OSError, ValueError) as error:
        raise ImageError("missing", str(error)) from error
    raise ImageError("missing", f"no image at {path}; check the image folder")


def load_pixels(image: ImageSource) -> np.ndarray:
    """Convert any form of an image to uint8 RGB (height, width, 3).

    Raises:
        ImageError: The file is missing or cannot be decoded.
        ValueError: An array has another shape or dtype.
    """
    if isinstance(image, (str, Path)):
        if not Path(image).is_file():
            raise ImageError("missing", f"no image at {image}")
        image = Path(image).read_bytes()
    if isinstance(image, bytes):
        return decode_image(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                "an image array must be uint8 RGB (height, width, 3), "
                f"this one is {image.dtype} {image.shape}"
            )
        return image
    return np.asarray(image.convert("RGB"))


# ---- decoding ----


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file.

    Args:
        data: The file.
        max_pixels: Maximum of width * height, checked in the header.

    Returns:
        uint8 RGB (height, width, 3): the first frame, with the EXIF orientation applied, transparency on white.

    Raises:
        ImageError: "html", "not_image", "too_large", "truncated" or "corrupt".
    """
    return _decode_pixels(_open_image(data, max_pixels), data)


def check_image(data: bytes, max_pixels: int = MAX_PIXELS) -> EncodedImage:
    """Check that `decode_image` would succeed, in less time, and return what the file is.

    A JPEG is decoded at an eighth of its size. This still reads every coded bit, which is what finds truncated and
    damaged files; only the inverse transforms are skipped.

    Raises:
        ImageError: As `decode_image`.
    """
    image = _open_image(data, max_pixels)
    _decode_pixels(image, data, min_size=(1, 1))
    width, height = image.size
    if image.getexif().get(_EXIF_ORIENTATION) in _TRANSPOSED_ORIENTATIONS:
        width, height = height, width
    image_format = str(image.format)
    suffix = _SUFFIX_BY_FORMAT.get(image_format, image_format.lower())
    return EncodedImage(data, suffix, width, height)


def shrink_image(data: bytes, side: int, max_pixels: int = MAX_PIXELS) -> EncodedImage:
    """Re-encode an image as a JPEG whose shorter side is `side` pixels.

    Args:
        data: The file.
        side: Length of the shorter side in pixels. An image that is not larger keeps its bytes.
        max_pixels: Maximum of width * height of the given file.

    Raises:
        ImageError: As `decode_image`.
    """
    image = _open_image(data, max_pixels)
    shorter = min(image.size)
    if shorter <= side:
        return check_image(data, max_pixels)
    width, height = (round(length * side / shorter) for length in image.size)
    # A large JPEG is decoded at the smallest of libjpeg's scales that is not below the target.
    pixels = _decode_pixels(image, data, min_size=(height, width))
    is_transposed = (pixels.shape[1] > pixels.shape[0]) != (width > height)
    if is_transposed:  # by its EXIF orientation
        width, height = height, width
    # Bicubic takes 1.6 times as long. After the resize for the vision tower, the result is only a thirtieth closer
    # to that of the original image.
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    encoded = simplejpeg.encode_jpeg(
        np.ascontiguousarray(np.asarray(resized)),
        quality=JPEG_QUALITY,
        colorspace="RGB",
    )
    return EncodedImage(encoded, "jpg", width, height)


def read_image_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return (width, height) of an image file from its header, before its EXIF orientation is applied.

    Raises:
        ImageError: "html", "not_image", "too_large" or "corrupt".
    """
    return _open_image(data, max_pixels).size


def _open_image(data: bytes, max_pixels: int) -> Image.Image:
    """Parse the header of an image file, without decoding pixels.

    Raises:
        ImageError: "html", "not_image", "too_large" or "corrupt".
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's warning about the size: `max_pixels` decides
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            is_html = data[:512].lstrip().startswith(b"<")
            raise ImageError(
                "html" if is_html else "not_image",
                f"not an image: {len(data)} bytes beginning {data[:16]!r}",
            ) from None
        except Image.DecompressionBombError as error:
            raise ImageError("too_large", str(error)) from None
        except _DECODER_ERRORS as error:
            raise _damaged(f"corrupt header: {error}") from error
    if image.width * image.height > max_pixels:
        raise ImageError(
            "too_large",
            f"{image.width}x{image.height} pixels, the limit is {max_pixels}",
        )
    return image


def _decode_pixels(
    image: Image.Image,
    data: bytes,
    min_size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Decode the pixels of an opened image.

    Args:
        image: What `_open_image` returned.
        data: The file.
        min_size: (height, width) before the EXIF orientation is applied. A JPEG is decoded at the smallest of
            libjpeg's scales (in eighths) that is not below it. None decodes at full size.

    Returns:
        uint8 RGB (height, width, 3).

    Raises:
        ImageError: "truncated" or "corrupt".
    """
    min_height, min_width = min_size or (0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's warnings about damaged EXIF
        try:
            # CMYK JPEGs go to Pillow: libjpeg-turbo does not convert them to RGB.
            if image.format != "JPEG" or image.mode not in ("RGB", "L"):
                return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
            pixels = simplejpeg.decode_jpeg(
                data,
                "RGB",
                min_height=min_height,
                min_width=min_width,
                strict=True,
            )
            return _apply_orientation(pixels, image.getexif().get(_EXIF_ORIENTATION, 1))
        except _DECODER_ERRORS as error:
            raise _damaged(f"corrupt {image.format}: {error}") from error


def _damaged(message: str) -> ImageError:
    """Return the error for a damaged file: "truncated" if the decoder says that it ends too early."""
    is_truncated = "Premature end" in message or "truncated" in message
    return ImageError("truncated" if is_truncated else "corrupt", message)


def _apply_orientation(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate and flip pixels (height, width, 3) by an EXIF orientation (1 to 8; 1 is upright)."""
    if orientation == 1:
        return pixels
    # Pillow's own rule for orientations, unknown values included. It reads the orientation from the image's EXIF.
    image = Image.fromarray(pixels)
    image.getexif()[_EXIF_ORIENTATION] = orientation
    return np.asarray(ImageOps.exif_transpose(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, with transparency on white."""
    if image.mode.startswith("I"):
        # 16 bits per channel. Pillow's `convert` would clip them to 255 instead of scaling.
        scaled = np.asarray(image, dtype=np.uint32) >> 8
        return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")

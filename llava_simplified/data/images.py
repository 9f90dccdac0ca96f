"""Untrusted image bytes -> RGB pixels. Training, cleaning, captioning and serving all use this decoder.

Images come from the internet, so nothing about them is trusted: the format is recognized by its magic bytes, the size
is checked in the header before pixels are allocated, and a file that is damaged anywhere is an error.

**Strict JPEG decoding.** The pixels of a JPEG are one stream of variable-length codes. A flipped byte in the middle
shifts everything after it, and libjpeg conceals that: it fills the rest of the image with grey or shifted stripes, and
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
# Do not add EPS, for which Pillow runs Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
JPEG_QUALITY = 95  # of images that `shrink_image` encodes

_EXIF_ORIENTATION = 274
_TRANSPOSED_ORIENTATIONS = (5, 6, 7, 8)  # width and height are swapped
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

Image.init()  # Import Pillow's plugins before workers are forked, so that they share the memory.


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
        # By default, an exception is pickled with `args` (the message) only; worker processes must send `kind` too.
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

    No file outside `folder` is opened. An absolute path outside `folder` often comes from the machine that wrote the
    records, so its base name is looked up in `folder`.

    Args:
        image: A path below `folder`, `shard.tar#key`, or `rows.parquet#row`.
        folder: The image folder.

    Raises:
        ImageError: "unsafe" if the path contains `..`; "missing" if there is no such image.
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
        # Check `is_file`, because reading a pipe or a device would block.
        if path.is_file():
            return path.read_bytes()
    except MissingExtraError:
        raise  # this is a ValueError too, but not a problem of the image
    # For example: the name is too long, permission is denied, the disk fails, the shard has no such key.
    except (OSError, ValueError) as error:
        raise ImageError("missing", str(error)) from error
    raise ImageError("missing", f"no image at {path}; check the image folder")


def load_pixels(image: ImageSource) -> np.ndarray:
    """Convert a path, bytes, PIL image or array to uint8 RGB (height, width, 3).

    Raises:
        ImageError: The file is missing or cannot be decoded.
        ValueError: An array is not uint8 with the shape (height, width, 3).
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
                f"got {image.dtype} {image.shape}"
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
    """Check that `decode_image` would succeed, but in less time, and return suffix and size of the image.

    A JPEG is decoded at an eighth of its size. This still reads every coded bit, and so finds truncated and damaged
    files; only the inverse transforms are skipped.

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
        side: Length of the shorter side in pixels. Smaller images are returned unchanged.
        max_pixels: Maximum of width * height of the given file.

    Raises:
        ImageError: As `decode_image`.
    """
    image = _open_image(data, max_pixels)
    shorter = min(image.size)
    if shorter <= side:
        return check_image(data, max_pixels)
    width, height = (round(length * side / shorter) for length in image.size)
    # Let libjpeg decode a large JPEG at a reduced scale, which is fast; then resize it to the exact size.
    pixels = _decode_pixels(image, data, min_size=(height, width))
    is_transposed = (pixels.shape[1] > pixels.shape[0]) != (width > height)
    if is_transposed:  # by its EXIF orientation
        width, height = height, width
    # Use bilinear interpolation: bicubic takes 1.6 times as long, and after the vision tower's own resize its result
    # is hardly (a thirtieth) closer to that of the original image.
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    encoded = simplejpeg.encode_jpeg(
        np.ascontiguousarray(np.asarray(resized)),
        quality=JPEG_QUALITY,
        colorspace="RGB",
    )
    return EncodedImage(encoded, "jpg", width, height)


def _open_image(data: bytes, max_pixels: int) -> Image.Image:
    """Parse the header of an image file, without decoding pixels.

    Raises:
        ImageError: "html", "not_image", "too_large" or "corrupt".
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # Pillow's warning about large images: we check `max_pixels`
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
            f"the image has {image.width}x{image.height} pixels, the limit is {max_pixels}",
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
        min_size: (height, width) before the EXIF orientation is applied. libjpeg may decode a JPEG at k/8 of its size
            (k = 1..8). The smallest such scale that still has at least this height and width is used. None decodes
            at full size.

    Returns:
        uint8 RGB (height, width, 3).

    Raises:
        ImageError: "truncated" or "corrupt".
    """
    min_height, min_width = min_size or (0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's warnings about damaged EXIF
        try:
            # Use Pillow for CMYK JPEGs too, which libjpeg-turbo does not convert to RGB.
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
    # Let Pillow handle the orientation, including unknown values. It reads the orientation from the image's EXIF.
    image = Image.fromarray(pixels)
    image.getexif()[_EXIF_ORIENTATION] = orientation
    return np.asarray(ImageOps.exif_transpose(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, with transparency on white."""
    if image.mode.startswith("I"):
        # Scale 16 bits per channel down to 8. Pillow's `convert` would clip the values to 255 instead.
        scaled = np.asarray(image, dtype=np.uint32) >> 8
        return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")

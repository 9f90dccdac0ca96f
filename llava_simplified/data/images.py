"""Image bytes -> pixels. The one decoder, and the one transform, of training, cleaning and captioning."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from llava_simplified.data.shards import read_shard_image

if TYPE_CHECKING:  # torch takes two seconds to import, and the downloader decodes without it
    pass

ImageSource = str | Path | bytes | Image.Image | np.ndarray
"""A path, file bytes, a PIL image, or uint8 RGB (height, width, 3)."""
MAX_PIXELS = 50_000_000
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "AVIF",
)  # no EPS: Pillow runs Ghostscript on it
_ORIENTATION = 274  # the EXIF tag
_SUFFIX = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}
_QUALITY = 95
Image.init()  # its plugins now: forked workers share them
# What Pillow and its decoders raise for bytes that are no whole picture; `make fuzz` knows of no other.
_BROKEN = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    TypeError,
    MemoryError,
    RuntimeError,
)


class ImageError(ValueError):
    """An image that can't be used. `kind` is one of missing, unsafe, html, not_image, too_large, truncated, corrupt."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        return type(self), (self.kind, str(self))  # worker processes send it back to the trainer


def read_image_bytes(image: str, folder: str | Path) -> bytes:
    """The bytes of a record's image: a path below `folder`, `shard.tar#key` or `rows.parquet#number`.

    Nothing outside `folder` is opened. An absolute path is often that of the machine that wrote the JSON: where
    it does not lie in `folder`, its base name is looked up there.

    Raises:
        ImageError: missing (names the place that was tried), or unsafe (`..` in the name).
    """
    name, mark, key = image.rpartition("#")
    in_shard = bool(mark) and name.endswith((".tar", ".parquet"))
    path = Path(name if in_shard else image)
    if ".." in path.parts:
        raise ImageError("unsafe", f"the image name {image!r} leaves its folder ('..')")
    place = Path(folder) / path
    if path.is_absolute() and not path.is_relative_to(Path(folder).absolute()):
        place = Path(folder) / path.name
    try:
        if in_shard:
            return read_shard_image(place, key)
        if place.is_file():  # and no pipe, which would be waited for
            return place.read_bytes()
    except (
        OSError,
        ValueError,
    ) as error:  # too long a name, no right to read it, a disk that fails
        raise ImageError("missing", str(error)) from error
    raise ImageError("missing", f"no image {place}; is the image folder right?")


class EncodedImage(NamedTuple):
    """An image file that decodes: its bytes, what they are (jpg, png, ...), its size in pixels."""

    data: bytes
    suffix: str
    width: int
    height: int


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode to uint8 RGB (height, width, 3), upright, first frame, transparency on white.

    JPEG goes through simplejpeg's strict mode, the only decoder that reports bytes corrupted in mid-scan; Pillow
    reads everything else. The size is checked in the header, before any pixel is allocated.

    Raises:
        ImageError: html, not_image, too_large (over `max_pixels`), truncated or corrupt.
    """
    return _pixels(_header(data, max_pixels), data)


def check_image(data: bytes, max_pixels: int = MAX_PIXELS) -> EncodedImage:
    """Say of an image what `decode_image` does, for less: a JPEG is decoded at an eighth of its size.

    Every coded bit is read all the same, which is what finds cut and damaged files.
    """
    image = _header(data, max_pixels)
    _pixels(image, data, (1, 1))
    turned = image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)  # it is seen, and cropped, upright
    size = image.size[::-1] if turned else image.size
    return EncodedImage(data, _SUFFIX.get(str(image.format), str(image.format).lower()), *size)


def shrink_image(data: bytes, side: int, max_pixels: int = MAX_PIXELS) -> EncodedImage:
    """An upright JPEG whose shorter side is `side` pixels; an image that isn't larger keeps its bytes.

    A large JPEG is decoded at the smallest of libjpeg's own scales that is not below `side`.
    """
    image = _header(data, max_pixels)
    shorter = min(image.size)
    if shorter <= side:
        return check_image(data, max_pixels)
    width, height = (round(length * side / shorter) for length in image.size)
    pixels = _pixels(image, data, (height, width))
    if (pixels.shape[1] > pixels.shape[0]) != (width > height):  # EXIF turned it
        width, height = height, width
    # bicubic takes 1.6 times as long, to be a thirtieth nearer to what the tower sees of the unshrunk picture
    small = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    encoded = simplejpeg.encode_jpeg(
        np.ascontiguousarray(small), quality=_QUALITY, colorspace="RGB"
    )
    return EncodedImage(encoded, "jpg", width, height)


def _header(data: bytes, max_pixels: int) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of size, where max_pixels is the rule
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            kind = "html" if data[:512].lstrip()[:1] == b"<" else "not_image"
            raise ImageError(
                kind, f"not an image: {len(data)} bytes beginning {data[:16]!r}"
            ) from None
        except Image.DecompressionBombError as error:
            raise ImageError("too_large", str(error)) from None
        except _BROKEN as error:
            raise _broken(f"corrupt header: {error}") from error
    if image.width * image.height > max_pixels:
        raise ImageError(
            "too_large", f"{image.width}x{image.height} pixels, the limit is {max_pixels}"
        )
    return image


def _pixels(image: Image.Image, data: bytes, least: tuple[int, int] = (0, 0)) -> np.ndarray:
    """All of the image; with `least` (height, width), of a JPEG the smallest of its scales that is not below it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of EXIF that is torn
        try:
            if image.format == "JPEG" and image.mode in ("RGB", "L"):
                pixels = simplejpeg.decode_jpeg(
                    data, "RGB", min_height=least[0], min_width=least[1], strict=True
                )
                orientation = image.getexif().get(_ORIENTATION, 1)
                return (
                    pixels if orientation == 1 else _upright(Image.fromarray(pixels), orientation)
                )
            return np.asarray(_on_white(ImageOps.exif_transpose(image)))
        except _BROKEN as error:
            raise _broken(f"corrupt {image.format}: {error}") from error


def _broken(message: str) -> ImageError:
    cut = "Premature end" in message or "truncated" in message
    return ImageError("truncated" if cut else "corrupt", message)


def _upright(image: Image.Image, orientation: int) -> np.ndarray:
    exif = image.getexif()
    exif[_ORIENTATION] = orientation
    return np.asarray(ImageOps.exif_transpose(image))


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith(
        "I"
    ):  # 16 bits a sample: Pillow's convert would clip them, not scale them
        return Image.fromarray((np.asarray(image, dtype=np.uint32) >> 8).astype(np.uint8)).convert(
            "RGB"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def load_pixels(image: ImageSource) -> np.ndarray:
    """Any form of a picture -> uint8 RGB (height, width, 3)."""
    if isinstance(image, (str, Path)):
        if not Path(image).is_file():
            raise ImageError("missing", f"no picture {image}")
        image = Path(image).read_bytes()
    if isinstance(image, bytes):
        return decode_image(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"an array must be uint8 RGB (height, width, 3), this is {image.dtype} {image.shape}"
            )
        return image
    return np.asarray(image.convert("RGB"))

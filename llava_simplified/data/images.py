"""Untrusted image bytes -> RGB pixels. Training, cleaning, captioning and serving all use this decoder.

Images come from the internet, so nothing about them is trusted: the format is recognized by its magic bytes, the size
is checked in the header before pixels are allocated, and damage of the pixels that a decoder can detect is an error.
Changed bytes can also decode to other pixels without any sign, above all in formats without checksums (all but PNG).

**Strict JPEG decoding.** The pixels of a JPEG are one stream of variable-length codes. A flipped byte in the middle
shifts everything after it, and libjpeg conceals that: it fills the rest of the image with grey or shifted stripes, and
writes a warning that Pillow ignores. A model would be trained on those stripes, with the caption of the real image.
simplejpeg's strict mode turns libjpeg's warnings into errors, so JPEGs are decoded with it, and all other formats with
Pillow. A CMYK JPEG is decoded by both: by simplejpeg to find damage, by Pillow for the colors. Some of libjpeg's warnings
are harmless; `jpeg_segments` finds out which ones.

**Metadata never affect the pixels.** If a decoder rejects a file, a copy without its metadata is decoded, as strictly as
the file (`image_formats.without_metadata`).

**One error type.** A decoder may raise any exception, not only the documented ones: a ZeroDivisionError for an AVIF
with a time scale of zero, a TypeError for a wrong TIFF tag. So every call of Pillow, simplejpeg or their plugins with
untrusted bytes is inside `_decoder_errors`, which converts each exception to an `ImageError`.

    path, bytes, PIL image, array --- load_pixels ---> uint8 RGB, upright, transparency on white, 16 bits scaled to 8
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from llava_simplified.data import jpeg_segments
from llava_simplified.data.image_folder import (
    LocatedFile,
    NameMatches,
    OutsideFolderError,
    exact_path,
    locate_file,
    split_shard_name,
)
from llava_simplified.data.image_formats import (
    sniff_format,
    with_article,
    without_gif_comments,
    without_metadata,
)
from llava_simplified.data.names import AmbiguousNameError
from llava_simplified.data.pixel_budget import DECODING
from llava_simplified.data.png_transparency import find_transparent_color
from llava_simplified.data.shards import read_shard_image
from llava_simplified.data.tiff_directories import (
    MAX_DIRECTORIES,
    has_many_directories,
    limit_directories,
)
from llava_simplified.extras import MissingExtraError

# torch is not imported: it takes two seconds, and the downloader decodes without it.

ImageSource: TypeAlias = str | Path | bytes | Image.Image | np.ndarray
"""A path, the bytes of an image file, a PIL image, or pixels: uint8, uint16 or bool (height, width) or (height, width,
channels), with one (grey), two (grey, alpha), three (RGB) or four (RGBA) channels."""

MAX_PIXELS = 50_000_000  # 150 MB of RGB
# Upper bound of the memory for decoding, with transparency; a test measures it. Multiply it by the number of pixels
# (see `read_image_size`) to limit how many images are decoded at the same time.
DECODE_BYTES_PER_PIXEL = 16
# Every scan of a JPEG is decoded over the entire image, however few bytes it has. Ordinary progressive files have about 10
# scans, and libjpeg-turbo's fuzzers stop at 500. The number of scans times the number of pixels is limited too, which
# limits the time to some seconds.
MAX_JPEG_SCANS = 500
MAX_JPEG_SCAN_PIXELS = 40 * MAX_PIXELS
# Pillow decodes run lengths of a BMP in Python. Four bytes of the file can stand for 255 rows of zeros.
MAX_RLE_PIXELS = 10_000_000
# The formats that are decoded; Pillow supports more. Do not add EPS: Pillow runs Ghostscript on it.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
JPEG_QUALITY = 95  # quality of the files that `shrink_image` and `portable_image` write
_MAX_JPEG_SIDE = 65_500  # libjpeg's limit

_EXIF_ORIENTATION = 274
# Tags of a TIFF: bits of each sample; and how samples become colors, where 0 means that the value 0 is white.
_TIFF_BITS = 258
_TIFF_COLORS = 262
_WHITE_IS_ZERO = 0
_TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: files of more than 4 GB
_TRANSPOSED_ORIENTATIONS = (5, 6, 7, 8)  # width and height change places
# EXIF orientation -> how to make the image upright. Other values mean that it is upright already.
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SUFFIX_BY_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}  # others: the lower-case format
_MAX_SIXTEEN_BITS = 65_535
_RLE_COMPRESSIONS = (
    1,
    2,
)  # values of a BMP's compression field: run lengths of 8-bit and of 4-bit pixels
_RLE_MAX_ROWS = 255  # maximum number of rows that one code of such a BMP skips

_DECODER_MODULES = r"PIL\.|pillow_heif"
# The filter of warnings that `warnings.filterwarnings("ignore", module=_DECODER_MODULES)` adds.
_DECODER_FILTER = ("ignore", None, Warning, re.compile(_DECODER_MODULES), 0)

Result = TypeVar("Result")

Image.init()  # Import Pillow's plugins before workers are forked, so that they share the memory.
limit_directories()


class ImageError(ValueError):
    """An image that cannot be used.

    Attributes:
        kind: The reason, as reports count it: "missing", "ambiguous", "unsafe", "html", "not_image", "unsupported" (an
            image of another format), "too_large", "truncated" or "corrupt". Cleaning adds more reasons.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        # By default, an exception is pickled with `args` (the message) only; worker processes must send `kind` too.
        return type(self), (self.kind, str(self))


class EncodedImage(NamedTuple):
    """An image file that can be decoded."""

    data: bytes  # the file
    suffix: str  # "jpg", "png", ..., from the file's contents
    width: int  # in pixels, after the EXIF orientation is applied
    height: int


# ---- reading ----


def read_image_bytes(image: str, folder: str | Path, matches: NameMatches | None = None) -> bytes:
    """Read the file of a record's image.

    Nothing outside `folder` is opened. A name that does not exist there is resolved by the rules of `image_folder`:
    absolute paths are often valid only on the machine that wrote the records. An absolute path that exists on this
    machine never resolves to another file.

    Args:
        image: A path below `folder`, `shard.tar#key`, or `rows.parquet#row`.
        folder: The image folder.
        matches: Counts which rule found the image, and rejects two names that lead to one file.

    Raises:
        ImageError: As `locate_image`; "missing" also if the file cannot be read.
        MissingExtraError: The image is in a Parquet file, and pyarrow is not installed.
    """
    located = locate_image(image, folder, matches)
    try:
        if located.key is not None:
            return read_shard_image(located.path, located.key)
        return located.path.read_bytes()
    except MissingExtraError:
        raise  # a ValueError, but not this image's fault
    # For example: there is no permission, the disk fails, the shard has no such key.
    except (OSError, ValueError) as error:
        raise ImageError("missing", str(error)) from error


def locate_image(image: str, folder: str | Path, matches: NameMatches | None = None) -> LocatedFile:
    """Find the file of a record's image, without opening it; see `read_image_bytes`.

    Raises:
        ImageError: "unsafe" if the path contains `..`, or is that of a file outside the folder; "ambiguous" if several
            files match; "missing" if there is no such image. The message names the path that was tried.
    """
    if ".." in split_shard_name(image)[0].replace("\\", "/").split("/"):
        raise ImageError(
            "unsafe",
            f"the image path {image!r} contains '..'; write it without '..', as a path inside the image folder",
        )
    folder = Path(folder)
    try:
        located = locate_file(image, folder)
        if located is not None:
            if matches is not None:
                matches.add(image, located)
            return located
    except AmbiguousNameError as error:
        raise ImageError("ambiguous", str(error)) from error
    except OutsideFolderError as error:
        raise ImageError("unsafe", str(error)) from error
    # For example: the name is too long, or the folder cannot be read.
    except (OSError, ValueError) as error:
        raise ImageError("missing", str(error)) from error
    path = exact_path(image, folder) or folder / Path(image).name
    raise ImageError("missing", f"no image at {str(path)!r}; check the image folder")


def load_pixels(image: ImageSource) -> np.ndarray:
    """Convert any form of an image to uint8 RGB (height, width, 3), upright, with transparency on white.

    A file, its bytes, and a PIL image or array of it give the same pixels, except that an array has lost the EXIF
    orientation. Files are decoded within the process's budget (`pixel_budget`).

    Raises:
        ImageError: The file is missing or cannot be decoded.
        ValueError: An array has another shape or dtype, or `image` is something else.
    """
    if isinstance(image, (str, Path)):
        if not Path(image).is_file():
            raise ImageError("missing", f"no image at {str(image)!r}")
        try:
            image = Path(image).read_bytes()
        except OSError as error:
            raise ImageError("missing", str(error)) from error
    if isinstance(image, (bytes, bytearray, memoryview)):
        data = bytes(image)
        width, height = read_image_size(data)
        # The server calls this function in several threads.
        with DECODING.admit(width * height):
            return decode_image(data)
    if isinstance(image, np.ndarray):
        return _array_to_rgb(image)
    if isinstance(image, Image.Image):
        _check_samples(image)
        with _decoder_errors(image.format):
            return _to_pixels(image)
    raise ValueError(
        f"an image must be a path, bytes, a PIL image or an array, got {type(image).__name__}"
    )


def _array_to_rgb(array: np.ndarray) -> np.ndarray:
    """Convert an image array of another kind to uint8 RGB."""
    channels = array.shape[2] if array.ndim == 3 else 1
    has_pixels = array.ndim in (2, 3) and array.size > 0 and 1 <= channels <= 4
    if not has_pixels or array.dtype not in (np.uint8, np.uint16, np.bool_):
        raise ValueError(
            "an image array must be uint8, uint16 or bool, with the shape (height, width) or (height, width, channels) "
            f"and 1 to 4 channels; got {array.dtype} {array.shape}"
        )
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    if array.ndim == 3 and channels == 3:
        return array
    if array.ndim == 3 and channels == 1:
        array = array[:, :, 0]
    return np.asarray(_to_rgb(Image.fromarray(np.ascontiguousarray(array))))


# ---- decoding ----


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file.

    Args:
        data: The file.
        max_pixels: Maximum of width * height, checked in the header.

    Returns:
        uint8 RGB (height, width, 3): the first frame, with the EXIF orientation applied, transparency on white.

    Raises:
        ImageError: "html", "not_image", "unsupported", "too_large", "truncated" or "corrupt".
    """

    def decode(file: bytes) -> np.ndarray:
        return _decode_pixels(_open_image(file, max_pixels), file)

    return _decode_or_retry_without_metadata(decode, data)


def check_image(data: bytes, max_pixels: int = MAX_PIXELS) -> EncodedImage:
    """Check that `decode_image` would succeed, in less time and memory, and return the file's format and size.

    A JPEG is decoded at an eighth of its size. This still reads every coded bit, which is what finds truncated and
    damaged files; only the inverse transforms are skipped. Other formats are decoded, but not converted to RGB.

    Raises:
        ImageError: As `decode_image`.
    """

    def check(file: bytes) -> EncodedImage:
        image = _open_image(file, max_pixels)
        if _is_strict(image):
            _decode_jpeg(file, min_size=(1, 1))
        else:
            _check_cmyk(image, file)
            with _decoder_errors(image.format):
                image.load()
                # Try the conversion on one pixel: whether it succeeds depends on the mode and the palette only.
                _to_pixels(image.crop((0, 0, 1, 1)))
        width, height = image.size
        if _read_orientation(image) in _TRANSPOSED_ORIENTATIONS:
            width, height = height, width
        image_format = str(image.format)
        suffix = _SUFFIX_BY_FORMAT.get(image_format, image_format.lower())
        # Return the file with its metadata, even if they were removed for the check.
        return EncodedImage(data, suffix, width, height)

    return _decode_or_retry_without_metadata(check, data)


def shrink_image(data: bytes, side: int, max_pixels: int = MAX_PIXELS) -> EncodedImage:
    """Re-encode an image as a JPEG whose shorter side is `side` pixels.

    Args:
        data: The file.
        side: Length of the shorter side in pixels. Smaller images are returned unchanged.
        max_pixels: Maximum of width * height of the given file.

    Raises:
        ImageError: As `decode_image`; "too_large" if the longer side would not fit into a JPEG.
    """

    def shrink(file: bytes) -> EncodedImage:
        image = _open_image(file, max_pixels)
        shorter = min(image.size)
        if shorter <= side:
            return check_image(data, max_pixels)
        width, height = (round(length * side / shorter) for length in image.size)
        if max(width, height) > _MAX_JPEG_SIDE:
            raise ImageError(
                "too_large",
                f"{image.width}x{image.height} pixels become {width}x{height} with a shorter side of {side}; "
                f"a side of a JPEG has at most {_MAX_JPEG_SIDE} pixels",
            )
        return _encode_resized(image, file, width, height)

    return _decode_or_retry_without_metadata(shrink, data)


def portable_image(data: bytes, max_side: int, max_pixels: int = MAX_PIXELS) -> EncodedImage:
    """Return an image file that other programs decode to the same pixels as `decode_image`.

    Programs differ in what they do with EXIF orientations, transparency and 16 bits, and in the formats that they support.
    A plain JPEG or PNG file is returned unchanged, everything else as a JPEG.

    Args:
        data: The file.
        max_side: Maximum length of the longer side in pixels. Larger images are shrunk to it.
        max_pixels: Maximum of width * height of the given file.

    Raises:
        ImageError: As `decode_image`.
    """

    def encode(file: bytes) -> EncodedImage:
        image = _open_image(file, max_pixels)
        longer = max(image.size)
        if longer <= max_side and _is_plain(image):
            # Return `file`, not `data`: if metadata had to be removed for our decoder, others may fail on it too.
            if image.format == "PNG":  # `_is_plain` has decoded it.
                return EncodedImage(file, "png", *image.size)
            return check_image(file, max_pixels)
        scale = min(1.0, max_side / longer)
        width, height = (max(1, round(length * scale)) for length in image.size)
        return _encode_resized(image, file, width, height)

    return _decode_or_retry_without_metadata(encode, data)


def _is_plain(image: Image.Image) -> bool:
    """Return whether all programs decode an opened image in the same way: upright, opaque, 8 bits, one frame."""
    with _decoder_errors(image.format):
        if image.format == "PNG":
            image.load()  # metadata may follow the pixels
            if image.mode not in ("RGB", "L", "P", "1") or image.has_transparency_data:
                return False
            if getattr(image, "is_animated", False):
                return False
        elif image.format != "JPEG" or not _is_strict(image):
            return False
    return _read_orientation(image) not in _ORIENTATIONS


def _encode_resized(image: Image.Image, data: bytes, width: int, height: int) -> EncodedImage:
    """Decode an opened image, resize it, and encode it as a JPEG.

    Args:
        image: What `_open_image` returned.
        data: The file.
        width, height: The new size, before the EXIF orientation is applied; not larger than the image.
    """
    # A large JPEG is decoded at the smallest of libjpeg's scales that is not below the target.
    pixels = _decode_pixels(image, data, min_size=(height, width))
    is_transposed = (pixels.shape[1] > pixels.shape[0]) != (width > height)
    if is_transposed:  # the EXIF orientation has exchanged width and height
        width, height = height, width
    # Bilinear, because bicubic takes 1.6 times as long, and reduces the difference from the original image by only
    # 3 % once both are resized for the vision tower.
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    encoded = simplejpeg.encode_jpeg(
        np.ascontiguousarray(np.asarray(resized)),
        quality=JPEG_QUALITY,
        colorspace="RGB",
    )
    return EncodedImage(encoded, "jpg", width, height)


def read_image_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return (width, height) of an image file from its header, before its EXIF orientation is applied.

    No pixels are allocated. Decoding takes up to `DECODE_BYTES_PER_PIXEL` bytes for each pixel.

    Raises:
        ImageError: "html", "not_image", "unsupported", "too_large" or "corrupt".
    """

    def read_size(file: bytes) -> tuple[int, int]:
        return _open_image(file, max_pixels).size

    return _decode_or_retry_without_metadata(read_size, data)


def count_frames(data: bytes, max_pixels: int = MAX_PIXELS) -> int:
    """Return the number of frames or pages of an image file; 1 for a still image, at most `MAX_DIRECTORIES` for a TIFF.

    Raises:
        ImageError: As `decode_image`; "corrupt" if the frames cannot be counted, because a later frame is damaged.
    """

    def count(file: bytes) -> int:
        image = _open_image(file, max_pixels)
        if image.format == "TIFF" and has_many_directories(file):
            return MAX_DIRECTORIES  # or more
        with _decoder_errors(image.format):
            return int(getattr(image, "n_frames", 1))

    return _decode_or_retry_without_metadata(count, data)


# ---- errors of decoders ----


@contextmanager
def _decoder_errors(what: str | None) -> Iterator[None]:
    """Convert any exception of Pillow, simplejpeg or a plugin to an ImageError.

    Args:
        what: The format of the image, for the message.
    """
    _ignore_warnings_of_decoders()
    try:
        yield
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", str(error)) from None
    except Exception as error:
        message = f"corrupt {what or 'image'}: {type(error).__name__}: {error}"
        is_truncated = "Premature end" in message or "truncated" in message
        raise ImageError("truncated" if is_truncated else "corrupt", message) from error


def _ignore_warnings_of_decoders() -> None:
    """Ignore Pillow's warnings about the size, which `max_pixels` limits, and about damaged metadata.

    Do not use `warnings.catch_warnings`: it restores the filters of the entire process, and if two threads decode at the
    same time, those of one of them remain, which silence all warnings.
    """
    # Add the filter again if another one precedes it: pytest and others replace all filters.
    if not warnings.filters or warnings.filters[0] != _DECODER_FILTER:
        warnings.filterwarnings("ignore", module=_DECODER_MODULES)


def _decode_or_retry_without_metadata(decode: Callable[[bytes], Result], data: bytes) -> Result:
    """Decode a file. If this fails, possibly because of damaged metadata, try again with a copy that has none."""
    try:
        return decode(data)
    except ImageError as error:
        # Other kinds are not caused by metadata: "too_large" is a limit, and HTML has no pixels.
        if error.kind not in ("corrupt", "not_image", "truncated", "unsupported") or not data:
            raise
        is_jpeg = data.startswith(b"\xff\xd8")
        # If libjpeg says that pixels are damaged, do not spend time on a second attempt.
        is_from_libjpeg = any(text in str(error) for text in jpeg_segments.DAMAGING_WARNINGS)
        if is_jpeg and is_from_libjpeg:
            raise
        stripped = without_metadata(data)
        if stripped == data:
            raise
        try:
            return decode(stripped)
        except ImageError as second:
            # Both attempts failed. Report the second error if it is about the pixels of a JPEG: its metadata are gone.
            if is_jpeg and second.kind in ("corrupt", "truncated"):
                raise
            raise error from None


def _open_image(data: bytes, max_pixels: int) -> Image.Image:
    """Parse the header of an image file, without decoding pixels.

    Raises:
        ImageError: "html", "not_image", "unsupported", "too_large" or "corrupt".
    """
    image: Image.Image | None = None
    # Pillow's Python code reads all segments before the pixels of a JPEG, so refuse too many segments first.
    try:
        scans = jpeg_segments.count_scans(data) if data.startswith(b"\xff\xd8") else 0
    except ValueError as error:
        raise ImageError("too_large", f"the JPEG has {error}") from None
    with _decoder_errors("header"), suppress(UnidentifiedImageError):
        image = Image.open(io.BytesIO(without_gif_comments(data)), formats=FORMATS)
    if image is None:
        image = _open_other_format(data)
    _check_samples(image)
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise ImageError(
            "too_large",
            f"the image has {image.width}x{image.height} pixels; the limit is {max_pixels}",
        )
    # MPO: several JPEGs in one file, as phones and 3D cameras write them. The first is decoded.
    allowed = min(MAX_JPEG_SCANS, MAX_JPEG_SCAN_PIXELS // max(pixels, 1))
    if scans > allowed:
        raise ImageError(
            "too_large",
            f"the JPEG has {scans} scans; the limit for {image.width}x{image.height} pixels is {allowed}",
        )
    is_rle = image.format == "BMP" and image.info.get("compression") in _RLE_COMPRESSIONS
    if is_rle and image.width * (image.height + _RLE_MAX_ROWS) > MAX_RLE_PIXELS:
        raise ImageError(
            "too_large",
            f"the run-length encoded BMP has {image.width}x{image.height} pixels; the limit is {MAX_RLE_PIXELS}",
        )
    return image


def _check_samples(image: Image.Image) -> None:
    """Refuse an image whose samples have no known range, because its brightness would be a guess, and is often black.

    Raises:
        ImageError: "unsupported".
    """
    # Pillow uses the mode I also for 16-bit samples of some PNG files, but in a TIFF it means 32 bits, or a sign.
    is_wide_tiff = False
    if image.format == "TIFF" and image.mode.startswith("I"):
        with _decoder_errors("TIFF"):
            is_wide_tiff = image.mode == "I" or _tiff_tag(image, _TIFF_BITS) != (16,)
    if image.mode == "F" or is_wide_tiff:
        raise ImageError(
            "unsupported",
            "the samples of this image are 32-bit, 12-bit, signed or floating-point numbers, whose range is not known: "
            "convert it to 8 bits, or to unsigned 16 bits",
        )


def _tiff_tag(image: Image.Image, tag: int) -> Any:
    """Return the value of a tag of a TIFF; None if the tag is missing, or if the image is not a TIFF."""
    tags: Any = getattr(image, "tag_v2", {})
    return tags.get(tag)


def _open_other_format(data: bytes) -> Image.Image:
    """Open an image whose format Pillow supports only with a plugin, or raise an error that names the format.

    Raises:
        ImageError: "unsupported", "html" or "not_image".
    """
    name = sniff_format(data)
    is_heif = name in ("HEIC image", "HEIF image")
    if is_heif and _register_heif_plugin():
        with _decoder_errors("HEIF"):
            return Image.open(io.BytesIO(data), formats=("HEIF",))
    if not data:
        raise ImageError("not_image", "the file is empty")
    if data.startswith(_TIFF_SIGNATURES):
        raise ImageError(
            "unsupported",
            "this TIFF image has samples or a layout that are not supported, or its header is damaged: "
            "convert it to JPEG or PNG",
        )
    shown = f"{len(data)} bytes beginning {data[:16]!r}"
    if name == "web page":
        raise ImageError("html", f"not an image but a web page: {shown}")
    if name.endswith("image"):
        remedy = "convert it to JPEG or PNG"
        if is_heif:
            remedy = "pip install pillow-heif, or convert it to JPEG or PNG"
        raise ImageError(
            "unsupported", f"this is {with_article(name)}, which is not supported: {remedy}"
        )
    if name:
        raise ImageError("not_image", f"not an image but {with_article(name)}: {shown}")
    raise ImageError("not_image", f"not an image: {shown}")


@lru_cache(maxsize=1)
def _register_heif_plugin() -> bool:
    """Register pillow-heif with Pillow, and return whether it is installed."""
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    importlib.import_module("pillow_heif").register_heif_opener()
    return True


# ---- pixels ----


def _is_strict(image: Image.Image) -> bool:
    """Return whether simplejpeg decodes the image. CMYK is left to Pillow: libjpeg-turbo does not convert it to RGB."""
    return image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")


def _check_cmyk(image: Image.Image, data: bytes) -> None:
    """Check the pixels of a CMYK JPEG strictly, since Pillow ignores damage. Other images are not checked.

    Raises:
        ImageError: "truncated" or "corrupt".
    """
    if image.format in ("JPEG", "MPO") and image.mode == "CMYK":
        # At an eighth of the size, every coded bit is still read.
        _decode_jpeg(data, min_size=(1, 1), colorspace="CMYK")


def _decode_pixels(
    image: Image.Image,
    data: bytes,
    min_size: tuple[int, int] = (0, 0),
) -> np.ndarray:
    """Decode the pixels of an opened image.

    Args:
        image: What `_open_image` returned.
        data: The file.
        min_size: (height, width) before the EXIF orientation is applied. A JPEG is decoded at the smallest of
            libjpeg's scales (in eighths) that is not below it. (0, 0) decodes at full size.

    Returns:
        uint8 RGB (height, width, 3).

    Raises:
        ImageError: "truncated" or "corrupt".
    """
    if not _is_strict(image):
        _check_cmyk(image, data)
        with _decoder_errors(image.format):
            return _to_pixels(image)
    # Do not use Pillow's `exif_transpose`: it also rewrites the EXIF data, which fails if they are damaged.
    pixels = _decode_jpeg(data, min_size)
    orientation = _read_orientation(image)
    if orientation not in _ORIENTATIONS:
        return pixels
    return np.asarray(_make_upright(Image.fromarray(pixels), orientation))


def _decode_jpeg(data: bytes, min_size: tuple[int, int], colorspace: str = "RGB") -> np.ndarray:
    """Decode a JPEG strictly; it is shrunk while decoding, but not below `min_size` (height, width)."""
    min_height, min_width = min_size
    with _decoder_errors("JPEG"):
        return simplejpeg.decode_jpeg(
            data,
            colorspace,
            min_height=min_height,
            min_width=min_width,
            strict=True,
        )


def _to_pixels(image: Image.Image) -> np.ndarray:
    """Return a PIL image as uint8 RGB (height, width, 3), upright, with transparency on white."""
    # Find the color before the image is loaded, because loading closes its file.
    color = find_transparent_color(image)
    image = _load(image if color is None else color.unloaded(image))
    # Read the orientation of the loaded image: loading a TIFF applies it, and loading a PNG finds metadata after the pixels.
    orientation = _read_orientation(image)
    rgb = _to_rgb(image) if color is None else color.put_on_white(image)
    return np.asarray(_make_upright(rgb, orientation))


def _load(image: Image.Image) -> Image.Image:
    """Decode a PIL image that is not decoded yet, and return it. A TIFF whose pixels Pillow has scrambled is read again.

    Pillow maps an uncompressed TIFF that was opened by its path into memory, but with the width and height after the EXIF
    rotation, so the pixels of a rotated photo are scrambled. If its path is removed, Pillow reads the file instead.
    """
    opened: Any = image
    filename = getattr(image, "filename", None)
    if not filename or image.format != "TIFF":
        image.load()
    elif opened.tile:
        opened.filename = ""
        try:
            image.load()
        finally:
            opened.filename = filename
    elif getattr(image, "map", None) is not None:
        return _load_mapped_tiff_again(image, filename)
    return image


def _load_mapped_tiff_again(image: Image.Image, filename: str) -> Image.Image:
    """Return a TIFF that Pillow has loaded by mapping it into memory, with the right pixels of its file.

    If the pixels are not those that mapping the file gives now, the caller has changed the image or the file. Then the
    image is returned unchanged.
    """
    # The file may have been deleted or replaced.
    with suppress(OSError, EOFError, ValueError):
        frames: list[Any] = []
        for path in (filename, ""):
            frame: Any = Image.open(filename, formats=("TIFF",))
            frame.seek(image.tell())
            frame.filename = path
            frame.load()
            frames.append(frame)
        mapped, read = frames
        if mapped.size == image.size and mapped.tobytes() == image.tobytes():
            return read
    return image


def _read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image (1 to 8; 1 is upright); 1 if its metadata are damaged."""
    try:
        with _decoder_errors(image.format):
            return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except ImageError:
        return 1


def _make_upright(image: Image.Image, orientation: int) -> Image.Image:
    """Rotate and flip an image by its EXIF orientation."""
    method = _ORIENTATIONS.get(orientation)
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, with transparency on white."""
    if image.mode.startswith("I"):
        # 16 bits per channel. Pillow's `convert` would clip them to 255 instead of scaling.
        values = np.asarray(image)
        if image.mode == "I":  # 32 bits, which Pillow uses for the 16-bit pixels of some files
            values = values.clip(0, _MAX_SIXTEEN_BITS)
        # A PNG may declare one shade of gray transparent.
        if isinstance(image.info.get("transparency"), int):
            values = np.where(values == image.info["transparency"], _MAX_SIXTEEN_BITS, values)
        # Pillow inverts such images of 8 bits only.
        if _tiff_tag(image, _TIFF_COLORS) == _WHITE_IS_ZERO:
            values = _MAX_SIXTEEN_BITS - values
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "LAB":
        return _lab_to_rgb(image)
    if image.mode == "La":
        image = image.convert("LA")  # undoes the multiplication of gray by alpha
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image from the Lab color space."""
    from PIL import ImageCms

    lab = ImageCms.createProfile("LAB")
    converted = ImageCms.profileToProfile(
        image, lab, ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert converted is not None  # it is None for a conversion in place only
    return converted

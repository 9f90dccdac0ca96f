"""Find the pixels of a PNG that have its one transparent color.

A PNG without an alpha channel may declare one gray or RGB color transparent, in its chunk tRNS. Pillow converts the pixels
to 8 bits, but leaves the color as it is in the file:

    file            color in the file      pixels in Pillow          the transparent pixels
    gray, 2 bits    2                      0, 85, 170, 255           170
    gray, 4 bits    10                     0, 17, 34, ..., 255       170
    RGB, 8 bits     (69, 78, 10)           0 to 255                  (69, 78, 10)
    RGB, 16 bits    (17680, 20173, 2685)   the upper byte of each    (69, 78, 10), if the lower bytes are equal, too

So the number of bits is read from the file. An image that was loaded from memory no longer has its file: then the bits are
inferred from its pixels, and of 16 bits the upper byte is compared. Gray of 16 bits keeps all its bits in Pillow.
"""

from __future__ import annotations

import io
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER_BYTES = 33  # the signature, and the chunk IHDR
_MODES = ("1", "L", "RGB")  # in which Pillow holds the images that may have such a color
# Color type of a PNG -> number of channels; the others have a palette or an alpha channel.
_CHANNELS = {0: 1, 2: 3}
_WHITE = 255


class TransparentColor(NamedTuple):
    """The transparent color of an image.

    Attributes:
        color: One value per channel, in the units of Pillow's pixels (0 to 255).
        lower_bytes_match: For an RGB image with 16 bits, which pixels have the lower bytes of the color: bool
            (height, width); None for other images.
        file: The PNG file of an image that is not loaded yet, or None.
    """

    color: tuple[int, ...]
    lower_bytes_match: np.ndarray | None = None
    file: bytes | None = None

    def unloaded(self, image: Image.Image) -> Image.Image:
        """Open the file of an image that is not loaded yet a second time; return a loaded image itself.

        If the caller's image were loaded, it would lose its file, from which the number of bits is read.
        """
        if self.file is None:
            return image
        return Image.open(io.BytesIO(self.file), formats=("PNG",))

    def put_on_white(self, image: Image.Image) -> Image.Image:
        """Return an image as RGB, with the pixels of this color in white.

        Args:
            image: What `unloaded` returned, loaded.
        """
        # Do not change the caller's image. An image that `unloaded` has opened is a copy already.
        result = image if self.file is not None else image.copy()
        if result.mode == "1":
            result = result.convert("L")
        is_color = _equals(np.asarray(result), self.color)
        if self.lower_bytes_match is not None and self.lower_bytes_match.shape == is_color.shape:
            is_color &= self.lower_bytes_match
        result.paste("white", (0, 0, *result.size), Image.fromarray(is_color))
        # Do not use `convert`: it also converts the transparent color, which may be out of range.
        return result if result.mode == "RGB" else Image.merge("RGB", [result] * 3)


def find_transparent_color(image: Image.Image) -> TransparentColor | None:
    """Return the transparent color of a PIL image; None if it has none, or another kind of transparency.

    The image may be loaded or not, and stays as it is.
    """
    declared = image.info.get("transparency")
    if image.mode not in _MODES or not isinstance(declared, int | tuple):
        return None
    # A GIF declares the index of a color, which Pillow converts.
    if image.format == "GIF":
        return None
    data = _file_of(image)
    if data is None:
        return _infer_color(image, declared)
    found = _read_color(data)
    if found is None:
        return None
    color, bits = found
    opened: Any = image
    is_first = image.tell() == 0  # frame of an animation
    file = data if opened.tile and is_first else None
    if bits == 16:
        upper = tuple(value >> 8 for value in color)
        lower = tuple(value & 255 for value in color)
        lower_bytes_match = _equals(_read_lower_bytes(data), lower) if is_first else None
        return TransparentColor(upper, lower_bytes_match, file)
    scale = 255 // (2**bits - 1)
    return TransparentColor(tuple(value * scale for value in color), file=file)


def _equals(values: np.ndarray, color: tuple[int, ...]) -> np.ndarray:
    """Return which pixels of an array (height, width) or (height, width, channels) have a color."""
    if values.ndim == 2:
        return np.asarray(values == color[0])
    # Channel by channel, because a comparison with all of them takes three times the memory.
    result = np.ones(values.shape[:2], bool)
    for channel, value in enumerate(color):
        result &= values[:, :, channel] == value
    return result


def _file_of(image: Image.Image) -> bytes | None:
    """Return the PNG file that an image was opened from; None if it cannot be read.

    An image that is not loaded yet has the open file. A loaded image has at most the path, so the file is read again.
    """
    if image.format != "PNG":
        return None
    opened: Any = image
    data = b""
    # The stream may be closed, the file deleted. Neither matters, because the color can be inferred.
    with suppress(OSError, ValueError):
        if opened.tile and opened.fp is not None:
            position = opened.fp.tell()
            try:
                opened.fp.seek(0)
                data = opened.fp.read()
            finally:
                opened.fp.seek(position)
        elif opened.filename:
            data = Path(opened.filename).read_bytes()
    is_png = data.startswith(_SIGNATURE) and len(data) >= _HEADER_BYTES
    # Compare the sizes, because the file may have been replaced by another image.
    if not is_png or struct.unpack_from(">II", data, 16) != image.size:
        return None
    return data


def _read_color(data: bytes) -> tuple[tuple[int, ...], int] | None:
    """Return the color of a PNG's chunk tRNS in the units of the file, and the bits per channel."""
    bits, color_type = data[24], data[25]
    channels = _CHANNELS.get(color_type, 0)
    position = len(_SIGNATURE)
    # length (4 bytes) | name (4) | data | checksum (4)
    while position + 8 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        name = data[position + 4 : position + 8]
        content = data[position + 8 : position + 8 + length]
        position += length + 12
        if name == b"IDAT":
            break
        if name == b"tRNS" and channels and len(content) >= 2 * channels:
            # The specification tells decoders to use the lower bits only.
            values = struct.unpack_from(f">{channels}H", content)
            return tuple(value & (2**bits - 1) for value in values), bits
    return None


def _read_lower_bytes(data: bytes) -> np.ndarray:
    """Decode the lower bytes of a PNG with 16 bits per channel: uint8 (height, width, 3)."""
    image: Any = Image.open(io.BytesIO(data), formats=("PNG",))
    decoder, extents, offset, _ = image.tile[0]
    # Pillow keeps the upper byte of each value. In the other byte order, that is the lower one.
    image.tile = [(decoder, extents, offset, "RGB;16L")]
    return np.asarray(image)


def _infer_color(image: Image.Image, declared: int | tuple[int, ...]) -> TransparentColor:
    """Return the transparent color of an image whose file is not known."""
    if isinstance(declared, tuple):
        if max(declared) > 255:
            return TransparentColor(tuple(value >> 8 for value in declared))
        return TransparentColor(declared)
    # With two or four bits, the pixels are multiples of 85 or 17, and the color, which is not scaled, does not occur.
    if image.mode == "L" and 0 < declared < 16:
        values = np.unique(np.asarray(image))
        for bits, step in ((2, 85), (4, 17)):
            if declared < 2**bits and declared not in values and not (values % step).any():
                return TransparentColor((declared * step,))
    return TransparentColor((declared & 255,))

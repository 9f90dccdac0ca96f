"""Find equal and similar images among millions.

Equal files have equal digests. Similar images (with a different size or compression) are found by a *perceptual hash*:
a few bytes that hardly change when the image is scaled or compressed again.

The hash consists of 128 bits about brightness, and a mean color:

    9 x 9 grid of the image       for each of the first 8 x 8 cells:
    . . . . . . . . .               bit 1: is the cell to the right brighter?
    . a > . . . . . .               bit 2: is the cell below brighter?
      v                           mean color: 3 bytes, because a red and a blue car have the same brightness

It is the difference hash (dHash) of N. Krawetz, "Kind of Like That", 2013, in both directions. Two images are similar if
at most 5 of the 128 bits differ, and each color channel differs by at most 8.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

HASH_BYTES = 16  # 128 bits
PERCEPTUAL_BYTES = HASH_BYTES + 3  # with the mean color
DIGEST_BYTES = 16
# Two images are similar if their hashes differ by at most this much.
MAX_BITS = 5
MAX_COLOR_DIFFERENCE = 8

_GRID = 8  # compared cells per row and per column; the grid has one more
_BAND_BYTES = 2
_NUM_NEIGHBORS = 8  # in each sorted order, each image is compared with the next N images


def perceptual_hash(pixels: np.ndarray) -> bytes:
    """Return 19 bytes that are nearly equal for similar images.

    Args:
        pixels: (height, width, 3) uint8 RGB.
    """
    image = Image.fromarray(pixels)
    small = image.resize((_GRID + 1, _GRID + 1), Image.Resampling.BOX, reducing_gap=2.0)
    gray = np.asarray(small.convert("L"), np.int16)
    cells = gray[:_GRID, :_GRID]
    # Use comparisons instead of values, because compression changes brightness and contrast slightly.
    brighter_right = gray[:_GRID, 1:] > cells
    brighter_below = gray[1:, :_GRID] > cells
    bits = np.packbits(np.stack([brighter_right, brighter_below]))
    # The mean color distinguishes images with the same structure.
    color = np.asarray(small, np.float32).mean((0, 1)).astype(np.uint8)
    return bits.tobytes() + color.tobytes()


def find_duplicates(rows: np.ndarray, data: np.ndarray, perceptual: bool) -> dict[int, int]:
    """Find duplicates, and the earlier row that each of them duplicates.

    Args:
        rows: (n,) row numbers, ascending.
        data: (n, 16) uint8 digests, or (n, 19) uint8 perceptual hashes.
        perceptual: Compare perceptual hashes; otherwise only equal rows of `data` are duplicates.

    Returns:
        Row number of each duplicate -> row number of the earlier record.
    """
    if not len(rows):
        return {}
    if perceptual:
        return _find_similar(rows, data)
    return _find_equal(rows, data)


def _find_equal(rows: np.ndarray, data: np.ndarray) -> dict[int, int]:
    # View each digest as one value, so that they can be sorted.
    keys = np.ascontiguousarray(data).view(f"V{data.shape[1]}").reshape(-1)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    original = first[inverse.reshape(-1)]
    repeats = np.flatnonzero(original != np.arange(len(rows)))
    return {int(rows[i]): int(rows[original[i]]) for i in repeats}


def _find_similar(rows: np.ndarray, data: np.ndarray) -> dict[int, int]:
    """Find pairs of similar hashes without comparing every pair.

    The 16 bytes of a hash are 8 bands of 2 bytes. If at most 5 bits differ, at least 3 bands are equal. Therefore the
    hashes are sorted 8 times, each time with a different band as the first key. Similar hashes are then usually close
    together in at least one of the orders, so each hash is compared only with its next 8 neighbors.

        order by band 0:   [b0 b1 b2 ...]     order by band 1:   [b1 b2 ... b0]     ...

    If several images are similar, each one but the first refers to the earliest one that it was compared with.
    """
    # Number of one bits in each possible byte.
    bits_in_byte = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1)
    bits_in_byte = bits_in_byte.astype(np.uint8)
    hashes = data[:, :HASH_BYTES]
    colors = data[:, HASH_BYTES:].astype(np.int16)  # signed, for differences
    found: dict[int, int] = {}
    for band in range(0, HASH_BYTES, _BAND_BYTES):
        # Move the band to the front, where it is the most significant part of the sort key.
        rolled = np.roll(hashes, -band, axis=1)
        order = np.lexsort(rolled.T[::-1])  # lexsort expects the most significant key last
        for step in range(1, _NUM_NEIGHBORS + 1):
            one, other = order[:-step], order[step:]
            different_bits = bits_in_byte[hashes[one] ^ hashes[other]].sum(1)
            color_difference = np.abs(colors[one] - colors[other]).max(1)
            similar = (different_bits <= MAX_BITS) & (color_difference <= MAX_COLOR_DIFFERENCE)
            for a, b in zip(one[similar], other[similar]):
                # A Python loop is fast enough here, since few pairs are similar.
                early, late = sorted((int(rows[a]), int(rows[b])))
                found[late] = min(early, found.get(late, early))
    return found

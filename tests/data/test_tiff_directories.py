"""Directories of TIFF files and EXIF data whose entries claim more data than the file contains."""

from __future__ import annotations

import io
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "attack"))

from bombs import (
    avif_with_exif,
    encoded,
    jpeg_with_exif,
    png,
    png_chunk,
    shared_values,
    tiff_of_many_strips,
    tiff_of_pages,
    tiff_with_shared_values,
    webp_with_exif,
    zeros,
)

from llava_simplified.data.images import ImageError, count_frames, decode_image, read_image_size
from llava_simplified.data.tiff_directories import (
    MAX_DIRECTORIES,
    DirectoryError,
    check_directory,
    has_many_directories,
)

# 2,000 entries share a value of 30 kB: read separately, 54 kB of data would take 60 MB.
SHARED = shared_values(2_000, 30_000)


@pytest.mark.parametrize(
    "data",
    [
        jpeg_with_exif(SHARED),
        png(8, 8, zeros(72), png_chunk(b"eXIf", SHARED)),
        webp_with_exif(SHARED),
        avif_with_exif(SHARED),
        tiff_with_shared_values(2_000, 30_000),
    ],
    ids=["jpeg", "png", "webp", "avif", "tiff"],
)
def test_shared_values_do_not_take_memory(data: bytes) -> None:
    assert SHARED[:20] in data or data.startswith(b"II")
    tracemalloc.start()
    pixels = decode_image(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pixels.shape[2] == 3
    assert peak < 5e6


def test_strips_are_counted_before_pillow_makes_an_object_of_each() -> None:
    data = tiff_of_many_strips(300_000)
    tracemalloc.start()
    with pytest.raises(ImageError, match="numbers; the limit is"):
        read_image_size(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6
    assert read_image_size(tiff_of_many_strips(50_000)) == (8, 50_000)


def test_values_that_a_few_entries_share_are_accepted() -> None:
    exif = shared_values(4, 300_000)
    file = io.BytesIO(exif)
    file.seek(8)
    check_directory(file, ">", False)
    assert file.tell() == 8


@pytest.mark.parametrize("is_big", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_directory_that_is_cut_off_is_left_to_pillow(order: str, is_big: bool) -> None:
    for size in range(20):
        check_directory(io.BytesIO(bytes(size)), order, is_big)


def test_number_of_entries_is_limited_in_files_of_64_bits() -> None:
    with pytest.raises(DirectoryError, match="entries"):
        check_directory(io.BytesIO(b"\xff" * 100), "<", True)


@pytest.mark.parametrize("pages", [1, 3])
def test_pages_are_counted_as_pillow_counts_them(pages: int) -> None:
    image = Image.fromarray(np.zeros((8, 8, 3), "uint8"))
    for is_big in (False, True):
        file = io.BytesIO()
        others = [image] * (pages - 1)
        image.save(file, "TIFF", save_all=True, append_images=others, big_tiff=is_big)
        assert not has_many_directories(file.getvalue())
        assert count_frames(file.getvalue()) == pages


def test_pages_beyond_the_limit_are_not_counted() -> None:
    assert count_frames(tiff_of_pages(3_000)) == MAX_DIRECTORIES


def test_pages_that_form_a_cycle_are_counted_once() -> None:
    data = bytearray(tiff_of_pages(5))
    data[-4:] = (8).to_bytes(4, "little")
    assert not has_many_directories(bytes(data))
    assert count_frames(bytes(data)) == 6


def test_orientation_of_ordinary_exif_is_still_applied() -> None:
    exif = Image.Exif()
    exif[274] = 6
    assert decode_image(encoded("JPEG", (48, 40), exif=exif)).shape == (48, 40, 3)

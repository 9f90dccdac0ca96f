"""A libjpeg warning about damage makes an image unusable, even after a harmless one. Harmless warnings alone do not."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from llava_simplified.data.images import (
    MAX_JPEG_SCANS,
    ImageError,
    check_image,
    decode_image,
    shrink_image,
)
from llava_simplified.data.jpeg_segments import (
    DAMAGING_WARNINGS,
    HARMLESS_WARNINGS,
    count_scans,
    is_harmless,
    segments,
    without_metadata,
)

SOS = b"\xff\xda"
EOI = b"\xff\xd9"


def draw(width: int = 96, height: int = 64) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encode(**options: object) -> bytes:
    buffer = io.BytesIO()
    draw().save(buffer, "JPEG", quality=85, **options)
    return buffer.getvalue()


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


def insert(data: bytes, position: int, inserted: bytes) -> bytes:
    return data[:position] + inserted + data[position:]


# ---- harmless ----


def with_invalid_sos(data: bytes) -> bytes:
    """Set the spectral selection to 0 to 0, as phones of one manufacturer do."""
    start = data.index(SOS)
    length = int.from_bytes(data[start + 2 : start + 4], "big")
    end = start + 2 + length
    return data[: end - 3] + b"\x00\x00\x00" + data[end:]


def with_jfif_version(data: bytes) -> bytes:
    version = data.index(b"JFIF\0") + 5
    return data[:version] + b"\x02" + data[version + 1 :]


def with_adobe_transform(data: bytes) -> bytes:
    jfif_length = int.from_bytes(data[4:6], "big")
    return data[:2] + segment(0xEE, b"Adobe\0\x64\0\0\0\0\x07") + data[4 + jfif_length :]


def with_adobe_code_of_cmyk(data: bytes) -> bytes:
    """Set the color transform to 2 (YCCK), which requires four components."""
    changed = with_adobe_transform(data)
    code = changed.index(b"Adobe") + 11
    return changed[:code] + b"\x02" + changed[code + 1 :]


def with_bad_icc_marker(data: bytes) -> bytes:
    return insert(data, 2, segment(0xE2, b"ICC_PROFILE\0\x05\x01" + b"x" * 10))


def with_zeros_at_the_end(data: bytes) -> bytes:
    """Append zeros, as cameras do to fill the last block of a file."""
    return data[:-2] + bytes(40) + EOI


def with_bytes_between(marker: bytes) -> Callable[[bytes], bytes]:
    return lambda data: insert(data, data.index(marker), b"\0abc")


HARMLESS = {
    "Invalid SOS parameters": with_invalid_sos,
    "unknown JFIF revision": with_jfif_version,
    "Unknown Adobe color transform": with_adobe_transform,
    "Unknown Adobe color transform code 2": with_adobe_code_of_cmyk,
    "extraneous bytes before marker 0xd9": with_zeros_at_the_end,
    "bad ICC marker": with_bad_icc_marker,
    "extraneous bytes before marker 0xdb": with_bytes_between(b"\xff\xdb"),
    "extraneous bytes before marker 0xc4": with_bytes_between(b"\xff\xc4"),
    "extraneous bytes before marker 0xda": with_bytes_between(SOS),
}


@pytest.mark.parametrize("warning", list(HARMLESS))
def test_jpeg_with_a_harmless_warning_is_decoded_as_by_pillow(warning: str) -> None:
    data = HARMLESS[warning](encode())
    with pytest.raises(ValueError, match=warning) as strict:
        simplejpeg.decode_jpeg(data, "RGB", strict=True)
    assert is_harmless(str(strict.value)), "the table has an entry"
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode_image(data), expected)
    checked = check_image(data)
    assert (checked.data, checked.suffix, checked.width) == (data, "jpg", 96)
    assert shrink_image(data, 32).height == 32


def test_jpeg_with_all_harmless_warnings_is_decoded_as_by_pillow() -> None:
    data = encode()
    for change in HARMLESS.values():
        if change is not with_adobe_code_of_cmyk:  # a file has only one color transform code
            data = change(data)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode_image(data), expected)


# ---- damaging ----


def damage_scan(data: bytes) -> bytes:
    """Overwrite the middle of the entropy-coded data with a restart marker and garbage."""
    middle = (data.rindex(SOS) + len(data)) // 2
    return data[:middle] + b"\xff\xd0" * 10 + data[middle + 20 :]


def cut(data: bytes) -> bytes:
    return data[: (data.rindex(SOS) + len(data)) // 2]


def cut_and_close(data: bytes) -> bytes:
    return cut(data) + EOI


def overwrite_with_zeros(data: bytes) -> bytes:
    """Replace the end with zeros, as in a failed download whose size was reserved in advance."""
    kept = cut(data)
    return kept + bytes(len(data) - len(kept) - 2) + EOI


def overwrite_with_many_zeros(data: bytes) -> bytes:
    """Replace the end with more zeros than the missing pixels need."""
    return cut(data) + bytes(5000) + EOI


DAMAGES = [
    damage_scan,
    cut,
    cut_and_close,
    overwrite_with_zeros,
    overwrite_with_many_zeros,
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("warning", [None, *HARMLESS])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_damage_is_also_found_after_a_harmless_warning(
    damage: Callable[[bytes], bytes], warning: str | None, options: dict[str, object]
) -> None:
    data = damage(encode(**options))
    if warning is not None:
        data = HARMLESS[warning](data)
    for function in (decode_image, check_image):
        with pytest.raises(ImageError) as error:
            function(data)
        assert error.value.kind in ("corrupt", "truncated")


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_damage_of_a_cmyk_jpeg_is_found(options: dict[str, object]) -> None:
    buffer = io.BytesIO()
    draw(256, 256).convert("CMYK").save(buffer, "JPEG", quality=90, **options)
    data = buffer.getvalue()
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for harmless in (data, with_zeros_at_the_end(data), with_bytes_between(SOS)(data)):
        assert np.array_equal(decode_image(harmless), expected)
        assert check_image(harmless).width == 256
    for damage in DAMAGES:
        for function in (decode_image, check_image):
            with pytest.raises(ImageError) as error:
                function(damage(data))
            assert error.value.kind in ("corrupt", "truncated")


def test_every_flipped_byte_that_strict_decoding_finds_is_still_found() -> None:
    """Removing the metadata must not hide damage: an image that strict decoding rejects is still rejected."""
    data = encode()
    start = data.index(SOS) + 14
    random = np.random.default_rng(0)
    found = 0
    for position in random.integers(start, len(data) - 2, 300).tolist():
        flipped = data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :]
        try:
            simplejpeg.decode_jpeg(flipped, "RGB", strict=True)
        except ValueError:
            found += 1
            with pytest.raises(ImageError):
                decode_image(flipped)
            with pytest.raises(ImageError):
                decode_image(with_invalid_sos(flipped))
    assert found > 20


def test_the_tables_name_every_warning_of_libjpeg() -> None:
    """The library contains the texts of its warnings. A new version must not add one that is in neither table."""
    library = Path(simplejpeg._jpeg.__file__).read_bytes()  # type: ignore[attr-defined]
    pattern = rb"[\x20-\x7e]*(?:Corrupt JPEG data|Premature end of JPEG|Warning: unknown|Inconsistent prog|Invalid SOS)[\x20-\x7e]*"
    texts = {text.decode() for text in re.findall(pattern, library)}
    assert len(texts) >= 8
    for text in texts:
        is_damaging = any(text.startswith(damage) for damage in DAMAGING_WARNINGS)
        assert is_harmless(text) != is_damaging, text


# ---- scans ----


def with_scans(data: bytes, count: int) -> bytes:
    """Repeat the last scan of a progressive file."""
    last = data.rindex(SOS)
    return data[:-2] + data[last:-2] * (count - count_scans(data)) + EOI


def test_count_scans_counts_scans_and_not_bytes_of_metadata() -> None:
    data = encode(progressive=True)
    assert count_scans(encode()) == 1
    assert count_scans(data) == 10
    assert count_scans(with_scans(data, 400)) == 400
    hidden = insert(data, 2, segment(0xE1, SOS * 1000))
    assert count_scans(hidden) == 10
    assert decode_image(hidden).shape == (64, 96, 3)


@pytest.mark.parametrize("options", [{"progressive": True}, {}])
def test_jpeg_of_thousands_of_scans_is_refused_before_it_is_decoded(
    options: dict[str, object],
) -> None:
    data = with_scans(encode(**options), 5000)
    for function in (decode_image, check_image):
        start = time.perf_counter()
        with pytest.raises(ImageError, match=f"5000 scans.*{MAX_JPEG_SCANS}") as error:
            function(data)
        assert error.value.kind == "too_large"
        assert time.perf_counter() - start < 1


def test_large_jpeg_may_have_fewer_scans() -> None:
    """The time to decode a scan depends on the pixels of the image, and not on the bytes of the scan."""
    buffer = io.BytesIO()
    Image.new("L", (6000, 6000)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    assert check_image(data).width == 6000
    with pytest.raises(ImageError, match="scans") as error:
        check_image(with_scans(data, 100))
    assert error.value.kind == "too_large"


# ---- copies ----


def test_without_metadata_keeps_tables_frame_and_scans() -> None:
    data = encode(comment=b"hello", exif=b"Exif\0\0" + b"x" * 20, icc_profile=b"p" * 200)
    copy = without_metadata(data)
    assert {item.marker for item in segments(copy)} <= {
        *(0xD8, 0xE0, 0xDB, 0xC0, 0xC4, 0xDA, 0xD9),
    }
    assert np.array_equal(decode_image(copy), decode_image(data))
    assert len(HARMLESS_WARNINGS) == 5

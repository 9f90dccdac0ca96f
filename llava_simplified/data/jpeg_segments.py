"""JPEG files as segments: which of libjpeg's warnings are harmless, and a copy of a file without their causes.

A JPEG file is a chain of segments. Only the tables, the frame header and the scans affect the pixels:

    SOI | APP0 JFIF | APP1 EXIF | ... | DQT | SOF | DHT | SOS header, entropy-coded data | ... | EOI
          ^^^^^^^^^^^^^^^^^^^^^^^^^^^ metadata                    ^ FF is followed by 00 or by a restart marker

libjpeg warns about damage and about oddities with the same severity, and reports only the first warning of a file. A
harmless first warning could therefore hide a damaging second one. So a harmless warning is not ignored: its cause is
removed from a copy of the file, which is decoded strictly again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

# Warnings of libjpeg-turbo (jerror.h, JWRN_*) that say nothing about the pixels, by the beginning of their texts.
HARMLESS_WARNINGS = {
    "Invalid SOS parameters for sequential JPEG": "written by phones; a sequential scan has no parameters",
    "Warning: unknown JFIF revision number": "the version of a header that contains only the density",
    "Unknown Adobe color transform code": "all readers then interpret three components as YCbCr",
    "Corrupt JPEG data: bad ICC marker": "a color profile, which is not applied",
    # Harmless only between the segments of the header, or if the bytes are zeros. Other bytes after entropy-coded data
    # are the rest of a damaged scan.
    "extraneous bytes before marker": "padding, which readers skip",
}
# Warnings that say that pixels are wrong or missing.
DAMAGING_WARNINGS = (
    "Premature end of JPEG file",
    "Corrupt JPEG data: premature end of data segment",
    "Corrupt JPEG data: bad Huffman code",
    "Corrupt JPEG data: bad arithmetic code",
    "Corrupt JPEG data: found marker",  # ... instead of a restart marker
    "Inconsistent progression sequence",
)

# An ordinary file has about 20 segments. The limit leaves room for a gigabyte of metadata (at most 65 kB per segment),
# and for more scans than are decoded.
MAX_SEGMENTS = 20_000
# This number of scans is allowed for an image of any size (see `images.MAX_JPEG_SCAN_PIXELS`), so it is not necessary
# to count fewer scans exactly.
_ALWAYS_ALLOWED_SCANS = 20

_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_STANDALONE = {0x01, *range(0xD0, 0xDA)}  # TEM, restart markers, SOI, EOI: without a length
_SEQUENTIAL_FRAMES = (0xC0, 0xC1, 0xC9)  # baseline, extended, arithmetic
_APP0, _APP14, _APP15, _COMMENT = 0xE0, 0xEE, 0xEF, 0xFE
_ADOBE_YCBCR = 1  # value of the color transform in an Adobe segment
_KEPT_ZEROS = 2  # zeros that are kept at the end of a scan, because its last bits may be zero
# Entropy-coded data end at a marker: FF, followed by none of 00 (an escaped FF), FF (padding) and D0 to D7 (restarts).
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_MARKER = re.compile(rb"\xff[^\x00\xff]")


class Segment(NamedTuple):
    """A segment of a JPEG file.

    Attributes:
        marker: The second byte of its marker.
        body: What follows the length: the parameters.
        scan: The entropy-coded data after an SOS; empty after other markers.
    """

    marker: int
    body: bytes
    scan: bytes = b""


def segments(data: bytes) -> Iterator[Segment]:
    """Iterate over the segments of a JPEG file up to its end marker. Bytes between segments are skipped.

    The last segment is cut off if the file is.
    """
    position = 0
    while True:
        match = _MARKER.search(data, position)
        if match is None:
            return
        marker = data[match.end() - 1]
        position = match.end()
        if marker in _STANDALONE:
            yield Segment(marker, b"")
            if marker == _EOI:
                return
            continue
        # The length counts its own two bytes, so less than 2 is damage.
        length = int.from_bytes(data[position : position + 2], "big")
        body = data[position + 2 : position + length]
        position += max(length, 2)
        scan = b""
        if marker == _SOS:
            end_match = _END_OF_SCAN.search(data, position)
            end = len(data) if end_match is None else end_match.start()
            scan = data[position:end]
            position = end
        yield Segment(marker, body, scan)


def count_scans(data: bytes) -> int:
    """Return the number of scans of a JPEG file, or an upper bound if that is below `_ALWAYS_ALLOWED_SCANS`.

    Raises:
        ValueError: The file has more than `MAX_SEGMENTS` segments.
    """
    # Count the marker's two bytes, which takes a tenth of a millisecond per megabyte. Metadata may contain them by
    # chance, so this is an upper bound.
    at_most = data.count(bytes([0xFF, _SOS]))
    # FF begins a marker, unless 00 follows.
    may_have_many = data.count(b"\xff") - data.count(b"\xff\0") > MAX_SEGMENTS
    if at_most < _ALWAYS_ALLOWED_SCANS and not may_have_many:
        return at_most
    scans = 0
    for number, segment in enumerate(segments(data)):
        if number == MAX_SEGMENTS:
            raise ValueError(f"more than {MAX_SEGMENTS} segments")
        scans += segment.marker == _SOS
    return scans


def is_harmless(warning: str) -> bool:
    """Return whether a warning of libjpeg may have a cause that `without_metadata` removes."""
    return any(text in warning for text in HARMLESS_WARNINGS)


def without_metadata(data: bytes) -> bytes:
    """Return a copy of a JPEG file without metadata, and without harmless faults that libjpeg warns of.

    The pixels are the same. Comments, application segments and bytes between segments are dropped. Two application
    segments affect the colors, and stay: JFIF (its version is replaced) and Adobe (an unknown code is replaced by the
    one that readers assume). Scans of sequential files get the parameters that the specification demands. Zeros that
    follow a scan are dropped.
    """
    parts = []
    is_sequential = False
    for segment in segments(data):
        marker, body, scan = segment
        if marker in _STANDALONE:
            parts.append(bytes([0xFF, marker]))
            continue
        # A frame header. C4 and CC are tables, and C8 is reserved.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            is_sequential = marker in _SEQUENTIAL_FRAMES
        # Version 1.01, which libjpeg knows.
        if marker == _APP0 and body.startswith(b"JFIF\0"):
            body = body[:5] + b"\x01\x01" + body[7:]
        elif marker == _APP14 and body.startswith(b"Adobe") and len(body) >= 12:
            # Byte 11 is the color transform. 0: the components are RGB or CMYK, 1: YCbCr, 2: YCCK. With three components,
            # 2 is unknown. With four, libjpeg reads every code but 0 as YCCK.
            if body[11] > _ADOBE_YCBCR:
                body = body[:11] + bytes([_ADOBE_YCBCR]) + body[12:]
        elif _APP0 <= marker <= _APP15 or marker == _COMMENT:
            continue
        elif marker == _SOS and is_sequential:
            body = body[:-3] + b"\x00\x3f\x00"  # coefficients 0 to 63, all bits
        length = (len(body) + 2).to_bytes(2, "big")
        parts += [bytes([0xFF, marker]), length, body, _without_padding(scan)]
    return b"".join(parts)


def _without_padding(scan: bytes) -> bytes:
    """Return entropy-coded data without the zeros that some cameras write after them.

    A file whose end was overwritten with zeros stays damaged: pixels are missing, and the decoder reports it.
    """
    data = scan.rstrip(b"\0")
    # `rstrip` may have removed the second byte of an escaped FF, which is FF 00.
    num_escapes = 1 if data.endswith(b"\xff") else 0
    return scan[: len(data) + num_escapes + _KEPT_ZEROS]

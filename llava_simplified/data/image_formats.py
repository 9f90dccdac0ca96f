"""Name the format of a file by its first bytes, and copy a file without its metadata.

Metadata never affect the pixels: if a decoder rejects a file because of its texts, color profile or EXIF data, a copy
without these is decoded instead.
"""

from __future__ import annotations

import re
import struct
import zlib

from llava_simplified.data import jpeg_segments

# First bytes of a file -> name of its format: images that are not decoded here, and other files that are often saved
# under an image's name. `.` matches any byte.
_SIGNATURES = {
    rb"\xff\x0a|\0\0\0\x0cJXL ": "JPEG XL image",
    rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51": "JPEG 2000 image",
    rb"....ftyp(hei|hev|heim|heis)": "HEIC image",
    rb"....ftyp(mif1|msf1)": "HEIF image",
    rb"....ftypjxl ": "JPEG XL image",
    rb"....ftypcrx ": "Canon CR3 raw image",
    rb"8BPS": "Photoshop image",
    rb"\x00\x00[\x01\x02]\x00": "icon",
    rb"%!PS|\xc5\xd0\xd3\xc6": "PostScript image",
    rb"P[1-7]\s": "Netpbm image",
    rb"DDS ": "DDS image",
    rb"qoif": "QOI image",
    rb"v/1\x01": "OpenEXR image",
    rb"#\?RADIANCE|#\?RGBE": "Radiance HDR image",
    rb"\xd7\xcd\xc6\x9a|\x01\x00\x09\x00": "WMF image",
    rb"II\xbc": "JPEG XR image",
    rb"....ftypavi[fs]": "",  # AVIF is decoded; without this line, it would match the pattern of MP4 below
    rb"....ftyp": "MP4 or QuickTime video",
    rb"\x1aE\xdf\xa3": "WebM or Matroska video",
    rb"RIFF....AVI ": "AVI video",
    rb"RIFF....WAVE|ID3|OggS|fLaC": "audio file",
    rb"%PDF": "PDF",
    rb"PK\x03\x04": "ZIP archive",
    rb"\x1f\x8b": "gzip file",
    rb"version https://git-lfs": "Git LFS pointer (run `git lfs pull`)",
}
_SIGNATURE_PATTERNS = [
    (re.compile(pattern, re.DOTALL), name) for pattern, name in _SIGNATURES.items()
]
# Searched for, not matched at the beginning: comments, a declaration and a document type may precede the element.
_SVG = re.compile(rb"<(?:\w+:)?svg[\s>]", re.IGNORECASE)
_SNIFFED_BYTES = 4096  # number of bytes in which `sniff_format` searches
IMAGE_HEADER_BYTES = 512  # number of bytes to pass to `is_image_header`
# First bytes of the formats that are decoded here.
_DECODED = re.compile(
    rb"\xff\xd8\xff|\x89PNG|RIFF....WEBP|GIF8|BM|II\*\x00|MM\x00\*|....ftypavi[fs]", re.DOTALL
)

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Chunks of a PNG that contain pixels, transparency, the orientation (eXIf) or an animation.
_PNG_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT", b"eXIf"}
# Of these, the chunks of an animation: its length, and each frame's place and its pixels.
_PNG_ANIMATION = {b"acTL", b"fcTL", b"fdAT"}
# Number of data bytes that the specification prescribes for the chunks that describe an animation.
_PNG_CONTROL_SIZES = {b"acTL": 8, b"fcTL": 26}
# Chunks of a WebP that contain pixels, transparency or an animation, and its header (VP8X).
_WEBP_CHUNKS = {b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF"}
# Tags of a TIFF that its decoder uses: layout, compression, color, orientation.
_TIFF_TAGS = {
    *(254, 255, 256, 257, 258, 259, 262, 263, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317),
    *(320, 322, 323, 324, 325, 332, 333, 334, 338, 339, 340, 341, 347),
    *(512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532),
}
_TIFF_ENTRY = 12  # bytes: tag, type, count, value or its position


def is_image_header(head: bytes) -> bool:
    """Return whether a file begins like an image, of a format that is decoded or of one that is only recognized."""
    return bool(_DECODED.match(head)) or sniff_format(head).endswith("image")


def sniff_format(data: bytes) -> str:
    """Return the name of the format of a file that is not decoded here, such as "HEIC image".

    Args:
        data: The file; only its first bytes are used.

    Returns:
        The name; it ends with "image" for images. "" if the format is unknown, or is decoded.
    """
    head = data[:_SNIFFED_BYTES]
    # The first pattern that matches wins. HEIC, AVIF and MP4 share a container, whose general pattern comes last.
    for pattern, name in _SIGNATURE_PATTERNS:
        if pattern.match(head):
            return name
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text.startswith(b"<"):
        return ""
    # A web page may contain an SVG element.
    is_page = re.match(rb"<(!doctype\s+html|html)", text, re.IGNORECASE)
    if _SVG.search(text) and not is_page:
        return "SVG image"
    return "web page"


def with_article(name: str) -> str:
    """Return the name of a format with its article: "an SVG image", "a JPEG 2000 image"."""
    word = name.partition(" ")[0]
    # Abbreviations are read letter by letter, so the name of the first letter decides: "an ess-vee-gee".
    vowels = "AEFHILMNORSX" if word.isupper() else "AEIOUaeiou"
    return f"an {name}" if word.startswith(tuple(vowels)) else f"a {name}"


def without_metadata(data: bytes) -> bytes:
    """Return a copy of an image file without metadata; the file itself if its format is not one of those below.

    The copy of a damaged file is damaged too, so decode it as strictly as the file itself.
    """
    if data.startswith(b"\xff\xd8"):
        return jpeg_segments.without_metadata(data)
    if data.startswith(_PNG_SIGNATURE):
        return _png_without_metadata(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp_without_metadata(data)
    if data[:4] in (b"II*\0", b"MM\0*"):
        return _tiff_without_metadata(data)
    if data[4:8] == b"ftyp":
        # An AVIF lists its items with their types, and decoders ignore items of an unknown type. Overwriting the type
        # keeps all positions in the file valid.
        return re.sub(rb"(infe.{8})(?:Exif|mime)", rb"\1skip", data, flags=re.DOTALL)
    return data


_GIF_COMMENT = b"!\xfe"
# First byte of a block: "!" is an extension, "," an image, ";" the end. Other bytes between blocks are skipped.
_GIF_BLOCK = re.compile(rb"[!,;]")


def without_gif_comments(data: bytes) -> bytes:
    """Return a GIF without its comments, or the same file if it has none.

    Pillow appends each part of a comment to a copy of the parts before it, which takes minutes for a comment of some
    megabytes.
    """
    if not data.startswith(b"GIF8") or _GIF_COMMENT not in data:
        return data
    kept = []
    start = 0  # start of the bytes that are kept next
    # The header has 13 bytes; byte 10 has the flags of the global palette.
    position = 13 + _palette_size(data, 10)
    # extension   "!" | kind (1 byte)         |                           | parts: size (1), data | 0
    # image       "," | place and size (8),   | palette, if the flags say | parts: size (1), data | 0
    #                 | flags (1)             | so; code size (1)         |
    while block := _GIF_BLOCK.search(data, position):
        is_comment = data.startswith(_GIF_COMMENT, block.start())
        if is_comment:
            kept.append(data[start : block.start()])
        if block[0] == b";":
            break
        position = block.end() + 1
        if block[0] == b",":
            position = block.end() + 10 + _palette_size(data, block.end() + 8)
        while position < len(data) and data[position]:
            position += data[position] + 1
        position += 1
        if is_comment:
            start = position
    return b"".join([*kept, data[start:]])


def _palette_size(data: bytes, flags_position: int) -> int:
    """Return the number of bytes of a palette of a GIF; 0 if the flags say that there is none.

    Args:
        data: The file.
        flags_position: Position of the byte with the flags.
    """
    flags = data[flags_position] if flags_position < len(data) else 0
    has_palette = flags & 128
    if not has_palette:
        return 0
    # The lowest three bits are the logarithm of the number of colors, minus 1. A color has three bytes.
    return 3 << ((flags & 7) + 1)


def _png_without_metadata(data: bytes) -> bytes:
    """Copy the chunks of a PNG that affect the pixels.

    If the description of an animation is damaged, copy only the still image, as viewers show only this image then.
    """
    # length (4 bytes) | name (4) | data | checksum (4)
    chunks: list[tuple[bytes, bytes]] = []
    is_animation_damaged = False
    position = len(_PNG_SIGNATURE)
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        name = data[position + 4 : position + 8]
        chunk = data[position : position + length + 12]
        position += length + 12
        if name not in _PNG_CHUNKS:
            continue
        # Check the checksums of the orientation and of the animation here. The decoder checks the other chunks.
        is_valid = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if name == b"eXIf" and not is_valid:
            continue
        if name in _PNG_CONTROL_SIZES and not (is_valid and length == _PNG_CONTROL_SIZES[name]):
            is_animation_damaged = True
        chunks.append((name, chunk))
    dropped = _PNG_ANIMATION if is_animation_damaged else set()
    return _PNG_SIGNATURE + b"".join(chunk for name, chunk in chunks if name not in dropped)


def _webp_without_metadata(data: bytes) -> bytes:
    """Copy the chunks of a WebP file that affect the pixels, and clear the flags of the others in the header."""
    parts = []
    has_exif = False
    position = 12  # after "RIFF", the length of the file and "WEBP"
    while position + 8 <= len(data):
        # name (4 bytes) | length (4) | data, padded to an even length
        name = data[position : position + 4]
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        end = position + 8 + length + length % 2
        chunk = data[position:end]
        position = end
        # Keep EXIF data for the orientation, unless they are cut off.
        if name == b"EXIF":
            has_exif = end <= len(data)
        if name in _WEBP_CHUNKS or (name == b"EXIF" and has_exif):
            parts.append(chunk)
    body = b"".join(parts)
    if body.startswith(b"VP8X") and len(body) > 8:
        # Byte 8 has a flag for each kind of metadata that follows: a color profile (0x20), EXIF (0x08), XMP (0x04).
        dropped = 0x24 if has_exif else 0x2C
        body = body[:8] + bytes([body[8] & ~dropped]) + body[9:]
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _tiff_without_metadata(data: bytes) -> bytes:
    """Return a copy of a TIFF whose header points to a new directory without metadata tags, appended to the file.

    A directory (IFD) lists the tags of an image. The old one stays in the file, but nothing refers to it.
    """
    order = "<" if data.startswith(b"II") else ">"
    try:
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        entries = []
        for number in range(count):
            offset = start + 2 + number * _TIFF_ENTRY
            (tag,) = struct.unpack_from(f"{order}H", data, offset)
            if tag in _TIFF_TAGS:
                entries.append(data[offset : offset + _TIFF_ENTRY])
    except struct.error:  # The directory is cut off, which the decoder reports.
        return data
    # A directory consists of the number of entries, the entries, and the position of the next directory (0: none).
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)
    padding = bytes(len(data) % 2)  # a directory begins at an even position
    end = len(data) + len(padding)
    return data[:4] + struct.pack(f"{order}I", end) + data[8:] + padding + directory

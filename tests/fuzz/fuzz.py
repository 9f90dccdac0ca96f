"""Bytes that nobody meant, at the doors where strangers' files come in: `make fuzz`, or

    python tests/fuzz/fuzz.py images|shards|sources [-max_total_time=600] [a folder for what it learns, or a crash's file]

Coverage-guided (atheris), from small valid files as seeds. Anything but the documented error is a crash; what was found is a
test of the room that it was found in. Options are libFuzzer's.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["PIL", "tarfile", "llava_simplified"]):
    import tarfile

    import PIL.Image as Image

    Image.init()  # the readers of all formats

    from llava_simplified.data.images import ImageError, decode_image
    from llava_simplified.data.shards import read_range, read_shard_image, tar_samples
    from llava_simplified.prepare.source_rows import Columns, ParseIssues
    from llava_simplified.prepare.sources import read_source

WORK = Path(tempfile.mkdtemp(prefix="fuzz-"))
FORMS = ("tsv", "csv", "json", "jsonl", "parquet", "tar", "tsv.gz", "json.xz", "jsonl.bz2")


def images(data: bytes) -> None:
    """The decoder: uint8 (height, width, 3), or ImageError."""
    try:
        pixels = decode_image(data, max_pixels=1_000_000)
    except ImageError:
        return
    assert (
        pixels.dtype == "uint8"
        and pixels.ndim == 3
        and pixels.shape[2] == 3
        and pixels.size <= 3_000_000
    )


def shards(data: bytes) -> None:
    """The tar reader: members that lie in the file, or ValueError with its name."""
    path = WORK / "x.tar"
    path.write_bytes(data)
    try:
        for key, members in tar_samples(path):
            for offset, size in members.values():
                assert len(read_range(path, offset, size)) == size
            read_shard_image(path, key)
    except ValueError as error:
        assert "x.tar" in str(error), error


def sources(data: bytes) -> None:
    """Caption sources: rows that can be written down, or ValueError with the file's name. The first byte is the form."""
    if not data:
        return
    path = WORK / f"x.{FORMS[data[0] % len(FORMS)]}"
    path.write_bytes(data[1:])
    try:
        for row in read_source(str(path), ParseIssues(), Columns()):
            json.dumps(row._asdict(), ensure_ascii=False).encode()
    except ValueError as error:
        assert path.name in str(error), error
    finally:
        path.unlink()


def image_seeds() -> Iterator[bytes]:
    picture = Image.radial_gradient("L").resize((20, 12))
    exif = Image.Exif()
    exif[274] = 6
    for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"):
        for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"):
            for options in (
                {},
                {"exif": exif},
                {"progressive": True, "quality": 30},
                {"compression": "tiff_lzw"},
            ):
                buffer = io.BytesIO()
                try:
                    picture.convert(mode).save(buffer, form, **options)
                except (OSError, ValueError, KeyError, TypeError):
                    continue  # a form that can't hold this mode
                yield buffer.getvalue()


def tar_seeds() -> Iterator[bytes]:
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
            for name in (
                "0.jpg",
                "0.txt",
                "a/1.png",
                "a/1.json",
                "é" * 40 + ".jpg",
                "x" * 95 + ".txt",
            ):
                info = tarfile.TarInfo(name)
                info.size, info.mtime = 5, 1.5
                archive.addfile(info, io.BytesIO(b'{"a"}'))
        yield buffer.getvalue().rstrip(b"\0") + bytes(1024)


def source_seeds() -> Iterator[bytes]:
    import bz2
    import gzip
    import lzma

    import pyarrow as pa
    import pyarrow.parquet as pq

    url = "http://a.example/1.jpg"
    texts = {
        "tsv": f"a cat\t{url}\na dog\t{url}\n",
        "csv": f'url,caption\n{url},"a ""big"" cat"\n{url},dog\n',
        "json": json.dumps(
            {
                "images": [{"id": 1, "file_name": "1.jpg"}],
                "annotations": [{"image_id": 1, "caption": "x"}],
            }
        ),
        "jsonl": json.dumps(
            {"image": "1.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]}
        )
        + "\n",
    }
    compress = {"tsv.gz": gzip.compress, "json.xz": lzma.compress, "jsonl.bz2": bz2.compress}
    for place, form in enumerate(FORMS):
        data = texts.get(form.partition(".")[0], "").encode()
        if form == "parquet":
            buffer = io.BytesIO()
            pq.write_table(
                pa.table({"url": [url], "caption": ["a cat"]}), buffer, compression="none"
            )
            data = buffer.getvalue()
        elif form == "tar":
            data = next(tar_seeds())
        yield bytes([place]) + compress.get(form, bytes)(data)
    karpathy = {
        "images": [{"filename": "1.jpg", "split": "test", "sentences": [{"raw": "A cat."}]}]
    }
    for row in (
        karpathy,
        [{"image": "1.jpg", "instruction": "?", "responses": ["a"]}],
        {"image_urls": [url], "captions": ["a"]},
    ):
        yield bytes([2]) + json.dumps(row).encode()


TARGETS = {
    "images": (images, image_seeds),
    "shards": (shards, tar_seeds),
    "sources": (sources, source_seeds),
}

if __name__ == "__main__":
    name, *options = sys.argv[1:]
    target, seeds = TARGETS[name]
    corpus = Path(tempfile.mkdtemp(prefix=f"corpus-{name}-"))
    for number, seed in enumerate(seeds()):
        (corpus / f"seed{number}").write_bytes(seed)
    again = any(Path(option).is_file() for option in options)
    limits = ["-rss_limit_mb=3000", "-timeout=20", "-max_len=8192", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *limits, *options, *([] if again else [str(corpus)])], target)
    atheris.Fuzz()

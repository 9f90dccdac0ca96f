"""The functions that read untrusted bytes. Each target accepts any bytes; any error but the documented one is a crash.

`fuzz.py` searches for crashes. `test_corpus.py` runs the targets on known inputs: small valid files, and the files in
`corpus/`.
"""

from __future__ import annotations

import asyncio
import io
import json
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from unittest import mock

from multidict import CIMultiDict
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/tiny.py

from llava_simplified.data.images import ImageError, decode_image
from llava_simplified.data.records import Record
from llava_simplified.data.shards import read_range, read_shard_image, tar_samples
from llava_simplified.model.checkpoint import read_adapter_config
from llava_simplified.model.config import LlavaConfig, TrainedParts, read_checkpoint_config
from llava_simplified.prepare.fetch import opted_out, parse_retry_after
from llava_simplified.prepare.lenient_response import LenientResponseHandler
from llava_simplified.prepare.request_url import UrlError, parse_url, resolve_redirect
from llava_simplified.prepare.source_rows import Columns, ParseIssues
from llava_simplified.prepare.sources import read_source
from llava_simplified.prompt import Message, Prompt

CORPUS = Path(__file__).with_name("corpus")
WORK = Path(tempfile.mkdtemp(prefix="fuzz-"))
FORMS = ("tsv", "csv", "json", "jsonl", "parquet", "tar", "tsv.gz", "json.xz", "jsonl.bz2")


def images(data: bytes) -> None:
    """The decoder returns uint8 (height, width, 3), or raises ImageError."""
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
    """The tar reader returns members inside the file, or raises ValueError with the name of the file."""
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
    """Caption sources give rows that can be written, or raise ValueError with the file's name.

    The first byte selects the form of the source.
    """
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


def config(data: bytes) -> None:
    """The configuration of a checkpoint or an adapter gives a config, or raises ValueError with the file's name."""
    for name, read in (("llava.json", _read_config), ("adapter_config.json", read_adapter_config)):
        path = WORK / name
        path.write_bytes(data)
        try:
            read(WORK)
        except ValueError as error:
            assert name in str(error), error
            assert len(str(error)) < 10_000


def _read_config(folder: Path) -> None:
    stored = read_checkpoint_config(folder)
    TrainedParts.from_stored(stored)
    LlavaConfig.from_dict(stored["architecture"])


@lru_cache(maxsize=1)
def _renderers() -> list[Prompt]:
    from tiny import make_tokenizer

    return [Prompt(make_tokenizer(), template) for template in ("chat", "plain", "bare")]


def prompt(data: bytes) -> None:
    """A record or a text gives token ids with a trained answer, or raises ValueError that names the row."""
    try:
        try:
            record = Record.from_json(json.loads(data), "row 0")
            turns, responses = record.turns, record.responses or ["a cat"]
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
            text = data.decode("utf-8", "replace")
            turns, responses = [Message("user", text)], [text]
        for renderer in _renderers():
            example = renderer.render(turns, responses[0], "row 0")
            assert len(example.input_ids) == len(example.labels)
    except ValueError as error:
        assert "row 0" in str(error), error


def http(data: bytes) -> None:
    """The URL in the first line is parsed or raises UrlError. The response in the other lines never causes an error."""
    first, _, response = data.partition(b"\n")
    text = first.decode("utf-8", "surrogateescape")
    base = parse_url("http://a.example/b/c?d")
    for parse in (parse_url, lambda location: resolve_redirect(base, location)):
        try:
            url = parse(text)
        except UrlError:
            continue
        assert url.host and url.scheme in ("http", "https")
        assert str(url).isascii() and not set(str(url)) & set(" \r\n\t\0")
    pause = parse_retry_after(text)
    assert pause is None or pause >= 0
    opted_out(CIMultiDict({"X-Robots-Tag": text, "TDM-Reservation": text}))
    for size in (len(response) or 1, 7):
        _receive(response, size)


def _receive(response: bytes, size: int) -> None:
    """Pass a response to the downloader's protocol in pieces. The protocol stores errors for the code that waits."""
    loop = _loop()
    handler = LenientResponseHandler(loop)
    transport = _transport()
    transport.reset_mock()  # the mock records every call
    handler.connection_made(transport)
    handler.set_response_params(timer=None, read_until_eof=True, auto_decompress=False)
    for start in range(0, len(response), size):
        handler.data_received(response[start : start + size])
    handler.connection_lost(None)


@lru_cache(maxsize=1)
def _transport() -> asyncio.Transport:
    # Create the mock only once, because this takes longer than processing a response.
    return mock.create_autospec(asyncio.Transport, instance=True)


@lru_cache(maxsize=1)
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def image_seeds() -> Iterator[bytes]:
    gradient = Image.radial_gradient("L").resize((20, 12))
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
                    gradient.convert(mode).save(buffer, form, **options)
                except (OSError, ValueError, KeyError, TypeError):
                    continue  # this format cannot store this mode
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


def corpus_seeds(name: str) -> Iterator[bytes]:
    """Yield the files of a target in `corpus/`: valid ones, and inputs that once caused a crash."""
    for path in sorted((CORPUS / name).glob("*")):
        yield path.read_bytes()


def seeds(name: str) -> Iterator[bytes]:
    """Yield all known inputs of a target."""
    yield from SEEDS.get(name, lambda: iter(()))()
    yield from corpus_seeds(name)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "images": images,
    "shards": shards,
    "sources": sources,
    "config": config,
    "prompt": prompt,
    "http": http,
}
SEEDS: dict[str, Callable[[], Iterator[bytes]]] = {
    "images": image_seeds,
    "shards": tar_seeds,
    "sources": source_seeds,
}

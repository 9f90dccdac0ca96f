"""Any caption source -> rows of image, URL and captions, streaming, with every oddity counted and named.

The forms, and where each comes from:
    lines       CC3M `caption<TAB>url`, CC12M `url<TAB>caption`, SBU's twin files as one TSV; Flickr30k
                `image_name| comment_number| comment` and `name.jpg#0<TAB>caption`; Flickr8k `image,caption`;
                any TSV or CSV with a header
    JSON        COCO, Karpathy's split, SBU's parallel arrays, LLaVA, the tutorial's, any array of rows, JSONL
    Parquet     LAION, DataComp, `image: struct<bytes, path>`, the manifests of shards
    folders     imagefolder (`metadata.jsonl|csv|parquet` beside the pictures), shards, parts of one source
    tar         webdataset and img2dataset: `key.jpg`, `key.txt` or `key.json`
"""

from __future__ import annotations

import csv
import glob
import itertools
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import fsspec

from llava_simplified.data.rows import BOM, find_records, scan_json
from llava_simplified.data.shards import IMAGE_SUFFIXES, image_column, read_range, tar_samples

URL_NAMES = ("url", "image_url", "coco_url", "flickr_url", "img_url", "link")
IMAGE_NAMES = (
    "image",
    "file_name",
    "filename",
    "image_name",
    "image_path",
    "file",
    "path",
    "filepath",
    "img",
)
CAPTION_NAMES = (
    "caption",
    "text",
    "captions",
    "alt_text",
    "sentence",
    "comment",
    "description",
    "title",
    "raw",
)
_TEXTS = ("txt", "caption", "json")  # of a tar's sample, the first there is
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_PICTURE = re.compile(r"\.(jpe?g|png|gif|webp|bmp|tiff?|avif)([.#]\w+)*$", re.IGNORECASE)


class SourceRow(NamedTuple):
    """One row of a source.

    `number` counts lines from 1 in text, rows from 0 elsewhere. `image` is a file name or `shard.tar#key`,
    empty where there is only a URL. `record` is a row that is a record already (LLaVA's, the tutorial's).
    """

    number: int
    image: str
    url: str
    captions: tuple[str, ...]
    split: str = ""
    record: dict[str, Any] | None = None


class Columns(NamedTuple):
    """Names that the user gave; empty where they are to be found out."""

    url: str = ""
    image: str = ""
    caption: str = ""


class ParseIssues:
    """What was strange in a source: how often, and where first."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def note(self, kind: str, number: int, text: object) -> None:
        """Count `kind`; keep the row's number and text the first time."""
        self.counts[kind] += 1
        if kind not in self.first:
            self.first[kind] = f"row {number}: {str(text)[:120]!r}"

    def lines(self) -> list[str]:
        """One line a kind, for people."""
        return [
            f"{count:>9,} {kind} (first: {self.first[kind]})"
            for kind, count in self.counts.most_common()
        ]


def read_source(source: str, odd: ParseIssues, columns: Columns) -> Iterator[SourceRow]:
    """Stream the rows of any source: a file, a folder, a glob, or any fsspec URL of a file.

    Raises:
        ValueError: where the form can't be told, or a column is missing or ambiguous; shows the first row.
    """
    for row in _read(source, odd, columns):
        if ".." in row.image and ".." in Path(row.image).parts:
            odd.note("image outside its folder, '..' (left out)", row.number, row.image)
            continue
        if not _is_unicode(row):
            odd.note(
                "half of a surrogate pair, no character (left out)",
                row.number,
                row.record or row.captions,
            )
            continue
        if not all(row.captions):
            kind = (
                "empty caption (left out)"
                if row.record is None
                else "record with an empty answer (kept)"
            )
            odd.note(kind, row.number, row.url or row.image)
            row = row._replace(captions=tuple(caption for caption in row.captions if caption))
        yield row


def _is_unicode(row: SourceRow) -> bool:
    """False for text that JSON can spell (`\\ud83d` alone), and that no file can hold."""
    texts = (row.image, row.url, row.split, *row.captions)
    text = "".join(texts) if row.record is None else json.dumps(row.record, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read(source: str, odd: ParseIssues, columns: Columns) -> Iterator[SourceRow]:
    folder = Path(source)
    if folder.is_dir():
        yield from _folder(folder, odd, columns)
    elif "://" not in source and not folder.is_file() and any(mark in source for mark in "*?["):
        parts = sorted(glob.glob(source))  # noqa: PTH207 - absolute patterns too
        if not parts:
            raise ValueError(f"{source}: no file matches")
        fixed = Path(re.split(r"[*?[]", source)[0] + "x").parent
        for part in parts:
            below = Path(part).parent.relative_to(fixed)  # shards of two folders may have one name
            for row in _read(part, odd, columns):
                yield row._replace(image=str(below / row.image)) if "#" in row.image else row
    elif "://" not in source and not folder.is_file():
        raise ValueError(f"{source}: no such file or folder")
    else:
        name = source.lower().partition("?")[0] if "://" in source else source.lower()
        suffix = Path(re.sub(r"\.(gz|bz2|xz)$", "", name)).suffix
        readers = {
            ".parquet": _parquet,
            ".tar": _tar,
            ".json": _json,
            ".jsonl": _jsonl,
            ".ndjson": _jsonl,
        }
        yield from readers.get(suffix, _table)(source, odd, columns)


def _folder(folder: Path, odd: ParseIssues, columns: Columns) -> Iterator[SourceRow]:
    if (records := find_records(folder)).is_file():
        yield from _read(str(records), odd, columns)
        return
    names = {f"metadata{suffix}" for suffix in (".jsonl", ".csv", ".parquet")}
    if metadata := sorted(path for path in folder.rglob("metadata.*") if path.name in names):
        for path in metadata:
            below = path.parent.relative_to(folder)
            for row in _read(str(path), odd, columns):
                yield row._replace(image=str(below / row.image) if row.image else "")
        return
    for suffixes in ((".tar",), (".parquet",), (".tsv", ".csv", ".txt"), (".jsonl",), (".json",)):
        if parts := sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes):
            for part in parts:
                yield from _read(str(part), odd, columns)
            return
    held = (
        ", ".join(sorted(path.name for path in itertools.islice(folder.iterdir(), 8))) or "nothing"
    )
    raise ValueError(
        f"{folder}: no metadata file, shard or caption file in this folder; it holds {held}"
    )


@contextmanager
def _open(source: str) -> Iterator[IO[bytes]]:
    try:
        with fsspec.open(source, "rb", compression="infer") as file:
            yield file
    except (
        OSError,
        EOFError,
        zlib.error,
        lzma.LZMAError,
    ) as error:  # of a compressed file that is torn
        raise ValueError(f"{source}: can't be read: {error}") from error


# ---- text, line by line


def _lines(source: str, odd: ParseIssues) -> Iterator[tuple[int, str]]:
    """(line number, text without line end) of each line that isn't blank, whatever its bytes."""
    with _open(source) as file:
        for number, raw in enumerate(file, 1):
            if number == 1 and raw.startswith(BOM):
                raw = raw[len(BOM) :]
                odd.note("byte order mark (removed)", number, "UTF-8")
            elif number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise ValueError(
                    f"{source}: UTF-16 text; make it UTF-8 first (iconv -f UTF-16 -t UTF-8)"
                )
            try:
                text = raw.decode()
            except UnicodeDecodeError:
                text = raw.decode("cp1252", "replace")
                odd.note("not UTF-8 (read as Windows-1252)", number, raw[:80])
            text = text.rstrip("\n")
            if text.endswith("\r"):
                text = text[:-1]
                odd.note("CRLF line end (removed)", number, text)
            if "\0" in text:
                text = text.replace("\0", "")
                odd.note("NUL byte (removed)", number, text)
            if text.strip():
                yield number, text
            else:
                odd.note("blank line (left out)", number, "")


def _table(source: str, odd: ParseIssues, columns: Columns) -> Iterator[SourceRow]:
    lines = _lines(source, odd)
    head = list(itertools.islice(lines, 100))
    if not head:
        raise ValueError(f"{source}: empty file")
    first = head[0][1]
    separator = "\t" if "\t" in first else "|" if re.match(r"[^|,]+\| ", first) else ","
    split = _csv_fields if separator == "," else _pipe_fields if separator == "|" else _tab_fields
    sample = [fields for _, _, fields in split(iter(head), ParseIssues())]
    url, image, caption, width, has_header = _layout(source, sample, columns)
    rows = split(itertools.chain(head, lines), odd)
    for number, text, fields in itertools.islice(rows, int(has_header), None):
        extra = len(fields) - width
        if extra > 0:  # a separator inside the caption: the other fields never hold one
            fields[caption : caption + extra + 1] = [
                separator.join(fields[caption : caption + extra + 1])
            ]
            odd.note(f"{separator!r} inside a caption (kept)", number, text)
        elif extra < 0:
            odd.note("ragged: too few fields (left out)", number, text)
            continue
        if '"' in text and separator != ",":
            odd.note("quote character (kept as text)", number, text)
        words = fields[caption].strip().replace("\t", " ")
        name = re.sub(r"#\d+$", "", fields[image].strip()) if image >= 0 else ""
        yield SourceRow(number, name, fields[url].strip() if url >= 0 else "", (words,))


def _tab_fields(
    lines: Iterator[tuple[int, str]], odd: ParseIssues
) -> Iterator[tuple[int, str, list[str]]]:
    """TSVs of captions know no quoting: a quote is a letter, and a tab always ends a field."""
    for number, text in lines:
        yield number, text, text.split("\t")


def _pipe_fields(
    lines: Iterator[tuple[int, str]], odd: ParseIssues
) -> Iterator[tuple[int, str, list[str]]]:
    """Flickr30k's results.csv; in one of its rows the second bar is missing."""
    for number, text in lines:
        fields = text.split("|")
        if len(fields) == 2 and (match := re.match(r"\s*(\d+)\s+(.+)", fields[1])):
            fields[1:] = match.groups()
            odd.note("missing '|' (repaired)", number, text)
        yield number, text, fields


def _csv_fields(
    lines: Iterator[tuple[int, str]], odd: ParseIssues
) -> Iterator[tuple[int, str, list[str]]]:
    """CSV with quotes, where a quote that never closes costs one row and not the rest of the file."""
    waiting: list[tuple[int, str]] = []  # looked at, but not part of the row
    while line := waiting.pop(0) if waiting else next(lines, None):
        number, text = line
        if '"' not in text:
            yield number, text, text.split(",")
            continue
        reader = csv.reader(
            piece.replace("\r", " ") + "\n" for piece in _with_followers(text, waiting, lines)
        )
        try:
            fields = [field.replace("\n", " ") for field in next(reader)]
        except csv.Error:
            odd.note("quote that never closes (kept as text)", number, text)
            yield number, text, text.split(",")
            continue
        if taken := reader.line_num - 1:
            del waiting[:taken]
            odd.note("line break inside quotes (kept as a space)", number, text)
        yield number, text, fields


def _with_followers(
    text: str, waiting: list[tuple[int, str]], lines: Iterator[tuple[int, str]]
) -> Iterator[str]:
    """A line and, as long as the reader asks for more, within a quoted field, the next ones: 20 at most."""
    yield text
    for place in range(20):
        if place == len(waiting):
            if not (line := next(lines, None)):
                break
            waiting.append(line)
        yield waiting[place][1]
    raise csv.Error("the quote never closes")


def _layout(
    source: str, sample: list[list[str]], columns: Columns
) -> tuple[int, int, int, int, bool]:
    """Which field is (url, image, caption), -1 for none; the number of fields; whether there is a header."""
    first = sample[0]
    names = [field.strip().lower() for field in first]
    known = {*URL_NAMES, *IMAGE_NAMES, *CAPTION_NAMES, *(name.lower() for name in columns if name)}
    if known & set(names) and not any(_URL.match(field) for field in first):
        url, image, caption = (
            names.index(name) if name else -1 for name in _named(source, names, columns, first)
        )
        return url, image, caption, len(names), True
    if len(sample) > 1 and len(first) > 2 and {len(row) for row in sample} == {len(first)}:
        raise ValueError(
            f"{source}: {len(first)} fields in every row, but no line of names before the first: {first}"
        )
    rows = [[row[0], row[-1]] for row in sample if len(row) > 1] or [["", ""]]
    for column, pattern in ((0, _URL), (1, _URL), (0, _PICTURE), (1, _PICTURE)):
        here, there = (
            sum(bool(pattern.search(row[k])) for row in rows) / len(rows)
            for k in (column, 1 - column)
        )
        if here > 0.5 and there > 0.5:
            raise ValueError(
                f"{source}: both fields look like an image's place; name the columns; first row: {first}"
            )
        if here > 0.5:
            place = (column, -1) if pattern is _URL else (-1, column)
            return *place, 1 - column, 2, False
    raise ValueError(
        f"{source}: no field looks like a URL or a picture's name, and there is no header that names one; "
        f"--url-column, --image-column and --caption-column say which it is; first row: {first}"
    )


def _named(
    source: str, names: Iterable[str], columns: Columns, first: object
) -> tuple[str, str, str]:
    """The (url, image, caption) columns among `names`; url or image may be missing, not both."""
    by_lower = {name.lower(): name for name in names}

    def find(asked: str, usual: tuple[str, ...]) -> str:
        if asked and asked.lower() not in by_lower:
            raise ValueError(
                f"{source}: no column {asked!r}; the columns are {', '.join(by_lower.values())}"
            )
        return (
            by_lower[asked.lower()]
            if asked
            else next((by_lower[n] for n in usual if n in by_lower), "")
        )

    url, image = find(columns.url, URL_NAMES), find(columns.image, IMAGE_NAMES)
    caption = find(columns.caption, CAPTION_NAMES)
    if not caption or not (url or image):
        wanted = "caption" if not caption else "url or image"
        raise ValueError(
            f"{source}: no {wanted} column among {', '.join(by_lower.values())}; "
            f"--url-column, --image-column, --caption-column say which it is; first row: {str(first)[:400]}"
        )
    return url, image, caption


def _names_for(
    row: dict[str, Any], known: tuple[str, str, str] | None, source: str, columns: Columns
) -> tuple[str, str, str]:
    """The columns of a JSON row: those of the rows before it where it has them, else its own where they can be told."""
    if known and set(known) - {""} <= row.keys():
        return known
    try:
        return _named(source, row, columns, row)
    except ValueError:
        if known is None:  # of the first row
            raise
        return known


# ---- JSON


def _json(source: str, odd: ParseIssues, columns: Columns) -> Iterator[SourceRow]:
    images: dict[str, tuple[str, str]] = {}
    early: list[tuple[int, dict[str, Any]]] = []  # annotations before their images
    parallel: dict[str, list[str]] = {}
    named: tuple[str, str, str] | None = None
    number = -1
    with _open(source) as file:
        for key, value, _, _ in scan_json(file, source):
            if key in ("image_urls", "captions") and not isinstance(value, dict):  # SBU
                parallel.setdefault(key, []).append(_text(value))
            elif key not in ("", "images", "annotations", "data", "rows"):
                continue  # COCO's info and licenses, SBU's user ids
            elif not isinstance(value, dict):
                number += 1
                odd.note("not a JSON object (left out)", number, value)
            elif key == "annotations":
                number += 1
                if not isinstance(value.get("caption"), str) and not number:
                    raise ValueError(
                        f"{source}: COCO annotations without captions (not the captions file?): {value}"
                    )
                if str(value.get("image_id")) in images:
                    yield from _coco(images, value, number, odd)
                else:
                    early.append((number, value))
            elif key == "images" and "sentences" not in value and "id" in value:
                images[str(value["id"])] = (
                    _text(value.get("file_name")),
                    _text(value.get("coco_url")),
                )
            else:
                number += 1
                if "sentences" not in value and not _is_record(value):
                    named = _names_for(value, named, source, columns)
                yield _from_mapping(value, number, named)
    for number, value in early:
        yield from _coco(images, value, number, odd)
    if parallel:
        urls, captions = parallel.get("image_urls", []), parallel.get("captions", [])
        if len(urls) != len(captions):
            raise ValueError(f"{source}: {len(urls)} 'image_urls', but {len(captions)} 'captions'")
        for number, (url, caption) in enumerate(zip(urls, captions)):
            yield SourceRow(number, "", url, (caption,))


def _coco(
    images: dict[str, tuple[str, str]], value: dict[str, Any], number: int, odd: ParseIssues
) -> Iterator[SourceRow]:
    place = images.get(str(value.get("image_id")))
    if place is None:
        odd.note("annotation of an unknown image (left out)", number, value)
    else:
        yield SourceRow(number, *place, (_text(value.get("caption")),))


def _jsonl(source: str, odd: ParseIssues, columns: Columns) -> Iterator[SourceRow]:
    named: tuple[str, str, str] | None = None
    for number, text in _lines(source, odd):
        value = _object(text)
        if value is None:
            odd.note("not a JSON object (left out)", number, text)
            continue
        if not _is_record(value):
            named = _names_for(value, named, source, columns)
        yield _from_mapping(value, number, named)


def _object(text: str) -> dict[str, Any] | None:
    """The JSON object that `text` is, or None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # nested a thousand times
        return None
    return value if isinstance(value, dict) else None


def _is_record(value: dict[str, Any]) -> bool:
    return "conversations" in value or "instruction" in value


def _text(value: object) -> str:
    """A text, or a number as text. Anything else says nothing: where a name or a caption should be, it is missed."""
    return str(value).strip() if isinstance(value, str | int) else ""


def _listed(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _from_mapping(
    value: dict[str, Any], number: int, named: tuple[str, str, str] | None
) -> SourceRow:
    split = _text(value.get("split"))
    if "sentences" in value:  # Karpathy
        parts = [_text(value.get(name)) for name in ("filepath", "filename")]
        image = _text(value.get("image")) or "/".join(filter(None, parts))
        said = (
            each.get("raw") if isinstance(each, dict) else each
            for each in _listed(value["sentences"])
        )
        return SourceRow(number, image, _text(value.get("url")), tuple(map(_text, said)), split)
    if _is_record(value):
        image = value.get("image") or ""
        texts = _listed(value.get("responses") or value.get("response"))
        if "conversations" in value:
            texts = [
                turn.get("value")
                for turn in _listed(value["conversations"])[-1:]
                if isinstance(turn, dict)
            ]
        return SourceRow(
            number, image if isinstance(image, str) else "", "", tuple(map(_text, texts)), "", value
        )
    assert named is not None
    url, name, caption = (value.get(column) for column in named)
    return SourceRow(number, _text(name), _text(url), tuple(map(_text, _listed(caption))), split)


# ---- Parquet and tar


def _parquet(source: str, odd: ParseIssues, columns: Columns) -> Iterator[SourceRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with fsspec.open(source, "rb") as file:
            yield from _parquet_rows(pq.ParquetFile(file), source, odd, columns)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: no Parquet file that can be read: {error}") from error


def _parquet_rows(
    table: Any, source: str, odd: ParseIssues, columns: Columns
) -> Iterator[SourceRow]:
    schema = table.schema_arrow
    pictures = image_column(schema)
    names = [field.name for field in schema if "binary" not in str(field.type)]
    manifest = {"key", "status"} <= set(names)
    wanted, named = names, None
    if "sentences" not in names and not _is_record(dict.fromkeys(names)):
        first = next(iter(table.iter_batches(1, columns=names)), None)
        shown = first.to_pylist()[0] if first is not None and first.num_rows else schema.names
        virtual = [*names, "image"] if pictures or manifest else names
        named = _named(source, virtual, columns, shown)
        wanted = [name for name in (*named, "split", "key", "status") if name in names]
    rows = (row for batch in table.iter_batches(8192, columns=wanted) for row in batch.to_pylist())
    for number, row in enumerate(rows):
        if manifest:
            if row["status"] not in ("ok", "success"):
                odd.note("not downloaded (left out)", number, row["status"])
                continue
            row["image"] = f"{Path(source).stem}.tar#{row['key']}"
        elif pictures:
            row["image"] = f"{Path(source).name}#{number}"
        yield _from_mapping(row, number, named)


def _tar(source: str, odd: ParseIssues, columns: Columns) -> Iterator[SourceRow]:
    path, manifest, seen = Path(source), Path(source).with_suffix(".parquet"), set[str]()
    if "://" in source:
        raise ValueError(
            f"{source}: the pictures of a tar are read at random, from a local file: copy it first"
        )
    if manifest.is_file():
        yield from _parquet(str(manifest), odd, columns)
        return
    named: tuple[str, str, str] | None = None
    for number, (key, members) in enumerate(tar_samples(path)):
        if key in seen:  # of tars put together: the key means the first one's picture
            odd.note("second sample of one key (left out)", number, key)
            continue
        seen.add(key)
        picture = next((suffix for suffix in members if suffix in IMAGE_SUFFIXES), None)
        texts = {
            s: read_range(path, *members[s]).decode("utf-8", "replace")
            for s in _TEXTS
            if s in members
        }
        if picture is None or not texts:
            odd.note(
                f"sample without {'an image' if picture is None else 'a caption'} (left out)",
                number,
                key,
            )
            continue
        text, caption = next(iter(texts.items()))
        row = _object(texts.get("json", ""))
        if text != "json" and not isinstance(
            (row or {}).get("captions"), list
        ):  # several, one a line in our .txt
            row = {"caption": caption}
        if row is None:
            odd.note("not a JSON object (left out)", number, key)
            continue
        row["image"] = f"{path.name}#{key}"
        named = _names_for(
            row, named, f"{source} member {key}.{text}", columns._replace(url="", image="image")
        )
        yield _from_mapping(row, number, ("", *named[1:]))

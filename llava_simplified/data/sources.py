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
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from llava_simplified.data.rows import BOM, scan_json
from llava_simplified.data.shards import IMAGE_SUFFIXES, read_range, tar_samples

URL_NAMES = ("url", "image_url", "coco_url", "flickr_url", "img_url", "link")
IMAGE_NAMES = ("image", "file_name", "filename", "image_name", "image_path", "file", "path", "filepath", "img")
CAPTION_NAMES = ("caption", "text", "captions", "alt_text", "sentence", "comment", "description", "title", "raw")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_PICTURE = re.compile(r"\.(jpe?g|png|gif|webp|bmp|tiff?)([.#]\w+)*$", re.IGNORECASE)


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


class Oddities:
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
        return [f"{count:>9,} {kind} (first: {self.first[kind]})" for kind, count in self.counts.most_common()]


def read_source(source: str, odd: Oddities, columns: Columns) -> Iterator[SourceRow]:
    """Stream the rows of any source: a file, a folder, a glob, or any fsspec URL of a file.

    Raises:
        ValueError: where the form can't be told, or a column is missing or ambiguous; shows the first row.
    """
    for row in _read(source, odd, columns):
        if ".." in row.image and ".." in Path(row.image).parts:
            odd.note("image outside its folder, '..' (left out)", row.number, row.image)
            continue
        if row.image.startswith(("/", "\\")) or row.image[1:3] == ":\\":  # of the machine that wrote it
            odd.note("absolute image path (base name kept)", row.number, row.image)
            row = row._replace(image=re.split(r"[/\\]", row.image)[-1])
        if not all(row.captions):
            odd.note("empty caption (left out)", row.number, row.url or row.image)
            row = row._replace(captions=tuple(caption for caption in row.captions if caption))
        yield row


def _read(source: str, odd: Oddities, columns: Columns) -> Iterator[SourceRow]:
    folder = Path(source)
    if folder.is_dir():
        yield from _folder(folder, odd, columns)
    elif any(mark in source for mark in "*?["):
        parts = sorted(glob.glob(source))  # noqa: PTH207 - absolute patterns too
        if not parts:
            raise ValueError(f"{source}: no file matches")
        for part in parts:
            yield from _read(part, odd, columns)
    elif "://" not in source and not folder.is_file():
        raise ValueError(f"{source}: no such file or folder")
    else:
        suffix = Path(re.sub(r"\.(gz|bz2|xz)$", "", source.lower())).suffix
        readers = {".parquet": _parquet, ".tar": _tar, ".json": _json, ".jsonl": _jsonl, ".ndjson": _jsonl}
        yield from readers.get(suffix, _table)(source, odd, columns)


def _folder(folder: Path, odd: Oddities, columns: Columns) -> Iterator[SourceRow]:
    if (folder / "records.jsonl").is_file():  # written by `llava download`
        yield from _jsonl(str(folder / "records.jsonl"), odd, columns)
        return
    names = {f"metadata{suffix}" for suffix in (".jsonl", ".csv", ".parquet")}
    if metadata := sorted(path for path in folder.rglob("metadata.*") if path.name in names):
        for path in metadata:
            below = path.parent.relative_to(folder)
            for row in _read(str(path), odd, columns):
                yield row._replace(image=str(below / row.image) if row.image else "")
        return
    for suffixes in ((".tar",), (".parquet",), (".tsv", ".csv", ".txt"), (".jsonl",), (".json",)):
        if parts := sorted(path for path in folder.iterdir() if path.suffix in suffixes):
            for part in parts:
                yield from _read(str(part), odd, columns)
            return
    held = ", ".join(sorted(path.name for path in itertools.islice(folder.iterdir(), 8))) or "nothing"
    raise ValueError(f"{folder}: no metadata file, shard or caption file in this folder; it holds {held}")


# ---- text, line by line


def _lines(source: str, odd: Oddities) -> Iterator[tuple[int, str]]:
    """(line number, text without line end) of each line that isn't blank, whatever its bytes."""
    with fsspec.open(source, "rb", compression="infer") as file:
        for number, raw in enumerate(file, 1):
            if number == 1 and raw.startswith(BOM):
                raw = raw[len(BOM) :]
                odd.note("byte order mark (removed)", number, "UTF-8")
            elif number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise ValueError(f"{source}: UTF-16 text; make it UTF-8 first (iconv -f UTF-16 -t UTF-8)")
            try:
                text = raw.decode()
            except UnicodeDecodeError:
                text = raw.decode("cp1252", "replace")
                odd.note("not UTF-8 (read as Windows-1252)", number, raw[:80])
            text = text.rstrip("\n")
            if text.endswith("\r"):
                text = text[:-1]
                odd.note("CRLF line end", number, text)
            if "\0" in text:
                text = text.replace("\0", "")
                odd.note("NUL byte (removed)", number, text)
            if text.strip():
                yield number, text
            else:
                odd.note("blank line (left out)", number, "")


def _table(source: str, odd: Oddities, columns: Columns) -> Iterator[SourceRow]:
    lines = _lines(source, odd)
    head = list(itertools.islice(lines, 100))
    if not head:
        raise ValueError(f"{source}: empty file")
    first = head[0][1]
    separator = "\t" if "\t" in first else "|" if re.match(r"[^|,]+\| ", first) else ","
    split = _csv_fields if separator == "," else _pipe_fields if separator == "|" else _tab_fields
    sample = [fields for _, _, fields in split(iter(head), Oddities())]
    url, image, caption, width, has_header = _layout(source, sample, columns)
    rows = split(itertools.chain(head, lines), odd)
    for number, text, fields in itertools.islice(rows, int(has_header), None):
        extra = len(fields) - width
        if extra > 0:  # a separator inside the caption: the other fields never hold one
            fields[caption : caption + extra + 1] = [separator.join(fields[caption : caption + extra + 1])]
            odd.note(f"{separator!r} inside a caption (kept)", number, text)
        elif extra < 0:
            odd.note("ragged: too few fields (left out)", number, text)
            continue
        if '"' in text and separator != ",":
            odd.note("quote character (kept as text)", number, text)
        words = fields[caption].strip().replace("\t", " ")
        name = re.sub(r"#\d+$", "", fields[image].strip()) if image >= 0 else ""
        yield SourceRow(number, name, fields[url].strip() if url >= 0 else "", (words,))


def _tab_fields(lines: Iterator[tuple[int, str]], odd: Oddities) -> Iterator[tuple[int, str, list[str]]]:
    """TSVs of captions know no quoting: a quote is a letter, and a tab always ends a field."""
    for number, text in lines:
        yield number, text, text.split("\t")


def _pipe_fields(lines: Iterator[tuple[int, str]], odd: Oddities) -> Iterator[tuple[int, str, list[str]]]:
    """Flickr30k's results.csv; in one of its rows the second bar is missing."""
    for number, text in lines:
        fields = text.split("|")
        if len(fields) == 2 and (match := re.match(r"\s*(\d+)\s+(.+)", fields[1])):
            fields[1:] = match.groups()
            odd.note("missing '|' (repaired)", number, text)
        yield number, text, fields


def _csv_fields(lines: Iterator[tuple[int, str]], odd: Oddities) -> Iterator[tuple[int, str, list[str]]]:
    """CSV with quotes, where a quote that never closes costs one row and not the rest of the file."""
    waiting: list[tuple[int, str]] = []
    while True:
        number, text = waiting.pop(0) if waiting else next(lines, (0, ""))
        if not number:
            return
        taken = 0
        whole = text
        while whole.count('"') % 2 and taken < 20:  # a field that goes on in the next lines
            if taken == len(waiting) and (line := next(lines, None)) is not None:
                waiting.append(line)
            if taken == len(waiting):
                break
            whole, taken = f"{whole}\n{waiting[taken][1]}", taken + 1
        if whole.count('"') % 2:
            odd.note("quote that never closes (kept as text)", number, text)
            yield number, text, text.split(",")
            continue
        if taken:
            del waiting[:taken]
            odd.note("line break inside quotes (kept as a space)", number, text)
        yield number, whole, next(csv.reader([whole.replace("\n", " ")]))


def _layout(source: str, sample: list[list[str]], columns: Columns) -> tuple[int, int, int, int, bool]:
    """Which field is (url, image, caption), -1 for none; the number of fields; whether there is a header."""
    first = sample[0]
    names = [field.strip().lower() for field in first]
    known = {*URL_NAMES, *IMAGE_NAMES, *CAPTION_NAMES, *(name.lower() for name in columns if name)}
    if known & set(names) and not any(_URL.match(field) for field in first):
        url, image, caption = _named(source, names, columns, first)
        return (
            names.index(url) if url else -1,
            names.index(image) if image else -1,
            names.index(caption),
            len(names),
            True,
        )
    rows = [[row[0], row[-1]] for row in sample if len(row) > 1] or [["", ""]]
    for column, pattern in ((0, _URL), (1, _URL), (0, _PICTURE), (1, _PICTURE)):
        here, there = (sum(bool(pattern.search(row[k])) for row in rows) / len(rows) for k in (column, 1 - column))
        if here > 0.5 and there > 0.5:
            raise ValueError(f"{source}: both fields look like an image's place; name the columns; first row: {first}")
        if here > 0.5:
            place = (column, -1) if pattern is _URL else (-1, column)
            return *place, 1 - column, 2, False
    raise ValueError(
        f"{source}: no field looks like a URL or a picture's name, and there is no header that names one; "
        f"--url-column, --image-column and --caption-column say which it is; first row: {first}"
    )


def _named(source: str, names: Iterable[str], columns: Columns, first: object) -> tuple[str, str, str]:
    """The (url, image, caption) columns among `names`; url or image may be missing, not both."""
    by_lower = {name.lower(): name for name in names}

    def find(asked: str, usual: tuple[str, ...]) -> str:
        if asked and asked.lower() not in by_lower:
            raise ValueError(f"{source}: no column {asked!r}; the columns are {', '.join(by_lower.values())}")
        return by_lower[asked.lower()] if asked else next((by_lower[n] for n in usual if n in by_lower), "")

    url, image = find(columns.url, URL_NAMES), find(columns.image, IMAGE_NAMES)
    caption = find(columns.caption, CAPTION_NAMES)
    if not caption or not (url or image):
        wanted = "caption" if not caption else "url or image"
        raise ValueError(
            f"{source}: no {wanted} column among {', '.join(by_lower.values())}; "
            f"--url-column, --image-column, --caption-column say which it is; first row: {str(first)[:400]}"
        )
    return url, image, caption


# ---- JSON


def _json(source: str, odd: Oddities, columns: Columns) -> Iterator[SourceRow]:
    images: dict[Any, tuple[str, str]] = {}
    annotations: list[dict[str, Any]] = []
    parallel: dict[str, list[str]] = {}
    named: tuple[str, str, str] | None = None
    number = -1
    with fsspec.open(source, "rb", compression="infer") as file:
        for key, value, _, _ in scan_json(file, source):
            if key in ("image_urls", "captions") and isinstance(value, str):  # SBU
                parallel.setdefault(key, []).append(value)
            elif key not in ("", "images", "annotations", "data", "rows"):
                continue  # COCO's info and licenses, SBU's user ids
            elif not isinstance(value, dict):
                number += 1
                odd.note("not a JSON object (left out)", number, value)
            elif key == "annotations":
                if not isinstance(value.get("caption"), str):
                    raise ValueError(f"{source}: COCO annotations without captions (not the captions file?): {value}")
                number += 1
                if value["image_id"] in images:
                    yield _coco(images, value, number, odd)
                else:
                    annotations.append(value)
            elif key == "images" and "sentences" not in value and "id" in value:
                images[value["id"]] = value.get("file_name", ""), value.get("coco_url", "")
            else:
                number += 1
                if "sentences" not in value and not _is_record(value):
                    named = named if named and set(named) - {""} <= set(value) else None
                    named = named or _named(source, value, columns, value)
                yield _from_mapping(value, number, named)
    for number, value in enumerate(annotations):
        yield _coco(images, value, number, odd)
    if parallel:
        urls, captions = parallel.get("image_urls", []), parallel.get("captions", [])
        if len(urls) != len(captions):
            raise ValueError(f"{source}: {len(urls)} 'image_urls', but {len(captions)} 'captions'")
        for number, (url, caption) in enumerate(zip(urls, captions)):
            yield SourceRow(number, "", url, (caption.strip(),))


def _coco(images: dict[Any, tuple[str, str]], value: dict[str, Any], number: int, odd: Oddities) -> SourceRow:
    if value["image_id"] not in images:
        odd.note("annotation of an unknown image (left out)", number, value)
    image, url = images.get(value["image_id"], ("", ""))
    return SourceRow(number, image, url, (value["caption"].strip(),))


def _jsonl(source: str, odd: Oddities, columns: Columns) -> Iterator[SourceRow]:
    named: tuple[str, str, str] | None = None
    for number, text in _lines(source, odd):
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            odd.note("not a JSON object (left out)", number, text)
            continue
        if not _is_record(value):
            named = named if named and set(named) - {""} <= set(value) else _named(source, value, columns, value)
        yield _from_mapping(value, number, named)


def _is_record(value: dict[str, Any]) -> bool:
    return "conversations" in value or "instruction" in value


def _from_mapping(value: dict[str, Any], number: int, named: tuple[str, str, str] | None) -> SourceRow:
    if "sentences" in value:  # Karpathy
        image = "/".join(part for part in (value.get("filepath", ""), value["filename"]) if part)
        captions = tuple(str(sentence["raw"]).strip() for sentence in value["sentences"])
        return SourceRow(number, image, "", captions, str(value.get("split", "")))
    if _is_record(value):
        image = value.get("image") or ""
        texts = value.get("responses") or [value.get("response") or ""]
        if "conversations" in value:
            texts = [turn.get("value", "") for turn in value["conversations"][-1:]]
        return SourceRow(number, image if isinstance(image, str) else "", "", tuple(texts), "", value)
    assert named is not None
    url, image, caption = (value.get(name) or "" for name in named)
    texts = caption if isinstance(caption, list | tuple) else [caption]
    return SourceRow(
        number, str(image), str(url), tuple(str(text or "").strip() for text in texts), str(value.get("split") or "")
    )


# ---- Parquet and tar


def _parquet(source: str, odd: Oddities, columns: Columns) -> Iterator[SourceRow]:
    import pyarrow.parquet as pq

    with fsspec.open(source, "rb") as file:
        table = pq.ParquetFile(file)
        schema = table.schema_arrow
        pictures = [field.name for field in schema if "binary" in str(field.type)]
        names = [name for name in schema.names if name not in pictures]
        record = _is_record(dict.fromkeys(names))
        manifest = {"key", "status"} <= set(names)
        if record:
            wanted, named = names, None
        else:
            first = next(iter(table.iter_batches(1, columns=names)), None)
            shown = first.to_pylist()[0] if first is not None and first.num_rows else schema.names
            virtual = [*names, "image"] if pictures or manifest else names
            named = _named(source, virtual, columns, shown)
            wanted = [name for name in (*named, "split", "key", "status") if name in names]
        rows = (row for batch in table.iter_batches(8192, columns=wanted) for row in batch.to_pylist())
        for number, row in enumerate(rows):
            if manifest:
                if row["status"] not in ("ok", "success"):
                    continue
                row["image"] = f"{Path(source).stem}.tar#{row['key']}"
            elif pictures:
                row["image"] = f"{Path(source).name}#{number}"
            yield _from_mapping(row, number, named)


def _tar(source: str, odd: Oddities, columns: Columns) -> Iterator[SourceRow]:
    path, manifest = Path(source), Path(source).with_suffix(".parquet")
    if manifest.is_file():
        yield from _parquet(str(manifest), odd, columns)
        return
    for number, (key, members) in enumerate(tar_samples(path)):
        picture = next((suffix for suffix in members if suffix in IMAGE_SUFFIXES), None)
        text = next((suffix for suffix in ("txt", "caption", "json") if suffix in members), None)
        if picture is None or text is None:
            odd.note(f"sample without {'an image' if picture is None else 'a caption'} (left out)", number, key)
            continue
        caption = read_range(path, *members[text]).decode("utf-8", "replace")
        row = {"image": f"{path.name}#{key}", **(json.loads(caption) if text == "json" else {"caption": caption})}
        row["image"] = f"{path.name}#{key}"
        named = _named(f"{source} member {key}.{text}", row, columns._replace(url="", image="image"), row)
        yield _from_mapping(row, number, ("", *named[1:]))

"""Read any source of captions as a stream of rows: image, URL and captions.

The supported formats, and the module that reads each of them:

    table_source     CC3M, CC12M, SBU, Flickr30k, Flickr8k; any TSV or CSV with a header; lists of URLs
    json_source      COCO, Karpathy's split, SBU, LLaVA, the tutorial's records, any array of rows, captions by image
                     name, JSON Lines
    archive_source   Parquet: LAION, DataComp, images inside the file, manifests of shards
                     tar: webdataset and img2dataset
    this module      folders: imagefolder (`metadata.jsonl|csv|parquet` with the images), shards, parts of one source

Everything that is skipped or repaired is counted in `ParseIssues`. To add a format, write a generator with the
parameters `(source, issues, columns)` that yields `SourceRow`s, and add its suffix to `_READERS`.
"""

from __future__ import annotations

import glob
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from llava_simplified.data.rows import find_records
from llava_simplified.data.shards import IMAGE_SUFFIXES
from llava_simplified.prepare.archive_source import read_parquet, read_tar
from llava_simplified.prepare.json_source import read_json, read_json_lines_source
from llava_simplified.prepare.source_rows import Columns, ParseIssues, SourceRow
from llava_simplified.prepare.table_source import read_table

Reader = Callable[[str, ParseIssues, Columns], Iterator[SourceRow]]

_READERS: dict[str, Reader] = {
    ".parquet": read_parquet,
    ".tar": read_tar,
    ".json": read_json,
    ".jsonl": read_json_lines_source,
    ".ndjson": read_json_lines_source,
}  # any other suffix is a table
_METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# Files that a folder without metadata may contain; the first kind that is found is read.
_PART_SUFFIXES = (
    (".tar",),
    (".parquet",),
    (".tsv", ".csv", ".txt"),
    (".jsonl", ".ndjson"),
    (".json",),
)
_COMPRESSIONS = re.compile(r"\.(gz|bz2|xz|lzma|zst|lz4|snappy)$")
_COMPRESSED_TAR = re.compile(r"\.(tar\.(gz|bz2|xz|lzma|zst|lz4)|tgz|tbz2?|txz|tzst)$")


def read_source(source: str, issues: ParseIssues, columns: Columns) -> Iterator[SourceRow]:
    """Yield the rows of any source, without unsafe image paths, text that is not UTF-8, and empty captions.

    Args:
        source: A file, a folder, a glob pattern, or the URL of a file that fsspec can open.
        issues: Collects what was skipped or repaired.
        columns: Column names that the user passed.

    Raises:
        ValueError: The source does not exist, its format is unknown, or a column is missing or ambiguous. The message
            shows the first row.
    """
    for row in _read_any(source, issues, columns):
        # Start with the cheap test, which is false for almost every row. "a..b.jpg" is a valid name.
        if ".." in row.image and ".." in Path(row.image).parts:
            issues.note("image outside its folder, '..' (skipped)", row.number, row.image)
            continue
        # Skip text that cannot be written to a file in a later step.
        if not _can_be_encoded(row):
            issues.note(
                "unpaired surrogate, not a character (skipped)",
                row.number,
                row.record or row.captions,
            )
            continue
        if not all(row.captions):
            # Remove the empty caption but not the row: the image may have other captions, in this row
            # or in others.
            kind = "record with an empty answer (kept)"
            if row.record is None:
                kind = "empty caption (skipped)"
            issues.note(kind, row.number, row.url or row.image)
            row = row._replace(captions=tuple(caption for caption in row.captions if caption))
        yield row


def _can_be_encoded(row: SourceRow) -> bool:
    """Return False for text that JSON can express (a lone `\\ud83d`), but that cannot be encoded as UTF-8."""
    if row.record is not None:
        text = json.dumps(row.record, ensure_ascii=False)
    else:
        text = "".join((row.image, row.url, row.split, *row.captions))
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_any(source: str, issues: ParseIssues, columns: Columns) -> Iterator[SourceRow]:
    is_url = "://" in source
    path = Path(source)
    if not is_url and path.is_dir():
        return _read_folder(path, issues, columns)
    # Check for a file first, since the name of a file may contain brackets.
    if not is_url and not path.is_file():
        if any(mark in source for mark in "*?["):
            return _read_glob(source, issues, columns)
        raise ValueError(f"{source}: no such file or folder")
    if _COMPRESSED_TAR.search(_lower_name(source)):
        raise ValueError(
            f"{source}: training reads the images of a tar at random positions, which a compressed one does not allow. "
            "Decompress it first (gunzip, bunzip2, unxz or unzstd), and pass the .tar file."
        )
    reader = _READERS.get(_format_suffix(source), read_table)
    return reader(source, issues, columns)


def _lower_name(source: str) -> str:
    """Return a source in lower case, without the query of a URL."""
    name = source.lower()
    return name.partition("?")[0] if "://" in name else name


def _format_suffix(source: str) -> str:
    """Return the suffix that identifies the format, ignoring a compression suffix and the query of a URL."""
    name = _lower_name(source)
    if _COMPRESSED_TAR.search(name):
        return ".tar"
    return Path(_COMPRESSIONS.sub("", name)).suffix


def _read_glob(pattern: str, issues: ParseIssues, columns: Columns) -> Iterator[SourceRow]:
    """Yield the rows of all files that match a pattern.

    The images of shards are named relative to the part of the pattern without wildcards, because shards in two
    folders may have the same name.
    """
    parts = sorted(glob.glob(pattern))  # noqa: PTH207 - the pattern may be absolute
    if not parts:
        raise ValueError(f"{pattern}: no file matches")
    before_wildcard = re.split(r"[*?[]", pattern)[0]
    root = Path(before_wildcard + "x").parent
    for part in parts:
        folder = Path(part).parent.relative_to(root)
        # Only metadata and shards name images relative to their own folder.
        is_metadata = Path(part).name in _METADATA_NAMES
        for row in _read_any(part, issues, columns):
            if row.image and (is_metadata or "#" in row.image):
                row = row._replace(image=str(folder / row.image))
            yield row


def _read_folder(folder: Path, issues: ParseIssues, columns: Columns) -> Iterator[SourceRow]:
    """Yield the rows of a folder: a download, an imagefolder, or the parts of one source."""
    records = find_records(folder)
    if records.is_file():
        yield from _read_any(str(records), issues, columns)
        return
    # Search subfolders too: an imagefolder may have splits (train/metadata.csv, val/metadata.csv).
    metadata = sorted(path for path in folder.rglob("metadata.*") if path.name in _METADATA_NAMES)
    if metadata:
        yield from _read_image_folder(folder, metadata, issues, columns)
        return
    # Prefer shards to their manifests, and archives to text files that describe them.
    for suffixes in _PART_SUFFIXES:
        parts = sorted(path for path in folder.iterdir() if _format_suffix(path.name) in suffixes)
        for part in parts:
            yield from _read_any(str(part), issues, columns)
        if parts:
            _note_other_files(folder, parts, issues)
            return
    # Name some files of the folder, because most often the path is one level too high or too low.
    names = sorted(path.name for path in itertools.islice(folder.iterdir(), 8))
    raise ValueError(
        f"{folder}: this folder contains no metadata file, shard or file of captions; "
        f"it contains {', '.join(names) or 'nothing'}."
    )


def _read_image_folder(
    folder: Path, metadata: list[Path], issues: ParseIssues, columns: Columns
) -> Iterator[SourceRow]:
    """Yield the rows of an imagefolder. Images that no row names are noted."""
    without_row = {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES
    }
    for path in metadata:
        below = path.parent.relative_to(folder)
        for row in _read_any(str(path), issues, columns):
            image = str(below / row.image) if row.image else ""
            without_row.discard(image)
            yield row._replace(image=image)
    for number, name in enumerate(sorted(without_row)):
        issues.note("image without a row of metadata (skipped)", number, name)


def _note_other_files(folder: Path, parts: list[Path], issues: ParseIssues) -> None:
    """Note what a folder holds besides the parts that were read."""
    stems = {path.name.partition(".")[0] for path in parts}
    others = sorted(path for path in folder.iterdir() if path not in set(parts))
    for number, path in enumerate(others):
        # Manifests and statistics of shards, hidden files, and work folders.
        stem = path.name.partition(".")[0].removesuffix("_stats")
        if stem not in stems and not path.name.startswith((".", "_")):
            issues.note("another file or folder beside the source (not read)", number, path.name)

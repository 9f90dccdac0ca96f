"""Read any source of captions as a stream of rows: image, URL and captions.

The supported formats, and the module that reads each of them:

    table_source     CC3M, CC12M, SBU, Flickr30k, Flickr8k; any TSV or CSV with a header; lists of URLs
    json_source      COCO, Karpathy's split, SBU, LLaVA, the tutorial's records, any array of rows, captions by image
                     name, JSON Lines
    archive_source   Parquet and Arrow: LAION, DataComp, images inside the file, manifests of shards
                     tar: webdataset and img2dataset
    dataset_folder   folders of Hugging Face `Dataset.save_to_disk`
    sidecar_source   folders with `a.txt` or `a.caption` beside `a.jpg`
    this module      folders: imagefolder (`metadata.jsonl|csv|parquet` with the images), shards, parts of one source

Everything that is skipped or repaired is counted in `ParseIssues`. To add a format, write a generator with the
parameters `(source, issues, columns)` that yields `SourceRow`s, and add its suffix to `_READERS`.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from llava_simplified.data.names import expand_pattern
from llava_simplified.data.records import image_names
from llava_simplified.data.rows import find_records
from llava_simplified.extras import MissingExtraError, require_extra
from llava_simplified.foreign_files import blame_file
from llava_simplified.prepare.archive_source import read_arrow, read_parquet, read_tar
from llava_simplified.prepare.dataset_folder import dataset_files, dataset_folder
from llava_simplified.prepare.json_source import read_json, read_json_lines_source
from llava_simplified.prepare.sidecar_source import SidecarOptions, read_sidecars, scan_names
from llava_simplified.prepare.source_rows import (
    COLUMN_OPTIONS,
    EMPTY_CAPTION,
    Columns,
    ParseIssues,
    SourceRow,
)
from llava_simplified.prepare.table_source import read_table

Reader = Callable[[str, ParseIssues, Columns], Iterator[SourceRow]]

# The readers by the suffix of a file. Files with any other suffix are read as tables.
_READERS: dict[str, Reader] = {
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".tar": read_tar,
    ".json": read_json,
    ".jsonl": read_json_lines_source,
    ".ndjson": read_json_lines_source,
}
_METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# A folder may contain captions in several forms. The keys are the names of forms in error messages, the values are the
# suffixes of their files. The forms `_METADATA` and `_SIDECARS` are recognized by the names of files.
_PART_SUFFIXES = {
    "tar shards": (".tar",),
    "Parquet files": (".parquet",),
    "Arrow files": (".arrow",),
    "tables": (".tsv", ".csv", ".txt"),
    "files of JSON lines": (".jsonl", ".ndjson"),
    "JSON files": (".json",),
}
_MERGED_MANIFEST = "merged manifest of `llava download` (not read)"  # an issue
_DOWNLOAD_SETTINGS = "download.json"  # `llava download` writes this file into its output
_METADATA = "metadata files"
_SIDECARS = "images with a sidecar"
# Number of files of one form that are opened to find out whether any of them contains captions. If one does, all are read.
_MAX_TRIED_FILES = 20
# Maximum number of rows of a file that are read to find out which folder contains its images.
_MAX_TRIED_ROWS = 20
_COMPRESSIONS = re.compile(r"\.(gz|bz2|xz|lzma|zst|lz4|snappy|zip)$")
_COMPRESSED_TAR = re.compile(r"\.(tar\.(gz|bz2|xz|lzma|zst|lz4)|tgz|tbz2?|txz|tzst)$")


def read_source(
    source: str, issues: ParseIssues, columns: Columns, sidecar: str = ""
) -> Iterator[SourceRow]:
    """Yield the rows of any source.

    Rows with an unsafe image path or with text that cannot be encoded as UTF-8 are skipped. Empty captions are removed.

    Args:
        source: A file, a folder, a glob pattern, or the URL of a file that fsspec can open.
        issues: Collects what was skipped or repaired.
        columns: Column names that the user passed.
        sidecar: Which sidecars of a folder are read, and how; see `SidecarOptions.parse`. "" chooses the reader of a
            folder by its contents.

    Raises:
        ValueError: The source does not exist, its format is unknown, a column is missing or ambiguous (the message
            shows the first row), or a folder contains several forms.
    """
    for row in _read_any(source, issues, columns, sidecar):
        # Start with the cheap test, which is false for almost every row. "a..b.jpg" is a valid name.
        images = row.image
        if row.record is not None:
            images = "\n".join(image_names(row.record))
            if any(columns):
                kind = f"record (kept as it is, without {COLUMN_OPTIONS})"
                issues.note(kind, row.number, row.record)
        if ".." in images and any(".." in Path(image).parts for image in images.split("\n")):
            issues.note("image path with '..' (skipped)", row.number, images)
            continue
        # The image column contains a URL. A URL in another column is then probably the address of a web page.
        if "://" in row.image and row.record is None and not row.image.startswith("file:"):
            issues.note("URL in the image column (used as the URL)", row.number, row.image)
            row = row._replace(image="", url=row.image)
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
                kind = EMPTY_CAPTION
            issues.note(kind, row.number, row.url or row.image)
            row = row._replace(
                captions=tuple(caption for caption in row.captions if caption),
                empty_notes=int(kind == EMPTY_CAPTION),
            )
        yield row


def is_read_with_others(path: Path, source: str, sidecar: str = "") -> bool:
    """Return whether an existing file is one of several files of a source, or is read instead of its other files.

    Args:
        path: The file: `.json`, `.jsonl` or `.parquet`.
        source: Any source; see `read_source`.
        sidecar: The sidecars of a folder, if only these are read.
    """
    folder = Path(source)
    # In the folder of a download, only the records are read.
    if "://" in source or folder.is_file() or sidecar or (folder / _DOWNLOAD_SETTINGS).is_file():
        return False
    paths: list[Path] = []
    if not folder.is_dir():
        names, _ = expand_pattern(source)
        paths = [Path(name) for name in names]
    elif path.resolve() == find_records(folder).resolve():
        return True
    elif not dataset_files(dataset_folder(folder)):
        # Files of several forms are an error. So only files of the same form can be read together with this one.
        forms = (suffixes for suffixes in _PART_SUFFIXES.values() if path.suffix in suffixes)
        suffixes = next(forms, ())
        paths = [other for other in folder.iterdir() if _format_suffix(other.name) in suffixes]
    return len(paths) > 1 and path.resolve() in [other.resolve() for other in paths]


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


def _read_any(
    source: str, issues: ParseIssues, columns: Columns, sidecar: str = ""
) -> Iterator[SourceRow]:
    """Choose the reader of a source: by its kind (folder, pattern, URL or file), and for a file by its suffix."""
    is_url = "://" in source
    path = Path(source)
    if not is_url and path.is_dir():
        return _read_folder(path, issues, columns, sidecar)
    if sidecar:
        raise ValueError(f"--sidecar {sidecar}: {source} is not a folder of images with sidecars")
    # Check for a file first, since the name of a file may contain brackets.
    if not is_url and not path.is_file():
        if any(mark in source for mark in "*?["):
            return _read_glob(source, issues, columns)
        raise ValueError(f"{source}: no such file or folder")
    if _COMPRESSED_TAR.search(_lower_name(source)):
        raise ValueError(
            f"{source}: training reads the images of a tar at random positions, which is not possible in a compressed "
            "tar. Decompress it first (gunzip, bunzip2, unxz or unzstd), and pass the .tar file."
        )
    if is_url and "*" in source:
        return _read_url_pattern(source, issues, columns)
    reader = _READERS.get(_format_suffix(source), read_table)
    return reader(source, issues, columns)


def _lower_name(source: str) -> str:
    """Return a source in lower case, without the query of a URL."""
    name = source.lower()
    return name.partition("?")[0] if "://" in name else name


def _format_suffix(source: str) -> str:
    """Return the suffix that identifies the format, ignoring a compression suffix and the query of a URL."""
    name = _lower_name(source)
    # Count a compressed tar in a folder as a tar, so that `_read_any` raises the error that says how to decompress it.
    if _COMPRESSED_TAR.search(name):
        return ".tar"
    return Path(_COMPRESSIONS.sub("", name)).suffix


def _read_glob(pattern: str, issues: ParseIssues, columns: Columns) -> Iterator[SourceRow]:
    """Yield the rows of all files that match a pattern.

    Images are named relative to the part of the pattern without wildcards, because files in two folders may use the
    same names for different images.
    """
    parts, root = expand_pattern(pattern)
    if not parts:
        raise ValueError(f"{pattern}: no file matches")
    for number, part in enumerate(map(Path, parts)):
        if len(parts) > 1 and _is_merged_manifest(part.as_posix(), os.path.exists):
            issues.note(_MERGED_MANIFEST, number, part)
            continue
        # A pattern may match a folder too. Its rows name images relative to this folder.
        rows = _read_any(str(part), issues, columns)
        if part.is_dir():
            folder, in_own_folder = part.relative_to(root), True
        else:
            folder = part.parent.relative_to(root)
            # Read some rows to find out which folder the names are relative to, and yield these rows again below.
            first_rows = list(itertools.islice(rows, _MAX_TRIED_ROWS))
            rows = itertools.chain(first_rows, rows)
            in_own_folder = _images_are_in_own_folder(part, root, first_rows, issues)
        for row in rows:
            yield _move_images(row, folder, all_images=in_own_folder)


def _is_merged_manifest(path: str, exists: Callable[[str], bool]) -> bool:
    """Return whether a file is the merged manifest of a download.

    Its rows are those of the shards' manifests, which a pattern that matches it probably matches too.

    Args:
        path: The file, with slashes.
        exists: Returns whether a file of the same file system exists.
    """
    name = path.rpartition("/")[2]
    return name == "manifest.parquet" and exists(path.removesuffix(name) + _DOWNLOAD_SETTINGS)


def _images_are_in_own_folder(
    path: Path, root: Path, first_rows: list[SourceRow], issues: ParseIssues
) -> bool:
    """Return whether a file names images relative to its own folder, and not to `root`.

    Metadata files always do. Other files do if one of their first images exists in their folder. Otherwise, the
    names are resolved against `root`, and an issue is noted.
    """
    if path.name in _METADATA_NAMES:
        return True
    if path.parent == root:
        return False  # both folders are the same
    names: list[str] = []
    for row in first_rows:
        names += [row.image] if row.record is None else image_names(row.record)
    names = [name for name in names if name and "#" not in name]
    # Looking for a file fails if its name is too long or contains a null character.
    with suppress(OSError, ValueError):
        if any((path.parent / name).is_file() for name in names):
            return True
    if names:
        issues.note(
            f"file with none of its first images in its own folder (image names resolved against {root})",
            0,
            path,
        )
    return False


def _read_url_pattern(pattern: str, issues: ParseIssues, columns: Columns) -> Iterator[SourceRow]:
    """Yield the rows of all remote files that match a pattern with `*`."""
    require_extra("download", "fsspec", purpose=f"the source {pattern}")
    import fsspec

    with blame_file(pattern):
        file_system, path = fsspec.core.url_to_fs(pattern)
        paths = sorted(file_system.glob(path))
    if not paths:
        raise ValueError(f"{pattern}: no file matches")
    for number, path in enumerate(paths):
        if len(paths) > 1 and _is_merged_manifest(path, file_system.exists):
            issues.note(_MERGED_MANIFEST, number, path)
            continue
        yield from _read_any(file_system.unstrip_protocol(path), issues, columns)


def _move_images(row: SourceRow, folder: Path, all_images: bool = False) -> SourceRow:
    """Return a row whose images are named relative to the source, and not to the folder of the row's file.

    Args:
        row: The row.
        folder: Folder of the row's file, relative to the source.
        all_images: Move all images; otherwise only images inside shards and tables ("shard.tar#key").
    """

    def move(image: str) -> str:
        if not image or not (all_images or "#" in image):
            return image
        return (folder / image).as_posix()

    record = row.record
    if record is not None and folder != Path():
        # A record names its images in `image` or `images`. Write all of them to `images`.
        images = [move(image) for image in image_names(record)]
        if images:
            others = {key: value for key, value in record.items() if key != "image"}
            record = {**others, "images": images}
    return row._replace(image=move(row.image), record=record)


def _read_folder(
    folder: Path, issues: ParseIssues, columns: Columns, sidecar: str
) -> Iterator[SourceRow]:
    """Yield the rows of a folder: a download, a saved data set, or a folder that contains one form of captions."""
    records = find_records(folder)
    if records.is_file() and not sidecar:
        # A folder of `llava download`: its records describe all that it contains. In any other folder, `llava convert`
        # may have written them before other files were added.
        if not (folder / _DOWNLOAD_SETTINGS).is_file():
            kind = "file of records in the folder (read instead of all other files)"
            issues.note(kind, 0, records)
        yield from _read_any(str(records), issues, columns)
        return
    # In a folder that `datasets` has saved, read only the Arrow files, and not state.json, for example.
    saved = dataset_folder(folder)
    for path in dataset_files(saved):
        subfolder = saved.relative_to(folder)
        for row in _read_any(str(path), issues, columns):
            yield _move_images(row, subfolder)
    if dataset_files(saved):
        return
    contents = _scan_folder(folder, sidecar)
    forms = _find_forms(folder, contents, columns)
    if sidecar:
        # The user has chosen the sidecars, so ignore all other forms.
        forms = {_SIDECARS: contents.sidecars}
    if len(forms) > 1:
        _raise_ambiguous_form(folder, contents, forms)
    for form, paths in forms.items():
        if form == _SIDECARS:
            yield from read_sidecars(folder, issues, SidecarOptions.parse(sidecar))
        elif form == _METADATA:
            yield from _read_image_folder(folder, paths, issues, columns)
        else:
            for path in paths:
                yield from _read_any(str(path), issues, columns)
            _note_other_files(folder, paths, issues)


class _FolderContents:
    """What a folder contains, found without reading any file.

    Attributes:
        metadata: The metadata files of an imagefolder, also in subfolders: train/metadata.csv, val/metadata.csv.
        files: Other files directly in the folder by the suffix of their format, without sidecars.
        sidecars: One sidecar as an example; empty if there is none.
        pairs: Number of images with a sidecar.
        images: Number of images.
    """

    def __init__(self) -> None:
        self.metadata: list[Path] = []
        self.files: dict[str, list[Path]] = {}
        self.sidecars: list[Path] = []
        self.pairs = 0
        self.images = 0


def _scan_folder(folder: Path, sidecar: str) -> _FolderContents:
    """List what a folder contains, to decide how its captions are read. No file is opened."""
    contents = _FolderContents()
    for group in scan_names(folder, SidecarOptions.parse(sidecar).suffixes):
        for _, sidecars in group.images:
            contents.images += 1
            if not sidecars:
                continue
            contents.pairs += 1
            # Keep one sidecar, as an example for error messages.
            if not contents.sidecars:
                contents.sidecars.append(folder / group.path(sidecars[0]))
        for name in (*group.others, *group.orphans):
            path = folder / group.path(name)
            if name in _METADATA_NAMES:
                contents.metadata.append(path)
            # A file with the name of an image (`a.json` beside `a.jpg`) describes that image, so it is not a source.
            elif not group.folder and not group.images:
                contents.files.setdefault(_format_suffix(name), []).append(path)
    return contents


def _find_forms(folder: Path, contents: _FolderContents, columns: Columns) -> dict[str, list[Path]]:
    """Return the forms in which a folder contains captions, with their files.

    Only files from which a row can be read are counted: a README.txt, for example, is not a table.

    Raises:
        ValueError: The folder contains no captions. If files could not be read, the error describes the first of them.
    """
    forms: dict[str, list[Path]] = {}
    if contents.metadata:
        forms[_METADATA] = contents.metadata
    if contents.pairs:
        forms[_SIDECARS] = contents.sidecars
    errors: list[ValueError] = []
    described: set[str] = set()
    for form, suffixes in _PART_SUFFIXES.items():
        paths = sorted(path for suffix in suffixes for path in contents.files.get(suffix, ()))
        # Skip the Parquet and JSON files of shards, which are their manifests and statistics.
        paths = [path for path in paths if _first_stem(path) not in described]
        paths = _find_readable(paths, columns, errors)
        if paths:
            forms[form] = paths
            described.update(map(_first_stem, paths))
    if not forms:
        raise errors[0] if errors else ValueError(_no_captions_message(folder, contents))
    return forms


def _find_readable(paths: list[Path], columns: Columns, errors: list[ValueError]) -> list[Path]:
    """Return the files of one form that contain captions.

    If one file contains captions, all files of the form are returned, and an error in one of them is reported when it is
    read. Only text files are tried one by one, because some may be something else, such as a README.txt.

    Args:
        paths: The files.
        columns: Column names that the user passed.
        errors: Receives the reasons why files are not read, except for text files.
    """
    texts: list[Path] = []
    has_captions = False  # whether one of the files that are not texts contains captions
    for number, path in enumerate(paths):
        # There may be a million texts that are not sources. Do not open them all.
        if number >= _MAX_TRIED_FILES and not (texts or has_captions):
            break
        is_text = _format_suffix(path.name) == ".txt"
        if has_captions and not is_text:
            continue
        error = _first_row_error(path, columns)
        if error is None and is_text:
            texts.append(path)
        elif error is None:
            has_captions = True
        elif not is_text:
            errors.append(error)
    others = [path for path in paths if _format_suffix(path.name) != ".txt"]
    return sorted([*texts, *others]) if has_captions else texts


def _first_stem(path: Path) -> str:
    """Return the common name of a shard's files: "00000" for 00000.tar, 00000.parquet and 00000_stats.json."""
    return path.name.partition(".")[0].removesuffix("_stats")


def _first_row_error(path: Path, columns: Columns) -> ValueError | None:
    """Return why no row can be read from a file, or None."""
    try:
        next(_read_any(str(path), ParseIssues(), columns), None)
    except MissingExtraError:
        raise  # this is a ValueError too, but the file is not the cause
    except ValueError as error:
        return error
    return None


def _raise_ambiguous_form(
    folder: Path, contents: _FolderContents, forms: dict[str, list[Path]]
) -> NoReturn:
    """Raise the error for a folder with captions in several forms."""
    found = []
    for form, paths in forms.items():
        name = paths[0].relative_to(folder)
        count = contents.pairs if form == _SIDECARS else len(paths)
        more = ", ..." if len(paths) > 1 else ""
        found.append(f"{count:,} {form} ({name}{more})")
    choices = (
        "Pass the file that you mean, or a pattern such as 'FOLDER/*.tar', instead of the folder"
    )
    if _SIDECARS in forms:
        choices += "; or --sidecar txt or --sidecar caption, which read the sidecars"
    raise ValueError(
        f"{folder}: contains captions in several forms: {'; '.join(found)}. {choices}."
    )


def _no_captions_message(folder: Path, contents: _FolderContents) -> str:
    """Return the message for a folder without any captions."""
    # Name some files of the folder, because most often the path is one level too high or too low.
    names = sorted(path.name for path in itertools.islice(folder.iterdir(), 8))
    images = ""
    if contents.images:
        images = f"{contents.images:,} images without a sidecar (a.txt beside a.jpg); "
    return (
        f"{folder}: this folder contains no metadata file, shard, sidecar or file of captions; "
        f"it contains {images}{', '.join(names) or 'nothing'}."
    )


def _read_image_folder(
    folder: Path, metadata: list[Path], issues: ParseIssues, columns: Columns
) -> Iterator[SourceRow]:
    """Yield the rows of a folder in the format of Hugging Face's `imagefolder`, and note images without a row."""
    # Keep only hashes of the image names, because a million names would take a hundred megabytes.
    named = array("q")
    for path in metadata:
        subfolder = path.parent.relative_to(folder)
        for row in _read_any(str(path), issues, columns):
            image = (subfolder / row.image).as_posix() if row.image else ""
            named.append(hash(image))
            yield row._replace(image=image)
    named = array("q", sorted(named))
    number = 0
    for group in scan_names(folder):
        for name, _ in group.images:
            image = group.path(name)
            index = bisect_left(named, hash(image))
            if index == len(named) or named[index] != hash(image):
                issues.note("image without a row of metadata (skipped)", number, image)
                number += 1


def _note_other_files(folder: Path, parts: list[Path], issues: ParseIssues) -> None:
    """Note what a folder contains besides the parts that were read."""
    stems = {_first_stem(path) for path in parts}
    others = sorted(path for path in folder.iterdir() if path not in set(parts))
    for number, path in enumerate(others):
        # Do not note files that belong to a shard (manifest, statistics), hidden files, or work folders ("_work").
        if _first_stem(path) not in stems and not path.name.startswith((".", "_")):
            issues.note("another file or folder in the source (not read)", number, path.name)

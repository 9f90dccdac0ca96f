"""Read captions from Parquet and Arrow files and from tar shards.

Parquet   LAION and DataComp (URLs), `image: struct<bytes, path>` (images inside the file), manifests of shards, chats
Arrow     the same, as written by `Dataset.save_to_disk`
tar       webdataset and img2dataset: `key.jpg` with `key.txt`, `key.caption` or `key.json`
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_simplified.data.embedded_images import (
    ArrowRows,
    ColumnarFile,
    ParquetRows,
    text_columns,
)
from llava_simplified.data.preference_rows import PAIR_KEYS
from llava_simplified.data.shards import IMAGE_SUFFIXES, read_range, tar_samples
from llava_simplified.extras import require_extra
from llava_simplified.foreign_files import MAX_TEXT_BYTES
from llava_simplified.prepare.json_source import (
    NOT_AN_OBJECT,
    columns_of_row,
    is_record,
    parse_object,
    row_from_mapping,
)
from llava_simplified.prepare.source_rows import (
    SPLIT_NAME,
    Columns,
    NamedColumns,
    ParseIssues,
    SourceRow,
    find_columns,
)

# Suffixes of the members of a tar that may contain the caption of a sample, in order of preference.
_CAPTION_SUFFIXES = ("txt", "caption", "json")
# Status of a downloaded image in the manifests of `llava download` and of img2dataset.
_DOWNLOADED = ("ok", "success")


def read_parquet(source: str, issues: ParseIssues, columns: Columns) -> Iterator[SourceRow]:
    """Yield the rows of a Parquet file.

    Raises:
        ValueError: The file cannot be read, or its columns cannot be determined.
    """
    require_extra("download", "fsspec", "pyarrow", purpose=f"the Parquet source {source}")
    import fsspec
    import pyarrow as pa

    # Use fsspec for local files too, so that remote files need no separate code. fsspec transfers only the
    # parts of a remote file that are read.
    try:
        with fsspec.open(source, "rb") as stream:
            table = ParquetRows(stream, _file_name(source))
            yield from _table_rows(table, source, issues, columns)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: cannot be read as Parquet: {error}") from error


def read_arrow(source: str, issues: ParseIssues, columns: Columns) -> Iterator[SourceRow]:
    """Yield the rows of an Arrow file, as `Dataset.save_to_disk` writes them.

    Raises:
        ValueError: The file cannot be read, is not a local file, or its columns cannot be determined.
    """
    require_extra("download", "pyarrow", purpose=f"the Arrow source {source}")
    import pyarrow as pa

    if "://" in source:
        raise ValueError(f"{source}: an Arrow file must be on this machine. Copy it first.")
    try:
        yield from _table_rows(ArrowRows(Path(source)), source, issues, columns)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: cannot be read as Arrow: {error}") from error


def _file_name(source: str) -> str:
    """Return the name of a file, without the query of a URL."""
    return Path(source.partition("?")[0] if "://" in source else source).name


def _table_rows(
    table: ColumnarFile, source: str, issues: ParseIssues, columns: Columns
) -> Iterator[SourceRow]:
    """Yield the rows of a Parquet or Arrow file: a manifest, records, Karpathy's split, or any table of captions."""
    names = text_columns(table.schema)
    image_keys = []
    if table.image_column is not None:
        image_keys = ["images" if table.image_column.is_list else "image"]
    is_manifest = "key" in names and "status" in names
    if is_manifest:
        _check_shard(source)
    # Read all columns of a table of records or of Karpathy's split, which have fixed column names. In any
    # other table, find the columns by their names, and read only those.
    wanted, named = names, None
    if "sentences" not in names and not _has_records(table):
        # For a manifest or a file with images, add a column "image". The loop below sets its values.
        virtual_names = [*names, *image_keys]
        if is_manifest:
            virtual_names = [*names, "image"]
        elif image_keys == ["images"]:
            # The loop below replaces a list of one image by this image.
            virtual_names = [*names, "image"]
        named = find_columns(source, virtual_names, columns, _first_row(table, names))
        wanted = [name for name in (*named, SPLIT_NAME, "key", "status") if name in names]
    # Count all rows, including skipped ones: `read_shard_image` uses this number to find the row.
    for number, row in enumerate(table.rows(wanted)):
        if is_manifest:
            if row["status"] not in _DOWNLOADED:
                issues.note("not downloaded (skipped)", number, row["status"])
                continue
            row["image"] = f"{Path(source).stem}.tar#{row['key']}"
        elif named is not None and "images" in row:
            images = row.pop("images")
            if len(images) > 1:
                issues.note("caption of several images (skipped)", number, images[0])
                continue
            row["image"] = "".join(images)
        yield from row_from_mapping(row, number, named, issues)


def _check_shard(manifest: str) -> None:
    """Raise ValueError if the tar with the images of a manifest does not exist.

    Two manifests of `llava download` have no tar: the merged manifest.parquet, and those of plain image files. A remote
    manifest is not checked, because its URLs can be downloaded without the tar.
    """
    path = Path(manifest)
    if "://" in manifest or path.with_suffix(".tar").is_file():
        return
    raise ValueError(
        f"{manifest}: a manifest of the images in {path.stem}.tar, which does not exist. "
        f"Pass the folder {path.parent} if `llava download` wrote it, after `llava merge-manifests {path.parent}` if it "
        "contains no file of records. To use the manifest as a list of URLs, remove its column 'status'."
    )


def _has_records(table: ColumnarFile) -> bool:
    """Return whether the rows of a table are records or chats."""
    types = {field.name: str(field.type) for field in table.schema}
    # Questions with answers (The Cauldron): list<struct<user: string, assistant: string>>.
    has_questions = "user: " in types.get("texts", "") and "assistant: " in types["texts"]
    is_chat = types.get("messages", "").startswith(("list<", "large_list<"))
    is_preference = all(key in types for key in PAIR_KEYS)
    return has_questions or is_chat or is_preference or is_record(dict.fromkeys(types))


def _first_row(table: ColumnarFile, names: list[str]) -> object:
    """Return the first row for error messages, or the column names if the file is empty."""
    return next(table.rows(names), table.schema.names)


def read_tar(source: str, issues: ParseIssues, columns: Columns) -> Iterator[SourceRow]:
    """Yield the rows of a tar shard, from its manifest if there is one, otherwise from its members.

    Raises:
        ValueError: The tar is not a local file, is damaged, or its JSON members have no captions.
    """
    if "://" in source:
        raise ValueError(
            f"{source}: training reads the images of a tar at random positions, so the tar must be a local file. "
            "Copy it first, and pass the copy."
        )
    path = Path(source)
    manifest = path.with_suffix(".parquet")
    if manifest.is_file():
        yield from read_parquet(str(manifest), issues, columns)
        return
    # Ignore image names and URLs in the JSON: the image is always the member with the sample's key.
    columns = columns._replace(url="", image="image")
    named: NamedColumns | None = None
    # The keys of a single tar fit into memory.
    seen: set[str] = set()
    for number, (key, members) in enumerate(tar_samples(path)):
        if key in seen:
            # This occurs in concatenated tars. The key refers to the image of the first sample.
            issues.note("second sample with the same key (skipped)", number, key)
            continue
        seen.add(key)
        # For a sample that lacks both image and caption, report the missing image.
        if not any(suffix in members for suffix in IMAGE_SUFFIXES):
            issues.note("sample without an image (skipped)", number, key)
            continue
        texts = _read_texts(path, members, number, issues)
        if not texts:
            issues.note("sample without a caption (skipped)", number, key)
            continue
        row = _row_of_texts(texts, columns.caption)
        if row is None:
            issues.note(NOT_AN_OBJECT, number, key)
            continue
        row["image"] = f"{path.name}#{key}"
        member = f"{source} member {key}.{next(iter(texts))}"
        named = columns_of_row(row, named, member, columns)
        yield from row_from_mapping(row, number, named._replace(url=""), issues)


def _read_texts(
    path: Path, members: dict[str, tuple[int, int]], number: int, issues: ParseIssues
) -> dict[str, str]:
    """Return the text members of a sample by suffix, in the order of `_CAPTION_SUFFIXES`."""
    texts = {}
    for suffix in _CAPTION_SUFFIXES:
        if suffix in members:
            # Read the text at its offset. The tar is never unpacked, and images are not read at all.
            offset, size = members[suffix]
            if size > MAX_TEXT_BYTES:
                issues.note(f"text of more than {MAX_TEXT_BYTES:,} bytes (not read)", number, size)
                continue
            texts[suffix] = read_range(path, offset, size).decode("utf-8", "replace")
    return texts


def _row_of_texts(texts: dict[str, str], caption_column: str) -> dict[str, Any] | None:
    """Return the row of a sample, or None if its .json member is the only text and is not a JSON object.

    The row is the caption in the first text, with two exceptions in which a .json member takes precedence. It has the
    column that the user passed; or it has a list of captions, as in our own shards: their .txt has one caption per line,
    but captions may contain line breaks.

    Args:
        texts: The result of `_read_texts`: suffix -> text, preferred suffix first. Not empty.
        caption_column: Name of the caption column that the user passed; "" if none.
    """
    # `row` is None for a sample without a .json member, since an empty text is not JSON.
    row = parse_object(texts.get("json", ""))
    suffix, text = next(iter(texts.items()))
    if suffix == "json":
        return row
    if row is None:
        return {"caption": text}
    # `find_columns` ignores case too.
    has_column = caption_column.lower() in [name.lower() for name in row]
    if has_column or isinstance(row.get("captions"), list):
        return row
    return {"caption": text}

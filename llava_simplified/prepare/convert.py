"""Turn any source of captions into files of records, and draw random samples from such files."""

from __future__ import annotations

import hashlib
import logging
import random
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from llava_simplified.data.rows import open_rows
from llava_simplified.data.shards import IMAGE_SUFFIXES
from llava_simplified.prepare.record_writer import (
    INSTRUCTION,
    RecordWriter,
    image_file_name,
    make_record,
)
from llava_simplified.prepare.source_rows import Columns, ParseIssues, SourceRow
from llava_simplified.prepare.sources import read_source

logger = logging.getLogger(__name__)

_ABSOLUTE_PATH = re.compile(r"[/\\]|[A-Za-z]:[/\\]")  # also one of Windows


# ---- captions of one image ----


def image_identity(row: SourceRow) -> str:
    """Return what makes two rows rows of one image: its name, or its URL if the source does not name it.

    A URL beside a name may be that of a page with several images.
    """
    return row.image or row.url


def request_identity(row: SourceRow) -> str:
    """Return what makes two rows rows of one download: the URL, and the name of the image if the source has one."""
    return f"{row.url}\n{row.image}"


def group_captions(
    read: Callable[[ParseIssues], Iterator[SourceRow]],
    issues: ParseIssues,
    identity: Callable[[SourceRow], str] = image_identity,
) -> Iterator[SourceRow]:
    """Yield one row per image with all its captions, without holding the source in memory.

    The source is read twice. The first pass counts how often each image occurs (8 bytes a row). The second pass yields
    a row as soon as the last caption of its image has come:

        source      a.jpg  b.jpg  a.jpg  c.jpg        counts: a 2, b 1, c 1
        yields             b             a with two captions, then c

    Memory therefore holds only the images whose captions are apart in the source.

    Args:
        read: Returns the rows of the source; it is called once for each pass.
        issues: What the source contains; only the second pass notes it.
        identity: Returns a text that is equal for rows of one image; empty or blank for a row that is never joined.
    """
    # `hash` of a text differs between processes, but within one it is fast and fixed.
    hashes = np.fromiter((hash(identity(row)) for row in read(ParseIssues())), np.int64)
    values, counts = np.unique(hashes, return_counts=True)
    # Most images have one caption. Only the others need a place in the dictionary.
    repeated = counts > 1
    occurrences = dict(zip(values[repeated].tolist(), counts[repeated].tolist()))
    # Of 3.3 million rows these arrays take 80 MB, and the second pass does not need them.
    del hashes, values, counts

    waiting: dict[str, list[SourceRow]] = {}
    for row in read(issues):
        key = identity(row)
        # Records have their captions together already, and rows without an image must not be
        # joined.
        expected = occurrences.get(hash(key)) if key.strip() else None
        if row.record is not None or expected is None:
            yield row
            continue
        rows = waiting.setdefault(key, [])
        rows.append(row)
        if len(rows) == expected:
            yield _merge_rows(waiting.pop(key), issues)
    # Two images with the same hash: their rows were counted together, so neither seemed to be complete.
    for rows in waiting.values():
        yield _merge_rows(rows, issues)


def _merge_rows(rows: list[SourceRow], issues: ParseIssues) -> SourceRow:
    """Return the first row with the captions of all rows, each once."""
    # An image in training and in the test set would spoil the test; which of them is right cannot be known.
    for row in rows[1:]:
        if row.split != rows[0].split:
            issues.note("image in two splits (kept in the first)", row.number, row.image or row.url)
    captions: dict[str, None] = {}
    for row in rows:
        captions.update(dict.fromkeys(row.captions))
    return rows[0]._replace(captions=tuple(captions))


# ---- rows to records ----


def hash_fraction(name: str) -> float:
    """Return a number in [0, 1) that depends only on `name` and is the same on every machine."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def to_records(
    rows: Iterable[SourceRow],
    issues: ParseIssues,
    instructions: list[str],
    image_folder: Path | None,
) -> Iterator[tuple[dict[str, Any], SourceRow]]:
    """Yield the record of each row, together with the row.

    Args:
        rows: The rows of a source, grouped by image.
        issues: Rows that cannot become a record are noted here.
        instructions: Templates; a hash of the image chooses one.
        image_folder: If given, rows whose image is not in this folder are left out.
    """
    for index, row in enumerate(rows):
        image = row.image
        # `index` counts the rows of the grouped source, as the downloader does: both derive the
        # same file name.
        if not image and row.url:
            image = image_file_name(index, row.url)
        if row.record is None and not image:
            issues.note("row without an image (left out)", row.number, row.captions)
            continue
        if _ABSOLUTE_PATH.match(image):
            image = _relative_path(image, row, issues, image_folder)
        # An image inside a shard is looked up when it is read.
        if image_folder is not None and image and "#" not in image:
            found = _find_image(image, row, image_folder)
            if not found:
                issues.note(f"image not in {image_folder} (left out)", row.number, image)
                continue
            image = found
        # A record keeps everything that its source has; only the place of its image may change.
        if row.record is not None:
            yield ({**row.record, "image": image} if image else row.record), row
        elif not row.captions:
            issues.note("image without any caption (left out)", row.number, image)
        else:
            # The question mark keeps this choice independent of that of the split.
            choice = int(hash_fraction(image + "?") * len(instructions))
            yield make_record(image, instructions[choice], row.captions), row


def _relative_path(
    image: str, row: SourceRow, issues: ParseIssues, image_folder: Path | None
) -> str:
    """Return an absolute path relative to the image folder, or its base name: it is often of another machine."""
    if image_folder is not None:
        folder = image_folder.absolute()
        if Path(image).is_relative_to(folder):
            return str(Path(image).relative_to(folder))
    issues.note("absolute path, not in --image-folder (base name kept)", row.number, image)
    return re.split(r"[/\\]", image)[-1]


def _find_image(image: str, row: SourceRow, image_folder: Path) -> str:
    """Return the name of the image in the folder, or an empty text.

    The suffix of an image that was downloaded from a URL follows its bytes, so all suffixes are tried.
    """
    names = [image]
    if not row.image:
        stem = image.rpartition(".")[0]
        names = [f"{stem}.{suffix}" for suffix in IMAGE_SUFFIXES]
    for name in names:
        if (image_folder / name).is_file():
            return name
    return ""


# ---- whole files ----


def convert(
    source: str,
    output: Path,
    *,
    image_folder: Path | None = None,
    instruction: str = INSTRUCTION,
    split: str = "",
    columns: Columns = Columns(),  # noqa: B008 - immutable
) -> tuple[dict[str, int], ParseIssues]:
    """Write the records of a source.

    Args:
        source: Anything that `read_source` reads.
        output: `.json`, `.jsonl` or `.parquet`.
        image_folder: The folder of the images. Rows whose image is not in it are left out and counted.
        instruction: The user's text, or a `.txt` file of templates, one a line, chosen by a hash of the image.
        split: "val=0.01" writes this share (by a hash of the image) to `<output>_val`, and the rest to
            `<output>_train`; "source" uses the split of the source itself (Karpathy's); "" writes one file.
        columns: Names of columns that the user passed.

    Returns:
        The number of records by file name, and what was left out or repaired.

    Raises:
        ValueError: An argument is wrong, or the source has no record.
    """
    if image_folder is not None and not image_folder.is_dir():
        raise ValueError(f"--image-folder {image_folder}: no such folder")
    instructions = _read_instructions(instruction)
    shares: dict[str, float] = {}
    if split not in ("", "source"):
        shares = _parse_split(split)
    # The source is read twice, and each pass notes its issues; `group_captions` keeps those of the
    # second.
    issues = ParseIssues()
    rows = group_captions(lambda pass_issues: read_source(source, pass_issues, columns), issues)
    writers: dict[str, RecordWriter] = {}
    with ExitStack() as stack:

        def open_part(part: str) -> RecordWriter:
            if part not in writers:
                path = output.with_stem(f"{output.stem}_{part}") if part else output
                writers[part] = stack.enter_context(RecordWriter(path))
            return writers[part]

        # Open all parts at once: a share without any record must still replace the file of an earlier run.
        if shares:
            for part in ("train", *shares):
                open_part(part)
        # Nothing is collected: each record goes to the file of its part at once.
        for record, row in to_records(rows, issues, instructions, image_folder):
            part = ""
            if split == "source":
                part = _source_part(row, issues)
            elif shares:
                part = _choose_part(str(record.get("image") or row.number), shares)
            open_part(part).write(record)
        # Inside the block, so that the error discards the files.
        if not any(writer.count for writer in writers.values()):
            raise ValueError("\n".join([f"{source}: contains no usable record", *issues.lines()]))
    return {str(writer.path): writer.count for writer in writers.values()}, issues


def _read_instructions(instruction: str) -> list[str]:
    if not instruction.endswith(".txt"):
        return [instruction]
    # Only "\n" ends a line, as in sources: U+2028 may be part of a template.
    lines = Path(instruction).read_text("utf-8").split("\n")
    templates = [line.strip() for line in lines if line.strip()]
    if not templates:
        raise ValueError(f"--instruction {instruction}: the file contains no template")
    return templates


def _parse_split(text: str) -> dict[str, float]:
    """Return the shares by name of "val=0.01,test=0.01"."""
    shares: dict[str, float] = {}
    try:
        for part in text.split(","):
            name, _, share = part.partition("=")
            shares[name.strip()] = float(share)
    except ValueError:
        shares = {}
    in_range = all(0 < share < 1 for share in shares.values())
    if not shares or not in_range or sum(shares.values()) >= 1:
        raise ValueError(
            f"--split {text}: expected names with shares that sum to less than 1, for example "
            "--split val=0.01 or --split val=0.01,test=0.01; or --split source."
        )
    return shares


def _source_part(row: SourceRow, issues: ParseIssues) -> str:
    """Return the part that the source assigns to a row; "restval" is Karpathy's name for more training images."""
    if not row.split:
        issues.note("row without a split of its own (taken for training)", row.number, row.image)
        return "train"
    return "train" if row.split == "restval" else row.split


def _choose_part(name: str, shares: dict[str, float]) -> str:
    """Return the part of an image: the interval of [0, 1) that the hash of its name falls into."""
    # [0, val) is val, [val, val + test) is test, the rest is train. An image keeps its part when
    # the source grows, because nothing but its name decides.
    position = hash_fraction(name)
    for part, share in shares.items():
        if position < share:
            return part
        position -= share
    return "train"


def reduce(source: Path, output: Path, count: int, seed: int) -> int:
    """Write a random sample of `count` records in their original order.

    Returns:
        The number of records that were written: all of them if the source has fewer. Rows that are not JSON are left
        out.

    Raises:
        ValueError: `count` is below 1, or the source is not a file of records, or has none.
    """
    rows = open_rows(source)
    if count < 1:
        raise ValueError(f"--count {count}: must be at least 1")
    if not len(rows):
        raise ValueError(f"{source}: contains no record")
    # `sample` needs no list of all rows, and the sorted numbers keep the order and read the file
    # forwards.
    chosen = sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows))))
    first_error = ""
    with RecordWriter(output) as writer:
        for index in chosen:
            try:
                row = rows[index]
            except ValueError as error:
                logger.warning("%s (left out)", error)
                first_error = first_error or str(error)
                continue
            writer.write(row)
        # Inside the block, so that the error discards the file.
        if not writer.count:
            raise ValueError(f"{source}: no chosen row is a record. {first_error}")
    return writer.count

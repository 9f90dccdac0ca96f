"""Convert caption sources to files of records, and draw random samples from such files."""

from __future__ import annotations

import hashlib
import io
import logging
import posixpath
import random
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from llava_simplified.data.image_folder import (
    NameMatches,
    OutsideFolderError,
    is_existing_path,
    locate_file,
)
from llava_simplified.data.names import AmbiguousNameError, windows_problem
from llava_simplified.data.records import image_names
from llava_simplified.data.rows import open_rows
from llava_simplified.data.shards import IMAGE_SUFFIXES
from llava_simplified.foreign_files import read_small_file
from llava_simplified.prepare.record_writer import (
    INSTRUCTION,
    RecordWriter,
    image_file_name,
    make_record,
)
from llava_simplified.prepare.source_files import decode_text
from llava_simplified.prepare.source_rows import SPLIT_NAME, Columns, ParseIssues, SourceRow
from llava_simplified.prepare.sources import is_read_with_others, read_source

logger = logging.getLogger(__name__)

_ABSOLUTE_PATH = re.compile(r"[/\\]|[A-Za-z]:[/\\]")  # on any system: /a.jpg, \a.jpg, C:\a.jpg


# ---- captions of one image ----


def image_identity(row: SourceRow) -> str:
    """Return the key by which rows of one image are grouped: its name, or its URL if it has no name.

    The name comes first, because the URL may lead to a web page with several images.
    """
    name = row.image or row.url
    # Normalize the path, so that "a.jpg" and "./a.jpg" are one image. The test before it is cheap, and false for
    # almost every name.
    if "./" in row.image or "//" in row.image:
        name = posixpath.normpath(name)
    return name


def request_identity(row: SourceRow) -> str:
    """Return the key by which rows of one download are grouped: the URL and the name of the image, if any."""
    return f"{row.url}\n{row.image}"


def group_captions(
    read: Callable[[ParseIssues], Iterator[SourceRow]],
    issues: ParseIssues,
    identity: Callable[[SourceRow], str] = image_identity,
) -> Iterator[SourceRow]:
    """Yield one row per image with all its captions, without holding the source in memory.

    The source is read twice. The first pass counts how often each image occurs (8 bytes per row). The second pass yields
    a row as soon as the last caption of its image has been read:

        source      a.jpg  b.jpg  a.jpg  c.jpg        counts: a 2, b 1, c 1
        yields             b             a with two captions, then c

    Memory therefore contains only the rows of images that occur both before and after the current row.

    Args:
        read: Returns the rows of the source; it is called once for each pass.
        issues: Collects the issues of the source, in the second pass only.
        identity: Returns a text that is equal for rows of one image; empty or blank for a row that is never joined.
    """
    # Use Python's `hash`, which is fast. It differs between processes, but is constant within this one.
    hashes = np.fromiter((hash(identity(row)) for row in read(ParseIssues())), np.int64)
    values, counts = np.unique(hashes, return_counts=True)
    # Keep only the images with several captions in the dictionary; most have one.
    repeated = counts > 1
    occurrences = dict(zip(values[repeated].tolist(), counts[repeated].tolist()))
    # Free these arrays before the second pass: for 3.3 million rows they take 80 MB.
    del hashes, values, counts

    waiting: dict[str, list[SourceRow]] = {}
    for row in read(issues):
        key = identity(row)
        # Do not group records, because they contain all captions of their image, nor rows without an image.
        expected = occurrences.get(hash(key)) if key.strip() else None
        if row.record is not None or expected is None:
            yield row
            continue
        rows = waiting.setdefault(key, [])
        rows.append(row)
        if len(rows) == expected:
            yield _merge_rows(waiting.pop(key), issues)
    # Images whose keys have the same hash were counted together, so none of them reached the expected number.
    for rows in waiting.values():
        yield _merge_rows(rows, issues)


def _merge_rows(rows: list[SourceRow], issues: ParseIssues) -> SourceRow:
    """Return the first row, with the captions of all rows without repetitions."""
    # An image must not be in both the training set and the test set. Keep it in the split that is named first.
    first, *others = rows
    for row in others:
        if row.split != first.split:
            issues.note("image in two splits (kept in the first)", row.number, row.image or row.url)
    captions: dict[str, None] = {}
    for row in rows:
        captions.update(dict.fromkeys(row.captions))
    empty_notes = sum(row.empty_notes for row in rows)
    return first._replace(captions=tuple(captions), empty_notes=empty_notes)


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
    keep_paths: bool = False,
    replace_instructions: bool = False,
) -> Iterator[tuple[dict[str, Any], SourceRow]]:
    """Yield the record of each row, together with the row.

    Args:
        rows: The rows of a source, grouped by image.
        issues: Collects the rows that cannot become a record.
        instructions: Instruction templates, one of which is selected by a hash of the image name.
        image_folder: If given, rows whose image is not in this folder are skipped.
        keep_paths: Keep absolute paths that do not exist. They are resolved when the images are read.
        replace_instructions: Also replace the instructions of rows that are records already.
    """
    names = _ImageNames(issues, image_folder, keep_paths)
    for index, row in enumerate(rows):
        if row.record is not None:
            record = _record_of_row(row, names)
            if record is None:
                continue
            if replace_instructions:
                record = _replace_instruction(record, row, instructions, issues)
            yield record, row
            continue
        image = row.image
        # Use the index of the grouped rows, as `llava download` does, so that both derive the same file name.
        if not image and row.url:
            image = image_file_name(index, row.url)
        if not image:
            issues.note("row without an image (skipped)", row.number, row.captions)
            continue
        image = names.resolve(image, row)
        if not image:
            continue
        if not row.captions:
            issues.note_without_caption("image without any caption (skipped)", row, image)
        else:
            instruction = _choose_instruction(image, instructions)
            yield make_record(image, instruction, row.captions), row


def _replace_instruction(
    record: dict[str, Any], row: SourceRow, instructions: list[str], issues: ParseIssues
) -> dict[str, Any]:
    """Return a record with one of the instructions. A conversation is kept, because its turns belong together."""
    if "conversations" in record or "instruction" not in record:
        issues.note("conversation (kept without the --instruction)", row.number, record)
        return record
    first_image = next(iter(image_names(record)), "")
    return {**record, "instruction": _choose_instruction(first_image, instructions)}


def _choose_instruction(image: str, instructions: list[str]) -> str:
    """Return the instruction of an image, selected by a hash of its name."""
    # `hash_fraction(image)` selects the split. Append a character to get an independent number. Otherwise the
    # instruction would depend on the split.
    return instructions[int(hash_fraction(image + "?") * len(instructions))]


def _record_of_row(row: SourceRow, names: _ImageNames) -> dict[str, Any] | None:
    """Return the record of a row with its images' names in the image folder; None if an image is missing.

    Everything else in the record is kept.
    """
    assert row.record is not None
    record = row.record
    images = image_names(record)
    found = [names.resolve(image, row) for image in images]
    if not all(found):
        return None
    if tuple(found) == images:
        return record
    key = "images" if record.get("images") else "image"
    is_list = isinstance(record[key], list)
    changed = {name: value for name, value in record.items() if name not in ("image", "images")}
    return {key: found if is_list else found[0], **changed}


class _ImageNames:
    """Converts the names of images in a source to the names in the records, and counts the changes.

    Args:
        issues: Collects images that are not found, and names that are changed.
        image_folder: The image folder, or None.
        keep_paths: Keep absolute paths.
    """

    def __init__(self, issues: ParseIssues, image_folder: Path | None, keep_paths: bool) -> None:
        self._issues = issues
        self._image_folder = image_folder
        self._keep_paths = keep_paths
        self._absolute_paths: dict[str, int] = {}
        self._matches = NameMatches()

    def resolve(self, image: str, row: SourceRow) -> str:
        """Return the name of an image in the records; "" (counted as an issue) if it is not in the image folder."""
        # Do not look up images inside shards ("shard.tar#key") here: their shard is searched when they are read.
        if self._image_folder is not None and "#" not in image:
            return _find_image(image, row, self._image_folder, self._matches, self._issues)
        if _ABSOLUTE_PATH.match(image) and not self._keep_paths:
            # Keep the path of an existing file: a different file in the image folder may have the same base name.
            if is_existing_path(image):
                self._issues.note("absolute path of a file that exists (kept)", row.number, image)
                return image
            return _base_name(image, row, self._issues, self._absolute_paths)
        return image


def _base_name(
    image: str, row: SourceRow, issues: ParseIssues, absolute_paths: dict[str, int]
) -> str:
    """Return the base name of an absolute path that does not exist, because it probably comes from another machine.

    A second path with the same base name is a different image, so it is kept unchanged. When its image is read, the
    longest trailing part of the path that exists in the image folder is used.

    Args:
        image: The path.
        row: The row of the image.
        issues: Collects the changes.
        absolute_paths: Base name -> hash of the first path with this name. The function adds the path.
    """
    *_, name = re.split(r"[/\\]", image)
    if absolute_paths.setdefault(name, hash(image)) != hash(image):
        issues.note("absolute path whose base name another path has too (kept)", row.number, image)
        return image
    issues.note("absolute path (only the base name kept)", row.number, image)
    return name


def _find_image(
    image: str,
    row: SourceRow,
    image_folder: Path,
    matches: NameMatches,
    issues: ParseIssues,
) -> str:
    """Return the name of the image in the folder; "" if it is not there. Problems are noted in `issues`.

    The suffix of a downloaded image depends on its bytes, so all suffixes are tried.
    """
    if row.url and not row.image:
        stem, _, _ = image.rpartition(".")
        for suffix in IMAGE_SUFFIXES:
            if (image_folder / f"{stem}.{suffix}").is_file():
                return f"{stem}.{suffix}"
    try:
        # The name may be a path from another machine, possibly with backslashes.
        located = locate_file(image.replace("\\", "/"), image_folder)
        if located is not None:
            matches.add(image, located)
    except AmbiguousNameError as error:
        issues.note("image name that fits several files (skipped)", row.number, error)
        return ""
    except OutsideFolderError:
        issues.note(f"image outside {image_folder} (skipped)", row.number, image)
        return ""
    # For example, the name is too long, or contains a null character.
    except (OSError, ValueError):
        located = None
    if located is None:
        issues.note(f"image not in {image_folder} (skipped)", row.number, image)
        return ""
    if located.rule != "exact":
        issues.note(f"image name matched by {located.rule} (kept)", row.number, image)
    folder = image_folder
    if located.path.is_absolute():
        folder = image_folder.absolute()
    # Write slashes on every system, so that records can be moved to another one.
    return located.path.relative_to(folder).as_posix()


# ---- whole files ----


def convert(
    source: str,
    output: Path,
    *,
    image_folder: Path | None = None,
    instruction: str | None = None,
    split: str = "",
    columns: Columns = Columns(),  # noqa: B008 - immutable
    sidecar: str = "",
    keep_paths: bool = False,
) -> tuple[dict[str, int], ParseIssues]:
    """Write the records of a source.

    Args:
        source: Any source that `read_source` supports.
        output: Output file: `.json`, `.jsonl` or `.parquet`.
        image_folder: The image folder. Rows whose image is not in it are skipped and counted.
        instruction: Instruction of all records, or a `.txt` file with one instruction template per line. It replaces the
            instructions of rows that are records already, except conversations. With None, these instructions are kept,
            and all other records get `INSTRUCTION`.
        split: "val=0.01" writes this fraction (by a hash of the image name) to `<output>_val`, and the rest to
            `<output>_train`; "source" uses the split of the source itself (a column or key "split"); "" writes one file.
        columns: Column names that the user passed.
        sidecar: Which sidecars of a folder are read, and how; see `SidecarOptions.parse`.
        keep_paths: Keep absolute paths of images, also of those that do not exist, instead of their base names.

    Returns:
        The number of records by file name, and the issues of the source (skipped and repaired rows).

    Raises:
        ValueError: An argument is wrong, the source contains no usable record, or no row has a split that `split`
            requires.
    """
    if image_folder is not None and not image_folder.is_dir():
        raise ValueError(
            f"--image-folder {image_folder}: no such folder. Pass the folder that contains the images."
        )
    # `group_captions` reads the source twice, but collects issues only in the second pass.
    issues = ParseIssues()
    instructions = _read_instructions(INSTRUCTION if instruction is None else instruction, issues)
    shares: dict[str, float] = {}
    if split not in ("", "source"):
        shares = _parse_split(split)
    rows = group_captions(
        lambda pass_issues: read_source(source, pass_issues, columns, sidecar), issues
    )
    writers: dict[str, RecordWriter] = {}
    has_source_split = False
    with ExitStack() as stack:

        def open_part(part: str) -> RecordWriter:
            if part not in writers:
                path = output.with_stem(f"{output.stem}_{part}") if part else output
                _check_not_in_source(path, source, sidecar)
                writers[part] = stack.enter_context(RecordWriter(path))
            return writers[part]

        # Open all parts now: a part without any record must still replace the file of an earlier run.
        if shares:
            for part in ("train", *shares):
                open_part(part)
        records = to_records(
            rows,
            issues,
            instructions,
            image_folder,
            keep_paths,
            replace_instructions=instruction is not None,
        )
        for record, row in records:
            part = ""
            if split == "source":
                has_source_split = has_source_split or bool(row.split)
                part = _source_part(row, issues)
            elif shares:
                first_image = next(iter(image_names(record)), "")
                part = _choose_part(first_image or str(row.number), shares)
            open_part(part).write(record)
        # Raise inside the `with` block, so that the unfinished files are discarded.
        if not any(writer.count for writer in writers.values()):
            raise ValueError("\n".join([f"{source}: contains no usable record", *issues.lines()]))
        if split == "source" and not has_source_split:
            raise ValueError(
                f"--split source: no row of {source} has a split, which is read from the column or key {SPLIT_NAME!r}. "
                "Pass --split val=0.01, for example, to choose the split by a hash of the image name."
            )
    return {str(writer.path): writer.count for writer in writers.values()}, issues


def _check_not_in_source(output: Path, source: str, sidecar: str) -> None:
    """Raise ValueError if a source of several files contains the output of an earlier run.

    Its records would be written again beside those of the other files, or instead of them.
    """
    if output.is_file() and is_read_with_others(output, source, sidecar):
        raise ValueError(
            f"--output {output}: this file exists, and would be read as a part of the source {source}. Delete it if an "
            "earlier run wrote it, or choose an output elsewhere."
        )


def _read_instructions(instruction: str, issues: ParseIssues) -> list[str]:
    """Return the instruction itself, or the lines of a .txt file of instructions in any encoding."""
    if not instruction.endswith(".txt"):
        return [instruction]
    path = Path(instruction)
    try:
        data = read_small_file(path)
    except FileNotFoundError:
        raise ValueError(
            f"--instruction {instruction}: no such file. A text that ends with .txt is the name of a file."
        ) from None
    # Only "\n" ends a line, as in sources: U+2028 may be part of a template.
    lines = decode_text(io.BytesIO(data), path, issues, 1).split("\n")
    templates = [line.strip() for line in lines if line.strip()]
    if not templates:
        raise ValueError(f"--instruction {instruction}: the file contains no template")
    return templates


def _parse_split(text: str) -> dict[str, float]:
    """Parse "val=0.01,test=0.01" to {"val": 0.01, "test": 0.01}."""
    shares: dict[str, float] = {}
    parts = [part.partition("=") for part in text.split(",")]
    names = [name.strip() for name, _, _ in parts]
    # Text that is not a number leaves `shares` empty, which is an error below.
    with suppress(ValueError):
        shares = {name: float(share) for name, (_, _, share) in zip(names, parts)}
    in_range = all(0 < share < 1 for share in shares.values())
    if not shares or not in_range or sum(shares.values()) >= 1:
        raise ValueError(
            f"--split {text}: expected names with fractions whose sum is less than 1, for example "
            "--split val=0.01 or --split val=0.01,test=0.01; or --split source."
        )
    # Each name becomes a part of a file name. The rest of the images is the part "train".
    wrong = [name for name in names if not _can_name_part(name) or name == "train"]
    if wrong or len(shares) < len(names):
        raise ValueError(
            f"--split {text}: the names must be different, and suitable for file names. The name train stands for the "
            "rest of the images: pass the other parts only, for example --split val=0.01."
        )
    return shares


def _can_name_part(name: str) -> bool:
    """Return whether the name of a split can be a part of a file name, on any system."""
    return re.search(r"\w", name) is not None and not windows_problem(f"_{name}.json")


def _source_part(row: SourceRow, issues: ParseIssues) -> str:
    """Return the part that the source assigns to a row; "restval" is Karpathy's name for additional training images."""
    if not row.split:
        issues.note("row without a split (assigned to train)", row.number, row.image)
        return "train"
    if not _can_name_part(row.split):
        raise ValueError(
            f"--split source: the split {row.split!r:.100} of row {row.number} cannot be a part of a file name. Correct the "
            "source, or pass --split val=0.01, for example, to choose the split by a hash of the image name."
        )
    return "train" if row.split == "restval" else row.split


def _choose_part(name: str, shares: dict[str, float]) -> str:
    """Return the part of an image: the interval of [0, 1) that contains the hash of its name."""
    # [0, val) is val, [val, val + test) is test, the rest is train. The part depends only on the name,
    # so an image keeps its part when the source grows.
    position = hash_fraction(name)
    for part, share in shares.items():
        if position < share:
            return part
        position -= share
    return "train"


def reduce(source: Path, output: Path, count: int, seed: int) -> int:
    """Write a random sample of `count` records in their original order.

    Returns:
        The number of records that were written. It is less than `count` if the source has fewer records, or if sampled
        rows are not JSON and were skipped.

    Raises:
        ValueError: `count` is below 1, the source is not a file of records, or none of the sampled rows is JSON.
    """
    rows = open_rows(source)
    if count < 1:
        raise ValueError(f"--count {count}: must be at least 1")
    if not len(rows):
        raise ValueError(f"{source}: contains no record")
    # Sort the indices, to keep the order of the records and to read the file from start to end.
    chosen = sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows))))
    first_error = ""
    with RecordWriter(output) as writer:
        for index in chosen:
            try:
                row = rows[index]
            except ValueError as error:
                logger.warning("%s (skipped)", error)
                first_error = first_error or str(error)
                continue
            writer.write(row)
        # Raise inside the `with` block, so that the unfinished file is discarded.
        if not writer.count:
            raise ValueError(f"{source}: none of the sampled rows is a valid record. {first_error}")
    return writer.count

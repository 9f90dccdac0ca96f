"""Split a file of records into usable records and a quarantine file, with a reason for each rejected record.

Each image is checked with the same decoder and transform as in training, so that both agree. A rejected record is
written to the quarantine file with its reason; nothing is deleted.

    records -> chunks of 500 -> workers: validate_chunk() -> <output>.work/<settings>/000012.parquet
                                                          \\-> one more pass: comparison of the records with each
                                                              other, output, quarantine, report

The results of a chunk are published with a rename, and stay in the work folder until the end. A run that was killed
therefore continues with the missing chunks. The name of the work folder depends on all settings, so results of different
settings are never mixed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llava_simplified.data.image_folder import NameMatches, locate_file
from llava_simplified.data.images import (
    MAX_PIXELS,
    ImageError,
    check_image,
    count_frames,
    decode_image,
    read_image_bytes,
)
from llava_simplified.data.names import AmbiguousNameError
from llava_simplified.data.records import Record, pair_problem
from llava_simplified.data.rows import RowFile, find_records, open_rows
from llava_simplified.data.transforms import ImageTransform
from llava_simplified.html_report import make_thumbnail
from llava_simplified.jobs import (
    SURROGATES_AS_ESCAPES,
    atomic_file,
    exclusive_lock,
    remove_temporary_files,
)
from llava_simplified.options import check_at_least
from llava_simplified.prepare.clean_rules import Rules
from llava_simplified.prepare.compact import compact_images, write_compacted_records
from llava_simplified.prepare.duplicates import (
    DIGEST_BYTES,
    PERCEPTUAL_BYTES,
    find_duplicates,
    perceptual_hash,
)
from llava_simplified.prepare.preparation_report import Example, write_preparation_report
from llava_simplified.prepare.record_tasks import cached_rows, run_record_tasks
from llava_simplified.prepare.record_writer import RecordWriter, check_output
from llava_simplified.workers import parse_slice

logger = logging.getLogger(__name__)

# Reasons to reject a record whose images are usable.
_TEXT_REASONS = ("empty_caption", "long_caption", "no_caption", "unusable_pair")
# Keys of a row for its captions; see `data.records`.
_CAPTION_KEYS = ("response", "responses", "gt_caption", "pred_output")
# If the file of an image has a different name than the image in the record, the details of the record contain this text,
# followed by the rule that matched the two names.
_MATCHED_BY = "image name matched by "
# Records per file of results: few enough that a killed run repeats little work, and enough to keep the
# number of files low (6,600 for CC3M).
CHUNK_RECORDS = 500
_EXAMPLES_PER_REASON = 12  # maximum number of examples in the report for each reason
_SHOWN_CAPTION = 200  # maximum length of a caption in the report, in characters
# The columns of a chunk's results. Keep the names of version 0.1.0, so that its unfinished runs can be continued.
_RESULT_SCHEMA = pa.schema(
    {
        "reason": pa.string(),
        "detail": pa.string(),
        "bad": pa.list_(pa.int16()),  # indices of the unusable responses
        "digest": pa.binary(DIGEST_BYTES),
        "look": pa.binary(PERCEPTUAL_BYTES),  # the perceptual hash
    }
)


# ---- one record ----


class ValidationResult(NamedTuple):
    """The result of checking whether training can use a record.

    Attributes:
        reason: Reason why the record is unusable; empty for a usable record.
        detail: Details of the reason. For a usable record: the reasons why some of its responses are unusable, and the
            rule by which its image was found.
        unusable_responses: Indices of the unusable responses of a usable record.
        digest: First 16 bytes of the SHA-256 digest of the image files; None for a rejected record, or without images.
        perceptual_hash: 19 bytes; see `_check_images`. None in the same cases as `digest`.
    """

    reason: str = ""
    detail: str = ""
    unusable_responses: tuple[int, ...] = ()
    digest: bytes | None = None
    perceptual_hash: bytes | None = None


def validate_record(
    row: dict[str, Any],
    where: str,
    folder: Path,
    transform: ImageTransform | None,
    rules: Rules,
) -> ValidationResult:
    """Check whether training can use a record, without regard to the other records.

    Args:
        row: The record as JSON.
        where: The file and row, for messages.
        folder: The image folder.
        transform: The transform of the vision tower; if None, check only that the images can be decoded.
        rules: Requirements on images and captions.
    """
    matches = NameMatches()
    try:
        record = Record.from_json(row, where)
        # Catch ImageError first, because it is a ValueError.
        digest, image_hash = _check_images(record, folder, transform, rules, matches)
    except ImageError as error:
        return ValidationResult(error.kind, str(error))
    except ValueError as error:
        return ValidationResult("not_a_record", str(error))
    captions = record.responses
    if record.rejected is not None:
        problem = pair_problem(record)
        if problem:
            return ValidationResult("unusable_pair", problem)
        captions = (*captions, record.rejected)
    problems = _check_captions(captions, rules)
    # A preference pair is unusable if one of its two answers is.
    if record.rejected is not None and problems:
        return ValidationResult(next(iter(problems.values())), repr(captions)[:_SHOWN_CAPTION])
    # No response is usable, or the record has no response at all.
    if len(problems) == len(record.responses):
        reason = problems.get(0, "no_caption")
        shown = repr(record.responses) if record.responses else "no response"
        return ValidationResult(reason, shown[:_SHOWN_CAPTION])
    notes = {f"{_MATCHED_BY}{rule}" for rule in matches.rules if rule != "exact"}
    detail = ", ".join(sorted({*problems.values(), *notes}))
    return ValidationResult(
        detail=detail,
        unusable_responses=tuple(problems),
        digest=digest,
        perceptual_hash=image_hash,
    )


def _check_images(
    record: Record,
    folder: Path,
    transform: ImageTransform | None,
    rules: Rules,
    matches: NameMatches,
) -> tuple[bytes | None, bytes | None]:
    """Check all images of a record.

    Returns:
        The digest and the perceptual hash of the images. For several images, whose similarity is not defined, and if
        `rules.perceptual` is not set, the second value is the beginning of the SHA-256 digest too.

    Raises:
        ImageError: An image cannot be used.
    """
    if not record.images:
        return None, None
    hasher = hashlib.sha256()
    data = b""
    for name in record.images:
        data = read_image_bytes(name, folder, matches)
        _check_image(data, transform, rules)
        # Compute one digest over all images, in order: records with the same images in a different order differ.
        hasher.update(data)
    digest = hasher.digest()
    image_hash = digest
    if rules.perceptual and len(record.images) == 1:
        image_hash = perceptual_hash(decode_image(data))
    return digest[:DIGEST_BYTES], image_hash[:PERCEPTUAL_BYTES]


def _check_image(data: bytes, transform: ImageTransform | None, rules: Rules) -> None:
    """Check one image file.

    Raises:
        ImageError: The image cannot be decoded, or violates a rule.
    """
    _, suffix, width, height = check_image(data, rules.max_pixels)
    if min(height, width) < rules.min_side:
        raise ImageError("too_small", f"{width}x{height} pixels, --min-side is {rules.min_side}")
    if max(height, width) > rules.max_aspect * min(height, width):
        raise ImageError("aspect", f"{width}x{height} pixels, --max-aspect is {rules.max_aspect:g}")
    # Only the resize of the transform can fail, and only because of the image's size. Check the size instead of
    # transforming the pixels, so that the image is decoded only once, by `check_image`.
    if transform is not None:
        transform.resized_size(height, width)
    # Skip JPEGs (most images), which cannot be animated, so that they are not opened a second time.
    if suffix != "jpg":
        frames = count_frames(data, rules.max_pixels)
        if frames > 1:
            raise ImageError("animated", f"{frames} frames")


def _check_captions(captions: tuple[str, ...], rules: Rules) -> dict[int, str]:
    """Return the unusable captions: index -> reason."""
    problems = {}
    for index, caption in enumerate(captions):
        if not caption.strip():
            problems[index] = "empty_caption"
        elif len(caption) > rules.max_caption:
            problems[index] = "long_caption"
    return problems


# ---- a chunk of records ----


@dataclass(frozen=True)
class Chunk:
    """A task of a worker: validate the records from `start` to `stop` (exclusive).

    Attributes:
        records: The file of records.
        start: Index of the first record.
        stop: Index after the last record.
        folder: The image folder.
        transform: The transform of the vision tower, or None.
        rules: Requirements on images and captions.
        path: Output file of the results.
    """

    records: str
    start: int
    stop: int
    folder: str
    transform: ImageTransform | None
    rules: Rules
    path: str


def validate_chunk(chunk: Chunk) -> dict[str, int]:
    """Write the results of a chunk unless they exist, and return the number of records by reason; "" means usable."""
    path = Path(chunk.path)
    # An existing file is complete, because it was published with a rename.
    if not path.exists():
        rows = cached_rows(chunk.records)
        results = [_validate_row(rows, index, chunk) for index in range(chunk.start, chunk.stop)]
        # The column names of the schema are in the order of the result's attributes.
        values = [dict(zip(_RESULT_SCHEMA.names, result)) for result in results]
        with atomic_file(path) as part:
            pq.write_table(pa.Table.from_pylist(values, _RESULT_SCHEMA), part)
    # Read the file back, so that new and earlier results are counted in the same way.
    return Counter(pq.read_table(path, columns=["reason"])["reason"].to_pylist())


def _validate_row(rows: RowFile, index: int, chunk: Chunk) -> ValidationResult:
    """Read and check one record. A row that is not JSON is rejected with the reason "not_a_record"."""
    try:
        row = rows[index]
    except ValueError as error:
        return ValidationResult("not_a_record", str(error))
    where = rows.where(index)
    folder = Path(chunk.folder)
    return validate_record(row, where, folder, chunk.transform, chunk.rules)


def _read_results(
    chunks: list[Chunk], rows: RowFile, folder: Path, duplicates: dict[int, int]
) -> Iterator[ValidationResult]:
    """Yield the result of every record in order, after it has been compared with the other records."""
    comparison = _Comparison(rows, folder, duplicates)
    # If a name leads to a file that another record names exactly, it means another image, in whichever order they come.
    # Usually all names are exact, and then no result is parsed for this.
    if any(map(_mentions_match, chunks)):
        for index, result in _stored_results(chunks):
            if not result.reason and not _has_match(result):
                comparison.note_exact_names(index)
    for index, result in _stored_results(chunks):
        yield comparison.check(index, result)


def _stored_results(chunks: list[Chunk]) -> Iterator[tuple[int, ValidationResult]]:
    """Yield the index and the result of every record, as the workers wrote them."""
    for chunk in chunks:
        values = pq.read_table(chunk.path).to_pylist()
        for index, value in enumerate(values, chunk.start):
            yield index, ValidationResult(*(value[name] for name in _RESULT_SCHEMA.names))


def _mentions_match(chunk: Chunk) -> bool:
    """Return whether the results of a chunk mention an image that was not found by its exact name."""
    details = pq.read_table(chunk.path, columns=["detail"])["detail"]
    return bool(pc.any(pc.match_substring(details, _MATCHED_BY)).as_py())


def _has_match(result: ValidationResult) -> bool:
    """Return whether a usable record has an image that was not found by its exact name."""
    return not result.reason and _MATCHED_BY in result.detail


# ---- comparison of the records with each other ----


class _Comparison:
    """Rejects records because of earlier ones: duplicates, and other names of a file that an earlier record names.

    The workers cannot do this, because each of them has only the records of its own chunk.

    Records whose images are equal or similar are a group. The first kept record of a group selects the image. Of the others,
    those that name the same image are kept if their text is new:

        a.jpg     "A"     kept
        copy.jpg  "B"     duplicate of row 0: another file
        a.jpg     "B"     kept: the same file with a new text
        a.jpg     "B"     duplicate of row 2

    Args:
        rows: All records.
        folder: The image folder.
        duplicates: Row of each equal or similar image -> row of an earlier one; see `find_duplicates`.
    """

    def __init__(self, rows: RowFile, folder: Path, duplicates: dict[int, int]) -> None:
        self._rows = rows
        self._folder = folder
        self._names = NameMatches()
        # Row -> first row of its group. Begin with the earliest rows, because the earlier row of a similar image may
        # itself be similar to one before it.
        self._group_of: dict[int, int] = {}
        for index in sorted(duplicates):
            original = duplicates[index]
            self._group_of[index] = self._group_of.setdefault(original, original)
        # First row of a group -> its first kept row, with the names of the images.
        self._first_kept: dict[int, tuple[int, tuple[str, ...]]] = {}
        # Digest of the content of a kept record -> its row. Memory contains no records, since there may be millions.
        self._contents: dict[bytes, int] = {}

    def note_exact_names(self, index: int) -> None:
        """Note the files of a record whose images were found by their exact names. Call this before `check`."""
        self._note_names(self._record(index))

    def check(self, index: int, result: ValidationResult) -> ValidationResult:
        """Return the result of a record, rejected if it conflicts with an earlier one. Call this in order of the rows."""
        problem = ""
        # Also note the names of a record that is rejected because of its text: the file may be its image, and then another
        # name means another image.
        if _has_match(result) or result.reason in _TEXT_REASONS:
            problem = self._note_names(self._record(index))
        if result.reason:
            return result
        if problem:
            return ValidationResult("ambiguous", problem)
        original = self._find_original(index, result)
        if original is not None:
            detail = f"of {self._rows.where(original)}"
            return result._replace(reason="duplicate", detail=detail)
        return result

    def _record(self, index: int) -> Record:
        return Record.from_json(self._rows[index], self._rows.where(index))

    def _note_names(self, record: Record) -> str:
        """Note which files the images' names lead to. Return the problem if another name leads to one of these files."""
        try:
            for name in record.images:
                located = locate_file(name, self._folder)
                if located is not None:
                    self._names.add(name, located)
        except AmbiguousNameError as error:
            return str(error)
        return ""

    def _find_original(self, index: int, result: ValidationResult) -> int | None:
        """Return the kept row that a usable record duplicates; None if the record is to be kept."""
        group = self._group_of.get(index)
        if group is None:
            return None
        record = self._record(index)
        first, images = self._first_kept.setdefault(group, (index, record.images))
        if record.images != images:
            return first
        digest = _content_digest(record, result.unusable_responses)
        original = self._contents.setdefault(digest, index)
        return None if original == index else original


def _content_digest(record: Record, unusable_responses: Collection[int]) -> bytes:
    """Return a digest of everything that training uses of a record."""
    usable = [text for n, text in enumerate(record.responses) if n not in unusable_responses]
    content = replace(record, id="", responses=tuple(usable))
    return hashlib.sha256(repr(content).encode()).digest()[:DIGEST_BYTES]


def _read_hashes(chunks: list[Chunk], perceptual: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the digests or perceptual hashes of all records that have one.

    Returns:
        (n,) int64 row numbers, and (n, bytes) uint8 hashes.
    """
    # In the stored files, the column of perceptual hashes is called "look".
    column = "look" if perceptual else "digest"
    width = PERCEPTUAL_BYTES if perceptual else DIGEST_BYTES
    # Start with empty arrays, because `np.concatenate` needs at least one.
    numbers = [np.zeros(0, np.int64)]
    hashes = [np.zeros((0, width), np.uint8)]
    for chunk in chunks:
        # Skip rejected records, which have no hash and are not compared.
        values = pq.read_table(chunk.path)[column].to_pylist()
        present = [index for index, value in enumerate(values) if value is not None]
        numbers.append(np.array(present, np.int64) + chunk.start)
        joined = b"".join(values[index] for index in present)
        hashes.append(np.frombuffer(joined, np.uint8).reshape(len(present), width))
    return np.concatenate(numbers), np.concatenate(hashes)


# ---- a file of records ----


def clean(
    source: Path,
    output: Path,
    *,
    image_folder: Path | None = None,
    vision_tower: str = "",
    image_aspect_ratio: str = "crop",
    rules: Rules = Rules(),  # noqa: B008 - immutable
    dedupe: str = "",
    compact: Path | None = None,
    compact_size: int = 224,
    engine: str = "local",
    workers: int = 0,
    shards: str = "",
    progress: bool = False,
) -> dict[str, int]:
    """Write the usable records of a file, in their order.

    In the same folder, `<output>_quarantine.jsonl` contains the rejected records with reason and detail, and
    `<output>_report.html` and `.json` contain the numbers and examples.

    Args:
        source: A file of records, or the folder of a download.
        output: Output file: `.json`, `.jsonl` or `.parquet`.
        image_folder: The image folder; by default the folder of `source`.
        vision_tower: A model whose transform every image must pass; empty for none.
        image_aspect_ratio: "crop" or "pad", as in training, for this transform.
        rules: Requirements on images and captions.
        dedupe: "exact" (equal files), "perceptual" (similar images), or "" to keep duplicates. A new text about the same
            image file is not a duplicate.
        compact: Output folder for shards with the images of the usable records; `output` then refers to them.
        compact_size: Shorter side of the images in `compact`, in pixels; 0 copies the image files unchanged.
        engine: Run the tasks in local processes or on Ray, see `run_tasks`.
        workers: Number of chunks to validate in parallel, see `run_tasks`.
        shards: "i/n" validates only this slice of the chunks. A last call without it writes the outputs.
        progress: Show a progress line.

    Returns:
        The number of records by reason. The key of usable records is "ok"; if `shards` is given, it is "".

    Raises:
        ValueError: An argument is wrong, or another process is writing to the output.
    """
    # Check all arguments before the first image is opened.
    _check_rules(rules)
    check_output(output)
    if compact is not None and (compact.is_file() or compact == output):
        raise ValueError(f"--compact {compact}: expected a folder for the shards, found a file")
    rows = open_rows(source)
    folder = image_folder or find_records(source).parent
    if not folder.is_dir():
        raise ValueError(
            f"--image-folder {folder}: no such folder. Pass the folder that contains the images."
        )
    transform = None
    if vision_tower:
        transform = ImageTransform.from_pretrained(vision_tower, image_aspect_ratio)
    # Put the lock next to the output: the work folder is deleted while the lock is held.
    lock_name = f".{output.name}.lock"
    if shards:
        lock_name = f".{output.name}-{shards.replace('/', '-of-')}.lock"
    with exclusive_lock(output.with_name(lock_name), output):
        work = _work_folder(rows, output, folder, transform, rules)
        # Make the chunks of the whole file, then select the chunks of the slice: a last call without
        # --shards has to find the results of all slices.
        chunks = _make_chunks(source, len(rows), folder, transform, rules, work)
        selected = [chunks[index] for index in parse_slice(shards, len(chunks))]
        run_record_tasks(
            validate_chunk, selected, engine=engine, workers=workers, progress=progress
        )
        if shards:
            # All chunks of the slice are finished now, so these calls only count their results.
            return dict(sum((Counter(validate_chunk(chunk)) for chunk in selected), Counter()))
        duplicates = {}
        if dedupe:
            numbers, hashes = _read_hashes(chunks, dedupe == "perceptual")
            duplicates = find_duplicates(numbers, hashes, dedupe == "perceptual")
        results = _read_results(chunks, rows, folder, duplicates)
        # With --compact, write the records twice: first with the old image names, from which the
        # shards are made, then with the new ones.
        kept = output if compact is None else work / "survivors.jsonl"
        outputs = _Outputs(rows, folder, kept, output)
        outputs.write(results)
        if compact is not None:
            compact_images(
                kept,
                folder,
                compact,
                compact_size,
                clean_output=output,
                engine=engine,
                workers=workers,
                progress=progress,
            )
            remove_temporary_files(output)
            write_compacted_records(open_rows(kept), output)
        # Delete the results of the chunks last, when everything else is written.
        outputs.write_report()
        shutil.rmtree(work.parent)
    return dict(outputs.counts)


def _check_rules(rules: Rules) -> None:
    """Raise ValueError for a rule that is out of range."""
    if rules.max_pixels > MAX_PIXELS:
        raise ValueError(
            f"--max-pixels {rules.max_pixels}: training rejects images of more than {MAX_PIXELS} pixels. "
            f"Pass --max-pixels {MAX_PIXELS} or less."
        )
    check_at_least(0, min_side=rules.min_side)
    check_at_least(
        1,
        max_aspect=rules.max_aspect,
        max_caption=rules.max_caption,
        max_pixels=rules.max_pixels,
    )


def _work_folder(
    rows: RowFile, output: Path, folder: Path, transform: ImageTransform | None, rules: Rules
) -> Path:
    """Create the folder for the results of the chunks, and return it.

    Its name is a digest of everything that the results depend on.
    """
    stat = rows.path.stat()
    # Use size and modification time of the file, because hashing gigabytes of records would take longer
    # than resuming saves. Keep the order of the list: otherwise, unfinished runs of version 0.1.0 would
    # have other digests, and could not be resumed.
    settings = [
        str(rows.path),
        stat.st_size,
        stat.st_mtime_ns,
        str(folder),
        str(transform),
        asdict(rules),
    ]
    # Add the color only if there is one, so that the digests of all other runs stay the same.
    if transform is not None and transform.pad_color is not None:
        settings.append(transform.pad_color)
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    work = output.with_name(f"{output.name}.work") / digest
    work.mkdir(parents=True, exist_ok=True)
    return work


def _make_chunks(
    source: Path,
    count: int,
    folder: Path,
    transform: ImageTransform | None,
    rules: Rules,
    work: Path,
) -> list[Chunk]:
    """Divide the records into the tasks of the workers."""
    chunks = []
    for number, start in enumerate(range(0, count, CHUNK_RECORDS)):
        stop = min(start + CHUNK_RECORDS, count)
        path = str(work / f"{number:06d}.parquet")
        chunks.append(Chunk(str(source), start, stop, str(folder), transform, rules, path))
    return chunks


# ---- outputs ----


class _Outputs:
    """Writes usable records, quarantine and report.

    Args:
        rows: All records.
        folder: The image folder.
        kept: Output file for usable records.
        output: Output file of the command, from which the names of quarantine and report are derived.
    """

    def __init__(self, rows: RowFile, folder: Path, kept: Path, output: Path) -> None:
        self.counts: Counter[str] = Counter()
        # Number of usable records whose image file has a different name, by the note about it.
        self.matched: Counter[str] = Counter()
        self._rows = rows
        self._folder = folder
        self._kept = kept
        self._quarantine = output.with_name(f"{output.stem}_quarantine.jsonl")
        self._report = output.with_name(f"{output.stem}_report.html")
        self._examples: dict[str, list[Example]] = {}

    def write(self, results: Iterator[ValidationResult]) -> None:
        """Write each record to the file of usable records, or to the quarantine."""
        remove_temporary_files(self._kept)
        remove_temporary_files(self._quarantine)
        with RecordWriter(self._kept) as usable, RecordWriter(self._quarantine) as quarantine:
            for index, result in enumerate(results):
                self.counts[result.reason or "ok"] += 1
                if result.reason:
                    quarantine.write(self._quarantine_row(index, result))
                    continue
                row = self._rows[index]
                # `validate_record` has joined the notes about a usable record with commas.
                notes = [note for note in result.detail.split(", ") if note]
                matched = [note for note in notes if note.startswith(_MATCHED_BY)]
                self.matched.update(matched)
                # Move only the unusable captions to the quarantine, and keep the record with its other captions.
                if result.unusable_responses:
                    where = self._rows.where(index)
                    row, removed = _split_responses(row, where, result.unusable_responses)
                    reason = ", ".join(note for note in notes if note not in matched)
                    quarantine.write({"reason": reason, "detail": "", "record": removed})
                usable.write(row)

    def _quarantine_row(self, index: int, result: ValidationResult) -> dict[str, Any]:
        """Return the line of the quarantine file for a rejected record, and collect examples for the report."""
        # Use the raw text and not the parsed row, because the reason may be that the row is not JSON.
        try:
            text = self._rows.raw(index).decode("utf-8", "replace")
        except ValueError as error:
            text = str(error)  # the row is too long to be copied
        examples = self._examples.setdefault(result.reason, [])
        if len(examples) < _EXAMPLES_PER_REASON:
            caption, thumbnail = _caption_and_thumbnail(text, self._folder)
            examples.append(
                Example(
                    name=self._rows.where(index),
                    caption=caption.encode(errors=SURROGATES_AS_ESCAPES).decode(),
                    detail=result.detail,
                    thumbnail=thumbnail,
                )
            )
        return {"reason": result.reason, "detail": result.detail, "record": _parse_or_text(text)}

    def write_report(self) -> None:
        """Write the report as HTML and JSON."""
        matched = {note: f"{count:,}" for note, count in sorted(self.matched.items())}
        for note, count in matched.items():
            logger.warning("%s: %s (%s records)", self._rows.name, note, count)
        write_preparation_report(
            self._report,
            title=f"Cleaning of {self._rows.name}",
            facts={
                "records": f"{len(self._rows):,}",
                "kept": f"{self.counts['ok']:,}",
                **matched,
            },
            outcomes=self.counts,
            examples=self._examples,
        )
        # Remove the thumbnails from the JSON report, which is meant for programs.
        plain_examples = {}
        for reason, some in sorted(self._examples.items()):
            plain_examples[reason] = [{**example, "thumbnail": ""} for example in some]
        report = {"outcomes": self.counts, "examples": plain_examples}
        if self.matched:
            report["matched"] = self.matched
        text = json.dumps(report, indent=1, ensure_ascii=False)
        # The name of the source, which examples contain, may not be UTF-8.
        path = self._report.with_suffix(".json")
        path.write_text(text, encoding="utf-8", errors=SURROGATES_AS_ESCAPES)


def _split_responses(
    row: dict[str, Any], where: str, unusable: Collection[int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a row with the usable responses, and a copy with the unusable ones."""
    responses = Record.from_json(row, where).responses
    usable = [text for index, text in enumerate(responses) if index not in unusable]
    removed = [responses[index] for index in unusable]
    # Write `responses` only: the other keys may contain captions that are removed from it.
    rest = {key: value for key, value in row.items() if key not in _CAPTION_KEYS}
    return {**rest, "responses": usable}, {**rest, "responses": removed}


def _parse_or_text(text: str) -> Any:
    """Return the JSON value of a text, or the text itself if it is not JSON."""
    try:
        return json.loads(text)
    # Deeply nested arrays exceed Python's recursion limit.
    except (ValueError, RecursionError):
        return text


def _caption_and_thumbnail(text: str, folder: Path) -> tuple[str, str]:
    """Return the caption of a rejected record and its image as a data URI; empty strings if they cannot be read."""
    try:
        record = Record.from_json(_parse_or_text(text), "")
    except ValueError:
        return text[:_SHOWN_CAPTION], ""
    caption = " / ".join(record.responses)[:_SHOWN_CAPTION]
    if not record.images:
        return caption, ""
    try:
        pixels = decode_image(read_image_bytes(record.images[0], folder))
    except ImageError:
        return caption, ""
    return caption, make_thumbnail(pixels).data_uri

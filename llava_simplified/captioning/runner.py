"""Caption many images into a file, in batches, as a job that can be killed and resumed.

Files of a job with `--output captions.jsonl`:

    captions.jsonl                  one row per caption; this is also the journal of the job
    captions.jsonl.bad.jsonl        one row per record that cannot be captioned, with the reason
    captions.jsonl.settings.json    settings of the job
    .captions.jsonl.lock            lock, held by the process that writes

A JSON array cannot be appended to. With `--output predictions.json`, the journal is therefore
`predictions.json.part.jsonl`, which is converted to the array at the end.

For a job that writes sidecar files (see `sidecars`), the journal is `.llava-caption.jsonl` in the folder of the sidecar
files. These files are deleted when the job is finished, except the list of failures (and see `_is_continued`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llava_simplified.captioning.caption_rows import Row, failed_row, parse_record
from llava_simplified.captioning.caption_text import TextOptions
from llava_simplified.captioning.endpoint_options import EndpointOptions
from llava_simplified.captioning.finishing import CaptionFinisher, count_shortened
from llava_simplified.captioning.inputs import ImageRecords, open_inputs
from llava_simplified.captioning.prompts import WeightedPrompt, prompt_chooser
from llava_simplified.captioning.review_page import write_review
from llava_simplified.captioning.sidecars import SidecarOptions, folder_problem
from llava_simplified.data.image_folder import NameMatches
from llava_simplified.data.images import ImageError, decode_image, read_image_bytes
from llava_simplified.data.records import Record, prediction_row
from llava_simplified.jobs import (
    SURROGATES_AS_ESCAPES,
    Journal,
    Progress,
    atomic_file,
    encode_json_lines,
    exclusive_lock,
    prepare_output_file,
    read_json_lines,
    store_or_check_settings,
)
from llava_simplified.model.config import DEFAULT_INSTRUCTION
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.options import check_at_least, checkpoint_options

# torch is imported when a model is loaded, because it may not be installed where `--endpoint` is used.
if TYPE_CHECKING:
    import torch

    from llava_simplified.model.llava import Llava

logger = logging.getLogger(__name__)

# Number of batches whose records are sorted by prompt length together, to reduce padding; see `caption_records`.
BATCHES_PER_WINDOW = 8

# ---- the job ----


@dataclass(frozen=True)
class CaptionJob:
    """A job of `caption_file`, which can be sent to another process or machine.

    Attributes:
        model_path, model_base, vision_tower, bits, dtype, quantize, trust_remote_code: See `Llava.from_pretrained`.
        source, image_folder, instructions: See `inputs.open_inputs`.
        output: A .jsonl file; with any other suffix, the output is a JSON array. For a job with `sidecars`, its
            journal: an absolute path, or a file name, which means a file in the folder of the images.
        options: Generation options; `num_return_sequences` is the number of captions per record.
        limit: Caption only the first N records; with `sidecars`, the first N images without a file to keep.
        batch_size: Records per batch.
        chunk, chunks: Index and number of slices: caption only every `chunks`-th record, starting with
            record `chunk`. (The names are stored in the settings of unfinished jobs.)
        prompts: Prompts of a prompt file, one of which is chosen for each image; empty for `instructions`.
        text: How captions are finished.
        sidecars: Where and how sidecar files are written; None for none.
        review: HTML page of all images and captions to write at the end; None for none.
        endpoint: A server that runs the model; None for the model of `model_path`.
    """

    model_path: str
    source: str | tuple[str, ...]
    output: str
    options: GenerationOptions
    instructions: tuple[str, ...] = ()
    image_folder: str | None = None
    model_base: str | None = None
    vision_tower: str | None = None
    bits: int | None = None
    dtype: str | None = None
    quantize: str | None = None
    trust_remote_code: bool = False
    limit: int | None = None
    batch_size: int = 16
    chunk: int = 0
    chunks: int = 1
    prompts: tuple[WeightedPrompt, ...] = ()
    text: TextOptions = field(default_factory=TextOptions)
    sidecars: SidecarOptions | None = None
    review: str | None = None
    endpoint: EndpointOptions | None = None

    def __post_init__(self) -> None:
        check_at_least(1, limit=self.limit, batch_size=self.batch_size)
        # The page replaces a file of the same name, which must not be an image or a file of captions.
        if self.review and Path(self.review).suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"--review {self.review}: the file name must end in .html")


class CaptionCounts(NamedTuple):
    """The result of a job, in records."""

    captioned: int  # records that have captions, also from earlier runs of the job
    failed: int  # records that cannot be captioned


class JobFiles(NamedTuple):
    """The files of a job; see the module's docstring."""

    output: Path
    journal: Path
    failures: Path
    settings: Path
    lock: Path

    @classmethod
    def of(cls, output: str) -> JobFiles:
        """Return the files of the job that writes `output`."""
        # Keep the names of version 0.1.0, whose unfinished jobs can be resumed.
        journal = output if Path(output).suffix == ".jsonl" else f"{output}.part.jsonl"
        return cls(
            output=Path(output),
            journal=Path(journal),
            failures=Path(f"{journal}.bad.jsonl"),
            settings=Path(f"{journal}.settings.json"),
            lock=Path(output).with_name(f".{Path(output).name}.lock"),
        )


def caption_file(job: CaptionJob, model: Llava | None = None) -> CaptionCounts:
    """Run a job, or resume it if it was killed. No record is captioned twice or skipped.

    Args:
        job: The job.
        model: The model of the job, if it is already loaded.

    Raises:
        ValueError: There is nothing to caption, the output belongs to a job with different settings, is the source or
            cannot be written, or another process is writing to it.
    """
    # Check source, output and settings before loading the model, which can take minutes.
    records, folder = open_inputs(job.source, job.image_folder, job.instructions)
    _prepare_records(job, records, folder)
    files = _job_files(job, folder)
    _check_outputs(job, files)
    images = records.names if isinstance(records, ImageRecords) else ()
    finisher = CaptionFinisher(job.text, job.sidecars, folder, images)
    # Hold the lock until the end, because two processes that append to one journal would mix their rows.
    with exclusive_lock(files.lock, files.output):
        _start_or_resume(files, _job_settings(job, records))
        try:
            if job.endpoint is None:
                model = model or load_model(job)
            _forget_failures(job, records, files.failures)
            if isinstance(records, ImageRecords) and not (job.instructions or job.prompts):
                # Use the instruction of the training run, which is stored in the checkpoint. The settings
                # need not contain it, because they identify the checkpoint.
                records.instructions = (model.instruction if model else DEFAULT_INSTRUCTION,)
            with Journal(files.journal) as journal, Journal(files.failures) as failures:
                counts = _caption_remaining(
                    job, model, records, folder, finisher, journal, failures
                )
                _log_finished(job, finisher, journal, files, counts)
                if job.review:
                    write_review(
                        job.review, folder, journal.rows(), failures.rows(), finisher.kept_texts()
                    )
        # Catch Ctrl-C too. If a job that has captioned nothing left its files, the next run would have to use the same
        # settings.
        except BaseException:
            _remove_empty_job(files)
            raise
        # The job is complete. If the process is killed during the cleanup, the next run repeats it.
        if not counts.failed:
            files.failures.unlink()
        if job.sidecars is not None:
            if not _is_continued(job, files):
                _remove_journal(files)
        elif files.journal != files.output:
            _publish_array(files)
    return counts


def _prepare_records(job: CaptionJob, records: Sequence[Record], folder: str) -> None:
    """Set the prompts of image records. For a file of records, refuse the options that require images.

    Raises:
        ValueError: The job has a prompt file or sidecar files, but its source is a file of records.
    """
    if isinstance(records, ImageRecords):
        if job.prompts:
            records.instructions = ("",)  # one instruction for each image
            seed = job.options.seed or 0
            records.prompt_of = prompt_chooser(job.prompts, folder, seed)
        return
    if job.prompts:
        raise ValueError(
            f"--prompt-file: the records of {job.source} contain their own instructions; "
            "remove the option."
        )
    if job.sidecars is not None:
        raise ValueError(
            f"--write: {job.source} is a file of records; pass the images or their folder instead."
        )


def _job_files(job: CaptionJob, folder: str) -> JobFiles:
    """Return the files of a job.

    Raises:
        ValueError: Sidecar files cannot be written into their folder.
    """
    if job.sidecars is None:
        return JobFiles.of(job.output)
    # Joining a folder with an absolute path gives the absolute path: the output of a job whose sidecar files are not
    # beside the images.
    files = JobFiles.of(str(Path(folder) / job.output))
    problem = folder_problem(files.journal.parent)
    if problem:
        raise ValueError(f"--write: {problem}")
    return files


def _check_outputs(job: CaptionJob, files: JobFiles) -> None:
    """Check the files that are written only at the end of the job.

    Raises:
        ValueError: One of them is a folder, or would replace the source.
    """
    prepare_output_file(files.output)
    if job.review:
        prepare_output_file(Path(job.review))
    sources = [job.source] if isinstance(job.source, str) else job.source
    for source in sources:
        if files.output.exists() and Path(source).exists() and files.output.samefile(source):
            raise ValueError(
                f"--output {files.output}: this is the file of records, which would be replaced; pass another file"
            )


def _log_finished(
    job: CaptionJob,
    finisher: CaptionFinisher,
    journal: Journal,
    files: JobFiles,
    counts: CaptionCounts,
) -> None:
    """Log how many captions were shortened and, with sidecar files, how many were written, kept and failed."""
    if job.text.loop_guard or job.text.max_words:
        shortened = count_shortened(journal.rows())
        if shortened["loop"]:
            logger.warning(
                "Captions that were cut where they began to repeat themselves: %s.",
                shortened["loop"],
            )
        if shortened["max_words"]:
            logger.info("Captions that were cut at --max-words: %s.", shortened["max_words"])
    if job.sidecars is None:
        return
    logger.info("%s", finisher.describe())
    if counts.failed:
        logger.warning(
            "Images that cannot be captioned: %s. They are listed with reasons in %s.",
            f"{counts.failed:,}",
            files.failures,
        )


def _start_or_resume(files: JobFiles, settings: dict[str, Any]) -> None:
    """Prepare the files of a new job, or check that an unfinished job has the same settings.

    A job is unfinished if its journal exists. Deleting the journal therefore restarts the job.
    """
    if not files.journal.exists():
        # Delete the other files of a job whose journal was deleted. Records that failed in that job
        # must be tried again.
        files.failures.unlink(missing_ok=True)
        files.settings.unlink(missing_ok=True)
    elif not files.settings.exists():
        # Do not append to a file of unknown origin: it was copied here, or written by another program.
        raise ValueError(
            f"{files.journal} exists, but {files.settings.name}, with the settings of its job, does not. Delete "
            f"{files.journal.name}, or pass another --output."
        )
    store_or_check_settings(files.settings, settings, files.journal)


def _forget_failures(job: CaptionJob, records: Sequence[Record], failures: Path) -> None:
    """Remove the records that this run must retry from the file of failures.

    These are the records that failed because of the server. Earlier versions also stored some images that failed
    without their names. After images were added to the folder, the index of such a failure can belong to another image.
    """
    retried_kinds = _retried_kinds(job)
    requires_name = isinstance(records, ImageRecords)

    def is_retried(row: Row) -> bool:
        return row.get("kind") in retried_kinds or (requires_name and not row.get("image"))

    # Do not rewrite the file if nothing changes.
    if not failures.exists() or not any(is_retried(row) for row, _ in read_json_lines(failures)):
        return
    with atomic_file(failures) as part, part.open("wb") as stream:
        for row, _ in read_json_lines(failures):
            if not is_retried(row):
                stream.write(encode_json_lines([row]))


def _retried_kinds(job: CaptionJob) -> Collection[str]:
    """Return the kinds of failures that the next run of a job tries again."""
    if job.endpoint is None:
        return ()
    # Import it here, because the module imports aiohttp, an optional package.
    from llava_simplified.captioning.endpoint_client import SERVER_FAILURES

    return SERVER_FAILURES


def _is_continued(job: CaptionJob, files: JobFiles) -> bool:
    """Return whether the next run of a job with sidecar files must continue this one, to retry images.

    With `--existing skip`, the next run finds the images without a file, so it needs no journal. With the other policies, it
    would caption all images again without the journal, and append all captions a second time.
    """
    assert job.sidecars is not None
    if job.sidecars.existing == "skip" or not files.failures.exists():
        return False
    retried_kinds = _retried_kinds(job)
    retried = [
        row for row, _ in read_json_lines(files.failures) if row.get("kind") in retried_kinds
    ]
    if retried:
        logger.warning(
            "Images that failed because of the server: %s. Run the same command again to caption them; to start over "
            "with all images instead, delete %s.",
            f"{len(retried):,}",
            files.journal,
        )
    return bool(retried)


def _remove_empty_job(files: JobFiles) -> None:
    """Delete the files of a job without a result, such as one whose model could not be loaded."""
    results = (files.journal, files.failures)
    if any(path.exists() and path.stat().st_size for path in results):
        return
    for path in (*results, files.settings):
        path.unlink(missing_ok=True)


def _job_settings(job: CaptionJob, records: Sequence[Record]) -> dict[str, Any]:
    """Return the settings that determine the rows of the output.

    Batch size and output are excluded: the batch size does not change a caption, and the output may be
    moved.
    """
    settings = asdict(job)
    # Keep the names of version 0.1.0, whose unfinished jobs can be resumed.
    settings["questions"] = settings.pop("instructions")
    settings["batch_size"] = None
    del settings["trust_remote_code"]  # affects whether a model can be loaded, but not its captions
    settings["output"] = None
    del settings["review"]
    if job.endpoint is not None:
        settings["endpoint"] = job.endpoint.job_settings()
    _remove_unused(settings)
    settings["model"] = _modification_times(job.model_path)
    # Images may be added to a folder while a job is unfinished (see `ImageRecords.renumber`), but not if the job is split
    # into slices, because a slice does not know which numbers the other slices give to new images.
    if not isinstance(records, ImageRecords) or job.chunks > 1:
        settings["contents of the source"] = _describe_contents(records, job.source)
    return settings


def _remove_unused(settings: dict[str, Any]) -> None:
    """Remove options that are off. The settings of unfinished jobs of version 0.1.0 do not contain them."""
    for name in ("dtype", "endpoint", "quantize"):
        if settings[name] is None:
            del settings[name]
    if not settings["prompts"]:
        del settings["prompts"]
    if settings["text"] == asdict(TextOptions()):
        del settings["text"]
    if settings["sidecars"] is None:
        del settings["sidecars"]
    for name in ("start_with", "forbid", "loop_guard"):
        if not settings["options"][name]:
            del settings["options"][name]


def _modification_times(model_path: str) -> list[int]:
    """Return the modification times of the weights, which change when the model is trained again."""
    if not model_path:
        return []
    return sorted(path.stat().st_mtime_ns for path in Path(model_path).glob("*.safetensors"))


def _describe_contents(records: Sequence[Record], source: str | tuple[str, ...]) -> object:
    """Return a value that changes if an index would refer to a different record."""
    if isinstance(records, ImageRecords):
        # Hash all names, because an additional image in a folder shifts the indices of all images after it.
        digest = hashlib.sha256()
        for number, name in enumerate(records.names):
            line = f"\n{name}" if number else name
            digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()
    # A file of records may have gigabytes, so use its size and modification time instead of a hash.
    assert isinstance(source, str)  # `open_inputs` accepts one file of records only
    stat = Path(source).stat()
    return [stat.st_size, stat.st_mtime_ns]


def _caption_remaining(
    job: CaptionJob,
    model: Llava | None,
    records: Sequence[Record],
    folder: str,
    finisher: CaptionFinisher,
    journal: Journal,
    failures: Journal,
) -> CaptionCounts:
    """Caption the records that are neither in the journal nor in the list of failures."""
    rows_per_record = job.options.num_return_sequences
    finished = _finished_records(journal, rows_per_record, records)
    failed = _finished_records(failures, rows_per_record=1, records=records)

    def fail(rows: list[Row]) -> None:
        """Add rows to the list of failures."""
        failures.append(rows)
        failed.update((row["index"], row.get("image")) for row in rows)

    indices: Sequence[int] = range(len(records))
    if isinstance(records, ImageRecords):
        # An interrupted run may have recorded captions in the journal without writing their sidecar files. Write them
        # now, except for images that were deleted or moved since, with their files.
        if job.sidecars is not None:
            names = set(records.names)
            in_folder = (row for row in journal.rows() if row["image"] in names)
            fail(finisher.resume(row for row in in_folder if row["index"] not in failed))
        if job.chunks == 1:
            _renumber(records, finished, failed)
        indices = records.indices()
    if job.limit is not None and job.sidecars is None:
        indices = indices[: job.limit]
    # Interleave the slices, so that slow parts of the source (large images) are distributed evenly.
    indices = indices[job.chunk :: job.chunks]
    # Use an array, because a list of millions of numbers takes five times as much memory.
    remaining: Sequence[int] = array(
        "q", (index for index in indices if index not in finished and index not in failed)
    )
    num_finished = len(indices) - len(remaining)
    num_records = len(indices)
    if isinstance(records, ImageRecords) and job.sidecars is not None:
        # With sidecar files, each image has one prompt, so records and images have the same indices.
        images = ((index, records.names[index]) for index in remaining)
        remaining, refused = finisher.admit(images, _images_left(job, num_finished))
        num_records = num_finished + len(remaining) + len(refused) + len(finisher.kept)
        fail(refused)

    initial = num_records - len(remaining)
    if initial:
        logger.info("%s: %s of %s records are already done.", job.output, initial, num_records)
    show_progress = logger.isEnabledFor(logging.INFO)
    with Progress(num_records, "records", initial, enabled=show_progress) as progress:
        for rows, failed_rows in _caption_batches(job, model, records, folder, remaining):
            # The order matters if the process is killed between these writes. Captions in the journal whose sidecar
            # files are missing are written by the next run (`resume`). Failures that were not listed occur again.
            finished_rows, unfinished_rows = finisher.finish(rows)
            _add_image_names(failed_rows, records)
            journal.append(finished_rows)
            fail([*failed_rows, *unfinished_rows])
            fail(finisher.write(finished_rows))
            num_done = progress.done + len(rows) // rows_per_record + len(failed_rows)
            progress.update(num_done, f"{len(failed):,} failed" if failed else "")
    return CaptionCounts(num_records - len(failed), len(failed))


def _add_image_names(failed_rows: Sequence[Row], records: Sequence[Record]) -> None:
    """Add the image name to the rows of images of which no record could be created; see `caption_rows.parse_record`.

    `_renumber` needs the name. Without it, the next run could give the index of the failure to an image that was added to
    the folder since, and would then skip that image.
    """
    if not isinstance(records, ImageRecords):
        return
    for row in failed_rows:
        if row["image"] is None:
            row["image"] = records.name_at(row["index"] // len(records.instructions))


def _images_left(job: CaptionJob, num_finished: int) -> int | None:
    """Return how many more images of its slice a job with sidecar files may caption; None for no limit.

    Images that keep their sidecar file do not count for `--limit`, so that the next run captions other images.
    """
    if job.limit is None:
        return None
    # The size of this slice of the first `limit` images.
    return len(range(job.chunk, job.limit, job.chunks)) - num_finished


def _caption_batches(
    job: CaptionJob,
    model: Llava | None,
    records: Sequence[Record],
    folder: str,
    indices: Sequence[int],
) -> Iterator[tuple[list[Row], list[Row]]]:
    """Yield the rows of the records in order, captioned by the model; without a model, by the server."""
    if model is not None:
        # Stop generating a sequence at a loop, because the finished text would be cut there.
        options = replace(job.options, loop_guard=job.text.loop_guard)
        return caption_records(model, records, folder, options, job.batch_size, indices)

    from llava_simplified.captioning.endpoint_captions import caption_at_endpoint

    assert job.endpoint is not None
    return caption_at_endpoint(records, folder, job.options, job.endpoint, indices)


def _renumber(records: ImageRecords, *done: dict[int, str | None]) -> None:
    """Keep the numbers of images in an unfinished output; see `ImageRecords.renumber`.

    Args:
        records: All records.
        done: Index -> image, for the records that have captions, and for the records that have failed.
    """
    per_image = len(records.instructions)
    numbered = chain.from_iterable(images.items() for images in done)
    # Usually no image was added or removed. Return before building `known`, which takes gigabytes for millions of images.
    if all(not image or records.name_at(index // per_image) == image for index, image in numbered):
        return
    known: dict[str, int] = {}
    for images in done:
        known.update((image, index // per_image) for index, image in images.items() if image)
    records.renumber(known)


def _finished_records(
    journal: Journal, rows_per_record: int, records: Sequence[Record]
) -> dict[int, str | None]:
    """Return index -> image of the records whose rows are all in a journal, and remove an incomplete record at its end.

    A process that was killed while writing may have left only some rows of the last record. The journal is truncated
    before them. Random numbers depend only on the record, so the next run generates the same captions again.

    For a file of records, the images are None: only `_renumber` needs them, and it is not called then.
    """
    finished: dict[int, str | None] = {}
    last_index = -1
    rows_of_record = 0
    end = 0  # end of the last complete record in bytes
    for row, position in read_json_lines(journal.path):
        # Count consecutive rows with the same index: the rows of one record are adjacent.
        if row["index"] != last_index:
            rows_of_record = 0
        rows_of_record += 1
        last_index = row["index"]
        if rows_of_record == rows_per_record:
            finished[last_index] = _image_in_memory(row, records)
            end = position
    journal.truncate(end)
    return finished


def _image_in_memory(row: Row, records: Sequence[Record]) -> str | None:
    """Return the image of a row. If `records` contains an equal string, return that object, to save memory."""
    if not isinstance(records, ImageRecords):
        return None
    image: str | None = row.get("image")
    name = records.name_at(row["index"] // len(records.instructions))
    return name if name == image else image


def _publish_array(files: JobFiles) -> None:
    """Write the rows of the journal as a JSON array, and delete the job's working files (journal, settings)."""
    rows = [row for row, _ in read_json_lines(files.journal)]
    with atomic_file(files.output) as part:
        text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
        part.write_text(text, encoding="utf-8", errors=SURROGATES_AS_ESCAPES)
    published_failures = Path(f"{files.output}.bad.jsonl")
    published_failures.unlink(missing_ok=True)  # an earlier job may have left one
    if files.failures.exists():
        files.failures.replace(published_failures)
    # Delete the journal before the settings. If the process is killed in between, settings without a journal are
    # harmless, whereas a journal without settings is an error at the next start.
    files.journal.unlink()
    files.settings.unlink()


def _remove_journal(files: JobFiles) -> None:
    """Delete the working files of a job whose captions are in sidecar files."""
    # Delete the journal first, for the same reason as in `_publish_array`.
    files.journal.unlink()
    files.settings.unlink()


def load_model(checkpoint: argparse.Namespace | CaptionJob) -> Llava:
    """Load the model of a job or of a command line."""
    from llava_simplified.model.llava import Llava

    options = checkpoint_options(checkpoint)
    return Llava.from_pretrained(options.pop("model_path"), **options)


# ---- records -> captions ----


def caption_records(
    model: Llava,
    records: Sequence[Record],
    image_folder: str | Path,
    options: GenerationOptions,
    batch_size: int = 16,
    indices: Sequence[int] | None = None,
) -> Iterator[tuple[list[Row], list[Row]]]:
    """Caption records, and yield the captions in the order of the records.

    All prompts of a batch are padded to the longest, so records are sorted by prompt length before
    they are batched. Sorting all records would delay the first row until the end, so they are sorted
    within a window. With a batch size of 2:

        window             0  1  2  3  4  5
        by prompt length   1  4 | 0  5 | 2  3      batches
        rows after each    -    | 0  1 | 2  3  4  5

    A record is yielded as soon as it and all records before it are done.

    Args:
        model: The model.
        records: Records with instructions; responses are not needed.
        image_folder: Folder that the image names are relative to.
        options: Generation options.
        batch_size: Records per batch.
        indices: Indices of the records to caption; None for all.

    Yields:
        After every batch: the prediction rows, `num_return_sequences` per record, and one row with the reason for
        each record that cannot be captioned.
    """
    if indices is None:
        indices = range(len(records))
    window_size = BATCHES_PER_WINDOW * batch_size
    matches = NameMatches()
    for start in range(0, len(indices), window_size):
        window_indices = indices[start : start + window_size]
        window = [parse_record(records, index) for index in window_indices]
        batches = _caption_window(model, window, image_folder, options, batch_size, matches)
        yield from _in_record_order(window_indices, window, batches)
    if matches.describe():
        logger.warning("%s", matches.describe())


# The captions of a record, or the error that prevented them: its image cannot be read, its prompt cannot be rendered or
# exceeds the context, the row is not a record, or the model's logits for it are not finite.
Outcome = list[str] | ValueError | FloatingPointError


def _in_record_order(
    indices: Sequence[int],
    window: Sequence[Record | ValueError],
    batches: Iterable[dict[int, Outcome]],
) -> Iterator[tuple[list[Row], list[Row]]]:
    """Convert outcomes to rows, in the order of the records.

    Args:
        indices: Index of each record of the window.
        window: The records.
        batches: Outcomes by position in the window. They may arrive in any order.
    """
    waiting: dict[int, Outcome] = {}
    position = 0  # position of the next record to yield
    for batch in batches:
        waiting.update(batch)
        rows: list[Row] = []
        failed_rows: list[Row] = []
        while position in waiting:
            index = indices[position]
            record = window[position]
            outcome = waiting.pop(position)
            if isinstance(record, ValueError) or isinstance(
                outcome, (ValueError, FloatingPointError)
            ):
                failed_rows.append(failed_row(index, record, outcome))
            else:
                rows += [prediction_row(index, record, caption) for caption in outcome]
            position += 1
        yield rows, failed_rows


def _caption_window(
    model: Llava,
    parsed: Sequence[Record | ValueError],
    image_folder: str | Path,
    options: GenerationOptions,
    batch_size: int,
    matches: NameMatches,
) -> Iterator[dict[int, Outcome]]:
    """Yield the outcomes of each batch, by position in the window."""
    from llava_simplified.model.generation import generate_separately
    from llava_simplified.model.openmp import use_one_thread
    from llava_simplified.model.sampling import prompt_hashes

    window: dict[int, Record] = {}
    prompts: dict[int, list[int]] = {}
    failed: dict[int, Outcome] = {}
    for position, record in enumerate(parsed):
        if isinstance(record, ValueError):
            failed[position] = record
            continue
        try:
            # Render without a response (None), so that the prompt ends where the answer begins.
            prompts[position] = model.prompt.render(record.turns, None).input_ids
            window[position] = record
        except ValueError as error:  # for example turns that the template cannot render
            failed[position] = error
    if failed:
        yield failed
    by_length = sorted(window, key=lambda position: len(prompts[position]))
    # Read the images in a thread, in the order of the batches, while the model computes. One thread is
    # sufficient: reading an image takes milliseconds, captioning it takes far longer.
    with ThreadPoolExecutor(1, initializer=use_one_thread) as reader:
        images = _WindowImages(model, image_folder, reader, matches)
        for position in by_length:
            images.read_ahead(window[position].images)
        for start in range(0, len(by_length), batch_size):
            batch = by_length[start : start + batch_size]
            outcomes: dict[int, Outcome] = {}
            for position in batch:
                image_error = images.error_of(window[position])
                if image_error is not None:
                    outcomes[position] = image_error
            # Caption the other records of the batch as usual.
            readable = [position for position in batch if position not in outcomes]
            if readable:
                names = _image_names(window[position] for position in readable)
                batch_prompts = [prompts[position] for position in readable]
                # Derive the random numbers from the content of prompt and images, so that a sampled
                # caption depends neither on the batch nor on the index of its record.
                hashes = prompt_hashes(batch_prompts, images.pixels(names))
                captions = generate_separately(
                    model, batch_prompts, images.features(names), options, hashes
                )
                outcomes.update(zip(readable, captions))
            yield outcomes


def _image_names(records: Iterable[Record]) -> list[str]:
    """Return the image names of records, in the order of the placeholders in their prompts."""
    names: list[str] = []
    for record in records:
        names += record.images
    return names


class _WindowImages:
    """The images of a window. Each is read and encoded once, even if several records refer to it.

    Args:
        model: The model, for its transform and its vision tower.
        image_folder: Folder that the image names are relative to.
        reader: Executor that reads the images.
        matches: Counts the image files that each rule finds.
    """

    def __init__(
        self,
        model: Llava,
        image_folder: str | Path,
        reader: ThreadPoolExecutor,
        matches: NameMatches,
    ) -> None:
        self._matches = matches
        self._model = model
        self._image_folder = image_folder
        self._reader = reader
        self._pixels: dict[str, Any] = {}  # image name -> future of the transformed image
        self._features: dict[str, torch.Tensor] = {}

    def read_ahead(self, names: Sequence[str]) -> None:
        """Start to read images that have not been read yet."""
        for name in names:
            if name not in self._pixels:
                self._pixels[name] = self._reader.submit(self._read, name)

    def _read(self, name: str) -> torch.Tensor:
        image = decode_image(read_image_bytes(name, self._image_folder, self._matches))
        return self._model.vision_tower.transform(image)

    def error_of(self, record: Record) -> ImageError | None:
        """Return the error if an image of the record cannot be read, else None. Raise errors of any other kind."""
        for name in record.images:
            # This waits until the image has been read.
            error = self._pixels[name].exception()
            if isinstance(error, ImageError):
                return error
            if error is not None:
                raise error
        return None

    def pixels(self, names: Sequence[str]) -> list[torch.Tensor]:
        """Return the transformed images: uint8 (3, height, width) each."""
        return [self._pixels[name].result() for name in names]

    def features(self, names: Sequence[str]) -> torch.Tensor | None:
        """Return image features (images, tokens, vision hidden size); None if there are no images."""
        if not names:
            return None

        import torch

        from llava_simplified.model.generation import encode_images

        # Remove duplicates: two records of one batch may refer to the same image.
        new = [name for name in dict.fromkeys(names) if name not in self._features]
        if new:
            # Encode all images of the batch together, which is faster than one by one.
            encoded = encode_images(self._model, torch.stack(self.pixels(new)))
            self._features.update(zip(new, encoded))
        return torch.stack([self._features[name] for name in names])

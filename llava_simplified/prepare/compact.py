"""Write the images of a file of records, shrunk to the size that training needs, into new shards."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llava_simplified.data.chat_rows import convert_chat, is_chat
from llava_simplified.data.images import check_image, read_image_bytes, shrink_image
from llava_simplified.data.preference_rows import convert_pair, is_pair
from llava_simplified.data.records import Record
from llava_simplified.data.rows import RowFile, open_rows
from llava_simplified.data.shards import ShardWriter
from llava_simplified.jobs import (
    atomic_file,
    exclusive_lock,
    remove_temporary_files,
    store_or_check_settings,
)
from llava_simplified.prepare.record_tasks import cached_rows, run_record_tasks
from llava_simplified.prepare.record_writer import RecordWriter

# At 224 pixels an image takes roughly 15 kB, so a shard has some 75 MB.
SHARD_RECORDS = 5_000
SETTINGS_NAME = "compact.json"
_DIGEST_NAME_0_1_0 = "made_of"  # version 0.1.0 stored one digest of all settings under this name
_READ_BLOCK = 1 << 20  # bytes


@dataclass(frozen=True)
class CompactShard:
    """A task of a worker: write a shard with the images of the records from `start` to `stop` (exclusive).

    Attributes:
        records: The file of records.
        start: Index of the first record.
        stop: Index after the last record.
        folder: The image folder.
        output: Output folder of the shards.
        number: Number of the shard.
        side: Shorter side of the shrunk images in pixels; 0 copies the image files unchanged.
    """

    records: str
    start: int
    stop: int
    folder: str
    output: str
    number: int
    side: int


def compact_images(
    records: Path,
    folder: Path,
    output: Path,
    side: int,
    *,
    clean_output: Path,
    engine: str,
    workers: int,
    progress: bool,
) -> None:
    """Write the images of all records into shards; continue an earlier run over the same records.

    Args:
        records: A JSON lines file of records.
        folder: The image folder.
        output: Output folder of the shards.
        side: Shorter side of the shrunk images in pixels; 0 copies the image files unchanged.
        clean_output: Output file of `llava clean`, which may be in the same folder.
        engine: Run the tasks in local processes or on Ray, see `run_tasks`.
        workers: Number of shards to write in parallel, see `run_tasks`.
        progress: Show a progress line.

    Raises:
        ValueError: The folder contains other files, or another process is writing to it.
    """
    # Lock this folder too. The lock of `clean` is for its own output file only, and another `llava
    # clean` may be writing to the same --compact folder.
    lock = output.with_name(f".{output.name}.lock")
    with exclusive_lock(lock, f"--compact {output}"):
        output.mkdir(parents=True, exist_ok=True)
        _check_output(records, folder, output, side, clean_output)
        count = len(open_rows(records))
        shards = []
        for number, start in enumerate(range(0, count, SHARD_RECORDS)):
            stop = min(start + SHARD_RECORDS, count)
            shards.append(
                CompactShard(str(records), start, stop, str(folder), str(output), number, side)
            )
        run_record_tasks(compact_shard, shards, engine=engine, workers=workers, progress=progress)


def _check_output(records: Path, folder: Path, output: Path, side: int, clean_output: Path) -> None:
    """Store the settings of a new output folder, or check that existing files were made from the same records.

    Without this check, finished shards of other records would be kept, and captions would refer to the wrong images.

    Raises:
        ValueError: The folder contains files with other settings, or without any.
    """
    settings = {
        "records_sha256": _file_digest(records, hashlib.sha256()),
        "image_folder": str(folder.resolve()),
        "compact_size": side,
    }
    settings_path = output / SETTINGS_NAME
    # A folder with files but without settings comes from version 0.1.0, or is unrelated. Version 0.1.0 stored
    # one digest of the image folder, the size and the records.
    if not settings_path.exists() and _has_other_files(output, clean_output):
        previous = output / _DIGEST_NAME_0_1_0
        start = hashlib.sha256(f"{folder.resolve()} {side}".encode())
        if not previous.is_file() or previous.read_text(encoding="utf-8") != _file_digest(
            records, start
        ):
            raise ValueError(
                f"--compact {output}: the folder contains files that were not made from these records with the "
                "same options. Empty it, or pass another folder to --compact."
            )
    store_or_check_settings(settings_path, settings, f"--compact {output}", option="--compact")


def _has_other_files(output: Path, clean_output: Path) -> bool:
    """Return whether the folder of the shards contains files that do not belong to the output of `llava clean`."""
    if clean_output.parent.resolve() != output.resolve():
        return any(output.iterdir())
    # Its lock, its work folder, its quarantine, and the reports of an earlier run
    name, stem = clean_output.name, clean_output.stem
    own = (name, f".{name}.", f"{stem}_quarantine.", f"{stem}_report.", f".{stem}_quarantine.")
    return any(not path.name.startswith(own) for path in output.iterdir())


def _file_digest(path: Path, digest: Any) -> str:
    """Add the contents of a file to a hash object, and return its hexadecimal digest."""
    with path.open("rb") as stream:
        for block in iter(partial(stream.read, _READ_BLOCK), b""):
            digest.update(block)
    return digest.hexdigest()


def compact_shard(spec: CompactShard) -> int:
    """Write one shard and its manifest unless they exist, and return the number of its images."""
    output = Path(spec.output)
    tar = output / f"{spec.number:05d}.tar"
    # An existing manifest was made from the same records, because `_check_output` compared the settings.
    manifest = tar.with_suffix(".parquet")
    if manifest.exists():
        return pq.read_metadata(manifest).num_rows
    rows = cached_rows(spec.records)
    remove_temporary_files(tar)
    remove_temporary_files(manifest)
    entries = []
    with atomic_file(tar) as part:
        writer = ShardWriter(part)
        for index in range(spec.start, spec.stop):
            record = Record.from_json(rows[index], rows.where(index))
            for number, name in enumerate(record.images):
                # Let errors end the run: the images were validated just before, so they must be there.
                entries.append(_add_image(writer, index, number, name, record, spec))
        writer.close()
    # Write the manifest last, because its existence means that the shard is finished.
    with atomic_file(manifest) as part:
        pq.write_table(pa.Table.from_pylist(entries), part, compression="zstd")
    return len(entries)


def _add_image(
    writer: ShardWriter, index: int, number: int, name: str, record: Record, spec: CompactShard
) -> dict[str, Any]:
    """Add one image to a shard, and return its row of the manifest."""
    data = read_image_bytes(name, spec.folder)
    # Decode the image even if it is copied unchanged, so that no damaged file gets into a shard.
    image = shrink_image(data, spec.side) if spec.side else check_image(data)
    key = compact_key(index, number)
    metadata = {"key": key, "source": name, "width": image.width, "height": image.height}
    offset = writer.add(key, image.data, image.suffix, record.responses, metadata)
    return {
        **metadata,
        "offset": offset,
        "length": len(image.data),
        "file": f"{key}.{image.suffix}",
        "captions": list(record.responses),
        "status": "ok",
    }


def compact_key(index: int, number: int) -> str:
    """Return the key of an image in the shards: the row index, and the number of the image in its row unless it is 0."""
    return f"{index:09d}_{number}" if number else f"{index:09d}"


def write_compacted_records(records: RowFile, output: Path) -> None:
    """Write records with the names that their images have in the new shards."""
    with RecordWriter(output) as writer:
        for index, row in enumerate(records):
            writer.write(_rename_images(row, index, records.where(index)))


def _rename_images(row: dict[str, Any], index: int, where: str) -> dict[str, Any]:
    """Return a record whose images refer to the new shards.

    Args:
        row: The record as JSON.
        index: The index of the row among the usable records.
        where: The file and row, for messages.
    """
    # `compact_shard` numbers the images in the order of the parsed record, which may differ from the row's.
    count = len(Record.from_json(row, where).images)
    if not count:
        return row
    # Convert the row as `Record.from_json` does. Its turns then contain `<image>` instead of the names of images or their
    # indices in a list.
    if is_pair(row):
        row = convert_pair(row, where)
    elif is_chat(row):
        row = convert_chat(row, where)
    # Compute the shard from the index among the usable records, as `compact_images` does.
    shard = f"{index // SHARD_RECORDS:05d}.tar"
    names = [f"{shard}#{compact_key(index, number)}" for number in range(count)]
    # A row may have both keys, and one of them may be null.
    rest = {key: value for key, value in row.items() if key not in ("image", "images")}
    if count == 1:
        return {"image": names[0], **rest}
    return {"images": names, **rest}

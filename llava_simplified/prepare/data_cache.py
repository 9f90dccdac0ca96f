"""Convert any source of captions to a file of records and an image folder, for `llava train --data`.

A file of records is used as it is. Everything else is converted once, into a folder of the cache:

    ~/.cache/llava-simplified/data/<digest>/records.jsonl
                                            source.json     the source, and what was skipped or repaired
                                            files/          copies of remote files

The digest covers the source, the options, and the sizes and modification times of the files. A changed source thus gets
another folder, and is converted again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from llava_simplified.data.image_folder import locate_file
from llava_simplified.data.names import AmbiguousNameError, expand_pattern
from llava_simplified.data.records import ALL_RECORDS, open_records
from llava_simplified.data.rows import RECORD_SUFFIXES, find_records
from llava_simplified.data.shards import IMAGE_SUFFIXES
from llava_simplified.foreign_files import read_json_object
from llava_simplified.jobs import atomic_directory, exclusive_lock
from llava_simplified.prepare.convert import convert
from llava_simplified.prepare.remote_data import (
    copy_url,
    is_hub_name,
    is_url,
    load_hub_dataset,
    state_of_url,
)
from llava_simplified.prepare.source_rows import Columns, ParseIssues, SourceRow
from llava_simplified.prepare.sources import read_source

logger = logging.getLogger(__name__)

# Part of the digest. Increment it when the conversion changes, so that sources are converted again.
_VERSION = 2
_COPIES = "files"  # name of the folder for copies of remote files
_NUM_PROBED_ROWS = 20  # number of rows whose images are searched, to find the image folder
_MAX_SUBFOLDERS = 200  # maximum number of subfolders to search
# Seconds to wait for another process that converts the same source, such as another rank of the same run.
_LOCK_TIMEOUT = 24 * 3600.0


class PreparedData(NamedTuple):
    """A file of records, and where its images are.

    Attributes:
        records: The file of records.
        image_folder: The folder that the records' image names are relative to.
        num_records: Number of records.
    """

    records: Path
    image_folder: Path
    num_records: int


def prepare_data(source: str, image_folder: str | None = None, sidecar: str = "") -> PreparedData:
    """Return the records of any source, converted in the cache if necessary.

    Args:
        source: Any source that `llava convert` accepts, or the name of a data set on the Hugging Face Hub. All files of
            a remote source are copied.
        image_folder: The image folder; by default the folder of the source, or the subfolder that contains its images.
        sidecar: Which sidecars of a folder are read, and how; see `SidecarOptions.parse`.

    Raises:
        ValueError: The source cannot be read, or contains no usable record.
    """
    # A file of records needs no conversion.
    records = find_records(Path(source))
    count = 0 if sidecar else _count_records(records)
    if count:
        return PreparedData(records, Path(image_folder or find_image_folder(source)), count)

    dataset = load_hub_dataset(source) if is_hub_name(source) else None
    # `datasets` identifies each version of a data set by a fingerprint.
    state = _state_of(source) if dataset is None else dataset._fingerprint
    settings = {
        "version": _VERSION,
        "source": _absolute(source),
        "state": state,
        "sidecar": sidecar,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    target = cache_folder() / digest
    # If several processes need the same source, one of them converts it, while the other processes wait for the lock.
    with exclusive_lock(target.with_suffix(".lock"), target, timeout=_LOCK_TIMEOUT):
        is_new = not target.is_dir()
        if is_new:
            with atomic_directory(target) as part:
                local_source = _local_copy(source, dataset, part / _COPIES)
                _convert(local_source, source, part, sidecar)
    source_info = read_json_object(target / "source.json")
    logger.info(
        "--data %s: %s records in %s (%s)",
        source,
        f"{source_info['count']:,}",
        target / "records.jsonl",
        "converted now" if is_new else "converted earlier, unchanged since",
    )
    # Repeat the warnings of the conversion in every run, not only in the first one.
    for line in source_info["issues"]:
        logger.warning("%s", line)
    # The images of a remote source are among its copies.
    copies = target / _COPIES
    if copies.is_dir():
        folder = str(copies)
    elif sidecar:
        folder = image_folder or source
    else:
        folder = image_folder or str(find_image_folder(source))
    return PreparedData(target / "records.jsonl", Path(folder), source_info["count"])


def _local_copy(source: str, dataset: Any, target: Path) -> str:
    """Return the path of a source on this machine. A remote source is copied to `target`."""
    if dataset is not None:
        dataset.save_to_disk(target)
        return str(target)
    if is_url(source):
        return str(copy_url(source, target))
    return source


def cache_folder() -> Path:
    """Return the folder of converted sources."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "llava-simplified" / "data"


def _convert(local_source: str, source: str, target: Path, sidecar: str) -> None:
    """Write records.jsonl and source.json into a folder."""
    # The first row shows whether the source has images or only their URLs.
    row = next(_rows(local_source, sidecar), None)
    if row is not None and row.url and not row.image:
        raise ValueError(
            f"--data {source}: the images are given as URLs. Fetch them with `llava download {source} --output FOLDER`, and "
            "pass --data FOLDER."
        )
    counts, issues = convert(
        local_source, target / "records.jsonl", keep_paths=True, sidecar=sidecar
    )
    source_info = {
        "source": _absolute(source),
        "count": sum(counts.values()),
        "issues": [line.strip() for line in issues.lines()],
    }
    text = json.dumps(source_info, indent=1)
    (target / "source.json").write_text(text, encoding="utf-8")


def _count_records(path: Path) -> int:
    """Return the number of records of a file that training can read as it is; 0 if it must be converted."""
    if not path.is_file() or path.suffix not in RECORD_SUFFIXES:
        return 0
    row = next(_rows(str(path)), None)
    if row is None or row.record is None:
        return 0
    # Training cannot read an object that contains an array of records, so it is converted. A file without any valid
    # record is converted too: the conversion reports what is wrong with it.
    try:
        return len(open_records(path, max_bad_records=ALL_RECORDS))
    except ValueError:
        return 0


def _rows(source: str, sidecar: str = "") -> Iterator[SourceRow]:
    return read_source(source, ParseIssues(), Columns(), sidecar)


# ---- state of a source ----


def _absolute(source: str) -> str:
    """Return the absolute path of a local source; other names unchanged."""
    if is_url(source) or is_hub_name(source):
        return source
    return str(Path(source).absolute())


def _state_of(source: str) -> Any:
    """Return a JSON value that changes when the source changes: sizes and times of its files, or a digest of them."""
    if is_url(source):
        return state_of_url(source)
    path = Path(source)
    if path.is_dir():
        return _state_of_folder(path)
    paths = [source]
    if not path.is_file():
        paths, _ = expand_pattern(source)
    states: list[list[Any]] = []
    for name in paths:
        # A pattern may match folders. The time of a folder does not change with the files in it.
        if Path(name).is_dir():
            states.append([name, _state_of_folder(Path(name))])
        else:
            states.append([name, *_state_of_file(Path(name))])
    return states


def _state_of_file(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _state_of_folder(folder: Path) -> str:
    """Return a digest of the names of all files, and of the states of those that are not images."""
    digest = hashlib.sha256()
    image_suffixes = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)
    for place, subfolders, names in os.walk(folder):
        subfolders.sort()
        names.sort()
        relative = os.path.relpath(place, folder)
        for name in names:
            state: tuple[int, int] | tuple[()] = ()
            # The records depend on the names of images, but not on their contents. So skip the slow `stat` of
            # maybe a million images.
            if not name.lower().endswith(image_suffixes):
                with suppress(OSError):  # a broken link has no state
                    state = _state_of_file(Path(place) / name)
            line = f"{relative}/{name} {state}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


# ---- the image folder ----


def find_image_folder(source: str) -> Path:
    """Return the image folder of a local source: the folder of the source, or the subfolder that contains its images.

    In many data sets, the file of captions is beside the folder of images, and names images relative to that folder:
    captions.txt contains "1.jpg", which is Images/1.jpg.

    Raises:
        ValueError: Several subfolders contain equally many of the first images.
    """
    path = Path(source)
    base = path if path.is_dir() else path.parent
    if not path.exists():
        # The source is a glob pattern. Use the folder before the first wildcard.
        _, base = expand_pattern(source)
    rows = itertools.islice(_rows(source), _NUM_PROBED_ROWS)
    # Skip images in shards ("shard.tar#key"), which are not files in a folder.
    names = [row.image for row in rows if row.image and "#" not in row.image]
    if not names or _count_images(names, base):
        return base

    # Choose the subfolder that contains most of the images.
    best: list[Path] = []
    most = 0
    subfolders = sorted(child for child in base.iterdir() if child.is_dir())
    for subfolder in subfolders[:_MAX_SUBFOLDERS]:
        count = _count_images(names, subfolder)
        if count > most:
            best, most = [subfolder], count
        elif count and count == most:
            best.append(subfolder)
    if not best:
        return base
    if len(best) > 1:
        raise ValueError(
            f"{source}: images such as {names[0]!r} are in {' and in '.join(map(str, best[:3]))}. Pass the right folder "
            "with --train_image_folder, or with --image_folder of `llava inspect`."
        )
    return best[0]


def _count_images(names: list[str], folder: Path) -> int:
    """Return how many of the images are in a folder."""
    count = 0
    for name in names:
        try:
            if locate_file(name, folder) is not None:
                count += 1
        except AmbiguousNameError:
            count += 1  # several files match the name
        except (OSError, ValueError):
            continue  # not a valid file name, for example too long
    return count

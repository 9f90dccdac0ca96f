"""Open a file of records together with its image folder, and check that both belong together.

Unlike `dataset`, this module does not import torch, so that `llava caption --endpoint` works without it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from llava_simplified.data.image_folder import NameMatches, check_distinct
from llava_simplified.data.images import ImageError, decode_image, read_image_bytes
from llava_simplified.data.names import AmbiguousNameError
from llava_simplified.data.records import Records, open_records
from llava_simplified.data.rows import find_records

logger = logging.getLogger(__name__)

NUM_PROBED_RECORDS = 20  # number of records whose images `open_data` tries to read


def open_data(
    path: str,
    folder: str | None,
    option: str,
    require_responses: bool = True,
    max_bad_records: float = 0.0,
) -> tuple[Records, str]:
    """Open a file of records, and check that its images are in the image folder.

    Images of the first records are tried until one can be decoded, so that a wrong folder is reported now and not after
    the model is loaded.

    Args:
        path: A file of records, or a folder that `llava download` wrote.
        folder: The image folder; None means the folder of the file of records.
        option: The option that sets the image folder, for error messages.
        require_responses: Every record must have a response, as training needs them.
        max_bad_records: Maximum share of the checked rows that may be invalid. The caller must skip these rows.

    Returns:
        The records, and the image folder.

    Raises:
        ValueError: The file has no records, too many of the checked rows are invalid, a checked record has no response,
            the image folder does not exist, or none of the first images can be read.
        MissingExtraError: `path` is a Parquet file, and pyarrow is not installed.
    """
    records = open_records(path, require_responses, max_bad_records)
    if not len(records):
        raise ValueError(f"{path}: the file contains no records. Pass another file.")
    if not folder:
        folder = str(find_records(Path(path)).parent)
    if not Path(folder).is_dir():
        raise ValueError(
            f"{option} {folder}: no such folder. Pass the folder that contains the images."
        )

    first_error: ImageError | None = None
    matches = NameMatches()
    for name in _first_image_names(records):
        try:
            decode_image(read_image_bytes(name, folder, matches))
        except ImageError as error:
            first_error = first_error or error
        else:
            _check_matches(records, folder, matches)
            return records, folder
    if first_error is not None:
        raise ValueError(
            f"{option} {folder}: none of the first images can be read. Pass the folder that the image paths of the records "
            f"are relative to. First error: {first_error}"
        )
    return records, folder  # the first records have no images


def _first_image_names(records: Records) -> Iterator[str]:
    """Yield the image names of the first records, as far as these can be parsed."""
    for index in range(min(NUM_PROBED_RECORDS, len(records))):
        with suppress(ValueError):
            yield from records[index].images


def _check_matches(records: Records, folder: str, matches: NameMatches) -> None:
    """If an image was found under another name, log a warning, and check that no two names lead to the same file.

    Args:
        records: All records, whose names are checked.
        folder: The image folder.
        matches: The rules that found the first images.

    Raises:
        ValueError: Two names lead to the same file.
    """
    description = matches.describe()
    if not description:
        return

    def all_names() -> Iterator[str]:
        for index in range(len(records)):
            with suppress(ValueError):
                yield from records[index].images

    try:
        check_distinct(all_names(), Path(folder))
    except AmbiguousNameError as error:
        raise ValueError(f"{records.rows.name}: {error}") from error
    logger.warning(
        "%s: some of the first images were found in %s under other names. %s",
        records.rows.name,
        folder,
        description,
    )

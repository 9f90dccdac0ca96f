"""Open a file of records together with its image folder, and check that both belong together.

Unlike `dataset`, this module does not import torch, so that `llava caption --endpoint` works without it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from llava_simplified.data.image_folder import NameMatches, check_distinct
from llava_simplified.data.images import ImageError, decode_image, locate_image, read_image_bytes
from llava_simplified.data.names import AmbiguousNameError
from llava_simplified.data.records import Records, open_records
from llava_simplified.data.rows import find_records

logger = logging.getLogger(__name__)

NUM_PROBED_RECORDS = 20  # number of records whose images `open_data` tries to read
NUM_LOCATED_RECORDS = 1_000  # number of records whose images `open_data` looks up


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
        require_responses: A record without a response is invalid, as training needs responses.
        max_bad_records: Maximum share of the checked rows that may be invalid. The caller must skip these rows.

    Returns:
        The records, and the image folder.

    Raises:
        ValueError: The file has no records, too many of the checked rows are invalid, the image folder does not exist,
            none of the first images can be read, or two image names lead to one file.
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

    error = _first_image_error(records, folder)
    if error is not None:
        raise ValueError(
            f"{option} {folder}: none of the first images can be read. Pass the folder that the image paths of the records "
            f"are relative to. First error: {error}"
        )
    matches = _locate_some_images(records, folder)
    if matches.describe():
        # This parses all records, so it is not done if all names are exact, as they usually are.
        _check_names(records, folder)
        logger.warning(
            "%s: of %d images that were looked up, some have other names in %s. %s",
            records.rows.name,
            matches.rules.total(),
            folder,
            matches.describe(),
        )
    return records, folder


def _first_image_error(records: Records, folder: str) -> ImageError | None:
    """Return the first error if none of the first images can be read; None if one can, or if there are no images."""
    first_error: ImageError | None = None
    for name in _first_image_names(records):
        try:
            decode_image(read_image_bytes(name, folder))
        except ImageError as error:
            first_error = first_error or error
        else:
            return None
    return first_error


def _first_image_names(records: Records) -> Iterator[str]:
    """Yield the image names of the first records, as far as these can be parsed."""
    for index in range(min(NUM_PROBED_RECORDS, len(records))):
        with suppress(ValueError):
            yield from records[index].images


def _locate_some_images(records: Records, folder: str) -> NameMatches:
    """Look up the images of some records, spread evenly over the file, and count the rules that found them."""
    matches = NameMatches()
    for index in range(0, len(records), max(1, len(records) // NUM_LOCATED_RECORDS)):
        # Bad records and images are reported by `drop_bad_records` and the data loader.
        with suppress(ValueError):
            for name in records[index].images:
                # Only count the rules: `_check_names` compares the names.
                matches.rules[locate_image(name, folder).rule] += 1
    return matches


def _check_names(records: Records, folder: str) -> None:
    """Check that no two image names lead to the same file.

    Raises:
        ValueError: Two names lead to the same file.
    """

    def all_names() -> Iterator[str]:
        for index in range(len(records)):
            with suppress(ValueError):
                yield from records[index].images

    try:
        check_distinct(all_names, Path(folder))
    except AmbiguousNameError as error:
        raise ValueError(f"{records.rows.name}: {error}") from error

"""Copy remote data to a local folder: files of any fsspec URL, and data sets of the Hugging Face Hub.

hf://datasets/owner/name/data/train-*.parquet     files, through fsspec; also s3://, gs://, https://
owner/name, owner/name/train                      a data set by its name, through the library `datasets`
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from llava_simplified.extras import MissingExtraError, require_extra
from llava_simplified.foreign_files import blame_file

logger = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/([\w-][\w.-]*))?")
# Suffixes that mark a path such as data/train.json as a file, although it has the form of a name on the Hub.
_FILE_SUFFIX = re.compile(r"\.(jsonl?|ndjson|csv|tsv|txt|parquet|arrow|tar|gz|zip|zst|ya?ml)$")


def is_url(source: str) -> bool:
    """Return whether a source is a URL."""
    return "://" in source


def is_hub_name(source: str) -> bool:
    """Return whether a source has the form of a data set's name on the Hub, and no local file has this name."""
    can_be_name = _HUB_NAME.fullmatch(source) and not _FILE_SUFFIX.search(source)
    return bool(can_be_name) and not Path(source).exists()


# ---- URLs ----


def state_of_url(source: str) -> list[str]:
    """Return the size, version and time of each file of a URL, as far as its file system knows them, as JSON.

    Raises:
        ValueError: There is no such file, or it cannot be reached.
    """
    file_system, paths = _find_files(source)
    with blame_file(source):
        infos = [file_system.info(path) for path in paths]
    # Leave out the address that a server redirects to. It often contains a signature, which differs in each request.
    known = [{key: value for key, value in info.items() if key != "url"} for info in infos]
    return [json.dumps(info, sort_keys=True, default=str) for info in known]


def copy_url(source: str, folder: Path) -> Path:
    """Copy the files of a URL, which may contain `*`, into a new folder.

    Returns:
        The file if there is only one, otherwise the folder.

    Raises:
        ValueError: The files cannot be read, or two have the same name.
    """
    file_system, paths = _find_files(source)
    names = [Path(path.partition("?")[0]).name for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(
            f"{source}: several files have the same name. Pass a pattern for one folder."
        )
    folder.mkdir()
    for path, name in zip(paths, names):
        logger.info("Copying %s", path)
        with blame_file(source):
            # Copy in blocks, because the file may be larger than the memory.
            file_system.get_file(path, str(folder / name))
    if len(names) == 1:
        return folder / names[0]
    return folder


def _find_files(source: str) -> tuple[Any, list[str]]:
    """Return the file system of a URL, and the paths of its files in it."""
    require_extra("download", "fsspec", purpose=f"the source {source}")
    import fsspec

    with blame_file(source):
        file_system, path = fsspec.core.url_to_fs(source)
        paths = [path]
        if "*" in path:
            paths = sorted(file_system.glob(path))
        folders = [path for path in paths if file_system.isdir(path)]
    if not paths:
        raise ValueError(f"{source}: no file matches this pattern. Check the path.")
    if folders:
        raise ValueError(
            f"{source}: expected a file, found a folder. Pass a file, or a pattern such as {source.rstrip('/')}/*.parquet"
        )
    return file_system, paths


# ---- data sets of the Hub ----


def load_hub_dataset(source: str) -> Any:
    """Load a data set of the Hub by its name. `datasets` stores it in its own cache, and checks for new versions.

    Args:
        source: "owner/name" for the only split or the one called train, or "owner/name/split".

    Raises:
        ValueError: The library is not installed, the Hub cannot be reached, or there is no such data set or split.
    """
    match = _HUB_NAME.fullmatch(source)
    assert match is not None
    name, split = match[1], match[2]
    try:
        require_extra("datasets", "datasets", purpose=f"Loading {name} from the Hugging Face Hub")
    except MissingExtraError as error:
        # The user may have meant a local folder, so mention that first.
        raise ValueError(f"{source}: no such file or folder. {error}") from None
    import datasets

    with blame_file(source):
        loaded = datasets.load_dataset(name, split=split)
    if not isinstance(loaded, dict):
        return loaded
    # Without a split in the name, `loaded` contains all splits. Use the only one, or the training split.
    splits = list(loaded)
    if len(splits) == 1:
        return loaded[splits[0]]
    if "train" not in splits:
        choices = ", ".join(f"{name}/{split}" for split in splits)
        raise ValueError(f"{source}: contains several splits. Pass one of {choices}")
    return loaded["train"]

"""Folders of Hugging Face `datasets`: the Arrow files of `Dataset.save_to_disk`, which are read without the library.

train/state.json          the files of the data set, in their order
train/dataset_info.json   the names and types of its columns
train/data-00000-of-00002.arrow, ...
dataset_dict.json         in the folder above: the names of the splits
"""

from __future__ import annotations

from pathlib import Path

from llava_simplified.foreign_files import read_json_object, shorten

_DICT_FILE = "dataset_dict.json"
_STATE_FILE = "state.json"


def dataset_folder(folder: Path) -> Path:
    """Return the folder of a data set: the folder itself, or the subfolder of its only split.

    Raises:
        ValueError: The folder contains several splits.
    """
    if not (folder / _DICT_FILE).is_file():
        return folder
    splits = read_json_object(folder / _DICT_FILE).get("splits")
    if not splits or not isinstance(splits, list) or not all(map(_is_name, splits)):
        raise ValueError(
            f"{folder / _DICT_FILE}: 'splits' must be a non-empty list of names, got {splits!r:.80}"
        )
    if len(splits) != 1:
        names = ", ".join(str(folder / split) for split in splits)
        raise ValueError(f"{folder}: contains several splits. Pass the folder of one: {names}")
    return folder / splits[0]


def dataset_files(folder: Path) -> list[Path]:
    """Return the Arrow files of a data set; [] if the folder contains none.

    Raises:
        ValueError: `state.json` names a file that does not exist, or an old version of `datasets` saved only a selection
            of the rows.
    """
    if not (folder / _STATE_FILE).is_file():
        return []
    state = read_json_object(folder / _STATE_FILE)
    entries = state.get("_data_files")
    if not isinstance(entries, list):
        return []
    # Versions before 2.0 saved a selection (`select`, `shuffle`) as all rows with a table of indices.
    if state.get("_indices_data_files"):
        raise ValueError(
            f"{folder}: this data set is a selection of rows, saved by an old version of `datasets`. Load it with the "
            "library, call flatten_indices(), and save it again."
        )
    files = []
    for entry in entries:
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not _is_name(name):
            raise ValueError(
                f"{folder / _STATE_FILE}: expected the name of a file in the folder, found {shorten(entry)}"
            )
        path = folder / str(name)
        if not path.is_file():
            raise ValueError(
                f"{folder}: the file {name} of this data set is missing. Copy the folder again."
            )
        files.append(path)
    return files


def _is_name(value: object) -> bool:
    """Return whether a value is a plain file name. A path such as "../x" could lead out of the folder."""
    return isinstance(value, str) and value not in ("", ".", "..") and Path(value).name == value

"""Open the inputs of `llava caption`: images, folders, patterns, shards and files of records."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from llava_simplified.data.dataset import open_data
from llava_simplified.data.records import Record, insert_image_placeholders
from llava_simplified.data.shards import shard_index
from llava_simplified.prompt import Message

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
RECORD_SUFFIXES = {".json", ".jsonl", ".parquet"}


class ImageRecords(Sequence[Record]):
    """One record for each image and instruction, created on access.

    The instructions about an image are adjacent:

        index     0          1          2          3
        record    image 0    image 0    image 1    image 1
                  instr. 0   instr. 1   instr. 0   instr. 1

    Args:
        names: Image names, relative to the image folder; `shard.tar#key` for an image in a shard.
        instructions: Instructions about every image.
    """

    def __init__(self, names: Sequence[str], instructions: Sequence[str]) -> None:
        self.names = names
        self.instructions = instructions

    def __len__(self) -> int:
        return len(self.names) * len(self.instructions)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        image_index, instruction_index = divmod(index, len(self.instructions))
        name = self.names[image_index]
        message = Message("user", self.instructions[instruction_index])
        turns = insert_image_placeholders([message], 1, name)
        return Record((name,), turns, (), name)


def open_inputs(
    source: str, image_folder: str | None, instructions: Sequence[str]
) -> tuple[Sequence[Record], str]:
    """Return the records of a source, and the folder that their image names are relative to.

    Args:
        source: An image, a .tar shard, a folder (searched recursively) or glob pattern of these, or
            a file of records.
        image_folder: Image folder; only for records.
        instructions: Instructions about every image; not for records, which contain instructions.

    Raises:
        ValueError: The source does not exist or contains no image, or instructions were given with
            records.
    """
    # Check only the suffix, so that a missing file of records is reported as such.
    if Path(source).suffix in RECORD_SUFFIXES:
        if instructions:
            raise ValueError(
                f"--instruction: the records of {source} contain their own instructions; "
                "remove the option."
            )
        # Accept records without responses, since this command generates them.
        return open_data(source, image_folder, "--image-folder", require_responses=False)
    names, folder = find_images(source)
    if not names:
        raise ValueError(
            f"{source}: not an image, a folder of images, a .tar shard or a file of records"
        )
    # Make the folder absolute, because a Ray worker has a different working directory.
    return ImageRecords(names, instructions), str(folder.absolute())


def find_images(source: str) -> tuple[list[str], Path]:
    """Return image names, and the folder that they are relative to.

    The source is a file, folder, shard or glob pattern. A single file is treated as an image whatever
    its suffix is. From a folder or pattern, only files with the suffix of an image or shard are used.
    """
    path = Path(source)
    folder = Path()
    if path.is_dir():
        folder = path
        files = sorted(path.rglob("*"))
    elif path.is_file():
        folder = path.parent
        files = [path]
    else:
        # Use the module glob, because Path.glob does not support absolute patterns.
        files = sorted(Path(name) for name in glob.glob(source, recursive=True))  # noqa: PTH207

    names: list[str] = []
    for file in files:
        # Use relative names, so that the output remains valid when the folder is moved.
        name = str(file)
        if file.is_relative_to(folder):
            name = file.relative_to(folder).as_posix()
        if file.suffix == ".tar":
            # Refer to an image in a shard by its key, as `read_image_bytes` expects.
            names += [f"{name}#{key.decode()}" for key in shard_index(file).keys]
        elif file == path or (file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()):
            names.append(name)
    return names, folder

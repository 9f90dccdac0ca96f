"""What `llava caption` accepts: images, folders, glob patterns, shards and files of records."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from llava_simplified.data.dataset import open_data
from llava_simplified.data.records import Record, insert_image_placeholders
from llava_simplified.data.shards import shard_index
from llava_simplified.prompt import Message

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}


class Pictures(Sequence[Record]):
    """Each question about each picture, as a record made when it is asked for."""

    def __init__(self, names: Sequence[str], questions: Sequence[str]) -> None:
        self.names, self.questions = names, questions

    def __len__(self) -> int:
        return len(self.names) * len(self.questions)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        name, question = (
            self.names[index // len(self.questions)],
            self.questions[index % len(self.questions)],
        )
        return Record(
            (name,), insert_image_placeholders([Message("user", question)], 1, name), (), name
        )


def open_inputs(
    source: str, image_folder: str | None, questions: Sequence[str]
) -> tuple[Sequence[Record], str]:
    """What SOURCE holds, and the folder that its images are in.

    Args:
        source: a picture, a .tar shard, a folder (with all below it) or glob pattern of these, or a file of records.
        questions: asked about every picture; records bring their own.

    Raises:
        ValueError: nothing is there, no picture, or questions beside records.
    """
    path = Path(source)
    if path.suffix in (".json", ".jsonl", ".parquet"):
        if questions:
            raise ValueError(f"--prompt: the records of {source} bring their own questions")
        return open_data(source, image_folder, "--image-folder", require_responses=False)
    folder = Path()
    if path.is_dir():
        folder, found = path, sorted(path.rglob("*"))
    elif path.is_file():
        folder, found = path.parent, [path]
    else:
        found = sorted(map(Path, glob.glob(source, recursive=True)))  # noqa: PTH207 - may be absolute
    names: list[str] = []
    for file in found:
        name = file.relative_to(folder).as_posix() if file.is_relative_to(folder) else str(file)
        if file.suffix == ".tar":
            names += [f"{name}#{key.decode()}" for key in shard_index(file).keys]
        elif file == path or (file.suffix.lower() in PICTURES and file.is_file()):
            names.append(name)
    if not names:
        raise ValueError(f"{source}: no picture, folder of pictures, shard or file of records")
    return Pictures(names, questions), str(folder.absolute())

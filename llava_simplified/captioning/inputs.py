"""Open the inputs of `llava caption`: images, folders, patterns, shards and files of records."""

from __future__ import annotations

import errno
import logging
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

from llava_simplified.captioning.sidecars import SIDECAR_JOURNAL, SIDECAR_SUFFIXES
from llava_simplified.data import shards
from llava_simplified.data.image_formats import IMAGE_HEADER_BYTES, is_image_header
from llava_simplified.data.names import expand_pattern
from llava_simplified.data.open_data import open_data
from llava_simplified.data.records import ALL_RECORDS, Record, insert_image_placeholders
from llava_simplified.data.shards import shard_index
from llava_simplified.prompt import Message

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = {f".{suffix}" for suffix in shards.IMAGE_SUFFIXES}
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
        prompt_of: Function from the name of an image to its only instruction, which replaces `instructions`.
    """

    def __init__(
        self,
        names: Sequence[str],
        instructions: Sequence[str],
        prompt_of: Callable[[str], str] | None = None,
    ) -> None:
        self.names = names
        self.instructions = instructions
        self.prompt_of = prompt_of

    def __len__(self) -> int:
        return len(self.names) * len(self.instructions)

    def renumber(self, known: Mapping[str, int]) -> None:
        """Keep the numbers of images that an unfinished output already contains, and give the other images free numbers.

        For example, `a` and `c` of the images `a c d` are finished, and `b` was added to the folder since:

            number    0  1  2  3
            before    a  c  d
            now       a  c  b  d

        An image that was captioned and later removed from the folder keeps its number, so that no other image gets it.

        Args:
            known: Image name -> number, for the images that are already done. If no image was added or removed since,
                nothing changes.
        """
        name_of = {number: name for name, number in known.items()}
        number = 0
        for name in self.names:
            if name in known:
                continue
            # A new image gets the next free number.
            while number in name_of:
                number += 1
            name_of[number] = name
        # Images that were removed before they were captioned leave gaps. The name of a gap is empty.
        num_images = max(name_of, default=-1) + 1
        self.names = [name_of.get(number, "") for number in range(num_images)]

    def name_at(self, number: int) -> str | None:
        """Return the name of the image with a number; None if there are fewer images."""
        return self.names[number] if number < len(self.names) else None

    def indices(self) -> Sequence[int]:
        """Return the indices of all records in order, without the gaps that removed images leave; see `renumber`."""
        if all(self.names):
            return range(len(self))
        per_image = len(self.instructions)
        return [index for index in range(len(self)) if self.names[index // per_image]]

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        image_index, instruction_index = divmod(index, len(self.instructions))
        name = self.names[image_index]
        instruction = self.instructions[instruction_index]
        if self.prompt_of is not None:
            instruction = self.prompt_of(name)
        message = Message("user", instruction)
        turns = insert_image_placeholders([message], count=1, where=name)
        return Record(images=(name,), turns=turns, responses=(), id=name)


def refuse_image_folder(image_folder: str | None, source: str) -> None:
    """Raise ValueError if an image folder was given, but the source contains images instead of records.

    If the source is the image folder itself, the option only repeats it.
    """
    if image_folder is not None and Path(image_folder).resolve() != Path(source).resolve():
        raise ValueError(
            f"--image-folder {image_folder}: {source} is not a file of records, which the option requires; remove the "
            "option."
        )


def open_inputs(
    source: str | Sequence[str], image_folder: str | None, instructions: Sequence[str]
) -> tuple[Sequence[Record], str]:
    """Return the records of a source, and the folder that their image names are relative to.

    Args:
        source: An image, a .tar shard, a folder (searched recursively) or glob pattern of these,
            or several of them; or a file of records.
        image_folder: Image folder; only for records.
        instructions: Instructions about every image. Empty for records, because each record has its own.

    Raises:
        ValueError: The source does not exist or contains no image, a file of records was given together with
            instructions or other inputs, or images together with an image folder.
    """
    sources = [source] if isinstance(source, str) else list(source)
    # An empty path would be the current folder.
    if "" in sources:
        raise ValueError(
            "The path of the source is empty. If it comes from a shell variable, set this variable."
        )
    records_files = [name for name in sources if Path(name).suffix in RECORD_SUFFIXES]
    if records_files and len(sources) > 1:
        raise ValueError(
            f"{records_files[0]}: a file of records must be the only input. Caption each file with "
            "a separate --output."
        )
    # Recognize a file of records by its suffix, even if it does not exist: the error message then says so.
    if records_files:
        source = records_files[0]
        if instructions:
            raise ValueError(
                f"--instruction: the records of {source} already contain instructions; "
                "remove the option."
            )
        # Accept records without responses, since this command generates them. Rows that are not records are left out
        # during the job, so any share of them is accepted here, unless all rows are bad.
        return open_data(
            source,
            image_folder,
            "--image-folder",
            require_responses=False,
            max_bad_records=ALL_RECORDS,
        )
    # Otherwise, the sources are images, folders, shards or patterns.
    refuse_image_folder(image_folder, sources[0])
    found = [_find_some_images(name) for name in sources]
    names, folder = found[0].names, found[0].folder
    if len(found) > 1:
        names, folder = _join_names(found)
    # Make the folder absolute, because a Ray worker has a different working directory.
    return ImageRecords(names, instructions), str(folder.absolute())


class FoundImages(NamedTuple):
    """The images of a source.

    Attributes:
        names: Relative to the folder, or absolute; `shard.tar#key` for an image in a shard.
        folder: Folder that the names are relative to. It contains all of them.
        skipped: Number of files that are not images, by their suffix or kind.
    """

    names: list[str]
    folder: Path
    skipped: Counter[str]


def _find_some_images(source: str) -> FoundImages:
    """Return the images of a source, and log the other files that it contains.

    Raises:
        ValueError: The source contains no image.
    """
    found = find_images(source)
    counts = ", ".join(f"{count:,} x {suffix}" for suffix, count in sorted(found.skipped.items()))
    if not found.names:
        if not counts and not Path(source).exists() and not any(mark in source for mark in "*?["):
            raise ValueError(f"{source}: no such file or folder. Check the path.")
        others = f", only other files ({counts})" if counts else ""
        raise ValueError(
            f"{source}: no images found{others}; pass an image, a folder of images, a .tar shard, a glob pattern, or a "
            "file of records"
        )
    if counts:
        logger.warning(
            "%s: left out the files that are not images of a supported format: %s", source, counts
        )
    return found


def _join_names(found: Sequence[FoundImages]) -> tuple[list[str], Path]:
    """Return the images of several sources, and the deepest folder that contains all of them.

    An image that several sources contain is returned once.
    """
    paths: dict[Path, None] = {}  # an ordered set
    for images in found:
        folder = images.folder.absolute()
        # A path with ".." could lead out of the common folder, so resolve its folder, but not the file itself, which may
        # be a link. Do not resolve other paths, because that takes a system call for each part.
        for name in images.names:
            path = folder / name
            if ".." in path.parts:
                path = path.parent.resolve() / path.name
            paths[path] = None
    try:
        common = Path(os.path.commonpath([path.parent for path in paths]))
    except ValueError:
        drives = ", ".join(sorted({path.drive for path in paths}))
        raise ValueError(
            f"the images are on several drives ({drives}); caption the images of each drive with a separate command."
        ) from None
    return [path.relative_to(common).as_posix() for path in paths], common


def find_images(source: str) -> FoundImages:
    """Find the images of a file, folder, shard or glob pattern.

    A single file that is not a shard is treated as an image, whatever its suffix. In a folder or a pattern, images are the
    files with the suffix of an image, and files without a suffix that begin with the bytes of an image. All images
    of a shard are included.
    """
    path = Path(source)
    files, folder = _list_files(path)
    # The matches of an absolute glob pattern keep their absolute paths, unless the pattern contains "..". (A source that
    # does not exist as a path is a pattern.)
    is_absolute_pattern = path.is_absolute() and not path.exists() and ".." not in path.parts
    names: list[str] = []
    skipped: Counter[str] = Counter()
    # Store hashes of the paths without their suffixes, because millions of paths would take gigabytes.
    image_stems = array("q")
    sidecar_stems: dict[str, array[int]] = {suffix: array("q") for suffix in SIDECAR_SUFFIXES}
    for file in files:
        # Use relative names, so that the output remains valid when the folder is moved.
        name = str(file)
        if file.is_relative_to(folder) and not is_absolute_pattern:
            name = file.relative_to(folder).as_posix()
        if file.suffix == ".tar" and not file.is_dir():
            index = shard_index(file)
            # Refer to an image in a shard by its key, as `read_image_bytes` expects.
            names += [f"{name}#{key}" for key in index.names()]
            if index.num_without_image:
                skipped["samples of a shard without an image"] += index.num_without_image
        elif file == path or _has_image(file):
            names.append(name)
            image_stems.append(hash(str(file.with_suffix(""))))
        elif file.suffix in SIDECAR_SUFFIXES:
            sidecar_stems[file.suffix].append(hash(str(file.with_suffix(""))))
        # Do not report the journal of an earlier captioning job in the folder.
        elif Path(SIDECAR_JOURNAL).stem not in file.name:
            skipped[_describe_other(file)] += 1
    # Sidecar files of images are expected; report only the other text files. numpy compares millions of hashes at
    # once; it is imported here, because the parser of the command imports this module.
    import numpy as np

    for suffix, stems in sidecar_stems.items():
        is_other_text = np.isin(np.array(stems), np.array(image_stems), invert=True)
        if is_other_text.any():
            skipped[suffix] += int(is_other_text.sum())
    return FoundImages(names, folder, skipped)


def _list_files(path: Path) -> tuple[Iterable[Path], Path]:
    """Return the files of a source, and the folder that their names are relative to."""
    if path.is_dir():
        return _files_below(path), path
    if path.is_file():
        return [path], path.parent
    matches, fixed_folder = expand_pattern(str(path))
    # A pattern with several `**` can match a file in several ways, and is then expanded to duplicates.
    files = sorted(set(map(Path, matches)))
    # Image names are later resolved relative to this folder. With a wrong folder, a name could match a
    # different file, for example one in the current directory.
    folder = Path()
    if ".." in path.parts:
        # Resolve the folders, because two paths with ".." can lead to the same file.
        files = list(dict.fromkeys(file.parent.resolve() / file.name for file in files))
        if files:
            folder = Path(os.path.commonpath([file.parent for file in files]))
    elif path.is_absolute():
        folder = fixed_folder
    return files, folder


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder in path order, without building a list of all files.

    Symbolic links to folders are not followed, to avoid infinite recursion.
    """
    try:
        # Sorting each folder by name equals sorting all paths by their parts: "a/b.jpg" comes before "a.jpg", because
        # "a" comes before "a.jpg".
        names = sorted(os.listdir(folder), key=os.path.normcase)  # noqa: PTH208
        # Without this permission, the names can be listed, but the files cannot be opened.
        if not os.access(folder, os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except PermissionError as error:
        logger.warning("%s: left out: %s", folder, error.strerror)
        return
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            yield from _files_below(path)
        else:
            yield path


def _describe_other(file: Path) -> str:
    """Return the kind of a file that is neither an image nor a sidecar file, for the counts in messages."""
    if file.is_file():
        return file.suffix.lower() or "no suffix"
    kind = "folder" if file.is_dir() else "special file"
    if file.is_symlink():
        return f"link to a {kind}" if file.exists() else "broken link"
    return kind


def _has_image(file: Path) -> bool:
    """Return whether a file is an image, judging by its suffix, or by its first bytes if it has none."""
    if file.suffix.lower() in IMAGE_SUFFIXES:
        return file.is_file()
    # Skip hidden files: a name such as ".DS_Store" has no suffix either.
    if file.suffix or file.name.startswith(".") or not file.is_file():
        return False
    try:
        with file.open("rb") as stream:
            return is_image_header(stream.read(IMAGE_HEADER_BYTES))
    except OSError:
        return False

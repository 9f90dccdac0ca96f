"""Read captions from text files beside the images: `a.jpg` with `a.txt`, `a.caption` or `a.jpg.txt`.

kohya's scripts, OneTrainer and taggui store captions in these files, called sidecars, in folders of any depth. A
sidecar has the full name of its image (`a.jpg.txt`) or the stem of it (`a.txt`). If an image has both, the one with the
full name is used. Images without a sidecar, and sidecars without an image, are counted and reported.

A folder may contain millions of files, so only the names of one directory are in memory at a time. They are sorted by a
key that puts the files of an image next to each other. (Sorted by name, `a-1.jpg` would be between `a` and `a.jpg`.)

    name         key
    a.jpg        a   NUL  .jpg
    a.jpg.txt    a   NUL  .jpg.txt
    a-1.jpg      a-1 NUL  .jpg
"""

from __future__ import annotations

import itertools
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from llava_simplified.data.shards import IMAGE_SUFFIXES
from llava_simplified.prepare.source_files import read_text
from llava_simplified.prepare.source_rows import ParseIssues, SourceRow

SIDECAR_SUFFIXES = (".txt", ".caption")
# Values of --sidecar: which files are read, and whether each line is a separate caption.
SIDECAR_CHOICES = ("txt", "caption", "lines")
IMAGE_DOT_SUFFIXES = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)
_MAX_BYTES = 1 << 20  # a larger file is not a caption
# Separates the parts of a sorted name. No file name contains it, and it sorts before every other character.
_MARK = "\0"


class SidecarOptions(NamedTuple):
    """How sidecars are read.

    Attributes:
        suffixes: Suffixes of sidecars, in lower case.
        lines: Each line is a caption. Otherwise the whole file is one.
    """

    suffixes: tuple[str, ...] = SIDECAR_SUFFIXES
    lines: bool = False

    @classmethod
    def parse(cls, text: str) -> SidecarOptions:
        """Parse a value of `--sidecar`, such as "lines" or "caption,lines"; "" is the default.

        Raises:
            ValueError: The value is unknown.
        """
        choices = [choice.strip() for choice in text.split(",") if choice.strip()]
        unknown = [choice for choice in choices if choice not in SIDECAR_CHOICES]
        if unknown:
            raise ValueError(
                f"--sidecar {text}: expected txt, caption or lines, or several of them as in caption,lines"
            )
        suffixes = tuple(suffix for suffix in SIDECAR_SUFFIXES if suffix[1:] in choices)
        return cls(suffixes or SIDECAR_SUFFIXES, lines="lines" in choices)


class NameGroup(NamedTuple):
    """The files of a directory whose names are equal up to the suffixes of images and sidecars.

    Attributes:
        folder: The directory, relative to the source; "" for the source itself.
        images: Each image with its sidecars: those with its full name (a.jpg.txt), or else with its stem (a.txt).
        orphans: Sidecars without an image.
        others: Files that are neither.
    """

    folder: str
    images: list[tuple[str, list[str]]]
    orphans: list[str]
    others: list[str]

    def path(self, name: str) -> str:
        """Return the path of a file, relative to the source."""
        return str(PurePosixPath(self.folder, name))


def read_sidecars(
    folder: Path, issues: ParseIssues, options: SidecarOptions
) -> Iterator[SourceRow]:
    """Yield a row for each image that has a sidecar with text.

    Raises:
        ValueError: An image has both a `.txt` and a `.caption`.
    """
    number = -1
    for group in scan_names(folder, options.suffixes):
        for name in group.orphans:
            issues.note("sidecar without an image (skipped)", number + 1, group.path(name))
        for name in group.others:
            issues.note("another file (not read)", number + 1, group.path(name))
        for image, sidecars in group.images:
            number += 1
            path = group.path(image)
            if not sidecars:
                issues.note("image without a sidecar (skipped)", number, path)
                continue
            _check_choice(group, image, sidecars)
            if len(sidecars) > 1:
                issues.note("several sidecars of one image (only the first is read)", number, path)
            captions = _read_captions(folder, group.path(sidecars[0]), number, issues, options)
            if captions:
                yield SourceRow(number, path, "", captions)
        # As in kohya's scripts, `a.txt` belongs to `a.jpg` and to `a.png`.
        uses = Counter(sidecars[0] for _, sidecars in group.images if sidecars)
        for name in sorted(uses):
            if uses[name] > 1:
                issues.note("sidecar of several images (used for each)", number, group.path(name))


def _check_choice(group: NameGroup, image: str, sidecars: list[str]) -> None:
    """Raise ValueError if an image has sidecars of two kinds, which often are tags and a sentence."""
    kinds = {Path(name).suffix.lower() for name in sidecars}
    if len(kinds) > 1:
        raise ValueError(
            f"{group.path(image)} has two kinds of text files, {' and '.join(sidecars)}; often one contains tags and "
            "the other a sentence. Choose the one with the captions: --sidecar txt or --sidecar caption."
        )


def _read_captions(
    folder: Path, name: str, number: int, issues: ParseIssues, options: SidecarOptions
) -> tuple[str, ...]:
    """Return the captions in a sidecar. If there are none, note the reason in `issues`, and return ()."""
    path = folder / name
    try:
        status = path.stat()
        # Reading a pipe or a device may never end.
        if not stat.S_ISREG(status.st_mode):
            issues.note("sidecar that is not a regular file (skipped)", number, name)
            return ()
        if status.st_size > _MAX_BYTES:
            issues.note("sidecar of more than a megabyte (skipped)", number, name)
            return ()
        text = read_text(path, issues, number).strip()
    except OSError as error:  # a broken link, or no permission
        issues.note("sidecar that cannot be read (skipped)", number, error)
        return ()
    texts = text.split("\n") if options.lines else [text]
    captions = []
    for caption in texts:
        if caption.strip():
            captions.append(caption.strip())
    if not captions:
        issues.note("empty sidecar (skipped)", number, name)
    return tuple(captions)


# ---- names ----


def scan_names(
    folder: Path, sidecar_suffixes: tuple[str, ...] = SIDECAR_SUFFIXES
) -> Iterator[NameGroup]:
    """Yield the files of a folder and of its subfolders, grouped by name, in a fixed order.

    Names that begin with a dot are left out: caches, and the files that macOS adds to archives.
    """
    for place, subfolders, files in os.walk(folder, onerror=_raise_error):
        relative = Path(place).relative_to(folder).as_posix().removeprefix(".")
        # Change this list in place: `os.walk` then visits the remaining subfolders, in this order.
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        # Links to folders may form a cycle, so `os.walk` does not follow them. Report them as unread files.
        links = [name for name in subfolders if (Path(place) / name).is_symlink()]
        if links:
            yield NameGroup(relative, [], [], links)
        # Change this list in place too. With a million names, a second list would double the memory.
        for index, name in enumerate(files):
            files[index] = _sort_key(name)
        files.sort()
        for _, keys in itertools.groupby(files, key=_group_of):
            names = []
            for key in keys:
                name = _name_of(key)
                if not name.startswith("."):
                    names.append(name)
            if names:
                yield _make_group(relative, names, sidecar_suffixes)


def _raise_error(error: OSError) -> None:
    raise ValueError(f"{error.filename}: this folder cannot be read: {error.strerror}") from error


def _make_group(folder: str, names: list[str], sidecar_suffixes: tuple[str, ...]) -> NameGroup:
    """Sort the files of a group into images, sidecars and others, and assign the sidecars to the images."""
    images: list[str] = []
    others: list[str] = []
    # Sidecars by their name without suffix: "a.jpg" for "a.jpg.txt", "a" for "a.txt".
    sidecars: dict[str, list[str]] = {}
    for name in names:
        if name.lower().endswith(IMAGE_DOT_SUFFIXES):
            images.append(name)
        elif name.lower().endswith(sidecar_suffixes):
            sidecars.setdefault(_stem(name), []).append(name)
        else:
            others.append(name)

    with_sidecars: list[tuple[str, list[str]]] = []
    used: set[str] = set()
    for image in images:
        own = sidecars.get(_compose(image)) or sidecars.get(_stem(image)) or []
        used.update(own)
        with_sidecars.append((image, list(own)))
    orphans: list[str] = []
    for name in names:
        if name in sidecars.get(_stem(name), ()) and name not in used:
            orphans.append(name)
    return NameGroup(folder, with_sidecars, orphans, others)


def _compose(name: str) -> str:
    """Return a name in Unicode's composed form (NFC): macOS writes decomposed names, and archives contain both forms."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _stem(name: str) -> str:
    """Return a name without its last suffix, in composed form."""
    return _compose(name).rpartition(".")[0]


def _sort_key(name: str) -> str:
    """Return a text that sorts files of one group next to each other, and contains the name."""
    composed = _compose(name)
    stem = composed
    # Remove the suffixes of images and sidecars one by one: "a.jpg.txt" -> "a.jpg" -> "a".
    while True:
        head, dot, suffix = stem.rpartition(".")
        is_known = dot + suffix.lower() in (*IMAGE_DOT_SUFFIXES, *SIDECAR_SUFFIXES)
        if not head or not is_known:
            break
        stem = head
    key = f"{stem}{_MARK}{composed[len(stem) :]}"
    # Append the original name only if it differs from the composed one, which is rare.
    return key if composed == name else f"{key}{_MARK}{name}"


def _group_of(key: str) -> str:
    """Return the part of a sort key that is equal for all files of a group."""
    return key.partition(_MARK)[0]


def _name_of(key: str) -> str:
    """Return the file name that a sort key was made from."""
    stem, suffix, *name = key.split(_MARK)
    return name[0] if name else stem + suffix

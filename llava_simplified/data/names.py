"""Match names of images, by the same rule in all modules.

The same image has different names in different files: a record contains `/home/ann/photos/cats/1.jpg`, the image folder
contains `cats/1.jpg`, and a file of references may call it `photos/cats/1.jpg`. What these names share is their end. So
a name is matched

1. *exactly*: with the same name;
2. otherwise by its *suffix*: with a longer name that ends with this name, or else with the longest name that is the end of
   this name. Parts between slashes are never split.

       cats/1.jpg     and  photos/cats/1.jpg     match: two parts
       cats/1.jpg     and  1.jpg                 match: one part
       cats/1.jpg     and  dogs/1.jpg            do not match: the base name alone is not the image
       my_cats/1.jpg  and  cats/1.jpg            do not match: `cats` is only the end of a part

A name with several equally long matches is an error, as are two images that would match the same name: no image is ever
silently replaced by a different one.
"""

from __future__ import annotations

import glob
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

_ARCHIVE_SUFFIXES = (
    ".tar",
    ".parquet",
    ".arrow",
)  # an image in an archive is called `shard.tar#key`
_MAX_SHOWN_NAMES = 3
# `C:` at the beginning, also in the form that lifts the limit of 260 characters: \\?\C:\photos\1.jpg
_DRIVE = re.compile(r"(?:[\\/]{2}[?.][\\/])?[A-Za-z]:(?=[\\/])")
# Windows reserves these names for devices, whatever their suffix is: "nul.txt" cannot be a file.
_WINDOWS_DEVICES = re.compile(
    r"(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[0-9\u00b9\u00b2\u00b3]) *(?:\..*)?",
    re.IGNORECASE,
)


class AmbiguousNameError(ValueError):
    """A name that matches several names equally well, or a name that several images match."""


class NameMatch(NamedTuple):
    """The name that was found, and the rule that found it."""

    name: str
    rule: Literal["exact", "suffix"]


def name_parts(name: str) -> tuple[str, ...]:
    r"""Return the parts of an image's name, from the outermost folder to the file.

    Slashes and backslashes separate parts. The root, the drive of Windows (`C:\`), `.` and repeated separators are
    dropped, and a part before `..` is removed with it. The key of an image in an archive is not split, since its slashes
    are not folders on disk: `a/0.tar#b/c` has the parts `a` and `0.tar#b/c`. Characters are composed (NFC), because
    macOS decomposes the characters in file names.
    """
    path, key = _split_key(unicodedata.normalize("NFC", name))
    path = _DRIVE.sub("", path)
    parts: list[str] = []
    for part in path.replace("\\", "/").split("/"):
        if part == "..":
            del parts[-1:]  # nothing to remove at the beginning
        elif part not in ("", "."):
            parts.append(part)
    if key and parts:
        parts[-1] += key
    return tuple(parts)


def _split_key(name: str) -> tuple[str, str]:
    """Split `shard.tar#key` into the path of the archive and `#key`, which is empty for other names."""
    path, mark, key = name.rpartition("#")
    if mark and path.endswith(_ARCHIVE_SUFFIXES):
        return path, mark + key
    return name, ""


def windows_problem(part: str) -> str:
    """Return why Windows does not allow a file or folder with this name; empty if it does.

    Args:
        part: One part of a path.
    """
    if _WINDOWS_DEVICES.fullmatch(part):
        return "the name is reserved for a device"
    if part.endswith((".", " ")):
        return "the name ends with a dot or a space"
    unsafe = sorted({char for char in part if char in '<>:"|?*\\/' or char < " "})
    if unsafe:
        return f"the name contains {' '.join(map(ascii, unsafe))}"
    return ""


def expand_pattern(pattern: str) -> tuple[list[str], Path]:
    """Return the files and folders that a glob pattern matches, sorted, and the folder before its first wildcard.

    Brackets in the name of an existing folder stand for themselves: albums are called `trip [2020]`. As a wildcard, that
    name would match the folder `trip 2` instead, and never its own.
    """
    folder = Path()
    escaped = []
    *folders, last = Path(pattern).parts
    for position, part in enumerate(folders):
        is_literal = not {"*", "?"}.intersection(part)
        if "[" in part:
            is_literal = is_literal and (folder / part).is_dir()
        if not is_literal:
            escaped += folders[position:]
            break
        folder /= part
        escaped.append(glob.escape(part))
    # Do not use `Path.glob`: it does not support absolute patterns.
    paths = glob.glob(str(Path(*escaped, last)), recursive=True)  # noqa: PTH207
    return sorted(paths), folder


def name_suffixes(name: str) -> Iterator[tuple[str, ...]]:
    """Yield the ends of a name, without splitting a part: first the name itself, last the base name."""
    parts = name_parts(name)
    for start in range(len(parts)):
        yield parts[start:]


class NameIndex:
    """An index of names, with which other names are matched. A look-up takes constant time.

    Args:
        names: The names. Duplicates are ignored.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = dict.fromkeys(names)
        # Parts -> the names that consist of exactly these parts, and the longer names that end with them.
        self._by_parts: dict[tuple[str, ...], list[str]] = {}
        self._by_suffix: dict[tuple[str, ...], list[str]] = {}
        for name in self._names:
            parts = name_parts(name)
            self._by_parts.setdefault(parts, []).append(name)
            for start in range(1, len(parts)):
                self._by_suffix.setdefault(parts[start:], []).append(name)

    def __len__(self) -> int:
        return len(self._names)

    def find(self, name: str) -> NameMatch | None:
        """Return the matching name, or None.

        Raises:
            AmbiguousNameError: Several names match equally well.
        """
        if name in self._names:
            return NameMatch(name, "exact")
        parts = name_parts(name)
        # First try the names that share the most parts with this name.
        equal = self._by_parts.get(parts)
        if equal:
            return NameMatch(_the_only(equal, name), "exact")
        longer = self._by_suffix.get(parts)
        if longer:
            return NameMatch(_the_only(longer, name), "suffix")
        for start in range(1, len(parts)):
            shorter = self._by_parts.get(parts[start:])
            if shorter:
                return NameMatch(_the_only(shorter, name), "suffix")
        return None


def match_name(name: str, candidates: Iterable[str]) -> NameMatch | None:
    """Return the matching candidate, or None. For many names, use `NameIndex` or `match_names`.

    Raises:
        AmbiguousNameError: Several candidates match equally well.
    """
    return NameIndex(candidates).find(name)


def match_names(names: Iterable[str], index: NameIndex) -> dict[str, NameMatch]:
    """Match several names, each with a different name of an index.

    Args:
        names: The names. Equal names are the same image.
        index: The names to match them with.

    Returns:
        The matches by name; names without a match are absent.

    Raises:
        AmbiguousNameError: A name matches several others, or two different names match the same one.
    """
    matches: dict[str, NameMatch] = {}
    matched_by: dict[str, str] = {}
    for name in dict.fromkeys(names):
        match = index.find(name)
        if match is None:
            continue
        first = matched_by.setdefault(match.name, name)
        # `cats/1.jpg` and `dogs/1.jpg` both match `1.jpg`, but at most one of them is this image.
        if name_parts(first) != name_parts(name):
            raise AmbiguousNameError(
                f"{first!r} and {name!r} are different images, but both match {match.name!r}. "
                "Include the folder in all of these names."
            )
        matches[name] = match
    return matches


def _the_only(matching: list[str], name: str) -> str:
    """Return the only match; raise AmbiguousNameError if there are several."""
    if len(matching) == 1:
        return matching[0]
    shown = ", ".join(map(repr, matching[:_MAX_SHOWN_NAMES]))
    if len(matching) > _MAX_SHOWN_NAMES:
        shown += ", ..."
    raise AmbiguousNameError(
        f"{name!r} matches {len(matching)} names equally well: {shown}. "
        "Use a name that contains more of the path."
    )

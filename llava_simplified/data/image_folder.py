"""Find the file of an image that a record names.

Records are copied between machines, and the image names in them stay the same: `/home/ann/photos/cats/1.jpg` was written
on a machine whose image folder was `/home/ann/photos`. A name is resolved by the first of these rules that finds a file
below the image folder:

    exact       the name itself; an absolute path that exists is this file, and no other
    suffix      the longest end of the name that is a file: photos/cats/1.jpg, cats/1.jpg, 1.jpg
    case        as above, but letters differ in case: img_1.jpg for IMG_1.JPG
    extension   as above, for a name without an extension: IMG_1 for IMG_1.JPG

A rule that finds several files is an error. Only `exact` is certain to find the image that was meant, so callers count
how often each rule was used. If two names lead to one file, that is an error too: at least one of them means an image
that is not there.

If an absolute path exists on this machine but is outside the image folder, that is an error: nothing outside is opened,
and a file of the same name in the folder would be another image. An absolute path is resolved by its ends only if it does
not exist here.
"""

from __future__ import annotations

import os
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Literal, NamedTuple

from llava_simplified.data.names import AmbiguousNameError, name_parts, name_suffixes

_MAX_LISTED_FILES = 200_000  # in a larger folder, the rules `case` and `extension` find nothing
_ARCHIVE_SUFFIXES = (".tar", ".parquet", ".arrow")
# A drive of Windows: `C:` or, in the form that lifts the limit of 260 characters, `\\?\C:`, but not `\\server\share`.
_LOCAL_DRIVE = re.compile(r"(?:\\\\[?.]\\)?[A-Za-z]:")


class OutsideFolderError(ValueError):
    """An absolute path of a file that exists, but not below the image folder."""


class LocatedFile(NamedTuple):
    """A file below the image folder, and the rule that found it.

    Attributes:
        path: The file: an image or an archive of images.
        key: The image's key in the archive, or None.
        rule: See the top of this module.
    """

    path: Path
    key: str | None
    rule: Literal["exact", "suffix", "case", "extension"]


def split_shard_name(name: str) -> tuple[str, str | None]:
    """Split `shard.tar#key` into the path of the archive and the key, which is None for other names."""
    archive, mark, key = name.rpartition("#")
    if mark and archive.endswith(_ARCHIVE_SUFFIXES):
        return archive, key
    return name, None


def exact_path(name: str, folder: Path) -> Path | None:
    """Return the path of a name in `folder`; None if the name is an absolute path outside the folder."""
    path = Path(name)
    # Do not use `is_absolute`: on Windows, `\home\1.jpg` (without a drive) and `C:1.jpg` (without a root) are not absolute,
    # but lead out of the folder too.
    if path.anchor and not path.is_relative_to(folder.absolute()):
        return None
    return folder / path


def is_existing_path(name: str) -> bool:
    """Return whether a name is the absolute path of a file on this machine. For `shard.tar#key`, check the archive."""
    path = Path(split_shard_name(name)[0])
    # A network path of Windows is not looked up: this would connect to a server that the records name.
    is_local = not path.drive or _LOCAL_DRIVE.fullmatch(path.drive)
    if not path.root or not is_local:
        return False
    try:
        return path.is_file()
    except (OSError, ValueError):  # no permission, too long, a null character
        return False


def locate_file(name: str, folder: Path) -> LocatedFile | None:
    """Find the file of an image.

    Args:
        name: A path, `shard.tar#key` or `rows.parquet#row`. It must not contain `..`.
        folder: The image folder. Nothing outside it is found.

    Returns:
        The file; None if no rule finds one.

    Raises:
        AmbiguousNameError: Several files match equally well.
        OutsideFolderError: The name is the absolute path of a file outside the folder.
        OSError: The folder cannot be read, or the name is too long.
        ValueError: The name contains a null character.
    """
    file_name, key = split_shard_name(name)
    path = exact_path(file_name, folder)
    # `is_file` excludes pipes and devices: reading one would block.
    if path is not None and path.is_file():
        return LocatedFile(path, key, "exact")
    if path is None and is_existing_path(file_name):
        return LocatedFile(_path_through_links(Path(file_name), folder), key, "exact")
    # Try long ends of the name first, because they are less likely to match a different image.
    suffixes = list(name_suffixes(file_name))
    for parts in suffixes:
        # Join the parts before the folder is put in front: on Windows, a part such as `D:` would replace the folder.
        path = exact_path("/".join(parts), folder)
        if path is not None and path.is_file():
            return LocatedFile(path, key, "suffix")
    for parts in suffixes:
        path = _find_other_case(folder, parts)
        if path is not None:
            is_extended = path.name.casefold() != parts[-1].casefold()
            return LocatedFile(path, key, "extension" if is_extended else "case")
    return None


def _path_through_links(path: Path, folder: Path) -> Path:
    """Return the path below `folder` of an existing file that was named by another path.

    Links can give one folder several paths: on macOS, `/tmp` is a link to `/private/tmp`.

    Raises:
        OutsideFolderError: The file is not below the folder.
    """
    # A link in the folder counts as a file of the folder, so do not resolve the last part of the path.
    real_path = path.parent.resolve() / path.name
    real_folder = folder.resolve()
    if not real_path.is_relative_to(real_folder):
        raise OutsideFolderError(
            f"the image {str(path)!r} exists, but is outside the image folder {str(folder)!r}; pass an image folder that "
            "contains it, or use names relative to the image folder"
        )
    return folder / real_path.relative_to(real_folder)


def _find_other_case(folder: Path, parts: tuple[str, ...]) -> Path | None:
    """Find a file whose path differs from `parts` in case only, or by an extension that the name lacks.

    Raises:
        AmbiguousNameError: Several files match.
    """
    for part in parts[:-1]:
        found = _names_in(folder).get(_fold(part), ())
        folders = [name for name in found if (folder / name).is_dir()]
        # Give up if several folders match: the file could be in any of them.
        if len(folders) != 1:
            return None
        folder /= folders[0]
    listed = _names_in(folder)
    found = listed.get(_fold(parts[-1]), ())
    # Names without their extensions are listed with a dot at the end; see `_names_in`.
    if not found and not Path(parts[-1]).suffix:
        found = listed.get(_fold(parts[-1]) + ".", ())
    files = [name for name in found if (folder / name).is_file()]
    if len(files) > 1:
        raise AmbiguousNameError(
            f"{parts[-1]!r} could be any of {', '.join(map(repr, sorted(files)[:3]))} in {folder}; "
            "use the exact name"
        )
    return folder / files[0] if files else None


def _fold(name: str) -> str:
    """Return a name without its case. Accents are composed, because macOS decomposes them in file names."""
    return unicodedata.normalize("NFC", name).casefold()


def _names_in(folder: Path) -> dict[str, list[str]]:
    """Return the names in a folder by their folded form, with and without the extension.

    `IMG_1.JPG` is listed as `img_1.jpg` and as `img_1.`. The result is {} for a folder that cannot be read or has more
    than `_MAX_LISTED_FILES` files.
    """
    try:
        return _cached_names_in(folder, folder.stat().st_mtime_ns)
    except OSError:
        return {}


@lru_cache(maxsize=16)
def _cached_names_in(folder: Path, _modified_ns: int) -> dict[str, list[str]]:
    """List a folder; see `_names_in`.

    The time of modification is only a part of the cache key: a changed folder has a new time, and is listed again.
    """
    names: dict[str, list[str]] = {}
    with os.scandir(folder) as entries:
        for count, entry in enumerate(entries, start=1):
            if count > _MAX_LISTED_FILES:
                return {}
            folded = _fold(entry.name)
            names.setdefault(folded, []).append(entry.name)
            stem, dot, _ = folded.rpartition(".")
            if stem:
                names.setdefault(stem + dot, []).append(entry.name)
    return names


class NameMatches:
    """Counts how many images each rule found, and refuses two names that lead to one file. It is thread-safe.

    Only `exact` names may repeat a file: `cats/1.jpg`, `./cats/1.jpg` and the absolute path are the same image.

    Attributes:
        rules: Number of images by rule.
    """

    def __init__(self) -> None:
        self.rules: Counter[str] = Counter()
        # Hash of a file -> the name that led to it, for files that were not found by "exact".
        self._names: dict[int, str] = {}
        # Hashes of the files that were found by "exact". Usually all are, and nobody looks for any of them, so they stay in
        # the array, which takes 8 bytes per image. They move to the set when another rule finds the next file.
        self._new_exact = array("q")
        self._exact: set[int] = set()
        self._lock = Lock()

    def add(self, name: str, located: LocatedFile) -> None:
        """Count one image.

        Raises:
            AmbiguousNameError: Another name has led to the same file.
        """
        # The path of a file that was named by its absolute path may be absolute, while the folder is relative.
        path = str(located.path.absolute())
        file = hash((path, located.key))
        with self._lock:
            if located.rule == "exact":
                first = self._names.get(file)
                if first is not None:
                    raise _same_file_error(first, name, located.path)
                self._new_exact.append(file)
            else:
                self._exact.update(self._new_exact)
                del self._new_exact[:]
                if file in self._exact:
                    raise _same_file_error(path, name, located.path)
                first = self._names.setdefault(file, name)
                if first != name:
                    raise _same_file_error(first, name, located.path)
            self.rules[located.rule] += 1

    def describe(self) -> str:
        """Return a sentence about the images that were not found by their exact names; empty if there are none."""
        counts = [f"{n:,} by {rule}" for rule, n in sorted(self.rules.items()) if rule != "exact"]
        if not counts:
            return ""
        return f"Images whose names do not match exactly: {', '.join(counts)}."


def _same_file_error(first: str, second: str, path: Path) -> AmbiguousNameError:
    return AmbiguousNameError(
        f"{first!r} and {second!r} are different images, but both names lead to the file {path}. "
        "Use names relative to the image folder, or pass the folder that contains both images."
    )


def check_distinct(names: Callable[[], Iterable[str]], folder: Path) -> None:
    """Check that no two names lead to one file, unless both are its exact name.

    All rules keep the last part of a name, apart from its case and its extension. So files are looked up only if several
    names share this part, and one of them may lead to a file that another one names. This is rare, even if the folders of
    a data set number their images alike.

    Args:
        names: A function that iterates over the names. It is called a second time if some share their last part.
        folder: The image folder.

    Raises:
        AmbiguousNameError: Two names lead to one file.
    """
    import numpy as np  # imported here, because parsers of commands import this module

    # Compare hashes in arrays, because a dict of millions of names would take gigabytes.
    name_hashes = array("q")
    stem_hashes = array("q")
    for name in names():
        name_hashes.append(hash(name))
        stem_hashes.append(hash(_stem(name)))
    # A name that occurs several times is one image with several texts.
    _, first_positions = np.unique(np.array(name_hashes), return_index=True)
    stems, counts = np.unique(np.array(stem_hashes)[first_positions], return_counts=True)
    repeated = set(stems[counts > 1].tolist())
    if not repeated:
        return
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(names()):
        stem = _stem(name)
        if hash(stem) in repeated:
            groups.setdefault(stem, []).append(name)
    listed = _names_in(folder)
    matches = NameMatches()
    for group in groups.values():
        if not _may_share_a_file(group, listed):
            continue
        for name in group:
            try:
                located = locate_file(name, folder)
            except (OSError, ValueError):
                continue  # reported when the image is read
            if located is not None:
                matches.add(name, located)


def _stem(name: str) -> str:
    """Return what all names of a file have in common: the last part, without its case and its extension."""
    parts = name_parts(name)
    return _fold_stem(parts[-1]) if parts else ""


def _fold_stem(part: str) -> str:
    folded = _fold(part)
    # No rule replaces the extension of an archive, and the key of an image in it may contain dots.
    if split_shard_name(part)[1] is not None:
        return folded
    return folded.rpartition(".")[0] or folded


def _may_share_a_file(names: list[str], listed: dict[str, list[str]]) -> bool:
    """Return whether one of several names with the same last part may lead to a file that another one names.

    Args:
        names: The names.
        listed: The names in the image folder; see `_names_in`. Searching it is much faster than looking up every name.
    """
    if not listed:
        return True  # the folder has too many files to list them
    whole_names = set()
    for name in names:
        parts = name_parts(split_shard_name(name)[0])
        # A name is resolved by its end only if the image folder contains the first part of this end.
        for part in parts[1:]:
            if _fold(part) in listed or f"{_fold(part)}." in listed:
                return True
        whole_names.add((*map(_fold, parts[:-1]), _stem(name)))
    # Names that differ only in case, or by an extension, may lead to one file too.
    return len(whole_names) < len(names)

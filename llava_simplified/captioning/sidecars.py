"""Sidecar files: the caption of `cats/a.jpg` in the text file `cats/a.txt`, the format that diffusion trainers read.

Each file is written under a temporary name and then renamed, so that it always has its old or its new contents. If a job
that appends captions to files is killed and continued, it must not append a caption twice. It therefore records in its
journal (`jobs.Journal`) what it is about to do before it changes a file, with digests of the old and the new contents:

    journal         {"image": "a.jpg", "pred_output": "a cat", "sidecar": {"before": "5f3a...", "after": "c071..."}}

    digest of the file
        "before"    the file was not written: write it
        "after"     the file was written: nothing to do
        any other   another program has changed the file since: leave it alone

The caller does this for each batch::

    plans = [writer.plan(image, text) for image, text in batch]
    journal.append(...)                   # with the plans
    for ...: writer.write(image, text, plan)

When a job continues, the caller repeats `write` for each row of the journal.
"""

from __future__ import annotations

import codecs
import errno
import hashlib
import os
import re
import sys
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict

from llava_simplified.data.image_folder import split_shard_name
from llava_simplified.data.names import windows_problem
from llava_simplified.foreign_files import read_small_file
from llava_simplified.jobs import atomic_file, remove_temporary_files

SIDECAR_SUFFIXES = (".txt", ".caption")
# The journal of a job that writes sidecar files. The names of the job's other files begin with this name. They are
# hidden files, so that no program that reads the folder mistakes them for data.
SIDECAR_JOURNAL = ".llava-caption.jsonl"
TAGS_SUFFIX = ".txt"  # suffix of the file beside an image that contains its {tags}
EXISTING_POLICIES = ("skip", "overwrite", "append", "prepend")

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Errors that concern one file or folder only. Other errors, such as a full disk, would occur for all files that follow.
_ERRORS_OF_ONE_FILE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP),
}


class SidecarError(ValueError):
    """A sidecar file that cannot be read or written."""


@dataclass(frozen=True)
class SidecarOptions:
    """Where and how sidecar files are written.

    Attributes:
        suffix: Suffix of the files, ".txt" or ".caption".
        existing: What to do with an image that already has such a file: "skip" the image, "overwrite" the file, or
            "append" or "prepend" the caption to its text.
        output: Folder for the files, with the same subfolders as the images; None puts them beside the images.
        separator: Text between the existing text and the caption.
    """

    suffix: str = ".txt"
    existing: Literal["skip", "overwrite", "append", "prepend"] = "skip"
    output: str | None = None
    separator: str = ", "


class SidecarPlan(TypedDict):
    """Digests of a file's contents before and after it is written; `before` is None if there is no file yet."""

    before: str | None
    after: str


# ---- contents ----


class TextForm(NamedTuple):
    """How a text file is encoded.

    Attributes:
        byte_order_mark: The byte order mark at its beginning; empty for none.
        codec: Name of the codec.
        newline: The line end, "\\n" or "\\r\\n".
    """

    byte_order_mark: bytes = b""
    codec: str = "utf-8"
    newline: str = "\n"


def decode_sidecar(data: bytes, path: Path) -> tuple[str, TextForm]:
    """Return the text of a sidecar file, with its line ends unchanged, and its form.

    Raises:
        SidecarError: The file is neither UTF-8, nor UTF-16 with a byte order mark.
    """
    mark, codec = b"", "utf-8"
    for known_mark, known_codec in _BYTE_ORDER_MARKS:
        if data.startswith(known_mark):
            mark, codec = known_mark, known_codec
    try:
        text = data[len(mark) :].decode(codec)
    except UnicodeDecodeError as error:
        raise SidecarError(f"{path}: not {codec.upper()} ({error}); save it as UTF-8") from None
    newline = "\r\n" if "\r\n" in text else "\n"
    return text, TextForm(mark, codec, newline)


def join_texts(existing: str, caption: str, options: SidecarOptions, newline: str = "\n") -> str:
    """Return an existing text with a caption appended or prepended.

    Appending keeps the white space at the end of the existing text, such as its last line break.
    """
    caption = caption.replace("\n", newline)
    separator = options.separator.replace("\n", newline)
    if options.existing == "append":
        body = existing.rstrip()
        line_end = existing[len(body) :]
        return body + _continuation(body, separator, caption) + line_end
    body = existing.lstrip()
    return caption + separator + body


def _continuation(body: str, separator: str, caption: str) -> str:
    """Return the text to append to a body: separator and caption, without a comma that the body already ends with."""
    visible = separator.rstrip()
    if visible and body.endswith(visible):
        separator = separator[len(visible) :]
    return separator + caption


def new_contents(
    existing: bytes | None, caption: str, options: SidecarOptions, path: Path
) -> bytes:
    """Return the bytes of a sidecar file after a caption was written to it.

    Raises:
        SidecarError: The existing file cannot be decoded, or the caption cannot be encoded.
    """
    form = TextForm()
    text = caption + "\n"
    if existing and options.existing in ("append", "prepend"):
        old_text, form = decode_sidecar(existing, path)
        # Keep the encoding and line ends of the existing file, even if it contains only white space.
        text = caption.replace("\n", form.newline) + form.newline
        if old_text.strip():
            text = join_texts(old_text, caption, options, form.newline)
    try:
        return form.byte_order_mark + text.encode(form.codec)
    except UnicodeEncodeError as error:
        raise SidecarError(
            f"{path}: the caption cannot be encoded as {form.codec.upper()} ({error})"
        ) from None


def read_tags(image: str, image_folder: str | Path, *, strict: bool = True) -> str:
    """Return the contents of the .txt file beside an image, for {tags}; empty if there is no such file.

    White space and commas at both ends are removed.

    Args:
        image: Name of the image, relative to the image folder. An image in a shard has no such file.
        image_folder: The image folder.
        strict: If False, bytes that are not UTF-8 are replaced, and files that cannot be read count as missing.

    Raises:
        SidecarError: `strict` is True, and the file cannot be read.
    """
    file_name, key = split_shard_name(image)
    if key is not None:
        return ""
    # Tags are always in the .txt file, even if captions are written to files with another suffix.
    path = (Path(image_folder) / file_name).with_suffix(TAGS_SUFFIX)
    try:
        data = _read(path)
    except (OSError, SidecarError) as error:
        if strict:
            raise SidecarError(str(error)) from None
        return ""
    if data is None:
        return ""
    try:
        text, _ = decode_sidecar(data, path)
    except SidecarError:
        if strict:
            raise
        text = data.decode(errors="replace")
    return text.strip().strip(",").strip()


# ---- files ----


class SidecarWriter:
    """Writes the sidecar files of a folder of images.

    Args:
        options: Where and how to write.
        image_folder: Folder that the names are relative to.
        images: Names of all images of the job, to find images that would share a sidecar file (a.jpg and a.png).
    """

    def __init__(
        self, options: SidecarOptions, image_folder: str | Path, images: Iterable[str]
    ) -> None:
        self.options = options
        self._image_folder = Path(image_folder)
        self._conflicts = self._find_conflicts(images)
        self._folder_problems: dict[Path, str] = {}

    def path(self, image: str) -> Path:
        """Return the sidecar file of an image.

        Raises:
            SidecarError: The image cannot have one.
        """
        file_name, key = split_shard_name(image)
        file = self._image_folder / file_name
        folder = self._image_folder
        if self.options.output is not None:
            # Mirror the subfolders of the images in the output folder.
            folder = Path(self.options.output)
            if not file.is_relative_to(self._image_folder):
                raise SidecarError(
                    f"{file} is not in the image folder {self._image_folder}, so its place below --output is unknown"
                )
            file = folder / file.relative_to(self._image_folder)
        if key is None:
            return file.with_suffix(self.options.suffix)
        if self.options.output is None:
            raise SidecarError(
                "an image in a shard cannot have a file beside it; pass --output with a folder"
            )
        # The key comes from the archive, so it is untrusted, and must not lead out of the folder.
        parts = re.split(r"[/\\]", key)
        if ".." in parts or key.startswith("/") or re.match("[A-Za-z]:", key):
            raise SidecarError(
                f"the key {key!r} is not safe as a file name; it must be a relative path without '..'"
            )
        if sys.platform == "win32":
            for part in (*parts[:-1], parts[-1] + self.options.suffix):
                problem = windows_problem(part)
                if problem:
                    raise SidecarError(
                        f"the key {key!r} cannot be a file name on Windows: {problem}"
                    )
        return file.with_suffix("").joinpath(*parts[:-1], parts[-1] + self.options.suffix)

    def is_kept(self, image: str) -> bool:
        """Return whether an image already has a sidecar file, and is skipped for that reason."""
        if self.options.existing != "skip":
            return False
        try:
            return os.path.lexists(self.path(image))
        except SidecarError:
            return False

    def existing_text(self, image: str) -> str:
        """Return the text of an image's sidecar file for display; empty if it cannot be read."""
        path = self.path(image)
        try:
            return decode_sidecar(_read(path) or b"", path)[0].strip()
        except SidecarError:
            return ""

    def conflict(self, image: str) -> str:
        """Return a message if an image would share its sidecar file with another image; else return ""."""
        return self._conflicts.get(image, "")

    def problem(self, image: str) -> str:
        """Return why no sidecar file can be written for an image; empty if no problem was found."""
        if self.conflict(image):
            return self.conflict(image)
        try:
            path = self.path(image)
        except SidecarError as error:
            return str(error)
        if self.options.output is None and path == self._image_folder / image:
            return f"the sidecar file would replace the image itself, {path}"
        # Something else has this name: a folder, a pipe or a broken link.
        if os.path.lexists(path) and not path.is_file():
            return f"{path} is not a regular file"
        # Check each folder only once.
        if path.parent not in self._folder_problems:
            self._folder_problems[path.parent] = folder_problem(path.parent)
        return self._folder_problems[path.parent]

    def plan(self, image: str, text: str) -> SidecarPlan | None:
        """Return what writing a text will change, for the journal.

        Returns:
            The plan; None if existing files are skipped, and another program has written this file in the meantime.

        Raises:
            SidecarError: The existing file cannot be read, or the text cannot be added to it.
        """
        path = self.path(image)
        existing = _read(path)
        if existing is not None and self.options.existing == "skip":
            return None
        # The digest of the new contents shows after a crash whether the file was written.
        after = new_contents(existing, text, self.options, path)
        return {"before": _digest(existing), "after": _hash(after)}

    def write(self, image: str, text: str, plan: SidecarPlan, *, resumed: bool = False) -> bool:
        """Write a sidecar file, unless it is written already.

        Args:
            image: Name of the image.
            text: The finished caption.
            plan: The result of `plan` for this image and text.
            resumed: True if a killed process may have left a temporary file, which is removed then.

        Returns:
            False if another program has changed the file since `plan` was called. Nothing is written then.

        Raises:
            SidecarError: The file cannot be written.
        """
        path = self.path(image)
        existing = _read(path)
        digest = _digest(existing)
        # Nothing to do: the file was already written before the process was killed.
        if digest == plan["after"]:
            return True
        # The contents are neither the old nor the new ones, so another program has changed the file. Keep it.
        if digest != plan["before"]:
            return False
        data = new_contents(existing, text, self.options, path)
        try:
            _replace_file(path, data, resumed)
        except OSError as error:
            raise _as_sidecar_error(error, path) from None
        return True

    def _find_conflicts(self, images: Iterable[str]) -> dict[str, str]:
        """Return the images that would share a sidecar file with another image, and a message for each."""
        # Path -> the first image with it; and path -> all its images, for paths that occur several times.
        first: dict[str, str] = {}
        sharing: dict[str, list[str]] = {}
        for image in images:
            try:
                path = _comparable(self.path(image))
            except SidecarError:
                continue  # reported by `problem`
            if first.setdefault(path, image) != image:
                sharing.setdefault(path, [first[path]]).append(image)
        conflicts: dict[str, str] = {}
        for names in sharing.values():
            reason = (
                f"{' and '.join(names)} would share the sidecar file {self.path(names[0]).name}; "
                "rename them so that their names differ before the suffix"
            )
            conflicts.update(dict.fromkeys(names, reason))
        return conflicts


def _comparable(path: Path) -> str:
    """Normalize a path for comparison: some file systems ignore case and Unicode composition."""
    if sys.platform in ("win32", "darwin"):
        return unicodedata.normalize("NFC", str(path)).casefold()
    return str(path)


def folder_problem(folder: Path) -> str:
    """Return the reason why no file can be created in a folder, or "" if there is none.

    The folder itself may not exist yet.
    """
    # Check the nearest parent folder that exists.
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        return f"{existing} is not a folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"the folder {existing} is not writable; pass --output with another folder"
    return ""


def _read(path: Path) -> bytes | None:
    """Return the contents of a sidecar file, None if there is none.

    Raises:
        SidecarError: The file cannot be read or is too large, or is a folder, a pipe or a device.
        OSError: An error that would also occur for other files.
    """
    try:
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "a pipe or a device"
            raise SidecarError(f"{path}: expected a text file, but this is {kind}")
        return read_small_file(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _as_sidecar_error(error, path) from None
    except SidecarError:
        raise
    except ValueError as error:
        raise SidecarError(str(error)) from None


def _replace_file(path: Path, data: bytes, resumed: bool) -> None:
    """Write a file atomically. A link stays a link, and a file keeps its permissions."""
    # Renaming onto a link would replace the link, so write to the file that it points to.
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    if resumed:
        remove_temporary_files(target)
    permissions = target.stat().st_mode if target.exists() else None
    with atomic_file(target) as part:
        part.write_bytes(data)
    if permissions is not None and target.stat().st_mode != permissions:
        target.chmod(permissions)


def _as_sidecar_error(error: OSError, path: Path) -> OSError | SidecarError:
    """Convert an error that concerns this file only to a `SidecarError`, so that the job continues.

    Other errors are returned unchanged.
    """
    if error.errno in _ERRORS_OF_ONE_FILE:
        return SidecarError(f"{path}: {error.strerror}")
    return error


def _digest(data: bytes | None) -> str | None:
    return None if data is None else _hash(data)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

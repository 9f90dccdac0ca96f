"""Reference captions from a file, and which of them belong to an image."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from llava_simplified.data.names import NameIndex, name_parts
from llava_simplified.data.records import open_records
from llava_simplified.prepare.source_rows import Columns, ParseIssues
from llava_simplified.prepare.sources import read_source

# COCO's names contain the image id: COCO_val2014_000000000042.jpg, 000000000042.jpg.
_COCO_NAME = re.compile(r"(?:COCO_\w+_)?0*(\d+)")
_COCO_DIGITS = 12
_HALF_SURROGATE = re.compile("[\ud800-\udfff]")


def replace_half_surrogates(text: str) -> str:
    """Replace half surrogate pairs: JSON can contain them, but they can be neither printed nor written as UTF-8."""
    return _HALF_SURROGATE.sub("\ufffd", text)


class ReferenceMatch(NamedTuple):
    """The references of an image, the rule that found them, and the name or id that they have in the file."""

    captions: tuple[str, ...]
    rule: Literal["exact", "suffix", "image id", "none"]
    key: str


_NO_MATCH = ReferenceMatch((), "none", "")


class References:
    """Reference captions by image.

    Args:
        by_name: Captions by image name. They are found by the rule of `data/names.py`.
        by_id: Captions by image id, as text.
        names: The image names by id.
        counts: Problems of the file, by description.
    """

    def __init__(
        self,
        by_name: Mapping[str, Sequence[str]],
        by_id: Mapping[str, Sequence[str]] | None = None,
        names: Mapping[str, str] | None = None,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        self.by_name = by_name
        self.by_id = by_id or {}
        self.counts = dict(counts or {})
        self._names = dict(names or {})
        self._ids = dict(zip(self._names.values(), self._names))
        self._index = NameIndex(by_name)

    def name_of(self, image_id: str) -> str | None:
        """Return the file name of an image id, or None."""
        return self._names.get(image_id)

    def find(self, image: str, image_id: str | None = None) -> ReferenceMatch:
        """Return the references of an image; without captions if there are none.

        Args:
            image: Its name.
            image_id: Its id, if it is known, as in a file of COCO results. Then the name does not count.

        Raises:
            AmbiguousNameError: The name matches several images.
        """
        if image_id is not None:
            if image_id not in self.by_id:
                return _NO_MATCH
            return ReferenceMatch(tuple(self.by_id[image_id]), "image id", image_id)
        match = self._index.find(image)
        if match is not None:
            # References that have an id are known by it, so that both ways to them count as one.
            key = self._ids.get(match.name, match.name)
            return ReferenceMatch(tuple(self.by_name[match.name]), match.rule, key)
        image_id = self._id_in_name(image)
        if image_id is None:
            return _NO_MATCH
        return ReferenceMatch(tuple(self.by_id[image_id]), "image id", image_id)

    def _id_in_name(self, image: str) -> str | None:
        """Return the id of an image whose name is its id, or contains it as COCO's names do."""
        parts = name_parts(image)
        if not parts or "#" in parts[-1]:  # a number in `shard.tar#key` is that of the shard
            return None
        stem = PurePosixPath(parts[-1]).stem
        candidates = [stem]  # an id can be any text
        numbered = _COCO_NAME.fullmatch(stem)
        if numbered is not None:
            candidates.append(numbered[1])
        for image_id in candidates:
            if image_id not in self.by_id:
                continue
            name = self._names.get(image_id)
            if name is None:  # the file gives no names: the id is all there is
                return image_id
            # `cats/1.jpg` is not the image with id 1 if that one is called `dogs/1.jpg` or `dogs/7.jpg`. COCO numbers
            # its images in 12 digits, and its names differ between the years.
            is_coco_name = stem.startswith("COCO_") or len(stem) == _COCO_DIGITS
            # With the same base name, the rule for names has already refused it: the folders differ.
            if numbered is not None and is_coco_name and PurePosixPath(name).stem != stem:
                return image_id
        return None

    def unused(self, used: Iterable[str]) -> list[str]:
        """Return the names, or else the ids, of the images with references that are not in `used`.

        Args:
            used: Keys of matches.
        """
        # In the order of the file; references that have a name and an id count once.
        unused = dict.fromkeys(self.by_id)
        for name in self.by_name:
            unused[self._ids.get(name, name)] = None
        for key in used:
            unused.pop(key, None)
        return [self._names.get(key, key) for key in unused]


def read_references(path: Path) -> References:
    """Read a COCO caption file, records, or any other source of captions.

    Args:
        path: `{"images": [...], "annotations": [...]}`; records in any form that `llava train` reads: their
            responses are the references of their images; or what `llava convert` reads, such as rows of
            `{"image": ..., "caption": ...}`.

    Raises:
        ValueError: The file has neither form, or gives one id or one name to two images.
    """
    content: object = None
    try:
        # Caption files have a few hundred megabytes at most. Records in other formats are read row by row.
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--references: {path} cannot be read: {error}") from None
    if isinstance(content, dict) and "annotations" in content:
        return _read_coco(content, path)
    try:
        return _read_records(path)
    except ValueError as error:
        references = _read_captions(path)
        if references is not None:
            return references
        raise ValueError(
            f"--references: {path} is not a COCO caption file "
            '({"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}), and '
            f"not a file of records: {error} Convert other formats with `llava convert`."
        ) from None


def _read_coco(content: Mapping[str, object], path: Path) -> References:
    """Read a COCO caption file."""
    by_id: dict[str, list[str]] = {}
    names: dict[str, str] = {}
    num_without_text = 0
    try:
        for annotation in _list(content["annotations"]):
            caption = annotation["caption"]
            captions = by_id.setdefault(str(annotation["image_id"]), [])
            if isinstance(caption, str) and caption.strip():
                captions.append(replace_half_surrogates(caption))
            else:  # null or empty
                num_without_text += 1
        for image in _list(content.get("images", [])):
            _add_name(names, str(image["id"]), image["file_name"])
        _check_names(names)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--references: {path} is not a COCO caption file ({type(error).__name__}: {error}). "
            'It needs {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}.'
        ) from None
    except ValueError as error:
        raise ValueError(f"--references: {path}: {error}") from None
    # An image whose annotations are all empty has no references.
    with_captions = {image_id: captions for image_id, captions in by_id.items() if captions}
    by_name = {}
    num_without_caption = 0
    for image_id, name in names.items():
        if image_id in with_captions:
            by_name[name] = with_captions[image_id]
        else:
            num_without_caption += 1
    counts = {
        "annotations without a text": num_without_text,
        "images without a caption": num_without_caption,
    }
    return References(by_name, with_captions, names, counts)


def _list(value: object) -> list[dict[str, object]]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, got {type(value).__name__}")
    return value


def _add_name(names: dict[str, str], image_id: str, name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"'file_name' of image {image_id} must be a string, not {name!r}")
    known = names.setdefault(image_id, name)
    if known != name:
        raise ValueError(f"the image id {image_id} belongs to two images, {known!r} and {name!r}.")


def _check_names(names: Mapping[str, str]) -> None:
    ids: dict[str, str] = {}
    for image_id, name in names.items():
        known = ids.setdefault(name, image_id)
        if known != image_id:
            raise ValueError(f"{name!r} is listed with two image ids, {known} and {image_id}.")


def _read_records(path: Path) -> References:
    """Read the responses of a file of records as references."""
    by_name: dict[str, list[str]] = {}
    num_without_image = 0
    num_without_caption = 0
    for record in open_records(path):
        captions = [replace_half_surrogates(text) for text in record.responses if text.strip()]
        # A conversation about several images says nothing about each of them.
        if len(record.images) != 1:
            num_without_image += 1
        elif not captions:
            num_without_caption += 1
        else:
            # Several rows of one image: all of their captions are references.
            known = by_name.setdefault(record.images[0], [])
            known += [text for text in captions if text not in known]
    counts = {
        "records with no image or several": num_without_image,
        "records without a caption": num_without_caption,
    }
    return References(by_name, counts=counts)


def _read_captions(path: Path) -> References | None:
    """Read any source of captions, as `llava convert` does; return None if the file is none."""
    by_name: dict[str, list[str]] = {}
    issues = ParseIssues()
    try:
        for row in read_source(str(path), issues, Columns()):
            known = by_name.setdefault(row.image or row.url, [])
            for text in map(replace_half_surrogates, row.captions):
                if text not in known:
                    known.append(text)
    except (OSError, ValueError):
        return None
    by_name.pop("", None)
    with_captions = {name: captions for name, captions in by_name.items() if captions}
    if not with_captions:
        return None
    counts = {
        **issues.counts,
        "images without a caption": len(by_name) - len(with_captions),
    }
    return References(with_captions, counts=counts)

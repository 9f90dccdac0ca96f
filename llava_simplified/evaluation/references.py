"""Read reference captions from a file, and find those of an image."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from llava_simplified.data.names import NameIndex, name_parts
from llava_simplified.data.records import open_records
from llava_simplified.foreign_files import error_reason
from llava_simplified.prepare.source_rows import Columns, ParseIssues
from llava_simplified.prepare.sources import read_source

# COCO's names contain the image id: COCO_val2014_000000000042.jpg, 000000000042.jpg.
_COCO_NAME = re.compile(r"(?:COCO_\w+_)?0*(\d+)")
_COCO_DIGITS = 12
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def replace_lone_surrogates(text: str) -> str:
    """Replace lone surrogates with U+FFFD.

    A lone surrogate is half a UTF-16 pair. JSON can contain it, but it can be neither printed nor written as UTF-8.
    """
    return _LONE_SURROGATE.sub("\ufffd", text)


class ReferenceMatch(NamedTuple):
    """The references of an image, the rule that found them, and the image's id (or else its name) in the file."""

    captions: tuple[str, ...]
    rule: Literal["exact", "suffix", "image id", "none"]
    key: str


_NO_MATCH = ReferenceMatch((), "none", "")


class References:
    """Reference captions by image.

    Args:
        by_name: Captions by image name. Names are matched by the rules of `data/names.py`.
        by_id: Captions by image id, as text.
        names: Image names by id.
        counts: Numbers of entries of the file that cannot be used, by the reason.
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
        """Return the references of an image. If there are none, the match has the rule "none" and no captions.

        Args:
            image: Name of the image.
            image_id: Id of the image if it is known, as in a file of COCO results. The name is then ignored.

        Raises:
            AmbiguousNameError: The name matches several images.
        """
        if image_id is not None:
            if image_id not in self.by_id:
                return _NO_MATCH
            return ReferenceMatch(tuple(self.by_id[image_id]), "image id", image_id)
        match = self._index.find(image)
        if match is not None:
            # Use the id as the key if there is one, so that a match by name and a match by id have the same key.
            key = self._ids.get(match.name, match.name)
            return ReferenceMatch(tuple(self.by_name[match.name]), match.rule, key)
        image_id = self._id_in_name(image)
        if image_id is None:
            return _NO_MATCH
        return ReferenceMatch(tuple(self.by_id[image_id]), "image id", image_id)

    def _id_in_name(self, image: str) -> str | None:
        """Return the image id in a file name: the name without its suffix, or the number in a COCO name.

        Returns:
            The id, or None if no id of the file matches.
        """
        parts = name_parts(image)
        # Do not search `shard.tar#key` for an id: a number in it can be the number of the shard.
        if not parts or "#" in parts[-1]:
            return None
        stem = PurePosixPath(parts[-1]).stem
        candidates = [stem]  # an id can be any string
        numbered = _COCO_NAME.fullmatch(stem)
        if numbered is not None:
            candidates.append(numbered[1])
        for image_id in candidates:
            if image_id not in self.by_id:
                continue
            name = self._names.get(image_id)
            if name is None:  # the file has no names that could contradict the id
                return image_id
            # The same number alone is not enough: `cats/1.jpg` is not the image with id 1 if the file calls that
            # image `dogs/7.jpg`. Only in COCO's names, with 12 digits, is the number always the id. COCO's releases
            # of 2014 and 2017 name the same image differently, so these names need not be equal.
            is_coco_name = stem.startswith("COCO_") or len(stem) == _COCO_DIGITS
            # If the base names are equal, the match by name has failed because the folders differ: another image.
            if numbered is not None and is_coco_name and PurePosixPath(name).stem != stem:
                return image_id
        return None

    def unused(self, used: Iterable[str]) -> list[str]:
        """Return the names, or else the ids, of the images with references that are not in `used`.

        Args:
            used: Keys of matches.
        """
        # A dict is used as an ordered set. References with a name and an id are added once, by their id.
        unused = dict.fromkeys(self.by_id)
        for name in self.by_name:
            unused[self._ids.get(name, name)] = None
        for key in used:
            unused.pop(key, None)
        return [self._names.get(key, key) for key in unused]


def read_references(path: Path) -> References:
    """Read a COCO caption file, records, or any other source of captions.

    Args:
        path: One of three kinds of files:
            - a COCO caption file, `{"images": [...], "annotations": [...]}`;
            - records in any form that `llava train` reads, whose responses are the references;
            - any source that `llava convert` reads, such as rows of `{"image": ..., "caption": ...}`.

    Raises:
        ValueError: The file is of none of these kinds, or gives one id or one name to two images.
    """
    content: object = None
    try:
        # COCO caption files have a size of a few hundred megabytes at most, so parse them as a whole. Other formats
        # are read row by row below.
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
            f"not a file of records ({error_reason(error)}). Convert other formats with `llava convert`."
        ) from None


def _read_coco(content: Mapping[str, object], path: Path) -> References:
    """Read a COCO caption file."""
    by_id: dict[str, list[str]] = {}
    names: dict[str, str] = {}
    num_without_text = 0
    try:
        for annotation in _check_list(content["annotations"]):
            caption = annotation["caption"]
            captions = by_id.setdefault(str(annotation["image_id"]), [])
            if isinstance(caption, str) and caption.strip():
                captions.append(replace_lone_surrogates(caption))
            else:  # null or empty
                num_without_text += 1
        for image in _check_list(content.get("images", [])):
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


def _check_list(value: object) -> list[dict[str, object]]:
    """Return the value if it is a list; otherwise raise TypeError."""
    if not isinstance(value, list):
        raise TypeError(f"expected a list, got {type(value).__name__}")
    return value


def _add_name(names: dict[str, str], image_id: str, name: object) -> None:
    """Add the file name of an image; raise ValueError if its id already belongs to another name."""
    if not isinstance(name, str):
        raise TypeError(f"'file_name' of image {image_id} must be a string, not {name!r}")
    known = names.setdefault(image_id, name)
    if known != name:
        raise ValueError(
            f"the image id {image_id} belongs to two images, {known!r} and {name!r}; each image needs its own id."
        )


def _check_names(names: Mapping[str, str]) -> None:
    """Raise ValueError if two ids have the same file name."""
    ids: dict[str, str] = {}
    for image_id, name in names.items():
        known = ids.setdefault(name, image_id)
        if known != image_id:
            raise ValueError(
                f"{name!r} is listed with two image ids, {known} and {image_id}; each image must have one id."
            )


def _read_records(path: Path) -> References:
    """Read the responses of a file of records as references."""
    by_name: dict[str, list[str]] = {}
    num_not_one_image = 0
    num_without_caption = 0
    for record in open_records(path):
        captions = [replace_lone_surrogates(text) for text in record.responses if text.strip()]
        # A response about several images is not a caption of any single one.
        if len(record.images) != 1:
            num_not_one_image += 1
        elif not captions:
            num_without_caption += 1
        else:
            # If an image has several rows, the captions of all of them are its references.
            known = by_name.setdefault(record.images[0], [])
            known += [text for text in captions if text not in known]
    counts = {
        "records with no image or several": num_not_one_image,
        "records without a caption": num_without_caption,
    }
    return References(by_name, counts=counts)


def _read_captions(path: Path) -> References | None:
    """Read a source of captions as `llava convert` does; return None if the file is not such a source."""
    by_name: dict[str, list[str]] = {}
    issues = ParseIssues()
    try:
        for row in read_source(str(path), issues, Columns()):
            known = by_name.setdefault(row.image or row.url, [])
            for text in map(replace_lone_surrogates, row.captions):
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

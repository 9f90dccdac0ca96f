"""Read prediction files.

A row is what `llava predict` and `llava caption` write, or a COCO result:

    {"index": 0, "image": "0.jpg", "instruction": "Describe it.", "gt_caption": "a cat", "pred_output": "a dog"}
    {"image_id": 42, "caption": "a dog"}

Every row is either scored, or counted in `Predictions.counts`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llava_simplified.data.images import read_image_bytes
from llava_simplified.data.names import AmbiguousNameError, name_parts
from llava_simplified.data.records import open_records
from llava_simplified.data.rows import open_rows
from llava_simplified.evaluation.metrics import Sample, normalize_caption
from llava_simplified.evaluation.references import (
    ReferenceMatch,
    References,
    replace_lone_surrogates,
)


@dataclass
class Predictions:
    """The images of a prediction file that have references, and counts of everything else.

    Attributes:
        samples: Images with captions and references, in the order of their first rows.
        counts: Number of images, references or texts by a description: how references were found, why images are not
            scored, and so on.
        notes: Sentences for the reader of the scores, each with an example.
    """

    samples: list[Sample]
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Row:
    """One row. A COCO result has an image id and no references; other rows may contain their own references."""

    index: str
    image: str
    instruction: str
    caption: str
    own_references: tuple[str, ...]
    image_id: str | None = None


def read_predictions(path: Path, references: References | None = None) -> Predictions:
    """Read a prediction file, and group the rows (one per trial) by image.

    Args:
        path: A `.json`, `.jsonl` or `.parquet` file of rows. Rows with the same `index` and `image` are trials of one
            image. `image` is null for a text-only record.
        references: Reference captions (see `read_references`). They replace `gt_caption` (a string or a list of
            strings) in the rows. Images without references are counted, but not scored.

    Raises:
        ValueError: A row is not a valid prediction, a name matches several images, or no image has references. The message
            names the file, the row and the problem.
    """
    rows = open_rows(path)
    reader = _Reader(path, references)
    for number in range(len(rows)):
        reader.add(rows[number], f"{path} row {number}")
    return reader.finish()


class _Reader:
    """Collects rows, and counts what is not scored."""

    def __init__(self, path: Path, references: References | None) -> None:
        self.path = path
        self.references = references
        # (index, image name) -> the captions so far.
        self.samples: dict[tuple[str, str], Sample] = {}
        # (image name, image id) -> result of `References.find`.
        self.matches: dict[tuple[str, str | None], ReferenceMatch] = {}
        # Key of references -> the image that they were used for, see `_check_first_use`.
        self.image_of_reference: dict[str, str] = {}
        # (index, image name) of an image without references -> place of its first row, for messages.
        self.without_references: dict[tuple[str, str], str] = {}
        self.num_lone_surrogates = 0

    def add(self, value: object, where: str) -> None:
        """Add a row. Several rows of an image become one sample with several captions."""
        row = self._parse(value, where)
        key = (row.index, row.image)
        row_references = self._find_references(row, where)
        if not row_references:
            # `llava predict` writes an empty reference for a record without a response.
            self.without_references.setdefault(key, where)
            return
        previous = self.samples.get(key)
        captions: tuple[str, ...] = (row.caption,)
        if previous is not None:
            # Trials of one image are scored together, against the same references.
            if previous.references != row_references:
                raise ValueError(
                    f"{where}: the references differ from the references in an earlier row of index "
                    f"{row.index}, image {row.image!r}. All rows of an image need the same references."
                )
            captions = (*previous.captions, row.caption)
        self.samples[key] = Sample(
            index=row.index,
            image=row.image,
            instruction=row.instruction,
            references=row_references,
            captions=captions,
        )

    def _parse(self, row: object, where: str) -> _Row:
        """Check a row of either form; raise ValueError if it is not a prediction."""
        if not isinstance(row, dict):
            raise ValueError(
                f"{where}: a prediction must be a JSON object, got {type(row).__name__}."
            )
        # Rows of `llava predict` have `pred_output`; results in COCO's format have `image_id` and `caption`.
        if "pred_output" not in row and "image_id" in row:
            return self._parse_coco_result(row, where)
        caption = self._read_text(row, "pred_output", where)
        # A record without an image has an empty name here.
        image = ""
        if "image" not in row or row["image"] is not None:
            image = _read_string(row, "image", where)
        # A row without an index is identified by its image.
        index = row.get("index")
        if index is None:
            index = image
        if index == "":
            raise ValueError(
                f"{where}: the row has neither an 'image' nor an 'index'; add the 'index' of its record, which is the same for all captions of a record."
            )
        return _Row(
            index=str(index),
            image=image,
            instruction=self._replace_lone_surrogates(str(row.get("instruction") or "")),
            caption=caption,
            own_references=() if self.references else self._own_references(row, where),
        )

    def _parse_coco_result(self, row: Mapping[str, object], where: str) -> _Row:
        """Check a row of the form {"image_id", "caption"}."""
        if self.references is None:
            raise ValueError(
                f"{where}: this is a file of COCO results ('image_id' and 'caption'), which "
                "contains no references. Pass the COCO caption file that they belong to, for "
                "example --references captions_val2014.json."
            )
        image_id = row["image_id"]
        if isinstance(image_id, bool) or not isinstance(image_id, (int, str)):
            raise ValueError(
                f"{where}: 'image_id' must be an integer or a string, but it is {image_id!r}."
            )
        caption = self._read_text(row, "caption", where)
        # The report shows the image only if its file name is known.
        name = self.references.name_of(str(image_id))
        return _Row(str(image_id), name or str(image_id), "", caption, (), str(image_id))

    def _read_text(self, row: Mapping[str, object], key: str, where: str) -> str:
        return self._replace_lone_surrogates(_read_string(row, key, where))

    def _replace_lone_surrogates(self, text: str) -> str:
        replaced = replace_lone_surrogates(text)
        self.num_lone_surrogates += replaced != text
        return replaced

    def _own_references(self, row: Mapping[str, object], where: str) -> tuple[str, ...]:
        """Return the references in the row's `gt_caption`; none if the record had no response."""
        value = row.get("gt_caption")
        if value is None:
            return ()
        references: list[str] = []
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str):
                raise ValueError(
                    f"{where}: 'gt_caption' must be a caption or a list of captions, but it is "
                    f"{value!r}. To use a file of reference captions instead, pass --references."
                )
            # Records may have blank responses. A blank reference would match an empty caption.
            if text.strip():
                references.append(self._replace_lone_surrogates(text))
        return tuple(references)

    def _find_references(self, row: _Row, where: str) -> tuple[str, ...]:
        """Return the references of a row: its `gt_caption`, or the matching captions of the file of references."""
        if self.references is None:
            return row.own_references
        # Look up each image only once, although it has a row for each trial.
        key = (row.image, row.image_id)
        match = self.matches.get(key)
        if match is None:
            try:
                match = self.references.find(row.image, row.image_id)
            except AmbiguousNameError as error:
                raise ValueError(f"{where}: --references: {error}") from None
            self.matches[key] = match
            self._check_first_use(match, row.image, where)
        return match.captions

    def _check_first_use(self, match: ReferenceMatch, image: str, where: str) -> None:
        """Raise ValueError if another image matched the same references, because one of the matches is wrong."""
        # `finish` reports images without references.
        if not match.captions:
            return
        first = self.image_of_reference.setdefault(match.key, image)
        if name_parts(first) != name_parts(image):
            raise ValueError(
                f"{where}: --references: {first!r} and {image!r} are different images, but both "
                f"match the references of {match.key!r}. Use names that contain the folder, in the "
                "predictions and in the references."
            )

    def finish(self) -> Predictions:
        """Return the samples, with counts and notes on everything that was not scored.

        Raises:
            ValueError: No image has references.
        """
        # Images without references are only counted, unless there are no others. Then the file of references is
        # probably the wrong one.
        if self.without_references and not self.samples:
            where = next(iter(self.without_references.values()))
            _, image = next(iter(self.without_references))
            if self.references is None:
                raise ValueError(
                    f"{where}: 'gt_caption' must be a caption or a list of captions, but no row of "
                    f"the file has one. Pass a file of reference captions with --references."
                )
            raise ValueError(
                f"{where}: --references has no caption of {image!r} or of any other image of the "
                "predictions, neither by name nor by image id. Pass the file that belongs to these "
                "images. Two names match if they are equal, or if one is the end of the other (cats/1.jpg and "
                "photos/cats/1.jpg)."
            )
        result = Predictions(list(self.samples.values()))
        if self.references is not None:
            self._describe_matches(self.references, result)
        self._describe_rest(result)
        return result

    def _describe_matches(self, references: References, result: Predictions) -> None:
        """Add counts and notes on how references were found, and on those that were not used."""
        num_matched = dict.fromkeys(_RULE_NAMES, 0)
        by_suffix = []
        used = set()
        # Count by rule, and remember which references were used.
        for (name, _), match in self.matches.items():
            if match.rule == "none":
                continue
            num_matched[match.rule] += 1
            used.add(match.key)
            if match.rule == "suffix":
                by_suffix.append(name)
        for rule, count in num_matched.items():
            result.counts[f"references matched by {_RULE_NAMES[rule]}"] = count
        # Matches by the end of the path could be wrong, so name an example that the user can check.
        if by_suffix:
            result.notes.append(
                f"references of {len(by_suffix)} images were matched by the end of the path, "
                f"for example the references of {by_suffix[0]!r}"
            )
        # References without a prediction are not an error: `llava caption --limit` captions only some images.
        unused = references.unused(used)
        result.counts["references without a prediction"] = len(unused)
        if unused:
            total = len(used) + len(unused)
            result.notes.append(
                f"the predictions cover {len(used)} of the {total} images with references; "
                f"without a prediction: {len(unused)}, for example {unused[0]!r}"
            )
        for text, count in references.counts.items():
            result.counts[text] = count
            if count:
                result.notes.append(f"--references: {count} {text}")

    def _describe_rest(self, result: Predictions) -> None:
        """Add counts and notes on images without references, and on repaired texts."""
        missing = len(self.without_references)
        result.counts["predictions without a reference"] = missing
        if missing:
            # Name one as an example.
            index, image = next(iter(self.without_references))
            result.notes.append(
                f"not scored, because they have no reference: {missing} of "
                f"{missing + len(self.samples)} images, for example {image or f'index {index}'!r}"
            )
        result.counts["texts with half a surrogate pair"] = self.num_lone_surrogates
        if self.num_lone_surrogates:
            result.notes.append(
                f"lone surrogates (half a UTF-16 pair) were replaced in {self.num_lone_surrogates} texts"
            )


# Name of each rule of `ReferenceMatch` in `counts`.
_RULE_NAMES = {
    "exact": "the whole name",
    "suffix": "the end of the path",
    "image id": "the image id",
}


def _read_string(row: Mapping[str, object], key: str, where: str) -> str:
    """Return a string of a row; raise ValueError if it is missing or of another type."""
    value = row.get(key)
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: {key!r} must be a string, got {value!r}. The row has the keys {sorted(row)}."
        )
    return value


def read_sample_images(samples: Sequence[Sample], folder: Path) -> list[bytes]:
    """Read the image files of samples, for CLIPScore.

    Raises:
        ValueError: A sample has no image, or it cannot be read.
    """
    for sample in samples:
        if not sample.image:
            raise ValueError(
                f"--clip: index {sample.index} has no image, which CLIPScore requires. Leave "
                "out --clip, or evaluate records without images separately."
            )
    return [read_image_bytes(sample.image, folder) for sample in samples]


def read_train_captions(path: Path) -> set[str]:
    """Return all responses of a training file, normalized by `normalize_caption`.

    Args:
        path: Records in any format that `llava train` supports.
    """
    captions: set[str] = set()
    for record in open_records(path):
        for response in record.responses:
            captions.add(normalize_caption(replace_lone_surrogates(response)))
    return captions

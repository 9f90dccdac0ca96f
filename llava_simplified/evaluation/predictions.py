"""Read prediction files.

A row is what `llava predict` and `llava caption` write, or a COCO result:

    {"index": 0, "image": "0.jpg", "instruction": "Describe it.", "gt_caption": "a cat", "pred_output": "a dog"}
    {"image_id": 42, "caption": "a dog"}

Every row ends as a caption that is scored, or in one of the counts of `Predictions`.
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
    replace_half_surrogates,
)


@dataclass
class Predictions:
    """The images of a prediction file that have references, and counts of everything else.

    Attributes:
        samples: Images with captions and references, in the order of their first rows.
        counts: What was found, by a short text: how references were matched, and what is not scored.
        notes: Sentences about what a reader of the scores must know, each naming an example.
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
            image. `image` is null for a record of text alone.
        references: Reference captions (see `read_references`). They replace `gt_caption` (a
            string or a list of strings) in the rows. Images without references are counted, not scored.

    Raises:
        ValueError: A row is not a valid prediction, a name matches several images, or no image has references. The message
            names file, row and problem.
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
        # By index and image name of the rows.
        self.samples: dict[tuple[str, str], Sample] = {}
        # By image name and image id: results of `References.find`.
        self.matches: dict[tuple[str, str | None], ReferenceMatch] = {}
        # The image that has used each set of references, see `_check_first_use`.
        self.image_of_reference: dict[str, str] = {}
        # Place of the first row of each image without references.
        self.without_references: dict[tuple[str, str], str] = {}
        self.num_half_surrogates = 0

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
                    f"{where}: its references differ from those in an earlier row of index "
                    f"{row.index}, image {row.image!r}."
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
        # If there is no index, the image is the key.
        index = row.get("index")
        if index is None:
            index = image
        if index == "":
            raise ValueError(
                f"{where}: without an 'image', a prediction needs an 'index' that identifies it."
            )
        return _Row(
            index=str(index),
            image=image,
            instruction=self._replace_half_surrogates(str(row.get("instruction") or "")),
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
                f"{where}: 'image_id' must be a number or a text, but it is {image_id!r}."
            )
        caption = self._read_text(row, "caption", where)
        # The report needs the image's name to show the image.
        name = self.references.name_of(str(image_id))
        return _Row(str(image_id), name or str(image_id), "", caption, (), str(image_id))

    def _read_text(self, row: Mapping[str, object], key: str, where: str) -> str:
        return self._replace_half_surrogates(_read_string(row, key, where))

    def _replace_half_surrogates(self, text: str) -> str:
        replaced = replace_half_surrogates(text)
        self.num_half_surrogates += replaced != text
        return replaced

    def _own_references(self, row: Mapping[str, object], where: str) -> tuple[str, ...]:
        """Return the references in the row's `gt_caption`; none if the record had no response."""
        value = row.get("gt_caption")
        if value is None or value == "" or value == []:
            return ()
        texts = value if isinstance(value, list) else [value]
        # An empty reference would match an empty caption.
        captions = [text for text in texts if isinstance(text, str) and text.strip()]
        if len(captions) < len(texts):
            raise ValueError(
                f"{where}: 'gt_caption' must be a caption or a list of captions, but it is "
                f"{value!r}. To use a file of reference captions instead, pass --references."
            )
        return tuple(map(self._replace_half_surrogates, captions))

    def _find_references(self, row: _Row, where: str) -> tuple[str, ...]:
        """Return the references of a row: its own ones, or those that match in the file of references."""
        if self.references is None:
            return row.own_references
        # Look up each image once. With several trials, it has several rows.
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
        # Images without references are reported elsewhere.
        if not match.captions:
            return
        first = self.image_of_reference.setdefault(match.key, image)
        if name_parts(first) != name_parts(image):
            raise ValueError(
                f"{where}: --references: {first!r} and {image!r} are different images, but both "
                f"match the references of {match.key!r}. Use names that contain the folder on both "
                "sides."
            )

    def finish(self) -> Predictions:
        """Check what was collected, and describe it.

        Raises:
            ValueError: No image has references.
        """
        # If some images have no references, count them. If none has any, the file of references is the wrong one.
        if self.without_references and not self.samples:
            where = next(iter(self.without_references.values()))
            _, image = next(iter(self.without_references))
            if self.references is None:
                raise ValueError(
                    f"{where}: 'gt_caption' must be a caption or a list of captions, but no row of "
                    f"the file has any. Pass a file of reference captions with --references."
                )
            raise ValueError(
                f"{where}: --references contains no caption of {image!r}, neither by name nor by "
                "image id, nor of any other image of the file. Names must end with the same "
                "folders."
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
        # Tell the user about matches by the end of the path, because they could be wrong.
        if by_suffix:
            result.notes.append(
                f"references of {len(by_suffix)} images were matched by the end of the path, "
                f"for example those of {by_suffix[0]!r}"
            )
        # References without a prediction are not an error: a job with --limit captions only some images.
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
        result.counts["texts with half a surrogate pair"] = self.num_half_surrogates
        if self.num_half_surrogates:
            result.notes.append(
                f"half surrogate pairs were replaced in {self.num_half_surrogates} texts"
            )


# What `counts` calls each rule of `ReferenceMatch`.
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
                f"--clip: index {sample.index} has no image, so it has no CLIPScore. Leave "
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
            captions.add(normalize_caption(replace_half_surrogates(response)))
    return captions

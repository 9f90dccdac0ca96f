"""Read captions from JSON and JSON Lines files of any size, without loading them into memory.

The supported formats of JSON, by the keys at the top level:

    COCO            {"images": [{"id", "file_name", "coco_url"}], "annotations": [{"image_id", "caption"}]}
    Karpathy split  {"images": [{"filepath", "filename", "split", "sentences": [{"raw"}]}]}
    SBU             {"image_urls": [...], "captions": [...]}: two parallel arrays
    rows            [{...}, ...], {"data": [...]} or {"rows": [...]}: records, or objects with a URL and a caption
    list of URLs    ["http://...", ...]: without captions
    by name         {"a.jpg": "a dog", "b.jpg": ["a cat", "my pet"]}: captions by image name or URL
    kohya           {"a.jpg": {"caption": "a dog", "tags": "dog, grass"}}

JSON Lines in a file with the suffix .json are recognized, and read as lines.
"""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from llava_simplified.data.chat_rows import convert_chat, is_chat
from llava_simplified.data.preference_rows import PAIR_KEYS, convert_pair, is_pair
from llava_simplified.data.records import answers_of_prediction, image_names
from llava_simplified.data.rows import BOM, scan_json
from llava_simplified.prepare.source_files import open_source, read_lines
from llava_simplified.prepare.source_rows import (
    IMAGE_NAME_PATTERN,
    SPLIT_NAME,
    URL_PATTERN,
    Columns,
    NamedColumns,
    ParseIssues,
    SourceRow,
    find_columns,
)

NOT_AN_OBJECT = "not a JSON object (skipped)"
_SAME_ID = "image with the id of a different image (skipped)"
# Keys whose arrays contain rows; "" stands for an array at the top level.
_ROW_KEYS = ("", "images", "annotations", "data", "rows")
_PARALLEL_KEYS = ("image_urls", "captions")
_COCO_URL_NAMES = ("coco_url", "flickr_url", "url")
_SNIFFED_BYTES = 1 << 20  # bytes that are read to recognize JSON Lines
# After this many annotations without a caption, a COCO file is assumed to contain boxes or key points.
_MAX_WITHOUT_CAPTION = 100


def read_json(source: str, issues: ParseIssues, columns: Columns) -> Iterator[SourceRow]:
    """Yield the rows of a JSON file in any of the formats above.

    Raises:
        ValueError: The file is not JSON, the columns of its rows cannot be determined, or its arrays do not match.
    """
    if _is_json_lines(source):
        issues.note("JSON Lines in a .json file (read as lines)", 1, source)
        yield from read_json_lines_source(source, issues, columns)
        return
    reader = _JsonReader(source, issues, columns)
    with open_source(source) as stream:
        for key, value, _, _ in scan_json(stream, source):
            yield from reader.read(key, value)
    if reader.has_early_annotations:
        # Read the file again, because a million annotations would take too much memory.
        with open_source(source) as stream:
            annotations = (
                value for key, value, _, _ in scan_json(stream, source) if key == "annotations"
            )
            yield from reader.read_early_annotations(annotations)
    yield from reader.finish()


def _is_json_lines(source: str) -> bool:
    """Return whether the first line of a file is a complete JSON object, and another object follows it."""
    with open_source(source) as stream:
        first, _, rest = stream.read(_SNIFFED_BYTES).removeprefix(BOM).partition(b"\n")
    return (
        rest.lstrip().startswith(b"{")
        and parse_object(first.decode("utf-8", "replace")) is not None
    )


class _Texts:
    """A list of texts in one block of memory: a million small strings would take a hundred megabytes more."""

    def __init__(self) -> None:
        self._data = bytearray()  # all texts in UTF-8, one after the other
        # Text i is data[ends[i]:ends[i + 1]].
        self._ends = array("Q", [0])

    def append(self, text: str) -> None:
        """Add a text at the end."""
        self._data += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._data))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> str:
        """Return the text at an index from 0."""
        return self._data[self._ends[index] : self._ends[index + 1]].decode(
            "utf-8", "surrogatepass"
        )


def _compact_id(value: object) -> int | str:
    """Return a COCO id in one form: 5 for both 5 and "5", because a number takes less memory than a text."""
    text = str(value)
    is_number = text.isascii() and text.isdigit() and (text == "0" or text[0] != "0")
    return int(text) if is_number else text


class _JsonReader:
    """Converts the values of a JSON file to rows, one at a time.

    COCO's annotations refer to an image by its id. Annotations that precede their image are read again at the end of the
    file. An id that two different images have is ambiguous, and ignored.
    """

    def __init__(self, source: str, issues: ParseIssues, columns: Columns) -> None:
        self._source = source
        self._issues = issues
        self._columns = columns
        self._number = -1  # number of the last row; -1 before the first one
        self._named: NamedColumns | None = None
        # COCO's images by their number in the file, and the number of the first image with each id.
        self._image_names = _Texts()
        self._image_urls = _Texts()
        self._is_captioned = bytearray()  # 1: an annotation names the image
        self._image_number_by_id: dict[int | str, int] = {}
        self._ambiguous: set[int | str] = set()  # ids of two different images
        self._has_captions = False  # an annotation of this file has a caption, perhaps an empty one
        # Top-level keys that no format has. A dictionary is used as a set that keeps their order.
        self._ignored: dict[str, None] = {}
        self._num_annotations = 0
        # Annotations that precede their images in the file: positions among all annotations, and row numbers.
        self._early_positions = array("Q")
        self._early_row_numbers = array("Q")
        # SBU's parallel arrays by their keys.
        self._parallel: dict[str, _Texts] = {}

    def read(self, key: str, value: Any) -> Iterator[SourceRow]:
        """Yield the rows of one value of the file; `key` is the name of the array that contains it."""
        # Collect parallel arrays for `finish`, because a URL and its caption are far apart in the file.
        if key in _PARALLEL_KEYS and not isinstance(value, dict):
            self._parallel.setdefault(key, _Texts()).append(as_text(value))
            return
        if key not in _ROW_KEYS:
            yield from self._read_by_name(key, value)
        elif not isinstance(value, dict):
            # Only a list of URLs contains anything but objects.
            self._number += 1
            row = row_from_text(value, self._number)
            if row is None:
                self._issues.note(NOT_AN_OBJECT, self._number, value)
            else:
                yield row
        elif key == "annotations":
            yield from self._read_annotation(value)
        elif key == "images" and "sentences" not in value and "id" in value:
            self._read_image(value)
        else:
            self._number += 1
            if "sentences" not in value and not is_record(value):
                self._named = columns_of_row(value, self._named, self._source, self._columns)
            yield from row_from_mapping(value, self._number, self._named, self._issues)

    def _read_by_name(self, key: str, value: Any) -> Iterator[SourceRow]:
        """Yield the row of a key that names an image. Other keys, such as COCO's info and licenses, have no rows."""
        is_url = bool(URL_PATTERN.match(key))
        if isinstance(value, dict):
            value = self._read_kohya(key, value)
        is_image_key = is_url or IMAGE_NAME_PATTERN.search(key) is not None
        if not is_image_key or not isinstance(value, str):
            self._ignored[key] = None
            if is_image_key:
                kind = "image name without a caption (skipped)"
                self._issues.note(kind, self._number + 1, key)
            return
        self._number += 1
        name, url = ("", key) if is_url else (key, "")
        yield SourceRow(self._number, name, url, (as_text(value),))

    def _read_kohya(self, key: str, value: dict[str, Any]) -> object:
        """Return the caption of an image in the metadata of kohya's scripts, or else its tags."""
        caption, tags = value.get("caption"), value.get("tags")
        if caption and tags:
            self._issues.note("tags beside a caption (not read)", self._number + 1, key)
        return caption or tags

    def _read_image(self, value: dict[str, Any]) -> None:
        """Remember an entry of COCO's `images`. Its captions follow in `annotations`, which refer to its id."""
        urls = (as_text(value.get(name)) for name in _COCO_URL_NAMES)
        url = next((url for url in urls if url), "")
        name = as_text(value.get("file_name"))
        number = len(self._image_names)
        self._image_names.append(name)
        self._image_urls.append(url)
        self._is_captioned.append(0)
        image_id = _compact_id(value["id"])
        first = self._image_number_by_id.setdefault(image_id, number)
        if first == number:
            return
        if (self._image_names[first], self._image_urls[first]) == (name, url):
            self._issues.note("image listed twice (kept once)", number, name or url)
            return
        # Two images have the same id, so it is unknown to which one a caption belongs. Skip both.
        if image_id not in self._ambiguous:
            self._ambiguous.add(image_id)
            self._issues.note(_SAME_ID, first, self._name_or_url(first))
        self._issues.note(_SAME_ID, number, name or url)

    def _name_or_url(self, number: int) -> str:
        return self._image_names[number] or self._image_urls[number]

    def _read_annotation(self, annotation: dict[str, Any]) -> Iterator[SourceRow]:
        """Yield the row of an annotation if its image has been read.

        Otherwise, remember its position, so that `read_early_annotations` can yield its row when all images are known.
        """
        self._number += 1
        self._has_captions = self._has_captions or "caption" in annotation
        if not self._has_captions and self._number + 1 >= _MAX_WITHOUT_CAPTION:
            self._raise_no_captions(annotation)
        if _compact_id(annotation.get("image_id")) in self._image_number_by_id:
            yield from self._caption_row(annotation, self._number)
        else:
            self._early_positions.append(self._num_annotations)
            self._early_row_numbers.append(self._number)
        self._num_annotations += 1

    def _raise_no_captions(self, annotation: dict[str, Any]) -> NoReturn:
        """Raise the error for COCO files with boxes or key points, which have the same structure as captions."""
        raise ValueError(
            f"{self._source}: the annotations of this COCO file have no captions. "
            f"Pass the captions_*.json file. Example of an annotation: {str(annotation)[:400]}"
        )

    def _caption_row(self, annotation: dict[str, Any], number: int) -> Iterator[SourceRow]:
        """Yield the row of an annotation, unless it is unknown to which image it belongs."""
        image_id = _compact_id(annotation.get("image_id"))
        image = self._image_number_by_id.get(image_id)
        if image is None:
            self._issues.note("annotation of an unknown image (skipped)", number, annotation)
        elif image_id in self._ambiguous:
            self._issues.note(
                "annotation with an id of several images (skipped)", number, annotation
            )
        else:
            self._is_captioned[image] = 1
            captions = (as_text(annotation.get("caption")),)
            yield SourceRow(number, self._image_names[image], self._image_urls[image], captions)

    @property
    def has_early_annotations(self) -> bool:
        """Whether there were annotations without an image before them."""
        return bool(self._early_positions)

    def read_early_annotations(self, annotations: Iterable[Any]) -> Iterator[SourceRow]:
        """Yield the rows of the annotations that precede their images in the file. Call this when all images are known.

        Args:
            annotations: All annotations of the file.
        """
        objects = (value for value in annotations if isinstance(value, dict))
        # Index of the next early annotation in `_early_positions`, whose entries are in ascending order.
        next_early = 0
        for position, annotation in enumerate(objects):
            if next_early == len(self._early_positions):
                return
            if position == self._early_positions[next_early]:
                if not self._has_captions:
                    self._raise_no_captions(annotation)
                yield from self._caption_row(annotation, self._early_row_numbers[next_early])
                next_early += 1

    def finish(self) -> Iterator[SourceRow]:
        """Yield the rows that could not be built before the end of the file.

        Raises:
            ValueError: Parallel arrays differ in length, or the file has none of the supported formats.
        """
        for image_id, image in self._image_number_by_id.items():
            if not self._is_captioned[image] and image_id not in self._ambiguous:
                name = self._name_or_url(image)
                self._issues.note("image without an annotation (skipped)", image, name)
        if not self._parallel:
            self._check_known_keys()
            return
        # Join URLs and captions by index, which requires arrays of equal length.
        urls = self._parallel.get("image_urls", _Texts())
        captions = self._parallel.get("captions", _Texts())
        if len(urls) != len(captions):
            raise ValueError(
                f"{self._source}: {len(urls)} 'image_urls', but {len(captions)} 'captions'; "
                "the two arrays must have the same length."
            )
        for number, (url, caption) in enumerate(zip(urls, captions)):
            yield SourceRow(number, "", url, (caption,))

    def _check_known_keys(self) -> None:
        """Raise ValueError if the file contains only keys that no format has."""
        if self._number >= 0 or self._image_number_by_id or not self._ignored:
            return
        keys = ", ".join(map(repr, itertools.islice(self._ignored, 8)))
        raise ValueError(
            f"{self._source}: an object with the keys {keys}, none of which contains captions. Captions are read from "
            '[{"image": "1.jpg", "caption": "a cat"}, ...], from {"1.jpg": "a cat", ...}, '
            'or from the keys "data", "rows", or "images" and "annotations" (COCO).'
        )


def read_json_lines_source(
    source: str, issues: ParseIssues, columns: Columns
) -> Iterator[SourceRow]:
    """Yield the rows of a file of JSON lines."""
    named: NamedColumns | None = None
    for number, text in read_lines(source, issues):
        value = parse_object(text)
        if value is None:
            row = row_from_text(parse_json_string(text), number)
            if row is None:
                issues.note(NOT_AN_OBJECT, number, text)
            else:
                yield row
            continue
        # Find the columns, except in records, which have fixed keys.
        if not is_record(value):
            named = columns_of_row(value, named, source, columns)
        yield from row_from_mapping(value, number, named, issues)


# ---- one JSON object or Parquet row ----


def columns_of_row(
    row: dict[str, Any], known: NamedColumns | None, source: str, columns: Columns
) -> NamedColumns:
    """Return the columns of a row. If it has the columns of the previous rows, use these.

    Args:
        row: The row.
        known: The columns of the previous rows; None for the first row.
        source: The source, for error messages.
        columns: The names that the user passed.

    Raises:
        ValueError: The columns of the first row cannot be determined. A later row without a caption column is not an
            error; its missing caption becomes an issue.
    """
    # Check every row, since the rows of one file may have different keys.
    if known and set(known) - {""} <= row.keys():
        return known
    # Find the columns of this row. If they cannot be found, its missing caption becomes an issue later.
    try:
        return find_columns(source, row, columns, row)
    except ValueError:
        if known is None:
            raise
        return known


def row_from_mapping(
    value: dict[str, Any], number: int, named: NamedColumns | None, issues: ParseIssues
) -> Iterator[SourceRow]:
    """Yield the source row of a JSON object or Parquet row; nothing for a malformed chat or an unusable pair.

    Args:
        value: A row of the Karpathy split, a record, or a row with the columns `named`.
        number: The row number.
        named: The columns; may be None for the first two formats.
        issues: Collects malformed chats and unusable pairs.
    """
    split = as_text(value.get(SPLIT_NAME))
    # Check for Karpathy's rows first, since these could also be mistaken for rows with an image column.
    if "sentences" in value:
        yield _karpathy_row(value, number, split)
        return
    if is_record(value):
        yield from _record_row(value, number, split, issues)
        return
    # The caller has called `columns_of_row` for every row of this format.
    assert named is not None
    captions: tuple[str, ...] = ()
    if named.caption:
        captions = tuple(as_text(caption) for caption in _as_list(value.get(named.caption)))
    image, url = as_text(value.get(named.image)), as_text(value.get(named.url))
    yield SourceRow(number, image, url, captions, split)


def _record_row(
    record: dict[str, Any], number: int, split: str, issues: ParseIssues
) -> Iterator[SourceRow]:
    """Yield the row of a record; nothing for a malformed chat, or a pair that training cannot use."""
    if is_pair(record):
        plain = _convert_usable_pair(record, number, issues)
        if plain is None:
            return
        record = plain
    elif is_chat(record):
        try:
            record = convert_chat(record, "chat")
        except ValueError as error:
            issues.note("malformed chat (skipped)", number, error)
            return
    images = image_names(record)
    # The image identifies the row only if it is the only one.
    image = images[0] if len(images) == 1 else ""
    yield SourceRow(number, image, "", _last_answers(record), split, record)


def _convert_usable_pair(
    record: dict[str, Any], number: int, issues: ParseIssues
) -> dict[str, Any] | None:
    """Convert a preference pair to the form of records. Return None, and note why, if training cannot use it."""
    if not all(record[key] for key in PAIR_KEYS):
        issues.note("pair with an empty answer (skipped)", number, record)
        return None
    try:
        plain = convert_pair(record, "pair")
    except ValueError as error:
        issues.note("malformed pair (skipped)", number, error)
        return None
    chosen, rejected = (plain[key].strip() for key in PAIR_KEYS)
    if not chosen or not rejected:
        issues.note("pair with an empty answer (skipped)", number, record)
        return None
    if chosen == rejected:
        issues.note("pair with equal answers (skipped)", number, chosen)
        return None
    if not image_names(plain):
        issues.note("pair without an image (kept)", number, chosen)
    return plain


def row_from_text(value: object, number: int) -> SourceRow | None:
    """Return the row of a value in a list of URLs, or None if the value is not a URL."""
    if isinstance(value, str) and URL_PATTERN.match(value):
        return SourceRow(number, "", as_text(value), ())
    return None


def _karpathy_row(value: dict[str, Any], number: int, split: str) -> SourceRow:
    """Return the row of an image in Karpathy's files, with all its captions."""
    folder_and_name = [as_text(value.get(name)) for name in ("filepath", "filename")]
    image = as_text(value.get("image")) or "/".join(part for part in folder_and_name if part)
    captions = []
    for sentence in _as_list(value["sentences"]):
        # A sentence is an object in the original JSON, and a string in the Parquet version on the hub.
        text = sentence.get("raw") if isinstance(sentence, dict) else sentence
        captions.append(as_text(text))
    return SourceRow(number, image, as_text(value.get("url")), tuple(captions), split)


def _last_answers(record: dict[str, Any]) -> tuple[str, ...]:
    """Return the alternatives of a record's last answer; of a pair, the chosen one."""
    if is_pair(record):
        return (as_text(record["chosen"]),)
    if "conversations" in record:
        last_turn = _as_list(record["conversations"])[-1:]
        return tuple(as_text(turn.get("value")) for turn in last_turn if isinstance(turn, dict))
    # Fall back to the single response if the list is empty.
    answers = record.get("responses") or record.get("response")
    if answers is None and "pred_output" in record:
        answers = answers_of_prediction(record) or [""]
    return tuple(as_text(answer) for answer in _as_list(answers))


def is_record(value: dict[str, Any]) -> bool:
    """Return whether a JSON object is a record already: in LLaVA's format, the tutorial's, a chat, or a pair."""
    if "conversations" in value or "instruction" in value:
        return True
    return is_chat(value) or is_pair(value)


def parse_object(text: str) -> dict[str, Any] | None:
    """Parse a JSON object; return None if the text is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # RecursionError: nested a thousand times
        return None
    return value if isinstance(value, dict) else None


def parse_json_string(text: str) -> str | None:
    """Parse a line that is a JSON string; return None if it is not one."""
    if not text.lstrip().startswith('"'):
        return None
    try:
        return str(json.loads(text))
    except ValueError:
        return None


def as_text(value: object) -> str:
    """Return a string without surrounding spaces, or an integer as a string.

    For anything else return an empty string, which is treated as a missing name or caption.
    """
    return str(value).strip() if isinstance(value, str | int) else ""


def _as_list(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]

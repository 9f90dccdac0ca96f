"""The rows and issues that every reader of a caption source produces, and the search for columns by their names.

This module imports only the standard library, so that the parsers of commands can use it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

# Usual column names, in order of preference; the comparison ignores case.
# A table of web pages may contain the `url` or `link` of the page in addition to the `image_url`.
URL_NAMES = ("image_url", "img_url", "url", "coco_url", "flickr_url", "link")
IMAGE_NAMES = (
    "image",
    "file_name",
    "filename",
    "image_name",
    "image_path",
    "file",
    "path",
    "filepath",
    "img",
)
CAPTION_NAMES = (
    "caption",
    "text",
    "captions",
    "alt_text",
    "sentence",
    "comment",
    "description",
    "title",
    "raw",
)
SPLIT_NAME = "split"  # column with the split that the source itself assigns to a row
EMPTY_CAPTION = "empty caption (skipped)"  # an issue
COLUMN_OPTIONS = "--url-column, --image-column or --caption-column"
# What a URL and the name of an image look like, for tables without a header. The repetitions are limited, because they are
# searched at every position of lines of any length.
URL_PATTERN = re.compile(r"[a-z][a-z0-9+.-]{0,30}://", re.IGNORECASE)
IMAGE_NAME_PATTERN = re.compile(
    r"\.(jpe?g|png|gif|webp|bmp|tiff?|avif)([.#]\w+){0,4}$", re.IGNORECASE
)


class SourceRow(NamedTuple):
    """One row of a caption source.

    Attributes:
        number: Row number for messages: counted from 1 for lines of text, from 0 for other rows.
        image: A file name or `shard.tar#key`; empty if the source has only a URL.
        url: The URL of the image; empty if there is none.
        captions: The captions of the image; empty ones are removed by `read_source`.
        split: The split that the source itself assigns ("train", "val", ...); empty if there is none.
        record: The row itself if it is a record already (in LLaVA's or the tutorial's format).
        empty_notes: How often `EMPTY_CAPTION` was noted for the row, or for the rows that were joined to it.
    """

    number: int
    image: str
    url: str
    captions: tuple[str, ...]
    split: str = ""
    record: dict[str, Any] | None = None
    empty_notes: int = 0


class Columns(NamedTuple):
    """Column names that the user passed; an empty name means that the usual names are tried."""

    url: str = ""
    image: str = ""
    caption: str = ""


class ParseIssues:
    """The issues of a source: the number of occurrences of each kind, and the first row.

    Readers never skip or repair anything silently; they record it here.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def note(self, kind: str, number: int, text: object) -> None:
        """Count one issue, and keep the row number and text of the first of its kind."""
        self.counts[kind] += 1
        if kind not in self.first:
            self.first[kind] = f"row {number}: {str(text)[:120]!r}"

    def note_without_caption(self, kind: str, row: SourceRow, text: object) -> None:
        """Count a row without any caption as one issue of this kind, and no longer count its empty captions."""
        self.counts[EMPTY_CAPTION] -= row.empty_notes
        if self.counts[EMPTY_CAPTION] <= 0:
            del self.counts[EMPTY_CAPTION]
            self.first.pop(EMPTY_CAPTION, None)
        self.note(kind, row.number, text)

    def lines(self) -> list[str]:
        """Return one line for each kind of issue, the most frequent first."""
        return [
            f"{count:>9,} {kind} (first: {self.first[kind]})"
            for kind, count in self.counts.most_common()
        ]


class NamedColumns(NamedTuple):
    """The column names of a source; a name is empty if the source has no such column.

    Every source has URLs or images. Only a list of URLs or image names has no captions.
    """

    url: str
    image: str
    caption: str


def find_columns(
    source: str, names: Iterable[str], columns: Columns, first_row: object
) -> NamedColumns:
    """Find the columns of URL, image and caption among `names`.

    Args:
        source: The source, for error messages.
        names: All column names.
        columns: The names that the user passed; they take precedence.
        first_row: The first row, for error messages.

    Raises:
        ValueError: A column that the user passed does not exist; or there is neither a URL column nor an image column;
            or there is no caption column, although the source has other columns that could contain captions.
    """
    by_lower_name = {name.lower(): name for name in names}
    all_names = ", ".join(by_lower_name.values())

    # Prefer the first of the usual names: "caption" before "title", if a table has both.
    def find(requested: str, usual_names: tuple[str, ...]) -> str:
        if requested:
            if requested.lower() not in by_lower_name:
                raise ValueError(f"{source}: no column {requested!r}; the columns are {all_names}.")
            return by_lower_name[requested.lower()]
        for name in usual_names:
            if name in by_lower_name:
                return by_lower_name[name]
        return ""

    url = find(columns.url, URL_NAMES)
    image = find(columns.image, IMAGE_NAMES)
    caption = find(columns.caption, CAPTION_NAMES)
    # If there is no other column, the source is a list of URLs or images, and no column of captions was overlooked.
    if not caption and (url or image) and set(by_lower_name.values()) == {url, image} - {""}:
        return NamedColumns(url, image, "")
    # Require an image name (for training) or a URL (for downloading), but not both.
    if not caption or not (url or image):
        missing = "caption" if not caption else "url or image"
        raise ValueError(
            f"{source}: no {missing} column among {all_names}. Rename the column, or name it with {COLUMN_OPTIONS} "
            f"of `llava convert` or `llava download`. First row: {str(first_row)[:400]}"
        )
    return NamedColumns(url, image, caption)

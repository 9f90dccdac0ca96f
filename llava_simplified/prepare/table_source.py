"""Read captions from TSV, CSV and bar-separated text, with or without a header.

The files of real datasets follow no standard:

    CC3M            caption <tab> url, no header, quotes are part of the text
    CC12M           url <tab> caption, no header
    Flickr30k       image_name| comment_number| comment     or     name.jpg#0 <tab> caption
    Flickr8k        image,caption with quoted captions
    anything else   TSV or CSV with a header

Therefore separator and columns are detected from the first lines. A bad line never affects its neighbors: a wrong
number of fields or an unclosed quote costs at most this line, and is recorded as an issue.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

from llava_simplified.prepare.source_files import read_lines
from llava_simplified.prepare.source_rows import (
    CAPTION_NAMES,
    COLUMN_OPTIONS,
    IMAGE_NAMES,
    URL_NAMES,
    Columns,
    ParseIssues,
    SourceRow,
    find_columns,
)

_SAMPLE_LINES = 100  # number of lines for detecting separator and columns
_MAX_QUOTED_LINES = 20  # a quoted field with more lines is treated as an unclosed quote
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_IMAGE_NAME = re.compile(r"\.(jpe?g|png|gif|webp|bmp|tiff?|avif)([.#]\w+)*$", re.IGNORECASE)
_BAR_SEPARATED = re.compile(r"[^|,]+\| ")
_CAPTION_NUMBER = re.compile(r"#\d+$")  # Flickr30k: "1.jpg#0" is caption 0 of 1.jpg

Line = tuple[int, str]
Fields = tuple[int, str, list[str]]  # line number, the line, its fields


class Layout(NamedTuple):
    """The index of each field in a row; -1 for a field that the table does not have."""

    url: int
    image: int
    caption: int
    width: int  # number of fields of a complete row
    has_header: bool


def read_table(source: str, issues: ParseIssues, columns: Columns) -> Iterator[SourceRow]:
    """Yield the rows of a table.

    Raises:
        ValueError: The file is empty, or the columns cannot be determined.
    """
    lines = read_lines(source, issues)
    # Read the first lines, and process them again below with `chain`: opening a remote source twice
    # would be expensive.
    head = list(itertools.islice(lines, _SAMPLE_LINES))
    if not head:
        raise ValueError(f"{source}: empty file")
    separator = _find_separator(head[0][1])
    # Pass a throw-away ParseIssues here: the same lines are parsed again below, and counted there.
    sample = [fields for _, _, fields in _split(separator, iter(head), ParseIssues())]
    layout = _find_layout(source, sample, columns)
    rows = _split(separator, itertools.chain(head, lines), issues)
    if layout.has_header:
        next(rows)
    for number, text, fields in rows:
        # Skip the whole line, since it is unknown which field is missing.
        if len(fields) < layout.width:
            issues.note("ragged: too few fields (skipped)", number, text)
            continue
        if len(fields) > layout.width:
            fields = _join_caption(fields, layout, separator)
            issues.note(f"{separator!r} inside a caption (kept)", number, text)
        if '"' in text and separator != ",":
            issues.note("quote character (kept as text)", number, text)
        # Replace tabs in the caption, so that it can be written to a TSV file later.
        caption = fields[layout.caption].strip().replace("\t", " ")
        image = ""
        if layout.image >= 0:
            image = _CAPTION_NUMBER.sub("", fields[layout.image].strip())
        url = ""
        if layout.url >= 0:
            url = fields[layout.url].strip()
        yield SourceRow(number, image, url, (caption,))


def _find_separator(first_line: str) -> str:
    if "\t" in first_line:
        return "\t"
    # Require a space after the bar, since a bar alone also occurs in captions and URLs.
    if _BAR_SEPARATED.match(first_line):
        return "|"
    return ","


def _join_caption(fields: list[str], layout: Layout, separator: str) -> list[str]:
    """Join the fields of a caption that contains the separator; image names and URLs never contain it."""
    start = layout.caption
    stop = start + len(fields) - layout.width + 1
    return [*fields[:start], separator.join(fields[start:stop]), *fields[stop:]]


# ---- lines to fields ----


def _split(separator: str, lines: Iterator[Line], issues: ParseIssues) -> Iterator[Fields]:
    if separator == ",":
        return _split_csv(lines, issues)
    if separator == "|":
        return _split_bars(lines, issues)
    return _split_tabs(lines)


def _split_tabs(lines: Iterator[Line]) -> Iterator[Fields]:
    """Split at every tab. TSV files of captions do not use quoting: a quote is part of the text."""
    for number, text in lines:
        yield number, text, text.split("\t")


def _split_bars(lines: Iterator[Line], issues: ParseIssues) -> Iterator[Fields]:
    """Split the lines of Flickr30k's results.csv, in one of whose rows the second bar is missing."""
    for number, text in lines:
        fields = text.split("|")
        if len(fields) == 2:
            match = re.match(r"\s*(\d+)\s+(.+)", fields[1])
            if match:
                fields = [fields[0], match[1], match[2]]
                issues.note("missing '|' (repaired)", number, text)
        yield number, text, fields


def _split_csv(lines: Iterator[Line], issues: ParseIssues) -> Iterator[Fields]:
    """Split the lines of a CSV file with quotes.

    A quoted field may continue on the next lines. In a plain CSV reader, one quote that is never closed would extend the
    field to the end of the file. Here the reader may look ahead `_MAX_QUOTED_LINES` lines; if the quote is not closed by
    then, the line is split at its commas, and the following lines are parsed again as separate rows:

        lines      5" nail,http://a      ahead: [..., ...]   lines that were read ahead, but belong to no row yet
    """
    ahead: list[Line] = []
    while True:
        line = ahead.pop(0) if ahead else next(lines, None)
        if line is None:
            return
        number, text = line
        # Fast path for almost all lines: splitting is much faster than a CSV reader.
        if '"' not in text:
            yield number, text, text.split(",")
            continue
        quoted_lines = _with_following_lines(text, ahead, lines)
        # Use a new reader for each row, so that an error cannot affect the next row. Replace carriage
        # returns, which csv rejects.
        reader = csv.reader(piece.replace("\r", " ") + "\n" for piece in quoted_lines)
        try:
            fields = [field.replace("\n", " ") for field in next(reader)]
        except csv.Error:
            issues.note("unclosed quote (kept as text)", number, text)
            yield number, text, text.split(",")
            continue
        # Remove the lines that belong to this row from `ahead`; the others are processed later.
        following = reader.line_num - 1
        if following:
            del ahead[:following]
            issues.note("line break inside quotes (kept as a space)", number, text)
        yield number, text, fields


def _with_following_lines(text: str, ahead: list[Line], lines: Iterator[Line]) -> Iterator[str]:
    """Yield a line, and then the next lines, which the CSV reader requests while inside a quoted field.

    Lines that are read from `lines` are appended to `ahead`.

    Raises:
        csv.Error: The quote is not closed within `_MAX_QUOTED_LINES` lines, or at the end of the file.
    """
    yield text
    for position in range(_MAX_QUOTED_LINES):
        if position == len(ahead):
            line = next(lines, None)
            if line is None:
                break
            ahead.append(line)
        yield ahead[position][1]
    raise csv.Error("the quote is never closed")


# ---- layout of the fields ----


def _find_layout(source: str, sample: list[list[str]], columns: Columns) -> Layout:
    """Find the columns from a header, or else by the contents of the first lines.

    Args:
        source: The source, for error messages.
        sample: The fields of the first lines.
        columns: The names that the user passed.

    Raises:
        ValueError: The columns cannot be determined.
    """
    first = sample[0]
    names = [field.strip().lower() for field in first]
    known_names = {*URL_NAMES, *IMAGE_NAMES, *CAPTION_NAMES}
    known_names.update(name.lower() for name in columns if name)
    # A first line with a URL is data and not a header, even if a caption happens to be "image".
    has_url = any(_URL.match(field) for field in first)
    if known_names.intersection(names) and not has_url:
        found = find_columns(source, names, columns, first)
        url, image, caption = (names.index(name) if name else -1 for name in found)
        return Layout(url, image, caption, len(names), has_header=True)

    same_width = {len(fields) for fields in sample} == {len(first)}
    if len(sample) > 1 and len(first) > 2 and same_width:
        raise ValueError(
            f"{source}: every row has {len(first)} fields, but there is no header line with column names. "
            f"Insert a first line such as url, caption, other. First row: {first}"
        )
    return _guess_layout(source, sample)


def _guess_layout(source: str, sample: list[list[str]]) -> Layout:
    """Find the column of URLs, or else of image names, in a table of two columns without a header.

    The other column contains the captions. Only the first and the last field of a line are checked, because a caption
    may contain separators.
    """
    first = sample[0]
    pairs = [(fields[0], fields[-1]) for fields in sample if len(fields) > 1] or [("", "")]
    for pattern in (_URL, _IMAGE_NAME):
        shares = [_share_of_matches(pattern, [pair[column] for pair in pairs]) for column in (0, 1)]
        # Require half of the lines, since single lines may lack a URL or have one in the caption.
        if min(shares) > 0.5:
            raise ValueError(
                f"{source}: both columns look like URLs or image names. Insert a header line that names them "
                f"(url, caption). First row: {first}"
            )
        if max(shares) > 0.5:
            column = shares.index(max(shares))
            url = column if pattern is _URL else -1
            image = -1 if pattern is _URL else column
            return Layout(url, image, caption=1 - column, width=2, has_header=False)
    raise ValueError(
        f"{source}: no column looks like a URL or an image name, and there is no header that names one. "
        f"Insert a header line, and name its columns with {COLUMN_OPTIONS}. First row: {first}"
    )


def _share_of_matches(pattern: re.Pattern[str], texts: list[str]) -> float:
    return sum(bool(pattern.search(text)) for text in texts) / len(texts)

"""Read captions from TSV, CSV and bar-separated text, with or without a header.

The files of real datasets follow no standard:

    CC3M            caption <tab> url, no header, quotes are part of the text
    CC12M           url <tab> caption, no header
    Flickr30k       image_name| comment_number| comment     or     name.jpg#0 <tab> caption
    Flickr8k        image,caption with quoted captions
    Excel           url;caption where the comma is the decimal separator, perhaps with a first line "sep=;"
    list            one URL or image name per line, without captions
    anything else   TSV or CSV with a header

Therefore separator and columns are detected from the first lines. A bad line never affects its neighbors: a wrong
number of fields or an unclosed quote affects at most this line, and is recorded as an issue.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections import Counter, deque
from collections.abc import Iterator
from typing import NamedTuple

from llava_simplified.prepare.source_files import read_lines
from llava_simplified.prepare.source_rows import (
    CAPTION_NAMES,
    IMAGE_NAME_PATTERN,
    IMAGE_NAMES,
    SPLIT_NAME,
    URL_NAMES,
    URL_PATTERN,
    Columns,
    ParseIssues,
    SourceRow,
    find_columns,
)

# Separator and columns are detected from the first lines: at most this many, and no further line after this many
# characters.
_SAMPLE_LINES = 100
_SAMPLE_CHARACTERS = 1 << 20
# A longer quoted field is treated as an unclosed quote. The csv module has the same limit.
_MAX_QUOTED_CHARACTERS = 131_072
_BAR_SEPARATED = re.compile(r"[^|,]+\| ")
# Some programs, such as Excel, can write the separator of a CSV file into its first line.
_SEPARATOR_LINE = re.compile(r"sep=(.)\s*", re.IGNORECASE)
# Flickr30k: "1.jpg#0" is caption 0 of 1.jpg. But "0.tar#0" is image 0 of a shard.
_CAPTION_NUMBER = re.compile(r"(?<!\.tar)(?<!\.parquet)(?<!\.arrow)#\d+$", re.IGNORECASE)
_UNQUOTED_SEPARATORS = ("\t", "|")  # separators of formats in which a quote is part of the text
# Control characters that no text contains. NUL is not one of them: it occurs in lists, and `read_lines` removes it.
_CONTROL_CHARACTER = re.compile(r"[\x01-\x08\x0e-\x1a\x1c-\x1f]")
# Text after a comma that contains one of these is treated as a part of the URL before it, such as "w=200" or "b.jpg".
# A caption of one word contains none of them.
_MARK_OF_URL = re.compile(r"[/=&?%]|\.\w+$")

Line = tuple[int, str]  # line number, the line
Fields = tuple[int, str, list[str]]  # line number, the line, its fields


class Layout(NamedTuple):
    """The positions of URL, image name, caption and split in the rows of a table.

    Attributes:
        url: Index of the field with the URL; -1 if the table has no URLs.
        image: Index of the field with the image name, or -1.
        caption: Index of the field with the caption, or -1.
        width: Number of fields of a complete row.
        has_header: Whether the first line contains the names of the columns.
        split: Index of the field with the split ("train", "val", ...), or -1.
    """

    url: int
    image: int
    caption: int
    width: int
    has_header: bool
    split: int = -1


def read_table(source: str, issues: ParseIssues, columns: Columns) -> Iterator[SourceRow]:
    """Yield the rows of a table.

    Raises:
        ValueError: The file is empty, or the columns cannot be determined.
    """
    lines = read_lines(source, issues)
    # Read the first lines, and process them again below with `chain`: opening a remote source twice
    # would be expensive.
    head = _read_head(lines)
    if not head:
        raise ValueError(f"{source}: empty file")
    all_lines = itertools.chain(head, lines)
    # Any file with an unknown suffix is read as a table, so it may be an Excel sheet, an image or a pickle.
    if any(_CONTROL_CHARACTER.search(text) for _, text in head):
        raise ValueError(
            f"{source}: not a text file. Captions are read from CSV, TSV, JSON, JSON Lines, Parquet, Arrow and tar; save "
            "a spreadsheet as CSV."
        )
    pattern = _list_pattern(source, head)
    if pattern is not None:
        yield from _read_list(all_lines, pattern, issues)
        return
    separator, has_separator_line = _find_separator(head, columns)
    if has_separator_line:
        next(all_lines)
        head = head[1:]
    # Pass a throw-away ParseIssues here: the same lines are parsed again below, and counted there.
    sample = [fields for _, _, fields in _split(separator, iter(head), ParseIssues())]
    if not sample:
        raise ValueError(f"{source}: contains no row")
    layout = _find_layout(source, sample, columns)
    rows = _split(separator, all_lines, issues)
    if layout.has_header:
        number, text, fields = next(rows)
        if not _known_names(columns).intersection(field.strip().lower() for field in fields):
            issues.note("first line, unlike all others (read as a header)", number, text)
    for number, text, fields in rows:
        # Skip the whole line, since it is unknown which field is missing.
        if len(fields) < layout.width:
            issues.note("ragged: too few fields (skipped)", number, text)
            continue
        if len(fields) > layout.width:
            fields = _join_fields(fields, layout, separator, number, issues)
        if separator in _UNQUOTED_SEPARATORS and any('"' in field for field in fields):
            issues.note("quote character (kept as text)", number, text)
        yield _row_of_fields(fields, layout, number)


def _read_head(lines: Iterator[Line]) -> list[Line]:
    """Return the first lines of a table."""
    head: list[Line] = []
    length = 0
    for line in itertools.islice(lines, _SAMPLE_LINES):
        head.append(line)
        length += len(line[1])
        if length > _SAMPLE_CHARACTERS:
            break
    return head


def _row_of_fields(fields: list[str], layout: Layout, number: int) -> SourceRow:
    """Return the row that these fields describe."""
    captions: tuple[str, ...] = ()
    if layout.caption >= 0:
        # Replace tabs in the caption, so that it can be written to a TSV file later.
        captions = (fields[layout.caption].strip().replace("\t", " "),)
    image = ""
    if layout.image >= 0:
        image = _CAPTION_NUMBER.sub("", fields[layout.image].strip())
    url = ""
    if layout.url >= 0:
        url = fields[layout.url].strip()
    split = ""
    if layout.split >= 0:
        split = fields[layout.split].strip()
    return SourceRow(number, image, url, captions, split)


def _find_separator(head: list[Line], columns: Columns) -> tuple[str, bool]:
    """Return the separator of a table, and whether the first line only names the separator ("sep=;")."""
    _, first = head[0]
    named = _SEPARATOR_LINE.fullmatch(first)
    if named and len(head) > 1:
        return named[1], True
    if "\t" in first:
        return "\t", False
    # Require a space after the bar, since a bar alone also occurs in captions and URLs.
    if _BAR_SEPARATED.match(first):
        return "|", False
    # Commas and semicolons occur in captions too. Choose the one that splits the header into more known names, or
    # else more lines into the same number of fields.
    comma = _separator_score(",", head, columns)
    semicolon = _separator_score(";", head, columns)
    if semicolon > comma:
        return ";", False
    return ",", False


def _separator_score(separator: str, head: list[Line], columns: Columns) -> tuple[int, int]:
    """Return how well a separator fits, as a pair to compare.

    Returns:
        The number of known column names in the first line, and the largest number of lines with equally many fields.
    """
    sample = [fields for _, _, fields in _split(separator, iter(head), ParseIssues())]
    known = _known_names(columns)
    num_names = sum(field.strip().lower() in known for field in sample[0])
    # Lines without the separator do not count.
    widths = Counter(len(fields) for fields in sample if len(fields) > 1)
    return num_names, max(widths.values(), default=0)


def _known_names(columns: Columns) -> set[str]:
    names = {*URL_NAMES, *IMAGE_NAMES, *CAPTION_NAMES}
    names.update(name.lower() for name in columns if name)
    return names


# ---- lists without captions ----


def _list_pattern(source: str, head: list[Line]) -> re.Pattern[str] | None:
    """Return the pattern of the lines, if they are a list of URLs or image names; None if they are a table.

    A URL may contain commas and semicolons, so complete lines are compared, and not fields.

    Raises:
        ValueError: It cannot be decided whether the lines are URLs, or URLs with captions of one word.
    """
    texts = [_list_name(text) for _, text in head if not text.startswith("#")]
    # In a table, some captions have several words. In a list, there are no captions.
    if any(map(_may_have_caption, texts)):
        return None
    num_urls = sum(bool(URL_PATTERN.match(text)) for text in texts)
    others = [text for text in texts if not URL_PATTERN.match(text)]
    if num_urls > len(texts) / 2 and all(re.search(r"\s", text) for text in others):
        # Is the text after a comma a part of the URL, or a caption of one word?
        num_with_comma = 0
        num_parts_of_url = 0
        # Whether in every line with a comma, the text before the first comma is a complete URL: it ends like the name
        # of an image.
        ends_like_image = True
        for text in texts:
            first, *rest = re.split(r"[,;]", text)
            if not rest:
                continue
            num_with_comma += 1
            if _is_part_of_url(rest[-1]):
                num_parts_of_url += 1
            if not IMAGE_NAME_PATTERN.search(first):
                ends_like_image = False
        if 2 * num_parts_of_url >= num_with_comma:
            return URL_PATTERN
        if not ends_like_image:
            raise ValueError(
                f"{source}: the lines are URLs, and the text after a comma may be a part of the URL or a caption. Insert "
                f"a first line: `url` for a list of URLs, or `url,caption`. First row: {texts[0][:200]}"
            )
        return None
    has_separator = any(re.search(r"[\s,;]", text) for text in texts)
    if texts and not has_separator and all(IMAGE_NAME_PATTERN.search(text) for text in texts):
        return IMAGE_NAME_PATTERN
    return None


def _is_part_of_url(text: str) -> bool:
    """Return whether text after a comma is a part of the URL before it."""
    # Search twice, because a single pattern for both conditions would take quadratic time for a long text.
    return not re.search(r"\s", text) and _MARK_OF_URL.search(text) is not None


def _read_list(
    lines: Iterator[Line], pattern: re.Pattern[str], issues: ParseIssues
) -> Iterator[SourceRow]:
    """Yield the rows of a list that has either only URLs or only image names, as `pattern` matches them."""
    expected = "a URL" if pattern is URL_PATTERN else "the name of an image"
    for number, text in lines:
        name = _list_name(text)
        if not pattern.search(name):
            issues.note(f"not {expected}, as the first lines are (skipped)", number, text)
            continue
        if re.search(r"\s", name):
            issues.note("space inside a URL or name (kept)", number, text)
        if pattern is URL_PATTERN:
            yield SourceRow(number, "", name, ())
        else:
            yield SourceRow(number, name, "", ())


def _may_have_caption(text: str) -> bool:
    """Return whether a line may contain a caption of several words.

    It may if it contains white space, with two exceptions among the lines without a separator: a remark (a line without
    a URL), and the URL of an image whose name contains spaces.
    """
    if not re.search(r"\s", text):
        return False
    if re.search(r"[,;|\t]", text):
        return True
    is_image_url = URL_PATTERN.match(text) and IMAGE_NAME_PATTERN.search(text)
    is_remark = not URL_PATTERN.search(text)
    return not (is_image_url or is_remark)


def _list_name(text: str) -> str:
    """Return the URL or image name in a line of a list, without the quotes that CSV programs put around a comma."""
    name = text.strip()
    if len(name) > 1 and name.startswith('"') and name.endswith('"') and '"' not in name[1:-1]:
        return name[1:-1]
    return name


# ---- lines to fields ----


def _join_fields(
    fields: list[str], layout: Layout, separator: str, number: int, issues: ParseIssues
) -> list[str]:
    """Join fields of a line that has too many, because a URL or a caption contains the separator."""
    extra = len(fields) - layout.width
    row = separator.join(fields)
    # Join the parts of a URL first, beginning at the first field that looks like a URL.
    positions = [i for i in range(max(layout.url, 0), len(fields)) if URL_PATTERN.match(fields[i])]
    if layout.url >= 0 and positions:
        start = stop = positions[0]
        # A URL that ends like the name of an image is complete.
        while (
            stop - start < extra
            and stop + 1 < len(fields)
            and not IMAGE_NAME_PATTERN.search(fields[stop])
            and _is_part_of_url(fields[stop + 1])
        ):
            stop += 1
        if stop > start:
            fields = [
                *fields[:start],
                separator.join(fields[start : stop + 1]),
                *fields[stop + 1 :],
            ]
            extra -= stop - start
            issues.note(f"{separator!r} inside a URL (kept)", number, row)
    if extra == 0:
        return fields
    # The other additional fields are parts of the caption; in a table without captions, of the URL or image name.
    start = layout.caption
    kind = f"{separator!r} inside a caption (kept)"
    if start < 0:
        start = max(layout.url, layout.image)
        kind = f"{separator!r} inside a URL or name (kept)"
    issues.note(kind, number, row)
    stop = start + extra + 1
    return [*fields[:start], separator.join(fields[start:stop]), *fields[stop:]]


def _split(separator: str, lines: Iterator[Line], issues: ParseIssues) -> Iterator[Fields]:
    """Split lines into fields by the rules of the separator."""
    if separator == "|":
        return _split_bars(lines, issues)
    if separator == "\t":
        return _split_tabs(lines, issues)
    return _split_csv(separator, lines, issues)


def _split_tabs(lines: Iterator[Line], issues: ParseIssues) -> Iterator[Fields]:
    """Split at every tab. TSV files of captions do not use quoting: a quote is part of the text.

    pandas and spreadsheets do quote a field if it contains a line break or a quote, and double the quotes inside it.
    Both cases can be distinguished from quotes that are part of the text:

        1.jpg <tab> "two            A quote opens the last field of a line, and the field ends at a quote in a later
        lines"                      line. There is no tab between the two: with a tab, the later line would be a row.
        2.jpg <tab> "a ""b"" c"     All quotes inside are doubled.
        3.jpg <tab> "a" and "b"     These quotes are part of the text.
    """
    ahead: deque[Line] = deque()
    while True:
        line = ahead.popleft() if ahead else next(lines, None)
        if line is None:
            return
        number, text = line
        fields = text.split("\t")
        if '"' in text:
            multiline_fields = None
            if fields[-1].startswith('"') and fields[-1].count('"') % 2:
                multiline_fields = _parse_lines("\t", text, ahead, lines)
            if multiline_fields is None:
                fields = [_unquote(field, number, issues) for field in fields]
            else:
                issues.note("line break inside quotes (kept as a space)", number, text)
                fields = multiline_fields
        yield number, text, fields


def _unquote(field: str, number: int, issues: ParseIssues) -> str:
    """Return a field of a TSV file, without its quoting if all quotes inside it are doubled."""
    inside = field.strip()[1:-1]
    is_quoted = field.startswith('"') and field.rstrip().endswith('"')
    if not is_quoted or '""' not in inside or '"' in inside.replace('""', ""):
        return field
    issues.note("quoted field with doubled quotes (quoting removed)", number, field)
    return inside.replace('""', '"')


def _split_bars(lines: Iterator[Line], issues: ParseIssues) -> Iterator[Fields]:
    """Split the lines of Flickr30k's results.csv. In one of its rows, the second bar is missing."""
    for number, text in lines:
        fields = text.split("|")
        if len(fields) == 2:
            match = re.match(r"\s*(\d+)\s+(.+)", fields[1])
            if match:
                fields = [fields[0], match[1], match[2]]
                issues.note("missing '|' (repaired)", number, text)
        yield number, text, fields


def _split_csv(separator: str, lines: Iterator[Line], issues: ParseIssues) -> Iterator[Fields]:
    """Split the lines of a CSV file with quotes (RFC 4180).

    A quoted field may continue on the next lines. In a plain CSV reader, one quote that is never closed would extend the
    field to the next quote, over any number of lines. Therefore a row of several lines must be exact: a closing quote
    must be followed by a separator or the line end. This detects an unclosed quote, because text follows the first quote
    of a later row. The line is then split at its separators, and the following lines are parsed again as separate rows:

        "a nail,http://a      opens a quote that is not closed, so it is split at its comma
        "b",http://b          text follows the first quote, so this line is a row of its own; it is parsed again

    Lines that were read ahead, but belong to no row yet, are kept in `ahead`.
    """
    ahead: deque[Line] = deque()
    while True:
        line = ahead.popleft() if ahead else next(lines, None)
        if line is None:
            return
        number, text = line
        # Fast path for almost all lines: splitting is much faster than a CSV reader.
        if '"' not in text:
            yield number, text, text.split(separator)
            continue
        # A row on one line may contain text after a closing quote.
        fields = _parse_quoted(separator, iter([text]), strict=False)
        if fields is None:
            fields = _parse_lines(separator, text, ahead, lines)
            if fields is not None:
                issues.note("line break inside quotes (kept as a space)", number, text)
        if fields is None:
            issues.note("unclosed quote (kept as text)", number, text)
            fields = text.split(separator)
        yield number, text, fields


def _parse_lines(
    separator: str, text: str, ahead: deque[Line], lines: Iterator[Line]
) -> list[str] | None:
    """Return the fields of a row of several lines, or None if these lines are not one row.

    Args:
        separator: The separator.
        text: The first line.
        ahead: Lines that were read already. The lines of the row are removed from it.
        lines: The lines after `ahead`.
    """
    reader_lines = _LookAhead(text, ahead, lines)
    pieces: Iterator[str] = reader_lines
    if separator == "\t":
        pieces = _without_rows(reader_lines)
    fields = _parse_quoted(separator, pieces, strict=True)
    # A row of a table has several fields. A result with one field comes from two lines with a stray quote each.
    if fields is None or len(fields) < 2:
        return None
    # The other lines in `ahead` are processed later.
    for _ in range(reader_lines.taken):
        ahead.popleft()
    return fields


def _without_rows(pieces: Iterator[str]) -> Iterator[str]:
    """Yield a line, and the lines after it that may continue its quoted field.

    Stop before a line with a tab before its first quote: this tab separates fields, so the line is a new row.
    """
    yield next(pieces)
    for text in pieces:
        if "\t" in text.partition('"')[0]:
            return
        yield text


def _parse_quoted(separator: str, lines: Iterator[str], strict: bool) -> list[str] | None:
    """Return the fields of one row, or None if a quote is not closed.

    Args:
        separator: The separator.
        lines: The line of the row, and the lines after it.
        strict: Also return None if text follows a closing quote.
    """
    # csv rejects a lone carriage return, which may be inside a caption. Raise an error at the
    # end of the input, because csv would silently close an open quote there.
    pieces = (piece.replace("\r", " ") + "\n" for piece in lines)
    reader = csv.reader(_raise_at_end(pieces), delimiter=separator, strict=strict)
    try:
        return [field.replace("\n", " ") for field in next(reader)]
    except csv.Error:
        return None


def _raise_at_end(pieces: Iterator[str]) -> Iterator[str]:
    yield from pieces
    raise csv.Error("the quote is never closed")


class _LookAhead:
    """Iterator over a line and the lines after it, for a CSV reader.

    Lines after the first stay in `ahead`, so that they can be read again.

    Attributes:
        taken: Number of lines in `ahead` that were read.
    """

    def __init__(self, text: str, ahead: deque[Line], lines: Iterator[Line]) -> None:
        self._first: str | None = text
        self._ahead = ahead
        self._lines = lines
        self._characters = len(text)
        self.taken = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._first is not None:
            text, self._first = self._first, None
            return text
        # A quote that is still open after this many characters was probably never closed. Stop, so that the rest of the
        # file is not read.
        if self._characters > _MAX_QUOTED_CHARACTERS:
            raise StopIteration
        if self.taken == len(self._ahead):
            self._ahead.append(next(self._lines))
        _, text = self._ahead[self.taken]
        self.taken += 1
        self._characters += len(text)
        return text


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
    # A first line with a URL is data and not a header, even if a caption happens to be "image".
    has_url = any(URL_PATTERN.match(field) for field in first)
    if _known_names(columns).intersection(names) and not has_url:
        found = find_columns(source, names, columns, first)
        url, image, caption = (names.index(name) if name else -1 for name in found)
        split = names.index(SPLIT_NAME) if SPLIT_NAME in names else -1
        # A user may name this column as the column of captions, for example. Then it does not contain the split.
        if split in (url, image, caption):
            split = -1
        return Layout(url, image, caption, len(names), has_header=True, split=split)

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
    first_fields: list[str] = []
    last_fields: list[str] = []
    for fields in sample:
        if len(fields) > 1:
            first_fields.append(fields[0])
            last_fields.append(fields[-1])
    for pattern in (URL_PATTERN, IMAGE_NAME_PATTERN):
        shares = [
            _share_of_matches(pattern, first_fields),
            _share_of_matches(pattern, last_fields),
        ]
        # Require more than half of the lines, since some lines may lack a URL or have one in the caption.
        if min(shares) > 0.5:
            raise ValueError(
                f"{source}: both columns look like URLs or image names. Insert a header line that names them "
                f"(url, caption). First row: {first}"
            )
        if max(shares) > 0.5:
            column = shares.index(max(shares))
            url = column if pattern is URL_PATTERN else -1
            image = -1 if pattern is URL_PATTERN else column
            # The first line is a header, perhaps in another language, if it is the only one without a URL or image name.
            names = (first_fields, last_fields)[column]
            matches = [bool(pattern.search(name)) for name in names]
            is_unlike_others = len(names) > 2 and not matches[0] and all(matches[1:])
            has_header = len(first) > 1 and is_unlike_others
            return Layout(url, image, caption=1 - column, width=2, has_header=has_header)
    raise ValueError(
        f"{source}: no column looks like a URL or an image name, and there is no header that names one. "
        f"Insert a header line, such as url,caption or image,caption. First row: {first}"
    )


def _share_of_matches(pattern: re.Pattern[str], texts: list[str]) -> float:
    """Return the share of texts that contain the pattern; 0 if there are no texts."""
    num_matches = sum(bool(pattern.search(text)) for text in texts)
    return num_matches / max(1, len(texts))

"""The page of `--review`: all images of a job with their captions, to be searched and filtered.

One HTML file shows up to `CARDS_PER_PAGE` images and contains them as thumbnails; larger jobs get several files, with
links from each to the others. Nothing is loaded from elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llava_simplified.data.images import decode_image, read_image_bytes
from llava_simplified.html_report import Thumbnail, Tile, make_thumbnail, write_page

CARDS_PER_PAGE = 1000  # about 20 MB

# The kinds of cards, in the order of the filters, with their labels.
KINDS = {
    "captioned": "captioned",
    "loop": "ended at a loop",
    "max_words": "cut at --max-words",
    "kept": "kept as it was",
    "failed": "failed",
}


@dataclass
class ReviewItem:
    """An image with its captions.

    Attributes:
        image: Name of the image.
        kind: One of `KINDS`.
        captions: The texts by their instruction; the instruction of a kept text is empty.
        error: Why there is no caption.
    """

    image: str
    kind: str = "captioned"
    captions: dict[str, list[str]] = field(default_factory=dict)
    error: str = ""


class PageLink(NamedTuple):
    """A link to one of several pages; `file` is empty for the page itself."""

    label: str
    file: str


def write_review(
    path: str | Path,
    image_folder: str,
    rows: Iterable[Mapping[str, Any]],
    failures: Iterable[Mapping[str, Any]],
    kept: Mapping[str, str],
) -> list[Path]:
    """Write the pages of a job.

    Args:
        path: The first page; the second of `review.html` is `review-2.html`.
        image_folder: Folder that the image names are relative to.
        rows: Prediction rows.
        failures: Rows with an error instead of a caption.
        kept: Text of the sidecar files that existed before, by image.

    Returns:
        The pages.
    """
    items = collect_items(rows, failures, kept)
    first = Path(path)
    starts = range(0, max(1, len(items)), CARDS_PER_PAGE)
    paths = [first]
    for number in range(2, len(starts) + 1):
        paths.append(first.with_name(f"{first.stem}-{number}{first.suffix}"))
    tiles = _count_kinds(items)
    for page, start in zip(paths, starts):
        shown = items[start : start + CARDS_PER_PAGE]
        with ThreadPoolExecutor() as pool:
            thumbnails = list(
                pool.map(lambda item: _read_thumbnail(item.image, image_folder), shown)
            )
        write_page(
            page,
            "captioning/review_page.html",
            title=f"Captions of {Path(image_folder).name}",
            tiles=tiles,
            links=_page_links(page, paths, len(items)),
            kinds={kind: label for kind, label in KINDS.items() if _has_kind(shown, kind)},
            labels=KINDS,
            cards=list(zip(shown, thumbnails)),
        )
    return paths


def collect_items(
    rows: Iterable[Mapping[str, Any]],
    failures: Iterable[Mapping[str, Any]],
    kept: Mapping[str, str],
) -> list[ReviewItem]:
    """Return one item for each image, sorted by name; the arguments are those of `write_review`."""
    items: dict[str, ReviewItem] = {}
    for row in rows:
        item = items.setdefault(row["image"] or "", ReviewItem(row["image"] or ""))
        item.captions.setdefault(row["instruction"], []).append(row["pred_output"])
        # Of several captions, one that was shortened is what a reviewer looks for.
        if row.get("ended_by"):
            item.kind = row["ended_by"]
    for image, text in kept.items():
        items[image] = ReviewItem(image, "kept", {"": [text]})
    for row in failures:
        name = row["image"] or f"index {row['index']}"
        # An image whose sidecar file could not be written has a caption all the same.
        item = items.setdefault(name, ReviewItem(name))
        item.kind = "failed"
        item.error = row["error"]
    return [items[image] for image in sorted(items)]


def _has_kind(items: Sequence[ReviewItem], kind: str) -> bool:
    return any(item.kind == kind for item in items)


def _count_kinds(items: Sequence[ReviewItem]) -> list[Tile]:
    """Return a tile for each kind that occurs."""
    tiles = [Tile("images", f"{len(items):,}")]
    for kind, label in KINDS.items():
        count = sum(item.kind == kind for item in items)
        if count:
            tiles.append(Tile(label, f"{count:,}", f"{count / len(items):.1%}"))
    return tiles


def _page_links(page: Path, paths: Sequence[Path], num_items: int) -> list[PageLink]:
    """Return links to all pages, labeled with the numbers of their images; none for a single page."""
    if len(paths) == 1:
        return []
    links = []
    for number, other in enumerate(paths):
        first = number * CARDS_PER_PAGE + 1
        last = min(num_items, first + CARDS_PER_PAGE - 1)
        links.append(PageLink(f"{first:,}–{last:,}", "" if other == page else other.name))
    return links


def _read_thumbnail(image: str, image_folder: str) -> Thumbnail | None:
    """Return the thumbnail of an image, None if it cannot be read."""
    try:
        return make_thumbnail(decode_image(read_image_bytes(image, image_folder)))
    except ValueError:
        return None

"""Write the page of `--review`: all images of a job with their captions, a search field and filters.

An HTML file shows up to `CARDS_PER_PAGE` images and contains their thumbnails. Larger jobs get several files with links to
each other. The files load no other files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

from llava_simplified.data.images import decode_image, read_image_bytes
from llava_simplified.html_report import Thumbnail, Tile, make_thumbnail, write_page

CARDS_PER_PAGE = 1000  # about 20 MB

# Kind of a card -> its label, in the order of the filters. The page shows one card per image.
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
        captions: Instruction -> texts. The instruction of a text that existed before (kind "kept") is "".
        error: Why the image has failed; empty if it has not.
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
        path: The first page, such as review.html; the second one is review-2.html.
        image_folder: Folder that the image names are relative to.
        rows: Prediction rows.
        failures: Rows with an error instead of a caption.
        kept: Text of the sidecar files that existed before, by image.

    Returns:
        The paths of the pages.
    """
    items = collect_items(rows, failures, kept)
    # Write at least one page, even if there are no images.
    first = Path(path)
    starts = range(0, max(1, len(items)), CARDS_PER_PAGE)
    paths = [first]
    for number in range(2, len(starts) + 1):
        paths.append(first.with_name(f"{first.stem}-{number}{first.suffix}"))
    tiles = _count_kinds(items)
    # Thumbnails exist for one page at a time, so memory does not grow with the number of images.
    for page, start in zip(paths, starts):
        shown = items[start : start + CARDS_PER_PAGE]
        names = [item.image for item in shown]
        with ThreadPoolExecutor() as pool:
            thumbnails = list(pool.map(_read_thumbnail, names, repeat(image_folder)))
        used_kinds: dict[str, str] = {}
        for kind, label in KINDS.items():
            if _has_kind(shown, kind):
                used_kinds[kind] = label
        write_page(
            page,
            "captioning/review_page.html",
            title=f"Captions of {Path(image_folder).name}",
            tiles=tiles,
            links=_page_links(page, paths, len(items)),
            kinds=used_kinds,
            labels=KINDS,
            cards=list(zip(shown, thumbnails)),
        )
    return paths


def collect_items(
    rows: Iterable[Mapping[str, Any]],
    failures: Iterable[Mapping[str, Any]],
    kept: Mapping[str, str],
) -> list[ReviewItem]:
    """Return one item for each image, sorted by name. See `write_review` for the arguments."""
    items: dict[str, ReviewItem] = {}
    for row in rows:
        item = items.setdefault(row["image"] or "", ReviewItem(row["image"] or ""))
        item.captions.setdefault(row["instruction"], []).append(row["pred_output"])
        # If one of several captions was shortened, the filter for shortened captions must show the image.
        if row.get("ended_by"):
            item.kind = row["ended_by"]
    for image, text in kept.items():
        items[image] = ReviewItem(image, kind="kept", captions={"": [text]})
    for row in failures:
        name = row["image"] or f"index {row['index']}"
        # The item may exist already: an image whose sidecar file could not be written has captions too.
        item = items.setdefault(name, ReviewItem(name))
        item.kind = "failed"
        item.error = row["error"]
    return [items[image] for image in sorted(items)]


def _has_kind(items: Sequence[ReviewItem], kind: str) -> bool:
    return any(item.kind == kind for item in items)


def _count_kinds(items: Sequence[ReviewItem]) -> list[Tile]:
    """Return a tile with the number of images, and one for each kind that occurs."""
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

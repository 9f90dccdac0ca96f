"""Write the report of a demo that is still running: steps, losses and captions so far. The page reloads itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from llava_simplified.data.images import decode_image, read_image_bytes
from llava_simplified.demo.progress import CaptionRow, read_curves, read_eval_captions
from llava_simplified.html_report import Chart, Thumbnail, line_chart, make_thumbnail, render_report
from llava_simplified.jobs import atomic_file

REFRESH_SECONDS = 5
SHOWN_EVALUATIONS = 4  # the last evaluations, one column of the table each
SHOWN_IMAGES = 12  # rows of the table


class StepRow(NamedTuple):
    """One step of the demo: `state` is "done", "running" or "waiting"."""

    title: str
    state: str
    detail: str


class ShownCaption(NamedTuple):
    """A caption, and whether it equals the reference."""

    text: str
    is_right: bool


class ImageRow(NamedTuple):
    """One row of the table: an image, its captions by step, and the reference."""

    thumbnail: Thumbnail
    captions: list[ShownCaption]
    reference: str


def write_live_report(
    path: Path,
    *,
    title: str,
    status: str,
    fraction: float,
    steps: Sequence[StepRow],
    runs: dict[str, Path],
    images: Path,
) -> None:
    """Write the page.

    Args:
        path: The HTML file, replaced atomically, because a browser may read it at any time.
        title: Heading of the page.
        status: One sentence: the current step and the time left.
        fraction: Completed part of the demo, 0 to 1.
        steps: All steps of the demo.
        runs: Title -> output folder of each training run that has begun.
        images: Image folder.
    """
    captions: dict[int, list[CaptionRow]] = {}  # training step -> captions of the validation images
    charts = []
    for name, folder in runs.items():
        charts += _charts(name, folder)
        # Merging cannot overwrite captions, because only one of the runs captions validation images.
        captions |= read_eval_captions(folder)
    shown = dict(list(captions.items())[-SHOWN_EVALUATIONS:])
    page = render_report(
        "demo/live_report.html",
        title=title,
        refresh_seconds=REFRESH_SECONDS,
        status=status,
        percent=100 * fraction,
        steps=steps,
        charts=charts,
        caption_steps=list(shown),
        rows=_image_rows(shown, images),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Replace characters that cannot be encoded: captions may contain lone surrogates.
    with atomic_file(path) as part:
        part.write_text(page, encoding="utf-8", errors="replace")


def _charts(name: str, folder: Path) -> list[Chart]:
    """Return a chart of the losses or the reward of a training run; no chart before the first values."""
    curves = {label: points for label, points in read_curves(folder).items() if points}
    if "reward" in curves:
        return [line_chart(name, "reward of sampled captions", {"reward": curves["reward"]})]
    if not curves:
        return []
    return [line_chart(name, "loss, nats per token", curves)]


def _image_rows(captions: dict[int, list[CaptionRow]], images: Path) -> list[ImageRow]:
    """Return the rows of the table, one per image."""
    rows = []
    # All evaluations caption the same images in the same order, so `zip` collects the captions of each image.
    for evaluations in list(zip(*captions.values()))[:SHOWN_IMAGES]:
        shown = []
        for row in evaluations:
            shown.append(ShownCaption(row.caption, row.caption == row.reference))
        thumbnail = _thumbnail(images, evaluations[0].image)
        rows.append(ImageRow(thumbnail, shown, evaluations[0].reference))
    return rows


@cache
def _thumbnail(folder: Path, image: str) -> Thumbnail:
    """Return the thumbnail of an image. It is cached, because the page is written many times with the same images."""
    return make_thumbnail(decode_image(read_image_bytes(image, folder)))

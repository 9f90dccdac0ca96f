"""HTML reports in a single file: page skeleton, style, charts and thumbnails, which all reports share.

A report is a Jinja template that extends `html_report.html` and is rendered by `render_report`. All values are escaped,
because captions, URLs and server messages are untrusted text. A page makes no request to any server: images are data
URIs, charts are inline SVG, and a content security policy blocks everything else.

The template `html_report_parts.html` renders the classes of this module: tiles, bars and charts.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import jinja2

# Maximum width and height in pixels, and WebP quality. With both, 500 photos take less than 10 MB.
THUMBNAIL_SIDE = 288
THUMBNAIL_QUALITY = 72
# Images of up to this size, in pixels, are probably drawings or icons, and are encoded without loss.
LOSSLESS_SIDE = 96

MAX_LINE_POINTS = 300  # points per line of a chart; longer lines are averaged
HISTOGRAM_BINS = 60


def render_report(template: str, **values: object) -> str:
    """Render the template of a report.

    Args:
        template: Path of the template in the package, for example "evaluation/evaluation_report.html".
        values: Values for the template.

    Returns:
        The HTML page.
    """
    return _template_environment().get_template(template).render(values)


@cache
def _template_environment() -> jinja2.Environment:
    """Create the environment once, because it keeps the templates that it has compiled."""
    import jinja2  # imported here, because workers that only make thumbnails do not need it

    # Escape all values. StrictUndefined makes a misspelled variable an error; by default, it would be
    # rendered as an empty string.
    return jinja2.Environment(
        loader=jinja2.PackageLoader("llava_simplified", package_path=""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def write_page(path: Path, template: str, **values: object) -> None:
    """Render the template of a report (see `render_report`), and write the page to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # File names and texts from JSON can contain half of a surrogate pair, which UTF-8 cannot encode. Replace it by "?".
    path.write_text(render_report(template, **values), encoding="utf-8", errors="replace")


# ---- numbers ----


class Tile(NamedTuple):
    """A number in large type, such as the mean score at the top of a report.

    Attributes:
        label: What the number is.
        value: The number.
        detail: More information in small type, such as an interval.
    """

    label: str
    value: str
    detail: str = ""


class Bar(NamedTuple):
    """A row of a horizontal bar chart.

    Attributes:
        label: Label of the bar.
        percent: Length of the bar, 0 to 100.
        text: The number after the bar.
        color: Index of the color, 0 to 5.
    """

    label: str
    percent: float
    text: str
    color: int = 0


# ---- charts ----


class Tick(NamedTuple):
    """A label on an axis. `position` is in percent of the axis, counted from the left or from the top."""

    position: float
    label: str


class Point(NamedTuple):
    """A point of a line. `x` and `y` are in percent of the plot, counted from its top left corner."""

    x: float
    y: float
    x_text: str
    y_text: str


class Line(NamedTuple):
    """A line of a chart."""

    name: str
    path: str  # the `d` attribute of an SVG path
    points: list[Point]
    last: str  # the last value, for the legend


class Column(NamedTuple):
    """A column of a histogram. `x` (its left edge), `width` and `height` are in percent of the plot."""

    x: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A line chart or a histogram.

    Positions are percentages of the plot. The template scales the SVG to the size of the plot, and writes the labels as
    HTML, so that the text remains readable on a phone.
    """

    title: str
    unit: str
    x_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: Sequence[Line] = ()
    columns: Sequence[Column] = ()


def line_chart(
    title: str,
    unit: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str = "step",
    max_points: int = MAX_LINE_POINTS,
) -> Chart:
    """Lay out a line chart.

    Args:
        title: Heading.
        unit: What the y axis shows.
        series: Points (x, y) of each line by its name; each line has at least one.
        x_label: What the x axis shows.
        max_points: Longer lines are averaged to this number of points.
    """
    # Average adjacent points of long lines. A curve with 100,000 points would look like noise, and make the file large.
    averaged: dict[str, list[list[float]]] = {}
    for name, all_points in series.items():
        # Split a line into parts with the same number of points (one more or less), not with equal ranges of x.
        parts = np.array_split(all_points, min(max_points, len(all_points)))
        averaged[name] = [np.mean(part, axis=0).tolist() for part in parts]
    xs: list[float] = []
    ys: list[float] = []
    for points in averaged.values():
        for x, y in points:
            xs.append(x)
            ys.append(y)

    # Let the x axis begin and end with the data, and the y axis at round numbers, so that lines do not touch the frame.
    y_ticks = round_ticks(min(ys), max(ys))
    left = min(xs)
    right = max(xs)
    if right == left:  # a single point: avoid a division by zero
        right = left + 1
    bottom = y_ticks[0]
    top = max(y_ticks[-1], max(ys))

    # Convert values to percent of the plot, from its left and top edges.
    def x_position(x: float) -> float:
        return round(100 * (x - left) / (right - left), 2)

    def y_position(y: float) -> float:
        return round(100 - 100 * (y - bottom) / (top - bottom), 2)

    lines = []
    for name, points in averaged.items():
        placed = []
        for x, y in points:
            # Round averaged steps, which are rarely whole numbers.
            x_text = f"{x:g}" if x == int(x) else f"{x:.0f}"
            placed.append(Point(x_position(x), y_position(y), x_text, f"{y:.3f}"))
        path = "M" + "L".join(f"{point.x} {point.y}" for point in placed)
        lines.append(Line(name, path, placed, last=placed[-1].y_text))
    x_ticks = []
    for tick in round_ticks(min(xs), max(xs)):
        if left <= tick <= right:
            x_ticks.append(Tick(x_position(tick), format_number(tick)))
    return Chart(
        title=title,
        unit=unit,
        x_label=x_label,
        x_ticks=x_ticks,
        y_ticks=[Tick(y_position(tick), format_number(tick)) for tick in y_ticks],
        lines=lines,
    )


def histogram(
    title: str,
    unit: str,
    values: np.ndarray,
    *,
    x_label: str,
    per_unit: bool = False,
    bins: int = HISTOGRAM_BINS,
) -> Chart:
    """Lay out a histogram.

    Args:
        title: Heading.
        unit: What the y axis shows.
        values: At least one number.
        x_label: What the x axis shows.
        per_unit: Divide the counts by the width of a bin. If the values are times, the columns then show a rate.
        bins: Number of columns.
    """
    # If all values are equal, numpy uses a range of width 1 around them, so the width of a bin is never 0.
    counts, edges = np.histogram(values, bins=bins)
    heights = counts.astype(float)
    if per_unit:
        heights = heights / (edges[1] - edges[0])
    # Let the axis begin at 0 and end at a round number.
    y_ticks = round_ticks(0, max(float(heights.max()), 1e-9))
    top = y_ticks[-1]
    left = float(edges[0])
    right = float(edges[-1])

    columns = []
    for index, height in enumerate(heights.tolist()):
        first, last = float(edges[index]), float(edges[index + 1])
        text = f"{format_number(first)} to {format_number(last)} {x_label}: {format_number(height)}"
        columns.append(Column(100 * index / bins, 100 / bins, 100 * height / top, f"{text} {unit}"))
    x_ticks = []
    for tick in round_ticks(left, right):
        if left <= tick <= right:
            x_ticks.append(Tick(100 * (tick - left) / (right - left), format_number(tick)))
    return Chart(
        title=title,
        unit=unit,
        x_label=x_label,
        x_ticks=x_ticks,
        y_ticks=[Tick(100 - 100 * tick / top, format_number(tick)) for tick in y_ticks],
        columns=columns,
    )


def round_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers at equal distances, the first at or below `low`, the last at or above `high`.

    Args:
        low: Smallest value.
        high: Largest value.
        about: Approximate number of steps.
    """
    # If all values are equal, or differ by rounding only, derive the distance of the ticks from their magnitude.
    magnitude = max(abs(low), abs(high))
    extent = high - low
    if extent <= 1e-9 * magnitude:
        extent = magnitude or 1.0
    step = _round_step(extent / about)
    first = math.floor(low / step)
    # Subtract a tolerance. If `high` is a multiple of the step, a rounding error would otherwise add another tick.
    last = math.ceil(high / step - 1e-9)
    count = max(2, last - first + 1)
    # Remove rounding errors such as 0.30000000000000004, which are far smaller than a step.
    digits = max(0, 3 - math.floor(math.log10(step)))
    return [round((first + index) * step, digits) for index in range(count)]


def _round_step(smallest: float) -> float:
    """Return the smallest round number that is not below `smallest`: 1, 2, 2.5 or 5 times a power of ten."""
    power = 10 ** math.floor(math.log10(smallest))
    for factor in (1, 2, 2.5, 5):
        # The factor 0.999 prevents a rounding error from selecting the next larger step.
        if power * factor >= smallest * 0.999:
            return power * factor
    return power * 10


def format_number(number: float) -> str:
    """Return a number with a few digits: four significant ones, or all digits before the decimal point."""
    if abs(number) >= 1000:
        return f"{number:,.0f}"
    return f"{number:.4g}"


# ---- images ----


class Thumbnail(NamedTuple):
    """A small image as a data URI, with its width and height in pixels."""

    data_uri: str
    width: int
    height: int

    @property
    def is_tiny(self) -> bool:
        """Return whether the image is so small that it is probably a drawing or an icon."""
        return max(self.width, self.height) <= LOSSLESS_SIDE


def make_thumbnail(pixels: np.ndarray) -> Thumbnail:
    """Shrink an image for a report.

    Args:
        pixels: uint8 RGB (height, width, 3).
    """
    # Pass reducing_gap to shrink by an integer factor first, which is much faster for photos and looks the same.
    image = Image.fromarray(pixels)
    size = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    image.thumbnail(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    buffer = io.BytesIO()
    # Encode drawings without loss: lossy compression blurs their edges.
    lossless = max(image.size) <= LOSSLESS_SIDE
    image.save(buffer, "WEBP", quality=THUMBNAIL_QUALITY, lossless=lossless)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return Thumbnail(f"data:image/webp;base64,{encoded}", image.width, image.height)

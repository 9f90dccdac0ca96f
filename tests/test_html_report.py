"""Tests of what all reports share: charts, thumbnails, and pages that fit on a phone."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest

from llava_simplified.html_report import (
    format_number,
    histogram,
    line_chart,
    make_thumbnail,
    round_ticks,
)
from llava_simplified.prepare.preparation_report import (
    Example,
    Host,
    write_preparation_report,
)


@pytest.mark.parametrize(
    ("low", "high"), [(0.9, 6.8), (0, 1), (3, 3), (1e-4, 2e-3), (0, 120_000), (0, 0)]
)
def test_round_ticks_span_the_values(low: float, high: float) -> None:
    ticks = round_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 8
    steps = np.diff(ticks)
    np.testing.assert_allclose(steps, steps[0])
    first_digit = f"{steps[0]:e}".rstrip("0")[0]
    assert first_digit in "125"


def test_line_chart_places_points() -> None:
    chart = line_chart("Loss", "", {"a": [(0, 4.0), (50, 2.0), (100, 0.0)]})
    (line,) = chart.lines
    assert [(point.x, point.y) for point in line.points] == [(0, 0), (50, 50), (100, 100)]


@pytest.mark.parametrize(
    "points",
    [
        [(2e8, 0.5)],
        [(0, 0.72086549848157), (1, 0.72086549848156)],  # they differ by rounding only
        [(0, 1e-13), (1, 4e-13)],
        [(0, 0.0), (1, 0.0)],
    ],
)
def test_line_chart_keeps_extreme_points_in_the_plot(points: list[tuple[float, float]]) -> None:
    (line,) = line_chart("Loss", "", {"a": points}).lines
    for point in line.points:
        assert 0 <= point.x <= 100
        assert 0 <= point.y <= 100


def test_line_chart_averages_long_lines() -> None:
    points = [(float(step), float(step % 2)) for step in range(10_000)]
    chart = line_chart("Loss", "", {"a": points}, max_points=100)
    values = [float(point.y_text) for point in chart.lines[0].points]
    assert values == [0.5] * 100


def test_histogram_counts_values() -> None:
    values = np.array([0.0, 0.5, 1.5, 2.0])
    chart = histogram("Size", "images", values, x_label="kB", bins=2)
    assert [(column.x, column.width) for column in chart.columns] == [(0, 50), (50, 50)]
    assert chart.columns[0].height == chart.columns[1].height > 0
    assert chart.columns[1].text == "1 to 2 kB: 2 images"
    rate = histogram("Rate", "rows per second", values, x_label="s", bins=4, per_unit=True)
    assert "0 to 0.5 s: 2 rows" in rate.columns[0].text, "expected one row in half a second"


def test_histogram_accepts_equal_values() -> None:
    chart = histogram("Size", "images", np.full(3, 7.0), x_label="kB")
    assert max(column.height for column in chart.columns) > 0


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (0.25, "0.25"), (12.3456, "12.35"), (12_000, "12,000")]
)
def test_format_number_is_short(number: float, text: str) -> None:
    assert format_number(number) == text


def test_make_thumbnail_shrinks_large_images_only() -> None:
    large = make_thumbnail(np.zeros((600, 1200, 3), np.uint8))
    assert (large.width, large.height) == (288, 144)
    assert large.data_uri.startswith("data:image/webp;base64,")
    assert not large.is_tiny
    icon = make_thumbnail(np.zeros((64, 64, 3), np.uint8))
    assert (icon.width, icon.height) == (64, 64)
    assert icon.is_tiny


# ---- pages ----


def write_example_page(path: Path) -> None:
    """Write a report with long names everywhere, and text that looks like markup."""
    generator = np.random.default_rng(0)
    long_url = "https://a-host.example/" + "very-long-path/" * 20
    pixels = generator.integers(0, 255, (60, 90, 3), dtype=np.uint8)
    example = Example(
        name="row 7",
        caption="<script>alert(1)</script>" + "Donaudampfschifffahrt" * 6,
        detail=long_url,
        thumbnail=make_thumbnail(pixels).data_uri,
    )
    write_preparation_report(
        path,
        title="Download of " + "x" * 120 + ".tsv",
        facts={"rows": "3,318,333", "images": "2,100,000", "seconds": "86,400"},
        outcomes={"ok": 900, "http_404": 90, "connection_refused_by_peer": 10},
        examples={"http_404": [example]},
        warnings=["12 rows are not UTF-8: " + "y" * 200],
        charts=[histogram("Size", "images", generator.normal(50, 9, 500), x_label="kB")],
        hosts=[Host("a" * 80 + ".example", 900, 90, "http_404 80, timeout 10")],
    )


def test_preparation_report_escapes_text(tmp_path: Path) -> None:
    write_example_page(tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "default-src 'none'" in html
    assert html.count("<script") == 1


@pytest.mark.slow
def test_reports_fit_the_window_in_both_color_schemes(tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("needs Chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    write_example_page(tmp_path / "report.html")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        for width, scheme in itertools.product([390, 1280], ["light", "dark"]):
            page = browser.new_page(
                viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True
            )
            page.goto((tmp_path / "report.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width, scheme
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            red = int(background.removeprefix("rgb(").partition(",")[0])
            assert (red < 128) == (scheme == "dark"), width
        browser.close()

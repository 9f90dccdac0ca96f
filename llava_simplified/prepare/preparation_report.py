"""The reports of `llava download` and `llava clean`: one HTML file each, and the same numbers as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np

from llava_simplified.html_report import Bar, Chart, Tile, histogram, write_page
from llava_simplified.jobs import SURROGATES_AS_ESCAPES, format_duration

MAX_EXAMPLES = 8  # examples per kind of error
MAX_HOSTS = 25  # hosts in the list of those with the most failures
MAX_CAUSES = 3  # causes of failure per host
ROWS_PER_BATCH = 50_000  # rows of the manifest to read at a time

_OK = "ok"
_GREEN, _ORANGE = 2, 1  # colors of the report


class Example(TypedDict):
    """An example of a rejected or failed row, for the HTML page and the JSON report.

    Keys:
        name: Number of the row; in the report of `llava clean`, also its file.
        caption: Captions of the row.
        detail: Details of the reason.
        thumbnail: Image as a data URI, or an empty string.
    """

    name: str
    caption: str
    detail: str
    thumbnail: str


class Host(NamedTuple):
    """A host with failed downloads."""

    name: str
    num_rows: int
    num_failed: int
    causes: str


def write_preparation_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    outcomes: Mapping[str, int],
    examples: Mapping[str, Sequence[Example]],
    warnings: Sequence[str] = (),
    charts: Sequence[Chart] = (),
    hosts: Sequence[Host] = (),
) -> None:
    """Write the HTML report of `llava download` or `llava clean`.

    Args:
        path: The HTML file.
        title: Heading of the page.
        facts: Label -> number, displayed in large type.
        outcomes: Number of rows by outcome; "ok" is drawn in green.
        examples: Example rows by outcome.
        warnings: Issues of the source.
        charts: Charts to show next to the outcomes.
        hosts: Hosts with the most failures.
    """
    # Draw one bar per outcome, as a percentage of all rows, the most frequent outcome first.
    total = max(1, sum(outcomes.values()))
    bars = []
    for outcome, count in Counter(outcomes).most_common():
        percent = 100 * count / total
        color = _GREEN if outcome == _OK else _ORANGE
        bars.append(Bar(outcome, percent, f"{count:,} ({percent:.1f} %)", color))
    write_page(
        path,
        "prepare/preparation_report.html",
        title=title,
        tiles=[Tile(label, value) for label, value in facts.items()],
        outcomes=bars,
        warnings=warnings,
        charts=charts,
        hosts=hosts,
        examples=dict(sorted(examples.items())),
    )


# ---- download ----


@dataclass
class _DownloadStatistics:
    """Statistics of the rows of a manifest.

    Attributes:
        outcomes: Rows by outcome.
        rows_by_host: Rows by host.
        errors_by_host: Rows by host and error.
        examples: Some rows of each error.
        columns: Arrays (rows, 4) with the time of each row in seconds, the width and height of its image in pixels, and
            its size in bytes. The last three are NaN for a row without an image.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    rows_by_host: Counter[str] = field(default_factory=Counter)
    errors_by_host: dict[str, Counter[str]] = field(default_factory=dict)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    columns: list[np.ndarray] = field(default_factory=list)

    def add(
        self, index: int, url: str, error: str | None, detail: str, captions: Sequence[str]
    ) -> None:
        """Count one row; a failed row may become an example."""
        self.outcomes[error or _OK] += 1
        # Do not use urllib: it raises errors for malformed URLs, which are among those to count.
        host = url.partition("://")[2].partition("/")[0]
        self.rows_by_host[host] += 1
        if not error:
            return
        # Count failures by host too, and keep a few examples of each kind.
        self.errors_by_host.setdefault(host, Counter())[error] += 1
        shown = self.examples.setdefault(error, [])
        if len(shown) < MAX_EXAMPLES:
            caption = captions[0] if captions else ""
            example = Example(
                name=f"row {index}",
                caption=caption,
                detail=f"{url}: {detail}",
                thumbnail="",
            )
            shown.append(example)

    def worst_hosts(self) -> list[str]:
        """Return the hosts with the most failures, worst first."""
        hosts = sorted(self.errors_by_host, key=lambda host: -self.errors_by_host[host].total())
        return hosts[:MAX_HOSTS]


def write_download_report(
    manifest: Path, settings: Mapping[str, Any], json_path: Path, html_path: Path
) -> dict[str, Any]:
    """Write the reports of a download.

    Args:
        manifest: `manifest.parquet`, with one row per URL.
        settings: The settings of the download; "oddities" are the warnings about its source.
        json_path: The JSON report.
        html_path: The HTML page.

    Returns:
        The content of the JSON report.
    """
    statistics = _read_manifest(manifest)
    # Start with an empty array, because a manifest may have no rows at all.
    no_rows = np.empty((0, 4))
    times, widths, heights, sizes = np.concatenate([no_rows, *statistics.columns]).T
    # A row without an image has NaN in all columns but the first.
    has_image = ~np.isnan(sizes)
    sizes = sizes[has_image]
    shorter_sides = np.minimum(widths, heights)[has_image]
    # Use the time from the first row to the last. It includes the time in which a download was interrupted.
    seconds = float(np.ptp(times)) if len(times) else 0.0
    num_rows = statistics.outcomes.total()
    worst_hosts = statistics.worst_hosts()
    worst_errors = {}
    for host in worst_hosts:
        worst_errors[host] = dict(statistics.errors_by_host[host].most_common())

    report = {
        "outcomes": dict(statistics.outcomes.most_common()),
        "rows": num_rows,
        "seconds": round(seconds, 1),
        "bytes": int(sizes.sum()),
        "hosts": len(statistics.rows_by_host),
        "worst_hosts": worst_errors,
        "examples": statistics.examples,
        "settings": settings,
    }
    text = json.dumps(report, indent=1, ensure_ascii=False)
    json_path.write_text(text, encoding="utf-8", errors=SURROGATES_AS_ESCAPES)

    # Omit the charts for which there is no data.
    charts = []
    if len(times):
        charts.append(
            histogram(
                "Rate over time",
                "rows per second",
                times - times.min(),
                x_label="seconds",
                per_unit=True,
            )
        )
    if len(sizes):
        charts.append(histogram("Shorter side", "images", shorter_sides, x_label="pixels"))
        charts.append(histogram("File size", "images", sizes / 1000, x_label="kB"))
    write_preparation_report(
        html_path,
        title=f"Download of {settings['source']}",
        facts={
            "rows": f"{num_rows:,}",
            "images": f"{statistics.outcomes[_OK]:,}",
            "MB": f"{sizes.sum() / 1e6:,.0f}",
            "hosts": f"{len(statistics.rows_by_host):,}",
            "duration": format_duration(seconds),
        },
        outcomes=statistics.outcomes,
        warnings=settings["oddities"],
        charts=charts,
        hosts=[_describe_host(host, statistics) for host in worst_hosts],
        examples=statistics.examples,
    )
    return report


def _read_manifest(manifest: Path) -> _DownloadStatistics:
    """Return the statistics of a download from its manifest."""
    import pyarrow.parquet as pq

    # Read in batches, because a manifest has millions of rows. Keep only counts and a few examples of the texts.
    statistics = _DownloadStatistics()
    # The columns of `texts` are in the order of the parameters of `add`.
    texts = ["index", "url", "error", "detail", "captions"]
    numbers = ["at", "width", "height", "length"]
    file = pq.ParquetFile(manifest)
    for batch in file.iter_batches(ROWS_PER_BATCH, columns=[*texts, *numbers]):
        for row in zip(*(batch[name].to_pylist() for name in texts)):
            statistics.add(*row)
        columns = [batch[name].to_pylist() for name in numbers]
        statistics.columns.append(np.array(columns, float).T)  # None becomes NaN
    return statistics


def _describe_host(host: str, statistics: _DownloadStatistics) -> Host:
    errors = statistics.errors_by_host[host]
    # List the most frequent causes only; the JSON report has all of them.
    causes = [f"{error} {count}" for error, count in errors.most_common(MAX_CAUSES)]
    return Host(
        name=host,
        num_rows=statistics.rows_by_host[host],
        num_failed=errors.total(),
        causes=", ".join(causes),
    )

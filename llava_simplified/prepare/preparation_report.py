"""The pages that say what came of a download or a cleaning: one HTML file each, needing no network."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
 body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
 h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid #ddd }
 td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top } td.n { text-align: right }
 svg { max-width: 42rem; font-size: 11px; fill: #555 } small { color: #666 }
 .bar { background: #4a7fb5; height: .8rem; display: inline-block } .bar.ok { background: #4c9a5f }
 .cards { display: flex; flex-wrap: wrap; gap: 1rem } .card { width: 11rem; font-size: 12px; overflow-wrap: anywhere }
 .card img { max-width: 11rem; max-height: 9rem; display: block }
</style>
<h1>{{ title }}</h1>
<p>{% for name, value in facts %}<b>{{ value }}</b> {{ name }}{{ ", " if not loop.last }}{% endfor %}</p>
<h2>Outcomes</h2><table>{% for kind, count in outcomes %}
<tr><td>{{ kind }}<td class="n">{{ "{:,}".format(count) }}<td class="n">{{ "%.1f"|format(100 * count / total) }} %
<td><span class="bar {{ 'ok' if kind == 'ok' }}" style="width: {{ 30 * count / total }}rem"></span>{% endfor %}</table>
{% if oddities %}<h2>What was strange in the source</h2><ul>{% for line in oddities %}<li>{{ line }}{% endfor %}</ul>
{% endif %}{% for heading, plot in plots %}<h2>{{ heading }}</h2>{{ plot }}{% endfor %}
{% if hosts %}<h2>Hosts with the most failures</h2><table><tr><th>host<th>rows<th>failed<th>causes{% for row in hosts %}
<tr><td>{{ row[0] }}<td class="n">{{ row[1] }}<td class="n">{{ row[2] }}<td>{{ row[3] }}{% endfor %}</table>{% endif %}
{% for kind, rows in examples %}<h2>{{ kind }}</h2><div class="cards">{% for row in rows %}<div class="card">
{% if row.thumbnail %}<img src="data:image/jpeg;base64,{{ row.thumbnail }}" alt="">{% endif %}
<b>{{ row.name }}</b><br>{{ row.caption }}<br><small>{{ row.detail }}</small></div>{% endfor %}</div>{% endfor %}</html>"""


def write_page(path: Path, **parts: Any) -> None:
    """Fill the page. Every value is escaped: captions, URLs and server messages are other people's text."""
    from jinja2 import Environment

    page = Environment(autoescape=True).from_string(_PAGE)
    defaults: dict[str, Any] = {"oddities": [], "plots": [], "hosts": [], "examples": []}
    outcomes = Counter(parts.pop("outcomes")).most_common()
    total = max(1, sum(count for _, count in outcomes))
    path.write_text(
        page.render(**{**defaults, **parts}, outcomes=outcomes, total=total), encoding="utf-8"
    )


_BARS = """<svg viewBox="0 0 640 190" role="img" aria-label="{{ label }}">
{% for count in counts %}<rect x="{{ 50 + loop.index0 * width }}" width="{{ width - 0.6 }}" fill="#4a7fb5"
 y="{{ 150 - 140 * count / top }}" height="{{ 140 * count / top }}"></rect>{% endfor %}
<path d="M50 10V150H640" stroke="#888" fill="none"></path>
<text x="46" y="16" text-anchor="end">{{ "{:,.4g}".format(top) }}</text>
<text x="46" y="152" text-anchor="end">0</text>
<text x="50" y="168">{{ "{:,.4g}".format(low) }}</text>
<text x="640" y="168" text-anchor="end">{{ "{:,.4g}".format(high) }}</text>
<text x="345" y="180" text-anchor="middle">{{ label }}</text></svg>"""


def histogram(values: np.ndarray, label: str, *, rate: bool = False, bins: int = 60) -> str:
    """Bars as SVG: how many values in each of `bins` equal steps; with `rate`, how many per unit."""
    from jinja2 import Environment
    from markupsafe import Markup

    counts, edges = np.histogram(values, bins=bins)
    heights = counts / (edges[1] - edges[0] or 1.0) if rate else counts.astype(float)
    template = Environment(autoescape=True).from_string(_BARS)
    scale = {
        "top": max(float(heights.max()), 1e-9),
        "low": edges[0],
        "high": edges[-1],
        "width": 590 / bins,
    }
    return Markup(template.render(counts=heights.tolist(), label=label, **scale))


def thumbnail(pixels: np.ndarray) -> str:
    """uint8 (H, W, 3) -> base64 JPEG of at most 176 pixels."""
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((176, 144))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    return base64.b64encode(data.getvalue()).decode()


def download_report(
    manifest: Path, settings: dict[str, Any], to_json: Path, to_html: Path
) -> dict[str, Any]:
    """Read `manifest.parquet`, write both reports; returns what `report.json` holds."""
    import pyarrow.parquet as pq

    outcomes, rows_by_host, hosts = Counter[str](), Counter[str](), dict[str, Counter[str]]()
    examples: dict[str, list[dict[str, Any]]] = {}
    parts: list[np.ndarray] = []
    columns = ["url", "error", "detail", "captions", "at", "width", "height", "length", "index"]
    for batch in pq.ParquetFile(manifest).iter_batches(50_000, columns=columns):
        for index, url, error, detail, captions in zip(
            *(batch[name].to_pylist() for name in ("index", "url", "error", "detail", "captions"))
        ):
            outcomes[error or "ok"] += 1
            host = url.partition("://")[2].partition("/")[0]
            rows_by_host[host] += 1
            if error:
                hosts.setdefault(host, Counter())[error] += 1
                if len(seen := examples.setdefault(error, [])) < 8:
                    caption = captions[0] if captions else ""
                    seen.append(
                        {"name": f"row {index}", "caption": caption, "detail": f"{url}: {detail}"}
                    )
        names = ("at", "width", "height", "length")  # NaN where there is no picture
        parts.append(np.array([batch[name].to_pylist() for name in names], float))
    at, width, height, lengths = np.concatenate(parts, axis=1)
    sides, lengths = np.minimum(width, height)[~np.isnan(lengths)], lengths[~np.isnan(lengths)]
    seconds = float(at.max() - at.min()) if len(at) else 0.0
    worst = sorted(hosts, key=lambda host: -hosts[host].total())[:25]
    report = {
        "outcomes": dict(outcomes.most_common()),
        "rows": outcomes.total(),
        "seconds": round(seconds, 1),
        "bytes": int(lengths.sum()),
        "hosts": len(rows_by_host),
        "worst_hosts": {host: dict(hosts[host].most_common()) for host in worst},
        "examples": examples,
        "settings": settings,
    }
    to_json.write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
    facts = [("rows", f"{outcomes.total():,}"), ("pictures", f"{outcomes['ok']:,}"),
             ("MB", f"{lengths.sum() / 1e6:,.0f}"), ("hosts", f"{len(rows_by_host):,}"),
             ("seconds from the first row to the last", f"{seconds:,.0f}")]  # fmt: skip
    write_page(
        to_html,
        title=f"Download of {settings['source']}",
        facts=facts,
        outcomes=outcomes,
        oddities=settings["oddities"],
        plots=_download_plots(at, sides, lengths),
        hosts=[
            (host, rows_by_host[host], hosts[host].total(), _causes(hosts[host])) for host in worst
        ],
        examples=sorted(examples.items()),
    )
    return report


def _causes(counts: Counter[str]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in counts.most_common(3))


def _download_plots(
    at: np.ndarray, sides: np.ndarray, lengths: np.ndarray
) -> list[tuple[str, str]]:
    plots = [("Rate over time", histogram(at - at.min(), "rows a second, over seconds", rate=True))]
    if len(sides):
        plots.append(("Shorter side", histogram(sides, "pictures, over pixels")))
        plots.append(("File size", histogram(lengths / 1000, "pictures, over kB")))
    return plots

"""The report of an evaluation: one HTML file of pictures, captions, scores and curves, without network."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from llava_simplified.data.images import ImageError, decode_image, read_image_bytes
from llava_simplified.evaluation.metrics import HEADLINES, Evaluation, Sample, Score, plain

CARDS = 500  # pictures shown; with PIXELS and QUALITY this keeps the file below 10 MB
PIXELS, QUALITY = 288, 72
PERCENT = ("exact match",)
WORD = re.compile(r"\w[\w'’-]*")


@dataclass(frozen=True)
class Run:
    """One model's or checkpoint's captions of the test pictures. A number that ends `name` is its step."""

    name: str
    samples: Sequence[Sample]
    result: Evaluation

    @property
    def step(self) -> int | None:
        match = re.search(r"(\d+)\D*$", self.name)
        return int(match[1]) if match else None


def write_report(
    output: Path,
    *,
    title: str,
    runs: Sequence[Run],
    image_folder: Path,
    settings: Mapping[str, str],
    log: Path | None = None,
    train_captions: Collection[str] | None = None,
) -> None:
    """Write the HTML file.

    Args:
        runs: of the same pictures; the last one gives the headline scores and the order of the cards.
        settings: shown as a table.
        log: `trainer_log.jsonl`, for the loss curves.
        train_captions: in `metrics.plain` form: marks references that training never showed.

    Raises:
        ValueError: the runs are of different pictures, no picture can be read, or the log is not JSON lines.
    """
    runs = list(runs)[::-1]  # the headline run first
    order = {(s.index, s.image): number for number, s in enumerate(runs[0].samples)}
    rows = [sorted(run.samples, key=lambda s: order.get((s.index, s.image), -1)) for run in runs]
    for run, samples in zip(runs, rows):
        if [(s.index, s.image) for s in samples] != list(order):
            raise ValueError(
                f"runs {runs[0].name!r} and {run.name!r} are of different pictures; compare them apart"
            )
    cards = _cards(runs, rows, train_captions)
    notes = list(dict.fromkeys(note for run in runs for note in run.result.notes))
    notes += _attach_pictures(cards, image_folder)
    if len(cards) < len(order):
        notes.append(
            f"{len(cards)} of {len(order)} pictures are shown: the best, the worst and an even spread between"
        )
    html = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = html.from_string(
        resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    )
    text = template.render(
        title=title,
        runs=[run.name for run in runs],
        result=runs[0].result,
        tiles=[
            _tile(name, runs[0].result.mean[name])
            for name in HEADLINES
            if name in runs[0].result.mean
        ],
        table=_score_table(runs),
        probe=_probe(runs[0].result),
        charts=_charts(runs, log),
        words=_words(runs[0].samples),
        cards=cards,
        settings=settings,
        notes=notes,
        trials=len(runs[0].result.trials),
        show=_show,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")


def _show(name: str, value: float) -> str:
    return f"{100 * value:.1f} %" if name in PERCENT else f"{value:.3f}"


def _tile(name: str, score: Score) -> dict[str, Any]:
    interval = (
        "" if math.isnan(score.low) else f"{_show(name, score.low)} – {_show(name, score.high)}"
    )
    return {"name": name, "value": _show(name, score.value), "interval": interval}


def _score_table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A metric a row; each run's value and where value and interval lie on the row's axis, in percent."""
    table = []
    for name in HEADLINES:
        cells = [(run.result.mean.get(name), run.result.best.get(name)) for run in runs]
        ends = [x for mean, _ in cells if mean for x in mean if not math.isnan(x)]
        if not ends:
            continue
        top = max([*ends, 1e-9]) * 1.08
        table.append({"name": name, "cells": [
            {**_tile(name, mean), "best": _show(name, best.value) if best else "",
             "at": 100 * mean.value / top,
             "low": 100 * (mean.value if math.isnan(mean.low) else mean.low) / top,
             "high": 100 * (mean.value if math.isnan(mean.high) else mean.high) / top} if mean else None
            for mean, best in cells
        ]})  # fmt: skip
    return table


def _probe(result: Evaluation) -> list[dict[str, Any]]:
    """Scores with the true and with shuffled pictures, as bar lengths in percent."""
    bars = []
    for name in ("word F1", "CIDEr-D", "exact match"):
        if name in result.shuffled:
            true, other = result.mean[name].value, result.shuffled[name].value
            top = max(true, other, 1e-9)
            bars.append({"name": name, "true": _show(name, true), "shuffled": _show(name, other),
                         "true_bar": 100 * true / top, "shuffled_bar": 100 * other / top})  # fmt: skip
    return bars


# ----------------------------------------------------------------------------------------------- cards


def _cards(
    runs: Sequence[Run], rows: Sequence[Sequence[Sample]], known: Collection[str] | None
) -> list[dict[str, Any]]:
    """The pictures that are shown, best first by the headline run's word F1, then CIDEr-D."""
    f1, cider = (runs[0].result.per_image[name].mean(axis=0) for name in ("word F1", "CIDEr-D"))
    ranked = sorted(range(len(f1)), key=lambda i: (-f1[i], -cider[i], i))
    if len(ranked) > CARDS:
        spread = np.linspace(
            CARDS // 4, len(ranked) - 1 - CARDS // 4, CARDS - 2 * (CARDS // 4)
        ).astype(int)
        ranked = [*ranked[: CARDS // 4], *(ranked[i] for i in spread), *ranked[-(CARDS // 4) :]]
    cards = []
    for i in ranked:
        sample = rows[0][i]
        exact = runs[0].result.per_image["exact match"][:, i].max() > 0
        verdict = "right" if exact else "close" if f1[i] >= 0.5 else "wrong"
        written = [{"run": number, "name": run.name, "captions": _marked(row[i])}
                   for number, (run, row) in enumerate(zip(runs, rows))]  # fmt: skip
        cards.append({
            "image": sample.image, "references": sample.references, "verdict": verdict, "position": i,
            "f1": f"{f1[i]:.2f}", "cider": f"{cider[i]:.2f}", "runs": written,
            "unseen": known is not None and not any(plain(r) in known for r in sample.references),
        })  # fmt: skip
    return cards


def _marked(sample: Sample) -> list[dict[str, Any]]:
    """Distinct captions with how often each was written; each word with whether a reference has it."""
    true = {word for reference in sample.references for word in WORD.findall(reference.lower())}
    marked = []
    for caption, times in Counter(sample.captions).items():
        pieces = re.split(r"(\s+)", caption)
        words = [
            (piece, any(word in true for word in WORD.findall(piece.lower()))) for piece in pieces
        ]
        exact = plain(caption) in map(plain, sample.references)
        marked.append({"words": words, "times": times, "exact": exact})
    return marked


def _attach_pictures(cards: Sequence[dict[str, Any]], folder: Path) -> list[str]:
    """Put a small picture into each card as a data URI. Returns notes on pictures that can't be read."""
    errors = []
    for card in cards:
        try:
            card["picture"], card["width"], card["height"] = _thumbnail(
                read_image_bytes(card["image"], folder)
            )
        except ImageError as error:
            card["picture"], card["width"], card["height"] = "", 4, 3
            errors.append(f"{card['image']}: {error}")
    if cards and len(errors) == len(cards):
        raise ValueError(f"none of the {len(cards)} pictures can be read; the first: {errors[0]}")
    return [f"{len(errors)} pictures can't be shown; the first: {errors[0]}"] if errors else []


def _thumbnail(data: bytes) -> tuple[str, int, int]:
    image = Image.fromarray(decode_image(data))
    image.thumbnail((PIXELS, PIXELS), Image.Resampling.LANCZOS, reducing_gap=2.0)
    buffer = io.BytesIO()
    image.save(
        buffer, "WEBP", quality=QUALITY, lossless=max(image.size) <= 96
    )  # drawings and icons stay sharp
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode(), *image.size


# ------------------------------------------------------------------------------------ curves and words


def _charts(runs: Sequence[Run], log: Path | None) -> list[dict[str, Any]]:
    charts = []
    curves = {name: points for name, points in (read_log(log) if log else {}).items() if points}
    watched = {"CIDEr-D": curves.pop("CIDEr-D")} if "CIDEr-D" in curves else {}
    if curves:
        charts.append(_chart("Loss", "nats a token", curves))
    if watched:
        charts.append(
            _chart("CIDEr-D while training", "of the watched validation pictures", watched)
        )
    steps = sorted(
        (run.step, run.result.mean["CIDEr-D"].value) for run in runs if run.step is not None
    )
    if len({step for step, _ in steps}) > 1:
        charts.append(_chart("CIDEr-D", "by checkpoint", {"CIDEr-D": steps}))
    return charts


def read_log(path: Path) -> dict[str, list[tuple[float, float]]]:
    """(step, value) points of a `trainer_log.jsonl`: the "training" and "validation" loss, and "CIDEr-D".

    A step that occurs again, after a resume, counts as it was last. The last line may be cut off by a kill.

    Raises:
        ValueError: names the line that is not a JSON object.
    """
    keys = {"training": "loss", "validation": "eval_loss", "CIDEr-D": "eval_cider"}
    curves: dict[str, dict[float, float]] = {name: {} for name in keys}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else {}
            for name, key in keys.items():
                if key in row and math.isfinite(row[key]):
                    curves[name][row["step"]] = row[key]
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines):
                raise ValueError(
                    f"{path} line {number}: not a row of a training log: {error!r}"
                ) from None
    return {name: sorted(points.items()) for name, points in curves.items()}


def _chart(
    title: str, unit: str, series: Mapping[str, Sequence[tuple[float, float]]], most: int = 300
) -> dict[str, Any]:
    """Lines in a square of 100 by 100, y downwards, round ticks. Long lines are averaged to `most` points."""
    thin = {name: [np.mean(part, axis=0).tolist() for part in np.array_split(points, min(most, len(points)))]
            for name, points in series.items()}  # fmt: skip
    xs, ys = zip(*(point for points in thin.values() for point in points))
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
    left, right, low, high = (
        min(xs),
        max(max(xs), min(xs) + 1e-9),
        y_ticks[0],
        max(y_ticks[-1], max(ys)),
    )

    def place(x: float, y: float) -> tuple[float, float]:
        return round(100 * (x - left) / (right - left), 2), round(
            100 - 100 * (y - low) / (high - low), 2
        )

    lines = []
    for name, points in thin.items():
        spots = [
            (*place(x, y), f"{x:g}" if x == int(x) else f"{x:.0f}", f"{y:.3f}") for x, y in points
        ]
        path = "M" + "L".join(f"{x} {y}" for x, y, *_ in spots)
        lines.append({"name": name, "path": path, "spots": spots, "last": f"{points[-1][1]:.3f}"})
    return {
        "title": title, "unit": unit, "lines": lines,
        "x_ticks": [(place(t, low)[0], f"{t:g}") for t in x_ticks if left <= t <= right],
        "y_ticks": [(place(left, t)[1], f"{t:g}") for t in y_ticks if low <= t <= high],
    }  # fmt: skip


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers, the first at or below `low`, the last at or above `high`."""
    raw = (high - low or abs(high) or 1) / about
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first = math.floor(low / step)
    count = max(2, math.ceil(high / step - 1e-9) - first + 1)
    return [round((first + i) * step, 10) for i in range(count)]


def _words(samples: Sequence[Sample], most: int = 12) -> dict[str, list[dict[str, Any]]]:
    """Words written too often and too rarely, by Dunning's (1993) log-likelihood; counts are per picture."""
    ours: dict[str, float] = defaultdict(float)
    true: dict[str, float] = defaultdict(float)
    for sample in samples:
        for total, texts in ((ours, sample.captions), (true, sample.references)):
            for text in texts:
                for word in WORD.findall(text.lower()):
                    total[word] += 1 / len(texts)
    all_ours, all_true = sum(ours.values()) or 1, sum(true.values()) or 1

    def surprise(word: str) -> float:
        a, b = ours[word], true[word]
        share = (a + b) / (all_ours + all_true)
        part = sum(
            n * math.log(n / (share * total)) for n, total in ((a, all_ours), (b, all_true)) if n
        )
        return math.copysign(part, a / all_ours - b / all_true)

    ranked = sorted({*ours, *true}, key=lambda word: (surprise(word), word))
    chosen = {"over": [w for w in ranked[::-1][:most] if surprise(w) > 1],
              "under": [w for w in ranked[:most] if surprise(w) < -1]}  # fmt: skip
    top = max([abs(surprise(w)) for group in chosen.values() for w in group], default=1)
    return {side: [{"word": word, "ours": f"{ours[word]:.0f}", "true": f"{true[word]:.0f}",
                    "bar": 100 * abs(surprise(word)) / top} for word in group]
            for side, group in chosen.items()}  # fmt: skip

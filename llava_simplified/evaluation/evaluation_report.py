"""The report of an evaluation: one HTML file of images, captions, scores and curves."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llava_simplified.data.images import ImageError, decode_image, read_image_bytes
from llava_simplified.evaluation.bootstrap import Score
from llava_simplified.evaluation.metrics import (
    METRIC_NAMES,
    Evaluation,
    Sample,
    exact_match,
    normalize_caption,
)
from llava_simplified.evaluation.training_curves import read_training_log
from llava_simplified.evaluation.word_usage import compare_word_usage, words_of
from llava_simplified.html_report import (
    Bar,
    Chart,
    Thumbnail,
    Tile,
    line_chart,
    make_thumbnail,
    write_page,
)

# Maximum number of images in the report, which keeps the file below 10 MB.
MAX_CARDS = 500
CLOSE_WORD_F1 = 0.5  # minimum word F1 of a caption that is marked as "close"

TILE_METRICS = ("CIDEr-D", "BLEU-4", "ROUGE-L", "METEOR", "CLIPScore", "word F1", "exact match")
SHUFFLE_METRICS = ("word F1", "CIDEr-D", "exact match")
UNSEEN_METRICS = ("CIDEr-D", "word F1", "exact match")
PERCENT_METRICS = ("exact match",)

# Colors of the report's style sheet.
_BLUE, _ORANGE, _GRAY = 0, 1, 5


@dataclass(frozen=True)
class Run:
    """The captions of one model or checkpoint. A number at the end of its name is its training step."""

    name: str
    samples: Sequence[Sample]
    result: Evaluation

    @property
    def step(self) -> int | None:
        """Return the training step, or None if the name contains no number."""
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
        output: The HTML file.
        title: Heading of the page.
        runs: Runs on the same images. The last one determines the headline scores and the order of the images.
        image_folder: Image folder.
        settings: Settings for the table at the end.
        log: `trainer_log.jsonl`, for the training curves.
        train_captions: Normalized training captions, for marking images with unseen references.

    Raises:
        ValueError: The runs are on different images, no image can be read, or the log is not a training log.
    """
    # Put the last run, which is the newest checkpoint, first. Its scores are the headline of the report.
    runs = list(runs)[::-1]
    headline = runs[0]
    aligned = _align_samples(runs)
    cards = _make_cards(runs, aligned, train_captions)
    notes: list[str] = []
    for run in runs:
        for note in run.result.notes:
            if note not in notes:  # most runs have the same notes
                notes.append(note)
    notes += _add_thumbnails(cards, image_folder)
    num_images = len(headline.samples)
    if len(cards) < num_images:
        notes.append(
            f"{len(cards)} of {num_images} images are shown: the best, the worst, and an evenly spread "
            "selection in between"
        )
    overused, underused = _word_bars(headline.samples)
    write_page(
        output,
        "evaluation/evaluation_report.html",
        title=title,
        run_names=[run.name for run in runs],
        result=headline.result,
        num_trials=len(headline.result.trials),
        tiles=_score_tiles(headline.result),
        notes=notes,
        shuffle_comparison=_compare_shuffled(headline.result),
        unseen_scores=_unseen_scores(headline.result),
        cards=cards,
        charts=_charts(runs, log),
        overused=overused,
        underused=underused,
        score_rows=_score_rows(runs),
        settings=settings,
    )


def _align_samples(runs: Sequence[Run]) -> list[list[Sample]]:
    """Return the samples of each run in the order of the first run."""
    # The position of each image in the first run.
    order: dict[tuple[str, str], int] = {}
    for position, sample in enumerate(runs[0].samples):
        order[_image_key(sample)] = position

    aligned = []
    for run in runs:
        # Use -1 for an image that is not in the first run, which makes the comparison below fail.
        samples = sorted(run.samples, key=lambda sample: order.get(_image_key(sample), -1))
        if list(map(_image_key, samples)) != list(order):
            raise ValueError(
                f"The runs {runs[0].name!r} and {run.name!r} are on different images. "
                "Evaluate their prediction files in separate calls."
            )
        aligned.append(samples)
    return aligned


def _image_key(sample: Sample) -> tuple[str, str]:
    return sample.index, sample.image


# ---- scores ----


def format_score(name: str, value: float) -> str:
    """Return a score as text: exact match in percent, others with three decimals."""
    if name in PERCENT_METRICS:
        return f"{100 * value:.1f} %"
    return f"{value:.3f}"


def _format_interval(name: str, score: Score) -> str:
    if math.isnan(score.low):
        return ""
    return f"{format_score(name, score.low)} – {format_score(name, score.high)}"


def _score_tiles(result: Evaluation) -> list[Tile]:
    """Return the headline scores, with their intervals."""
    tiles = []
    for name in METRIC_NAMES:
        if name in TILE_METRICS and name in result.mean:
            score = result.mean[name]
            interval = _format_interval(name, score) or "no interval"
            tiles.append(Tile(name, format_score(name, score.value), interval))
    return tiles


def _compare_shuffled(result: Evaluation) -> dict[str, list[Bar]]:
    """Return the bars that compare the scores of each image's own captions and of shuffled captions, by metric."""
    comparison = {}
    for name in SHUFFLE_METRICS:
        if name not in result.shuffled:
            continue
        own = result.mean[name].value
        shuffled = result.shuffled[name].value
        largest = max(own, shuffled, 1e-9)  # both may be 0
        comparison[name] = [
            Bar("own image", 100 * own / largest, format_score(name, own)),
            Bar("shuffled", 100 * shuffled / largest, format_score(name, shuffled), color=_GRAY),
        ]
    return comparison


def _unseen_scores(result: Evaluation) -> str:
    scores = []
    for name in UNSEEN_METRICS:
        if name in result.unseen:
            scores.append(f"{name} {format_score(name, result.unseen[name].value)}")
    return ", ".join(scores)


@dataclass(frozen=True)
class ScoreCell:
    """The score of one run. Positions are in percent of the common axis of all runs."""

    run: int
    value: str
    interval: str
    best: str
    position: float
    low: float
    high: float


@dataclass(frozen=True)
class ScoreRow:
    """One metric, with a cell for each run that has a score."""

    name: str
    cells: list[ScoreCell]


def _score_rows(runs: Sequence[Run]) -> list[ScoreRow]:
    rows = []
    for name in METRIC_NAMES:
        # The axis begins at 0, and ends slightly after the largest score or interval of all runs.
        largest = 1e-9
        for run in runs:
            score = run.result.mean.get(name, Score(0.0))
            largest = max(largest, score.value)
            if not math.isnan(score.high):
                largest = max(largest, score.high)
        cells = []
        for number, run in enumerate(runs):
            if name in run.result.mean:
                cells.append(_score_cell(name, number, run.result, axis_end=1.08 * largest))
        if cells:  # skip a metric that no run has, such as METEOR without Java
            rows.append(ScoreRow(name, cells))
    return rows


def _score_cell(name: str, run: int, result: Evaluation, axis_end: float) -> ScoreCell:
    score = result.mean[name]
    # The interval is drawn as a bar, and the score as a dot on it.
    low, high = score.low, score.high
    if math.isnan(low):  # draw only the dot
        low = high = score.value
    best = ""
    if name in result.best:
        best = format_score(name, result.best[name].value)
    return ScoreCell(
        run=run,
        value=format_score(name, score.value),
        interval=_format_interval(name, score),
        best=best,
        position=100 * score.value / axis_end,
        low=100 * low / axis_end,
        high=100 * high / axis_end,
    )


# ---- images ----


@dataclass(frozen=True)
class MarkedCaption:
    """A caption, split into words and spaces.

    Attributes:
        pieces: Pairs of a piece, and whether it is a word of a reference.
        count: Number of trials in which the caption was generated.
        is_exact: Whether the caption equals a reference.
    """

    pieces: list[tuple[str, bool]]
    count: int
    is_exact: bool


@dataclass
class Card:
    """One image of the report.

    Attributes:
        sample: The image with its references.
        position: Position in the prediction file.
        verdict: "right", "close" or "wrong".
        word_f1: Mean word F1 over the trials of the headline run.
        cider_d: Mean CIDEr-D over the trials of the headline run.
        is_unseen: Whether no reference is in the training data.
        captions_by_run: Distinct captions of each run.
        thumbnail: None if the image cannot be read.
    """

    sample: Sample
    position: int
    verdict: str
    word_f1: float
    cider_d: float
    is_unseen: bool
    captions_by_run: list[list[MarkedCaption]]
    thumbnail: Thumbnail | None = None


def _make_cards(
    runs: Sequence[Run],
    aligned: Sequence[Sequence[Sample]],
    train_captions: Collection[str] | None,
) -> list[Card]:
    """Return the cards of the report, sorted by word F1 and then CIDEr-D of the headline run, best first."""
    # Arrays (images,) of the headline run, from (trials, images).
    per_image = runs[0].result.per_image
    word_f1 = per_image["word F1"].mean(axis=0)
    cider_d = per_image["CIDEr-D"].mean(axis=0)
    is_exact = per_image["exact match"].max(axis=0) > 0
    # Use CIDEr-D only to break ties of word F1: in a small set, its values are not reliable.
    ranked = sorted(range(len(word_f1)), key=lambda i: (-word_f1[i], -cider_d[i], i))

    cards = []
    for position in _choose_shown(ranked):
        sample = aligned[0][position]
        verdict = "wrong"
        if is_exact[position]:
            verdict = "right"
        elif word_f1[position] >= CLOSE_WORD_F1:
            verdict = "close"
        is_unseen = False
        if train_captions is not None:
            normalized = map(normalize_caption, sample.references)
            is_unseen = not any(reference in train_captions for reference in normalized)
        card = Card(
            sample=sample,
            position=position,
            verdict=verdict,
            word_f1=float(word_f1[position]),
            cider_d=float(cider_d[position]),
            is_unseen=is_unseen,
            captions_by_run=[mark_captions(samples[position]) for samples in aligned],
        )
        cards.append(card)
    return cards


def _choose_shown(ranked: list[int]) -> list[int]:
    """Return at most MAX_CARDS images: the best, the worst, and an evenly spread selection in between."""
    if len(ranked) <= MAX_CARDS:
        return ranked
    # Use a quarter of the cards for each end of the ranking, and the rest for evenly spread positions.
    quarter = MAX_CARDS // 4
    spread = np.linspace(quarter, len(ranked) - 1 - quarter, MAX_CARDS - 2 * quarter)
    middle = [ranked[rank] for rank in spread.astype(int)]
    return [*ranked[:quarter], *middle, *ranked[-quarter:]]


def mark_captions(sample: Sample) -> list[MarkedCaption]:
    """Return the distinct captions of an image, with the words that a reference contains."""
    # Ignore case and punctuation: "Mat." in a caption matches "mat" in a reference.
    reference_words: set[str] = set()
    for reference in sample.references:
        reference_words.update(words_of(reference))
    marked = []
    # Count equal captions, since trials often repeat a caption.
    for caption, count in Counter(sample.captions).items():
        pieces = []
        # Split with a group, which keeps the spaces, so that the caption is displayed unchanged.
        for piece in re.split(r"(\s+)", caption):
            if piece:
                pieces.append((piece, not reference_words.isdisjoint(words_of(piece))))
        marked.append(MarkedCaption(pieces, count, exact_match(caption, sample.references)))
    return marked


def _add_thumbnails(cards: Sequence[Card], folder: Path) -> list[str]:
    """Read the images of the cards.

    Returns:
        Notes about unreadable images.

    Raises:
        ValueError: No image can be read.
    """
    errors = []
    for card in cards:
        try:
            pixels = decode_image(read_image_bytes(card.sample.image, folder))
        except ImageError as error:  # the card is displayed without an image
            errors.append(f"{card.sample.image}: {error}")
            continue
        card.thumbnail = make_thumbnail(pixels)
    if not errors:
        return []
    if len(errors) == len(cards):  # probably a wrong folder
        raise ValueError(
            f"None of the {len(cards)} images can be read; check --image-folder. "
            f"The first: {errors[0]}"
        )
    return [f"images that cannot be shown: {len(errors)}; the first: {errors[0]}"]


# ---- charts ----


def _charts(runs: Sequence[Run], log: Path | None) -> list[Chart]:
    charts = []
    if log:
        curves = read_training_log(log)
        cider_points = curves.pop("CIDEr-D")
        losses = {name: points for name, points in curves.items() if points}
        if losses:
            charts.append(line_chart("Loss", "nats per token", losses))
        if cider_points:
            cider = {"CIDEr-D": cider_points}
            charts.append(line_chart("CIDEr-D during training", "on validation images", cider))

    # The scores of several checkpoints, over their steps.
    by_step = []
    for run in runs:
        if run.step is not None:
            by_step.append((float(run.step), run.result.mean["CIDEr-D"].value))
    if len({step for step, _ in by_step}) > 1:
        charts.append(line_chart("CIDEr-D", "by checkpoint", {"CIDEr-D": sorted(by_step)}))
    return charts


def _word_bars(samples: Sequence[Sample]) -> tuple[list[Bar], list[Bar]]:
    """Return bars for the words that are generated too often, and for those generated too rarely."""
    overused, underused = compare_word_usage(samples)
    # Use the same scale for both lists.
    largest = 1e-9
    for usage in [*overused, *underused]:
        largest = max(largest, abs(usage.log_likelihood))

    bars: tuple[list[Bar], list[Bar]] = ([], [])
    for side, (usages, color) in enumerate(((overused, _ORANGE), (underused, _BLUE))):
        for usage in usages:
            percent = 100 * abs(usage.log_likelihood) / largest
            counts = f"{usage.generated:.0f} : {usage.references:.0f}"
            bars[side].append(Bar(usage.word, percent, counts, color))
    return bars

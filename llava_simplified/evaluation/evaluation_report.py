"""The report of an evaluation: one HTML file of images, captions, scores and curves."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llava_simplified.data.images import ImageError, decode_image, read_image_bytes
from llava_simplified.evaluation.bootstrap import Score
from llava_simplified.evaluation.comparison import RANK_METRICS, ChangedImage, Comparison
from llava_simplified.evaluation.metrics import (
    METRIC_NAMES,
    Evaluation,
    Sample,
    exact_match,
    normalize_caption,
)
from llava_simplified.evaluation.run_names import training_steps
from llava_simplified.evaluation.training_curves import read_training_log
from llava_simplified.evaluation.word_usage import compare_word_usage, words_of
from llava_simplified.html_report import (
    Bar,
    Chart,
    Thumbnail,
    line_chart,
    make_thumbnail,
    write_page,
)

# Maximum number of images in the report, which keeps the file below 10 MB.
MAX_CARDS = 500
MAX_PANELS = 4  # maximum number of runs with separate panels
MAX_CHANGED = 8  # images in each list of a comparison
CLOSE_WORD_F1 = 0.5  # minimum word F1 of a caption that is marked as "close"

# Metrics that are shown in large type, compared with shuffled captions, and shown for unseen images.
TILE_METRICS = (
    "CIDEr-D",
    "BLEU-4",
    "ROUGE-L",
    "METEOR",
    "CLIPScore",
    "word F1",
    "exact match",
    "CHAIRi",
)
SHUFFLE_METRICS = ("word F1", "CIDEr-D", "exact match")
UNSEEN_METRICS = ("CIDEr-D", "word F1", "exact match")
# Metrics that are shown in percent.
PERCENT_METRICS = ("exact match", "CHAIRs", "CHAIRi")

# Numbers of the colors in the report's style sheet (classes c0 to c5).
_BLUE, _ORANGE, _GRAY = 0, 1, 5


@dataclass(frozen=True)
class Run:
    """The captions of one model or checkpoint, and their scores."""

    name: str
    samples: Sequence[Sample]
    result: Evaluation


@dataclass(frozen=True)
class RunPanel:
    """Contents of the panels of a run: memorization, and words with an unusual frequency.

    Attributes:
        number: Number of the run, which determines its color.
        name: Name of the run.
        result: Scores of the run.
        unseen_scores: Scores on images whose references are not in the training data, as text.
        overused: Words that the model generates too often.
        underused: Words that the model generates too rarely.
    """

    number: int
    name: str
    result: Evaluation
    unseen_scores: str
    overused: list[Bar]
    underused: list[Bar]


def write_report(
    output: Path,
    *,
    title: str,
    runs: Sequence[Run],
    image_folder: Path,
    settings: Mapping[str, str],
    log: Path | None = None,
    train_captions: Collection[str] | None = None,
    comparisons: Mapping[str, Comparison] | None = None,
    groups: Mapping[str, Mapping[str, Evaluation]] | None = None,
) -> None:
    """Write the HTML file.

    Args:
        output: The HTML file.
        title: Heading of the page.
        runs: Runs on the same images. The checkpoints of one training run are shown newest first. The first run that is
            shown determines the order and the verdicts of the images.
        image_folder: Image folder.
        settings: Settings for the table at the end.
        log: `trainer_log.jsonl`, for the training curves.
        train_captions: Normalized training captions. Images whose references are not among them are marked.
        comparisons: Comparisons with the first of `runs`, by the name of the run that is compared with it.
        groups: Scores of subsets of the images, such as the domains of nocaps, by run and subset.

    Raises:
        ValueError: The runs have different images or references, no image can be read, or the log is not a training log.
    """
    given_runs = runs
    # Show the newest checkpoint of a run first. Other runs keep the order in which the user named them.
    steps = training_steps([run.name for run in runs])
    if steps is not None:
        runs = list(runs)[::-1]
    headline = runs[0]
    aligned = _align_samples(runs)
    cards = _make_cards(runs, aligned, train_captions)
    notes = _collect_notes(runs)
    notes += _add_thumbnails(cards, image_folder)
    num_images = len(headline.samples)
    if len(cards) < num_images:
        notes.append(
            f"{len(cards)} of {num_images} images are shown: the best, the worst, and an evenly spread "
            "selection in between"
        )
    # With many runs, show panels of the first one only. The section "All scores" and the charts show all runs.
    shown = runs
    if len(runs) > MAX_PANELS:
        shown = runs[:1]
    panels = _make_panels(shown)
    write_page(
        output,
        "evaluation/evaluation_report.html",
        title=title,
        run_names=[run.name for run in runs],
        num_images=num_images,
        num_trials=max(len(run.result.trials) for run in runs),
        tiles=_score_tiles(shown),
        panels=panels,
        notes=notes,
        shuffle_comparison=_compare_shuffled(shown),
        comparisons=_comparison_panels(given_runs, comparisons or {}, image_folder),
        cards=cards,
        charts=_charts(runs, steps, log),
        score_rows=_score_rows(runs),
        text_rows=_text_rows(runs),
        group_metrics=[name for name in METRIC_NAMES if name in headline.result.mean],
        group_rows=_group_rows(groups or {}),
        settings=settings,
    )


def _collect_notes(runs: Sequence[Run]) -> list[str]:
    """Return the notes of all runs, each once. A note that only some runs have begins with their names."""
    runs_by_note: dict[str, list[str]] = {}
    for run in runs:
        for note in run.result.notes:
            runs_by_note.setdefault(note, []).append(run.name)
    notes = []
    for note, names in runs_by_note.items():
        if len(names) < len(runs):
            note = f"{', '.join(names)}: {note}"
        notes.append(note)
    return notes


def _make_panels(runs: Sequence[Run]) -> list[RunPanel]:
    """Return the panels of runs: their scores, and the words that they use too often or too rarely."""
    panels = []
    for number, run in enumerate(runs):
        # With a single run, the colors distinguish the two lists; with several, they distinguish the runs.
        colors = (_ORANGE, _BLUE) if len(runs) == 1 else (number, number)
        overused, underused = _word_bars(run.samples, colors)
        unseen = _unseen_scores(run.result)
        panels.append(RunPanel(number, run.name, run.result, unseen, overused, underused))
    return panels


def _align_samples(runs: Sequence[Run]) -> list[list[Sample]]:
    """Return the samples of each run in the order of the first run."""
    # The position of each image in the first run.
    order: dict[_ImageKey, int] = {}
    for position, sample in enumerate(runs[0].samples):
        order[_image_key(sample)] = position

    aligned = []
    for run in runs:
        # An image that is missing in the first run gets -1. The comparison below then fails.
        samples = sorted(run.samples, key=lambda sample: order.get(_image_key(sample), -1))
        if list(map(_image_key, samples)) != list(order):
            raise ValueError(
                f"The runs {runs[0].name!r} and {run.name!r} are on different images, or have different references. "
                "Evaluate their prediction files in separate calls."
            )
        aligned.append(samples)
    return aligned


_ImageKey = tuple[str, str, frozenset[str]]


def _image_key(sample: Sample) -> _ImageKey:
    """Return the key that identifies an image in all runs. A card shows the references once, so they are part of it."""
    return sample.index, sample.image, frozenset(sample.references)


# ---- scores ----


def format_score(name: str, value: float) -> str:
    """Return a score as text: in percent for `PERCENT_METRICS`, with three decimals for all other metrics."""
    if name in PERCENT_METRICS:
        return f"{100 * value:.1f} %"
    return f"{value:.3f}"


def _format_interval(name: str, score: Score) -> str:
    if math.isnan(score.low):
        return ""
    return f"{format_score(name, score.low)} – {format_score(name, score.high)}"


class RunTile(NamedTuple):
    """One metric in large type, with (number of the run, score, interval) for each run that has the metric."""

    label: str
    values_by_run: list[tuple[int, str, str]]


def _score_tiles(runs: Sequence[Run]) -> list[RunTile]:
    """Return the headline scores, with their intervals."""
    tiles = []
    for name in METRIC_NAMES:
        values = []
        for number, run in enumerate(runs):
            if name in TILE_METRICS and name in run.result.mean:
                score = run.result.mean[name]
                interval = _format_interval(name, score) or "no interval"
                values.append((number, format_score(name, score.value), interval))
        if values:
            tiles.append(RunTile(name, values))
    return tiles


def _compare_shuffled(runs: Sequence[Run]) -> dict[str, list[Bar]]:
    """Return bars by metric, which compare the scores of the captions with those of shuffled captions."""
    comparison = {}
    for name in SHUFFLE_METRICS:
        # A set of one image has no shuffled scores.
        scored = [(n, run) for n, run in enumerate(runs) if name in run.result.shuffled]
        # The longest bar has the largest score. All scores may be 0, so start above 0.
        largest = 1e-9
        for _, run in scored:
            largest = max(largest, run.result.mean[name].value, run.result.shuffled[name].value)
        bars = []
        for number, run in scored:
            # There are only five colors, so name the run in the label.
            prefix = f"{run.name}: " if len(runs) > 1 else ""
            own = run.result.mean[name].value
            shuffled = run.result.shuffled[name].value
            own_text = format_score(name, own)
            shuffled_text = format_score(name, shuffled)
            bars.append(Bar(f"{prefix}own image", 100 * own / largest, own_text, number % 5))
            bars.append(Bar(f"{prefix}shuffled", 100 * shuffled / largest, shuffled_text, _GRAY))
        if bars:
            comparison[name] = bars
    return comparison


def _unseen_scores(result: Evaluation) -> str:
    """Return the scores on unseen images as text; empty if there are none."""
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
    """Return a row for each metric. All cells of a row have the same axis, so that their bars can be compared."""
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
    """Return the score of one run, with its positions on the axis."""
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


class GroupRow(NamedTuple):
    """The scores of one run on a subset of the images: (score, interval) as texts, by metric."""

    group: str
    run: str
    num_images: int
    scores: dict[str, tuple[str, str]]


def _group_rows(groups: Mapping[str, Mapping[str, Evaluation]]) -> list[GroupRow]:
    """Return one row for each subset and run; the rows of a subset follow each other."""
    rows = []
    for run, results in groups.items():
        for group, result in results.items():
            scores = {}
            for name, score in result.mean.items():
                scores[name] = format_score(name, score.value), _format_interval(name, score)
            rows.append(GroupRow(group, run, result.num_images, scores))
    # `sorted` is stable, so the runs of a subset keep their order.
    order = list(dict.fromkeys(row.group for row in rows))
    return sorted(rows, key=lambda row: order.index(row.group))


def _text_rows(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the text statistics by name: one value for each run, and then the value of the references."""
    rows = {}
    for name, reference_value in runs[0].result.reference_text.items():
        values = [run.result.text[name] for run in runs]
        rows[name] = [f"{value:.3g}" for value in (*values, reference_value)]
    return rows


# ---- comparison ----


class DifferenceRow(NamedTuple):
    """The difference of one metric as text."""

    name: str
    difference: str
    interval: str
    is_clear: bool
    num_better: int
    num_worse: int
    num_equal: int


class ChangedRow(NamedTuple):
    """An image whose captions changed, with the captions of both runs."""

    image: str
    references: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    word_f1: float
    thumbnail: Thumbnail | None


@dataclass(frozen=True)
class ComparisonPanel:
    """The comparison of a run with the baseline.

    Attributes:
        first: Name of the baseline.
        second: Name of the other run.
        rows: The differences of the metrics.
        gains: The images that gained most, the greatest gain first.
        losses: The images that lost most, the greatest loss first.
        num_changed: Number of images whose captions changed.
    """

    first: str
    second: str
    rows: list[DifferenceRow]
    gains: list[ChangedRow]
    losses: list[ChangedRow]
    num_changed: int


def _comparison_panels(
    runs: Sequence[Run], comparisons: Mapping[str, Comparison], image_folder: Path
) -> list[ComparisonPanel]:
    """Return the panels of the comparisons of runs with the first one."""
    baseline = runs[0]
    panels = []
    for run in runs[1:]:
        comparison = comparisons.get(run.name)
        if comparison is None:
            continue
        rows = []
        for name, difference in comparison.differences.items():
            score = difference.score
            row = DifferenceRow(
                name=name,
                difference=_format_difference(name, score.value),
                interval=_format_difference_interval(name, score),
                is_clear=difference.is_clear,
                num_better=difference.num_better,
                num_worse=difference.num_worse,
                num_equal=difference.num_equal,
            )
            rows.append(row)
        # `changed` is sorted from the greatest gain to the greatest loss. Images whose captions changed without
        # changing the score belong to neither list.
        changed = comparison.changed
        gains = [image for image in changed if image.differences[RANK_METRICS[0]] > 0]
        losses = [image for image in changed[::-1] if image.differences[RANK_METRICS[0]] < 0]
        panel = ComparisonPanel(
            first=baseline.name,
            second=run.name,
            rows=rows,
            gains=[_changed_row(i, baseline, run, image_folder) for i in gains[:MAX_CHANGED]],
            losses=[_changed_row(i, baseline, run, image_folder) for i in losses[:MAX_CHANGED]],
            num_changed=len(changed),
        )
        panels.append(panel)
    return panels


def _changed_row(image: ChangedImage, first: Run, second: Run, folder: Path) -> ChangedRow:
    """Return an image with the captions of both runs."""
    before = first.samples[image.position]
    after = second.samples[image.position]
    return ChangedRow(
        image=before.image or f"index {before.index}",  # a text-only record has no image
        references=before.references,
        # Remove duplicates, since trials often repeat a caption.
        before=tuple(dict.fromkeys(before.captions)),
        after=tuple(dict.fromkeys(after.captions)),
        word_f1=image.differences[RANK_METRICS[0]],
        thumbnail=_thumbnail(before.image, folder),
    )


def _thumbnail(image: str, folder: Path) -> Thumbnail | None:
    """Return the thumbnail of an image; None if there is no image or it cannot be read.

    The reason is not reported here, because `_add_thumbnails` writes it into the notes of the report.
    """
    if not image:
        return None
    try:
        return make_thumbnail(decode_image(read_image_bytes(image, folder)))
    except ImageError:
        return None


def _format_difference(name: str, value: float) -> str:
    if name in PERCENT_METRICS:
        return f"{100 * value:+.1f} %"
    return f"{value:+.3f}"


def _format_difference_interval(name: str, score: Score) -> str:
    if math.isnan(score.low):
        return ""
    return f"{_format_difference(name, score.low)} to {_format_difference(name, score.high)}"


# ---- images ----


@dataclass(frozen=True)
class CardRun:
    """What one run generated for an image.

    Attributes:
        verdict: "right", "close" or "wrong".
        word_f1: Word F1, the mean over the trials.
        cider_d: CIDEr-D, the mean over the trials.
        captions: The distinct captions of the run.
    """

    verdict: str
    word_f1: float
    cider_d: float
    captions: list[MarkedCaption]


@dataclass(frozen=True)
class MarkedCaption:
    """A caption, split into words and spaces.

    Attributes:
        pieces: Pairs (piece, whether the piece is a word of a reference).
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
        position: Position of the image in the prediction file.
        is_unseen: Whether no reference is in the training data.
        runs: What each run generated.
        thumbnail: Small copy of the image; None if the image cannot be read.
    """

    sample: Sample
    position: int
    is_unseen: bool
    runs: list[CardRun]
    thumbnail: Thumbnail | None = None


def _make_cards(
    runs: Sequence[Run],
    aligned: Sequence[Sequence[Sample]],
    train_captions: Collection[str] | None,
) -> list[Card]:
    """Return the cards of the report, sorted by word F1 and then CIDEr-D of the headline run, best first."""
    scores = []
    for run, samples in zip(runs, aligned):
        # The scores of a run are in the order of its own samples. Put them into the order of the first run.
        positions = {_image_key(sample): i for i, sample in enumerate(run.samples)}
        order = [positions[_image_key(sample)] for sample in samples]
        scores.append(_card_scores(run, order))
    # Use CIDEr-D only to break ties of word F1: in a small set, its values are not reliable.
    word_f1, cider_d, _ = scores[0]
    ranked = sorted(range(len(word_f1)), key=lambda i: (-word_f1[i], -cider_d[i], i))

    cards = []
    for position in _choose_shown(ranked):
        sample = aligned[0][position]
        is_unseen = False
        if train_captions is not None:
            normalized = map(normalize_caption, sample.references)
            is_unseen = not any(reference in train_captions for reference in normalized)
        card_runs = []
        for run_scores, samples in zip(scores, aligned):
            card_runs.append(_card_run(run_scores, position, samples[position]))
        cards.append(Card(sample, position, is_unseen, card_runs))
    return cards


_CardScores = tuple[np.ndarray, np.ndarray, np.ndarray]  # word F1, CIDEr-D, exact match: (images,)


def _card_scores(run: Run, order: Sequence[int]) -> _CardScores:
    """Return the scores of all images of a run, in the given order.

    Word F1 and CIDEr-D are means over the trials. An exact match in one of the trials is enough.
    """
    per_image = run.result.per_image
    word_f1 = per_image["word F1"].mean(axis=0)[order]
    cider_d = per_image["CIDEr-D"].mean(axis=0)[order]
    is_exact = per_image["exact match"].max(axis=0)[order] > 0
    return word_f1, cider_d, is_exact


def _card_run(scores: _CardScores, position: int, sample: Sample) -> CardRun:
    """Return the captions of one image in one run, with their scores and a verdict."""
    word_f1, cider_d, is_exact = (array[position] for array in scores)
    verdict = "wrong"
    if is_exact:
        verdict = "right"
    elif word_f1 >= CLOSE_WORD_F1:
        verdict = "close"
    return CardRun(verdict, float(word_f1), float(cider_d), mark_captions(sample))


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
    with_image = [card for card in cards if card.sample.image]  # text-only records have no image
    for card in with_image:
        try:
            pixels = decode_image(read_image_bytes(card.sample.image, folder))
        except ImageError as error:  # the card is displayed without an image
            errors.append(f"{card.sample.image}: {error}")
            continue
        card.thumbnail = make_thumbnail(pixels)
    if not errors:
        return []
    if len(errors) == len(with_image):  # probably a wrong folder
        raise ValueError(
            f"None of the {len(errors)} images can be read; check --image-folder. "
            f"The first error: {errors[0]}"
        )
    return [f"images that cannot be shown: {len(errors)}; the first error: {errors[0]}"]


# ---- charts ----


def _charts(runs: Sequence[Run], steps: Sequence[int] | None, log: Path | None) -> list[Chart]:
    """Return the curves of the training log, and the scores of checkpoints over their steps."""
    charts = []
    if log:
        curves = read_training_log(log)
        cider_points = curves.pop("CIDEr-D")
        reward_points = curves.pop("reward")
        if reward_points:
            # The chart "Loss" below shows cross-entropies. In reinforcement learning, the training loss is not a
            # cross-entropy, so leave it out.
            del curves["training"]
            reward = {"reward": reward_points}
            charts.append(line_chart("Reward during training", "of sampled captions", reward))
        losses = {name: points for name, points in curves.items() if points}
        if losses:
            charts.append(line_chart("Loss", "nats per token", losses))
        if cider_points:
            cider = {"CIDEr-D": cider_points}
            charts.append(line_chart("CIDEr-D during training", "on validation images", cider))

    # The scores of several checkpoints, over their steps.
    if steps is not None and len(steps) > 1:
        ciders = [run.result.mean["CIDEr-D"].value for run in runs]
        points = sorted(zip(map(float, steps[::-1]), ciders))  # the runs are shown newest first
        charts.append(line_chart("CIDEr-D", "by checkpoint", {"CIDEr-D": points}))
    return charts


def _word_bars(samples: Sequence[Sample], colors: tuple[int, int]) -> tuple[list[Bar], list[Bar]]:
    """Return bars for the words that are generated too often, and for those that are generated too rarely."""
    overused, underused = compare_word_usage(samples)
    # The longest bar of both lists fills the width, so that the lists can be compared.
    largest = 1e-9
    for usage in [*overused, *underused]:
        largest = max(largest, abs(usage.log_likelihood))

    bars: tuple[list[Bar], list[Bar]] = ([], [])
    for side, (usages, color) in enumerate(zip((overused, underused), colors)):
        for usage in usages:
            percent = 100 * abs(usage.log_likelihood) / largest
            counts = f"{usage.generated:.0f} : {usage.references:.0f}"
            bars[side].append(Bar(usage.word, percent, counts, color))
    return bars

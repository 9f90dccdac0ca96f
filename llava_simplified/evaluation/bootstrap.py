"""Scores of a corpus, and their bootstrap confidence intervals over images.

Every metric consists of two parts: statistics per image, and a function that converts their sum to a score.

    statistics                   sum over images          finish
    (trials, images, k)   --->   (trials, k)       --->   score of each trial

For a mean such as ROUGE-L, k is 1 and `finish` divides by the number of images. BLEU is not a mean over images:
its k = 10 statistics are counts, and the score is computed from the summed counts.

A bootstrap resample (Efron 1979) draws n of the n images with replacement. Only the number of times that each image
is drawn matters, so a resample is a vector w of n counts, and its summed statistics are `w @ statistics`. All
resamples together are one matrix product, for means and for BLEU alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

# Maximum number of resamples x images in memory (160 MB). Larger sets are resampled in several parts, which
# does not change the result.
MAX_DRAWS = 20_000_000
INTERVAL_PERCENTILES = (2.5, 97.5)


class Score(NamedTuple):
    """A score and its 95 % bootstrap interval. `low` and `high` are NaN if there is no interval."""

    value: float
    low: float = math.nan
    high: float = math.nan


Scores = dict[str, Score]
"""Scores by the name of the metric."""


class Metric(NamedTuple):
    """One metric, or several that are computed from the same statistics.

    Attributes:
        names: Names of the metrics.
        statistics: Array (trials, images, k).
        finish: Function of summed statistics (..., k) and the number of summed images; returns the scores
            (..., len(names)).
        lower_is_better: Whether the metric counts faults.
    """

    names: tuple[str, ...]
    statistics: np.ndarray
    finish: Callable[[np.ndarray, int], np.ndarray]
    lower_is_better: bool = False


def mean_metric(name: str, scores: np.ndarray) -> Metric:
    """Return the metric whose corpus score is the mean over images.

    Args:
        name: Name of the metric.
        scores: The score of each caption, an array (trials, images).
    """
    return Metric((name,), scores[..., None], lambda sums, num_images: sums / num_images)


@dataclass
class ScoreTable:
    """The scores of all metrics.

    Attributes:
        trials: Scores of each trial.
        mean: Mean of the trials' scores.
        best: Scores of the best caption of each image, which is selected for each metric separately.
        per_image: The score of each caption by metric, arrays (trials, images).
        resampled: The mean on each resample by metric, arrays (resamples,).
    """

    trials: list[Scores]
    mean: Scores = field(default_factory=dict)
    best: Scores = field(default_factory=dict)
    per_image: dict[str, np.ndarray] = field(default_factory=dict)
    resampled: dict[str, np.ndarray] = field(default_factory=dict)


class _Column(NamedTuple):
    """One column of the table of scores: a metric's name, with the statistics of the trials and of the best captions."""

    name: str
    name_index: int  # index in `Metric.names`
    per_image: np.ndarray  # (trials, images)
    statistics: np.ndarray  # (trials + 1, images, k); the last row belongs to the best captions
    finish: Callable[[np.ndarray, int], np.ndarray]

    def score(self, sums: np.ndarray, num_images: int) -> np.ndarray:
        """Return the scores (...) of summed statistics (..., k)."""
        return self.finish(sums, num_images)[..., self.name_index]


def score_metrics(metrics: Sequence[Metric], resamples: int, seed: int) -> ScoreTable:
    """Compute the score of each trial, their mean, and the score of the best captions, all with intervals.

    Args:
        metrics: Metrics of the same trials and images.
        resamples: Number of bootstrap resamples; 0 computes no intervals.
        seed: Seed of the resampling.
    """
    num_trials, num_images, _ = metrics[0].statistics.shape
    columns: list[_Column] = []
    for metric in metrics:
        columns += _columns(metric)
    bootstrap = _resample(columns, num_images, resamples, seed)

    table = ScoreTable(trials=[{} for _ in range(num_trials)])
    # Row -1 of the values belongs to the best captions, the rows before it to the trials.
    for column, resampled in zip(columns, bootstrap):
        values = column.score(column.statistics.sum(axis=1), num_images)  # (trials + 1,)
        for trial, scores in enumerate(table.trials):
            scores[column.name] = _with_interval(values[trial], resampled[:, trial])
        # For the interval of the mean, average the trials within each resample. Treating the trials as additional
        # images would give an interval that is too narrow, because the captions of one image are not independent.
        mean_resampled = resampled[:, :-1].mean(axis=1)
        table.mean[column.name] = _with_interval(values[:-1].mean(), mean_resampled)
        table.resampled[column.name] = mean_resampled
        table.best[column.name] = _with_interval(values[-1], resampled[:, -1])
        table.per_image[column.name] = column.per_image
    return table


def _columns(metric: Metric) -> list[_Column]:
    """Return a column for each name of a metric, with the statistics of the best caption of each image appended."""
    columns = []
    per_image = metric.finish(metric.statistics, 1)  # score each image as a corpus of one image
    for index, name in enumerate(metric.names):
        scores = per_image[..., index]
        # Select the trial with the best score for each image, and for each name separately: the best
        # trial may differ between BLEU-1 and BLEU-4.
        best_trial = scores.argmin(axis=0) if metric.lower_is_better else scores.argmax(axis=0)
        best = np.take_along_axis(metric.statistics, best_trial[None, :, None], axis=0)
        statistics = np.concatenate([metric.statistics, best])
        columns.append(_Column(name, index, scores, statistics, metric.finish))
    return columns


def _resample(
    columns: Sequence[_Column], num_images: int, resamples: int, seed: int
) -> list[np.ndarray]:
    """Return the scores of each column on each resample, arrays (resamples, trials + 1).

    CIDEr's document frequencies are still counted on all images. If they were counted on a resample, the rare n-grams
    of an image that is drawn twice would look common.
    """
    generator = np.random.default_rng(seed)
    probabilities = [1 / num_images] * num_images
    # Number of resamples that are drawn at a time.
    chunk = max(1, MAX_DRAWS // num_images)
    scores = [np.empty((resamples, len(column.statistics))) for column in columns]
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        # (size, images): how many times each resample draws each image.
        draws = generator.multinomial(num_images, probabilities, size=size).astype(float)
        for column, target in zip(columns, scores):
            # (size, images) @ (images, k) for each trial -> (size, trials + 1, k)
            sums = np.stack([draws @ trial for trial in column.statistics], axis=1)
            target[start : start + size] = column.score(sums, num_images)
    return scores


def _with_interval(value: float, resampled: np.ndarray) -> Score:
    """Return a score with its interval, the percentiles of the resampled scores; without resamples, no interval."""
    if not len(resampled):
        return Score(float(value))
    low, high = np.percentile(resampled, INTERVAL_PERCENTILES)
    return Score(float(value), float(low), float(high))

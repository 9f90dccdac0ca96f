"""Compare two runs on the same images: how much do their scores differ, and on which images?

Whether the intervals of two runs overlap says little about their difference. Most of the width of an interval comes from
the choice of images (some are harder than others), which is the same for both runs. So each bootstrap resample is scored
for both runs, and the interval is computed from the differences.

    resample       0      1      2     ...
    first run    0.61   0.58   0.64
    second run   0.63   0.61   0.66
    difference   0.02   0.03   0.02    ...   ->  interval of the difference

Runs with equal seeds are scored on equal resamples. So it is enough to subtract the scores in `Evaluation.resampled`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from llava_simplified.data.names import AmbiguousNameError, NameIndex
from llava_simplified.evaluation.bootstrap import INTERVAL_PERCENTILES, Score
from llava_simplified.evaluation.metrics import (
    LOWER_IS_BETTER,
    METRIC_NAMES,
    Evaluation,
    Sample,
    normalize_caption,
)

# Changed images are sorted by the difference of the first metric. The second metric decides between equal differences.
RANK_METRICS = ("word F1", "CIDEr-D")
_EQUAL = 1e-9  # smaller differences are rounding errors


@dataclass(frozen=True)
class Difference:
    """How one metric changed from the first run to the second.

    Attributes:
        score: Second minus first, with the interval of the paired bootstrap.
        num_better: Number of images on which the second run is better.
        num_worse: Number of images on which the second run is worse.
        num_equal: Number of images on which both have the same score.
    """

    score: Score
    num_better: int
    num_worse: int
    num_equal: int

    @property
    def is_clear(self) -> bool:
        """Return whether the interval excludes 0."""
        return self.score.low > 0 or self.score.high < 0


@dataclass(frozen=True)
class ChangedImage:
    """An image for which the runs generated different captions.

    Attributes:
        position: Position of the image among the samples.
        differences: Score of the second run minus score of the first run, by metric.
    """

    position: int
    differences: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Two runs on the same images.

    Attributes:
        differences: The differences by metric, in the order of `METRIC_NAMES`.
        changed: The images whose captions changed, the greatest gain first, the greatest loss last.
    """

    differences: dict[str, Difference]
    changed: list[ChangedImage]


def align_samples(samples: Sequence[Sample], order: Sequence[Sample]) -> list[Sample] | None:
    """Return samples in the order of other samples; None if their images or references differ.

    Two programs may number and name the same images differently. If an index or a name differs, images are matched by
    the rules of `data/names.py`, and the returned samples have the indices and names of `order`.
    """
    return _align_by_key(samples, order) or _align_by_name(samples, order)


def _align_by_key(samples: Sequence[Sample], order: Sequence[Sample]) -> list[Sample] | None:
    """Match samples with equal index and image; return None unless each has exactly one counterpart."""
    # An index can occur with several images, and an image with several instructions.
    by_key = {(sample.index, sample.image): sample for sample in samples}
    aligned = []
    for sample in order:
        same_image = by_key.pop((sample.index, sample.image), None)
        if same_image is None or not _have_equal_references(same_image, sample):
            return None
        aligned.append(same_image)
    if by_key:
        return None
    return aligned


def _align_by_name(samples: Sequence[Sample], order: Sequence[Sample]) -> list[Sample] | None:
    """Match samples by the names of their images; return None unless each has exactly one counterpart."""
    by_name = {sample.image: sample for sample in order}
    # A name does not identify a sample if an image has several instructions, or a record has no image.
    if "" in by_name or len(by_name) != len(order) or len(samples) != len(order):
        return None
    index = NameIndex(by_name)
    found: dict[str, Sample] = {}
    for sample in samples:
        try:
            match = index.find(sample.image)
        except AmbiguousNameError:
            return None
        if match is None or match.name in found:
            return None
        other = by_name[match.name]
        if not _have_equal_references(sample, other):
            return None
        found[match.name] = replace(sample, index=other.index, image=other.image)
    return [found[name] for name in by_name]


def _have_equal_references(first: Sample, second: Sample) -> bool:
    """Return whether two samples have the same references, in any order.

    Scores against different references cannot be compared. Records without an image may have nothing else to tell two
    data sets apart, since both number their records from 0.
    """
    return set(first.references) == set(second.references)


def compare_runs(
    first_samples: Sequence[Sample],
    first: Evaluation,
    second_samples: Sequence[Sample],
    second: Evaluation,
) -> Comparison:
    """Compare two runs.

    Args:
        first_samples: The images of the first run.
        first: Its scores.
        second_samples: The same images in the same order.
        second: Its scores, with the same number of resamples and the same seed.
    """
    # The difference of each image by metric, arrays (images,).
    per_image: dict[str, np.ndarray] = {}
    differences: dict[str, Difference] = {}
    for name in METRIC_NAMES:
        if name not in first.mean or name not in second.mean:
            continue
        # The runs may have different numbers of trials, so use the mean of each image's trials.
        change = second.per_image[name].mean(axis=0) - first.per_image[name].mean(axis=0)
        per_image[name] = change
        num_higher = int((change > _EQUAL).sum())
        num_lower = int((change < -_EQUAL).sum())
        num_better, num_worse = num_higher, num_lower
        if name in LOWER_IS_BETTER:
            num_better, num_worse = num_lower, num_higher
        differences[name] = Difference(
            score=_difference(name, first, second),
            num_better=num_better,
            num_worse=num_worse,
            num_equal=len(change) - num_higher - num_lower,
        )

    # Compare the captions themselves, because different captions can have equal scores.
    changed = []
    for position, (before, after) in enumerate(zip(first_samples, second_samples)):
        if _normalized(before) == _normalized(after):
            continue
        image_differences = {}
        for name, change in per_image.items():
            image_differences[name] = float(change[position])
        changed.append(ChangedImage(position, image_differences))
    changed.sort(key=_gain, reverse=True)
    return Comparison(differences, changed)


def _gain(image: ChangedImage) -> list[float]:
    """Return the key by which changed images are sorted."""
    return [image.differences[name] for name in RANK_METRICS]


def _difference(name: str, first: Evaluation, second: Evaluation) -> Score:
    """Return second minus first, with the interval of the paired bootstrap if both have resamples."""
    value = second.mean[name].value - first.mean[name].value
    before = first.resampled.get(name)
    after = second.resampled.get(name)
    # Without resamples (--resamples 0), and always for METEOR and SPICE, there is no interval.
    if before is None or after is None or not len(before):
        return Score(value)
    # Resample i of both runs has the same images, so subtract the resamples pairwise.
    low, high = np.percentile(after - before, INTERVAL_PERCENTILES)
    return Score(value, float(low), float(high))


def _normalized(sample: Sample) -> list[str]:
    """Return the captions of an image in a form that does not depend on the order of the trials."""
    return sorted(map(normalize_caption, sample.captions))


def format_comparison(first: str, second: str, num_images: int, comparison: Comparison) -> str:
    """Return a comparison as text, with one line for each metric.

    Args:
        first: Name of the first run.
        second: Name of the second run.
        num_images: Number of images.
        comparison: The comparison.
    """
    lines = [["metric", "difference", "95 % interval", "better", "worse", "equal"]]
    for name, difference in comparison.differences.items():
        score = difference.score
        interval = ""
        if not math.isnan(score.low):
            interval = f"{score.low:+.4f} to {score.high:+.4f}"
        counts = [difference.num_better, difference.num_worse, difference.num_equal]
        lines.append([name, f"{score.value:+.4f}", interval, *map(str, counts)])
    rows = [f"{second} minus {first}: {num_images} images, paired bootstrap"]
    rows += align_columns(lines)
    rows.append(f"images whose captions changed: {len(comparison.changed)} of {num_images}")
    return "\n".join(rows) + "\n"


def align_columns(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table as texts, with aligned columns.

    Args:
        lines: The cells of each line.
    """
    widths = [max(map(len, column)) for column in zip(*lines)]
    rows = []
    for line in lines:
        padded = [cell.ljust(width) for cell, width in zip(line, widths)]
        rows.append("  ".join(padded).rstrip())
    return rows

"""Evaluate captions: the metrics of the COCO caption server, intervals, and checks for guessing and memorization.

`evaluate` is the entry point. The metrics are computed in `ngram_metrics` (BLEU, CIDEr), `rouge` (ROUGE-L),
`clip_metrics` (CLIPScore) and `java_metrics` (METEOR, SPICE); `bootstrap` adds the intervals. BLEU, ROUGE-L and CIDEr-D
equal those of pycocoevalcap 1.2, the server's code (Chen et al. 2015, arXiv:1504.00325).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llava_simplified.evaluation.bootstrap import (
    Metric,
    Scores,
    ScoreTable,
    mean_metric,
    score_metrics,
)
from llava_simplified.evaluation.chair import chair_metrics
from llava_simplified.evaluation.clip_metrics import clip_scores
from llava_simplified.evaluation.java_metrics import add_java_metrics
from llava_simplified.evaluation.ngram_metrics import ngram_metrics
from llava_simplified.evaluation.ptb_tokenizer import cached_tokenize
from llava_simplified.evaluation.rouge import rouge_l
from llava_simplified.evaluation.text_statistics import describe_texts

MIN_IMAGES_FOR_CIDER = 50
"""CIDEr weights n-grams by the number of images whose references contain them, which is unstable for few images."""

METRIC_NAMES = (
    "CIDEr-D",
    "CIDEr",
    "BLEU-1",
    "BLEU-2",
    "BLEU-3",
    "BLEU-4",
    "ROUGE-L",
    "METEOR",
    "SPICE",
    "CLIPScore",
    "RefCLIPScore",
    "word F1",
    "exact match",
    "CHAIRs",
    "CHAIRi",
)
"""All metrics in the order of display. The COCO server (and therefore most papers) calls CIDEr-D "CIDEr"."""

LOWER_IS_BETTER = frozenset({"CHAIRs", "CHAIRi"})


@dataclass(frozen=True)
class Sample:
    """One image of a test set.

    Attributes:
        index: Index of the record, as text.
        image: Path of the image in the image folder, or `shard.tar#key`; empty for a text-only record.
        instruction: Instruction that was given to the model.
        references: Reference captions.
        captions: Generated captions, one for each trial (returned sequence).
    """

    index: str
    image: str
    instruction: str
    references: tuple[str, ...]
    captions: tuple[str, ...]


@dataclass
class Evaluation:
    """Every score of one set of predictions.

    Attributes:
        num_images: Number of images.
        trials: Scores of each trial.
        mean: Mean of the trials' scores.
        best: Scores of the best caption of each image, which is selected for each metric separately.
        shuffled: `mean` if each image gets the captions of a different image. Guessing reaches these scores too.
        unseen: `mean` on the images whose references are all missing from the training data.
        shares: Fraction of distinct captions; with training captions, also the fractions of novel captions and of
            images whose references are all missing from the training data ("unseen references").
        per_image: The score of each caption by metric, arrays (trials, images).
        notes: Warnings, and reasons for skipped metrics.
        resampled: `mean` on each bootstrap resample by metric, arrays (resamples,); for paired comparisons.
        counts: Numbers of predictions and references that were matched or left out, by a description.
        text: Length, variety and repetition of the captions; see `text_statistics`.
        reference_text: The same statistics of the first reference of each image, for comparison.
    """

    num_images: int
    trials: list[Scores]
    mean: Scores
    best: Scores
    shuffled: Scores = field(default_factory=dict)
    unseen: Scores = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    per_image: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    resampled: dict[str, np.ndarray] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    text: dict[str, float] = field(default_factory=dict)
    reference_text: dict[str, float] = field(default_factory=dict)


def evaluate(
    samples: Sequence[Sample],
    *,
    train_captions: Iterable[str] | None = None,
    clip: Path | None = None,
    images: Sequence[bytes] = (),
    annotated: Sequence[Collection[str]] | None = None,
    java: bool = True,
    resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Score captions against references.

    Args:
        samples: Images with references and captions; all have the same number of captions.
        train_captions: All captions of the training data, to count novel captions and unseen references.
        clip: Folder of a CLIP model, for CLIPScore and RefCLIPScore.
        images: Encoded image files in the order of the samples; only CLIPScore requires them.
        annotated: COCO categories that are annotated in each image, in the order of the samples, for CHAIR.
        java: Compute METEOR and SPICE too, if Java and pycocoevalcap are installed.
        resamples: Number of bootstrap resamples over images; 0 computes no intervals.
        seed: Seed of the bootstrap and of the shuffled captions.

    Raises:
        ValueError: There are no samples, a sample has no references, or the numbers of captions differ.
    """
    _check_samples(samples)
    num_images = len(samples)
    # Samples are ordered by image and then by trial. Metrics expect (trials, images).
    num_trials = len(samples[0].captions)
    captions: list[list[str]] = [[] for _ in range(num_trials)]
    references: list[list[str]] = []
    for sample in samples:
        for trial, caption in zip(captions, sample.captions):
            trial.append(caption)
        references.append(list(sample.references))

    # CLIPScore (which is slow) and CHAIR are computed for these captions only, and not for the shuffled ones below.
    extra_metrics = []
    if clip is not None:
        clip_score, ref_clip_score = clip_scores(clip, images, captions, references)
        extra_metrics.append(mean_metric("CLIPScore", clip_score))
        extra_metrics.append(mean_metric("RefCLIPScore", ref_clip_score))
    if annotated is not None:
        extra_metrics += chair_metrics(captions, references, annotated)
    table = _score_captions(captions, references, resamples, seed, extra_metrics)
    notes: list[str] = []
    if java:
        notes += add_java_metrics(table, _tokenize_all(captions), _tokenize_all(references))
    if num_images < MIN_IMAGES_FOR_CIDER:
        notes.append(
            f"only {num_images} images with references: "
            f"CIDEr is unstable below {MIN_IMAGES_FOR_CIDER}"
        )
    result = Evaluation(
        num_images=num_images,
        trials=table.trials,
        mean=table.mean,
        best=table.best,
        per_image=table.per_image,
        notes=notes,
        resampled=table.resampled,
        text=describe_texts(_tokenize_all(captions)),
        # A trial has one caption per image, so use one reference per image too: statistics such as distinct-n depend
        # on the number of texts.
        reference_text=describe_texts(_tokenize_all([[group[0] for group in references]])),
    )

    if num_images > 1:  # a single image cannot be shuffled
        # Score each image with the captions of another one. The more the model uses the image, the lower these scores
        # are in comparison.
        shuffled = _shuffle_captions(captions, seed)
        result.shuffled = _score_captions(shuffled, references, resamples, seed).mean
    result.shares["distinct captions"] = _distinct_share(captions)
    if train_captions is not None:
        _compare_with_training(result, captions, references, train_captions, resamples, seed)
    return result


def _check_samples(samples: Sequence[Sample]) -> None:
    """Raise ValueError unless all samples have references and the same number of captions."""
    if not samples:
        raise ValueError("There are no predictions to evaluate.")
    first = samples[0]
    for sample in samples:
        where = f"image {sample.image!r} (index {sample.index})"
        if not sample.references:
            raise ValueError(
                f"{where} has no reference caption: add 'gt_caption' to its row, or pass --references."
            )
        if len(sample.captions) != len(first.captions):
            raise ValueError(
                f"{where} has {len(sample.captions)} captions, but {first.image!r} has "
                f"{len(first.captions)}. All images need the same number of captions, as set by --trials of "
                "`llava predict`; check that it has finished, and run it again if not."
            )


def _score_captions(
    captions: list[list[str]],
    references: list[list[str]],
    resamples: int,
    seed: int,
    extra_metrics: Sequence[Metric] = (),
) -> ScoreTable:
    """Compute the metrics of texts. `captions` is (trials, images), `references` (images, references)."""
    # COCO's metrics compare tokens in lower case, without punctuation.
    caption_tokens = _tokenize_all(captions)
    reference_tokens = _tokenize_all(references)
    metrics = ngram_metrics(caption_tokens, reference_tokens)
    metrics.append(_score_each("ROUGE-L", rouge_l, caption_tokens, reference_tokens))
    # Use the original captions for these two metrics, including punctuation.
    metrics.append(_score_each("word F1", word_f1, captions, references))
    metrics.append(_score_each("exact match", exact_match, captions, references))
    return score_metrics([*metrics, *extra_metrics], resamples, seed)


def _score_each(
    name: str,
    score: Callable[[str, Sequence[str]], float],
    captions: list[list[str]],
    references: list[list[str]],
) -> Metric:
    """Return a metric that scores each caption separately."""
    scores = np.zeros((len(captions), len(references)))
    for trial, trial_captions in enumerate(captions):
        for image, caption in enumerate(trial_captions):
            scores[trial, image] = score(caption, references[image])
    return mean_metric(name, scores)


def _tokenize_all(groups: Iterable[Iterable[str]]) -> list[list[str]]:
    """Tokenize lists of texts, as the COCO caption server does."""
    return [list(map(cached_tokenize, group)) for group in groups]


# ---- simple metrics ----


def normalize_caption(caption: str) -> str:
    """Return the caption in lower case with single spaces, for comparing whole captions."""
    return " ".join(caption.lower().split())


def exact_match(caption: str, references: Sequence[str]) -> bool:
    """Return whether the normalized caption equals a reference."""
    return normalize_caption(caption) in map(normalize_caption, references)


def word_f1(caption: str, references: Sequence[str]) -> float:
    """Return the largest F1 score of the caption's words with the words of a reference.

    Both are compared as bags of lower-cased words: the order is ignored, and the number of occurrences counts.
    """
    words = Counter(caption.lower().split())  # how often each word occurs
    best = 0.0
    for reference in references:
        reference_words = Counter(reference.lower().split())
        total = words.total() + reference_words.total()
        if total == 0:  # both are empty
            return 1.0
        common = (words & reference_words).total()  # the smaller count of each word
        best = max(best, 2 * common / total)
    return best


# ---- checks for guessing and memorization ----


def _shuffle_captions(captions: list[list[str]], seed: int) -> list[list[str]]:
    """Assign to each image the captions of a different image.

    The images are arranged in a random circle, and each gets the captions of its neighbor. Unlike with a random
    permutation, no image keeps its own captions.
    """
    num_images = len(captions[0])
    circle = np.random.default_rng(seed).permutation(num_images)
    # Example: with the circle 2, 0, 1, image 0 gets the captions of 2, image 1 those of 0, and image 2 those of 1.
    source = np.empty(num_images, dtype=int)  # the image whose captions each image gets
    source[circle] = np.roll(circle, 1)
    shuffled = []
    for trial in captions:
        shuffled.append([trial[image] for image in source])
    return shuffled


def _distinct_share(captions: list[list[str]]) -> float:
    """Return the fraction of distinct captions in a trial, averaged over the trials."""
    shares = [len(set(map(normalize_caption, trial))) / len(trial) for trial in captions]
    return float(np.mean(shares))


def _compare_with_training(
    result: Evaluation,
    captions: list[list[str]],
    references: list[list[str]],
    train_captions: Iterable[str],
    resamples: int,
    seed: int,
) -> None:
    """Add the scores of unseen images, and the fractions of novel captions and unseen references, to the result."""
    known = {normalize_caption(caption) for caption in train_captions}
    num_novel = 0
    for trial in captions:
        num_novel += sum(normalize_caption(caption) not in known for caption in trial)
    result.shares["novel captions"] = num_novel / (len(captions) * len(references))

    # Find the images without any reference that occurs in the training data. A single known reference excludes an
    # image: the model may have memorized the caption with the same or with a similar image.
    unseen = []
    for image, group in enumerate(references):
        if known.isdisjoint(map(normalize_caption, group)):
            unseen.append(image)
    result.shares["unseen references"] = len(unseen) / len(references)
    if unseen:
        unseen_references = [references[image] for image in unseen]
        unseen_captions = []
        for trial in captions:
            unseen_captions.append([trial[image] for image in unseen])
        # CIDEr's document frequencies are computed on these images only, so its values cannot be compared with the mean.
        table = _score_captions(unseen_captions, unseen_references, resamples, seed)
        result.unseen = table.mean

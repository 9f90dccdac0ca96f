"""Length, variety and repetition of captions, which need no references."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DISTINCT_SIZES = (1, 2, 3)
REPEATED_SIZES = (2, 3, 4)


def describe_texts(trials: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return statistics of captions: the mean over the trials.

    - words: mean, standard deviation, shortest and longest caption;
    - distinct-n (Li et al. 2016, arXiv:1510.03055): different n-grams of all captions of a trial, divided by all
      n-grams. It falls as the number of captions grows, so compare sets of the same size;
    - repeated n-grams (seq-rep-n of Welleck et al. 2020, arXiv:1908.04319): the fraction of a caption's n-grams that
      have occurred in the same caption before, averaged over the captions. A model that loops has a large one.

    Args:
        trials: Tokenized captions by trial and image, with single spaces between the tokens.
    """
    of_trials = [_describe_trial([text.split() for text in trial]) for trial in trials]
    means = {}
    for name in of_trials[0]:
        means[name] = float(np.mean([statistics[name] for statistics in of_trials]))
    return means


def _describe_trial(captions: Sequence[Sequence[str]]) -> dict[str, float]:
    lengths = [len(words) for words in captions]
    statistics = {
        "words, mean": float(np.mean(lengths)),
        "words, standard deviation": float(np.std(lengths)),
        "words, shortest": float(min(lengths)),
        "words, longest": float(max(lengths)),
    }
    for size in DISTINCT_SIZES:
        ngrams: list[tuple[str, ...]] = []
        for words in captions:
            ngrams += _ngrams(words, size)
        statistics[f"distinct-{size}"] = _distinct(ngrams)
    for size in REPEATED_SIZES:
        repeated = [1 - _distinct(_ngrams(words, size)) for words in captions]
        statistics[f"repeated {size}-grams"] = float(np.mean(repeated))
    return statistics


def _ngrams(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]


def _distinct(ngrams: Sequence[tuple[str, ...]]) -> float:
    """Return the fraction of different n-grams; 1 if there are none, because nothing is repeated."""
    return len(set(ngrams)) / len(ngrams) if ngrams else 1.0

"""Length, variety and repetition of captions, which need no references."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DISTINCT_SIZES = (1, 2, 3)
REPEATED_SIZES = (2, 3, 4)


def describe_texts(trials: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return statistics of captions: the mean over the trials.

    - words: mean, standard deviation, shortest and longest caption;
    - distinct-n (Li et al. 2016, arXiv:1510.03055): the number of different n-grams in all captions of a trial,
      divided by the number of n-grams. It falls as the number of captions grows, so compare sets of the same size;
    - repeated n-grams (seq-rep-n of Welleck et al. 2020, arXiv:1908.04319): the fraction of a caption's n-grams that
      have occurred in the same caption before, averaged over the captions. It is large if a model repeats itself
      endlessly.

    Args:
        trials: Tokenized captions by trial and image, with single spaces between the tokens.
    """
    values: dict[str, list[float]] = {}  # one value per trial
    for trial in trials:
        captions = [text.split() for text in trial]
        for name, value in _describe_trial(captions).items():
            values.setdefault(name, []).append(value)
    return {name: float(np.mean(trial_values)) for name, trial_values in values.items()}


def _describe_trial(captions: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the statistics of one caption per image, each a list of tokens."""
    lengths = [len(words) for words in captions]
    statistics = {
        "words, mean": float(np.mean(lengths)),
        "words, standard deviation": float(np.std(lengths)),
        "words, shortest": float(min(lengths)),
        "words, longest": float(max(lengths)),
    }
    # Distinct n-grams are counted over all captions, repeated ones within each caption.
    for size in DISTINCT_SIZES:
        ngrams: list[tuple[str, ...]] = []
        for words in captions:
            ngrams += _ngrams(words, size)
        statistics[f"distinct-{size}"] = _distinct(ngrams)
    for size in REPEATED_SIZES:
        repeated = []
        for words in captions:
            repeated.append(1 - _distinct(_ngrams(words, size)))
        statistics[f"repeated {size}-grams"] = float(np.mean(repeated))
    return statistics


def _ngrams(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """Return all runs of `size` adjacent words; none if the text is shorter."""
    ngrams = []
    for start in range(len(words) - size + 1):
        ngrams.append(tuple(words[start : start + size]))
    return ngrams


def _distinct(ngrams: Sequence[tuple[str, ...]]) -> float:
    """Return the number of different n-grams divided by the number of n-grams."""
    if not ngrams:
        return 1.0  # a text without n-grams repeats none
    return len(set(ngrams)) / len(ngrams)

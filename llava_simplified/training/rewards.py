"""Rewards: what a sampled caption is worth, `--reward cider=1.0,length=0.1`.

    cider      CIDEr-D against the record's responses; words that occur with many images count less. The
               frequencies are those of all training records
    bleu4      BLEU-4 of the single caption
    rouge_l    the longest common subsequence with a reference
    word_f1    the best F1 of the words, for any language that separates words by spaces
    length     1 for a caption as long as a reference in words, 0 for twice as long and for an empty one

    my_module:my_function    a function of your own: (image paths, references, captions) -> numbers

CIDEr-D, BLEU-4 and ROUGE-L equal those of pycocoevalcap, as in `llava evaluate`.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from llava_simplified.evaluation.metrics import word_f1
from llava_simplified.evaluation.ngram_metrics import (
    CIDER_SCALE,
    CIDER_SIGMA,
    MAX_ORDER,
    ngram_metrics,
)
from llava_simplified.evaluation.ptb_tokenizer import tokenize
from llava_simplified.evaluation.rouge import rouge_l

RewardFunction = Callable[[Sequence[str], Sequence[Sequence[str]], Sequence[str]], Sequence[float]]
"""Image paths, the references of each caption, and the captions -> one number per caption."""

BUILT_IN = ("cider", "bleu4", "rouge_l", "word_f1", "length")

# Cached, because each reference is compared with every sample of its image, in every epoch.
_tokenize = lru_cache(maxsize=100_000)(tokenize)


# ---- CIDEr-D ----

NGram = tuple[str, ...]


class CiderScorer:
    """CIDEr-D (Vedantam et al., 2015) with the document frequencies of a whole training set.

    `llava evaluate` takes the frequencies from the images that it scores. A step has a few images only,
    in which nearly every word would be rare.

    Args:
        references: The references of each training image.
    """

    def __init__(self, references: Iterable[Sequence[str]]) -> None:
        self._document_frequency = Counter[NGram]()
        num_images = 0
        for group in references:
            num_images += 1
            # An n-gram counts once per image, even if several references contain it.
            distinct: set[NGram] = set()
            for reference in group:
                distinct.update(_count_ngrams(tokenize(reference)))
            self._document_frequency.update(distinct)
        if num_images < 2:
            raise ValueError(
                "--reward cider: CIDEr compares images, but there is only one record. Use word_f1."
            )
        self._log_images = math.log(num_images)

    def score(self, caption: str, references: Sequence[str]) -> float:
        """Return the CIDEr-D of one caption.

        Args:
            caption: The caption.
            references: At least one reference.
        """
        counts = _count_ngrams(_tokenize(caption))
        weights, norms = self._weigh(counts)
        total = 0.0
        for reference in references:
            other_counts = _count_ngrams(_tokenize(reference))
            other_weights, other_norms = self._weigh(other_counts)
            products = [0.0] * MAX_ORDER
            for gram, weight in weights.items():
                # Clip to the reference's weight, so that repeating a word does not help.
                other = other_weights.get(gram, 0.0)
                products[len(gram) - 1] += min(weight, other) * other
            cosines = 0.0
            for product, norm, other_norm in zip(products, norms, other_norms):
                if norm > 0 and other_norm > 0:
                    cosines += product / (norm * other_norm)
            # The evaluation server of COCO measures the length of a caption in bigrams.
            difference = _num_bigrams(counts) - _num_bigrams(other_counts)
            penalty = math.exp(-(difference**2) / (2 * CIDER_SIGMA**2))
            total += penalty * cosines / MAX_ORDER
        return CIDER_SCALE * total / len(references)

    def _weigh(self, counts: Counter[NGram]) -> tuple[dict[NGram, float], list[float]]:
        """Return the TF-IDF weight of each n-gram, and the norm of each order."""
        weights: dict[NGram, float] = {}
        squares = [0.0] * MAX_ORDER
        for gram, count in counts.items():
            frequency = max(1, self._document_frequency[gram])
            weights[gram] = count * (self._log_images - math.log(frequency))
            squares[len(gram) - 1] += weights[gram] ** 2
        return weights, [math.sqrt(square) for square in squares]


def _count_ngrams(tokens: str) -> Counter[NGram]:
    words = tokens.split()
    counts = Counter[NGram]()
    for order in range(1, MAX_ORDER + 1):
        counts.update(zip(*(words[start:] for start in range(order))))
    return counts


def _num_bigrams(counts: Counter[NGram]) -> int:
    return sum(count for gram, count in counts.items() if len(gram) == 2)


# ---- the other rewards ----


def _bleu4(
    images: Sequence[str], references: Sequence[Sequence[str]], captions: Sequence[str]
) -> list[float]:
    tokens = [_tokenize(caption) for caption in captions]
    reference_tokens = [[_tokenize(text) for text in group] for group in references]
    bleu = ngram_metrics([tokens], reference_tokens)[-1]
    # The statistics of single captions, not summed over the images.
    scores: list[float] = bleu.finish(bleu.statistics[0], 1)[:, MAX_ORDER - 1].tolist()
    return scores


def _rouge_l(caption: str, references: Sequence[str]) -> float:
    return rouge_l(_tokenize(caption), [_tokenize(text) for text in references])


def length_reward(caption: str, references: Sequence[str]) -> float:
    """Return 1 for as many words as a reference, less the relative difference; at least 0."""
    words = len(caption.split())
    best = 0.0
    for reference in references:
        target = max(len(reference.split()), 1)
        best = max(best, 1 - abs(words - target) / target)
    return best


def _for_each(score: Callable[[str, Sequence[str]], float]) -> RewardFunction:
    """Return a reward that scores each caption separately."""

    def reward(
        images: Sequence[str], references: Sequence[Sequence[str]], captions: Sequence[str]
    ) -> list[float]:
        return [score(caption, group) for caption, group in zip(captions, references)]

    return reward


# ---- weighted sums ----


def parse_rewards(text: str) -> dict[str, float]:
    """Parse `--reward`: names with weights, such as "cider=1.0,length=0.1"; no weight means 1.

    Raises:
        ValueError: A name is unknown or repeated, or a weight is not a number.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if name not in BUILT_IN and ":" not in name:
            raise ValueError(
                f"--reward {text}: unknown reward {name!r}; expected {', '.join(BUILT_IN)}, or module:function."
            )
        try:
            weight = float(value) if equals else 1.0
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight) or name in weights:
            raise ValueError(
                f"--reward {text}: expected each name once, with a number, such as cider=1.0,length=0.1."
            )
        weights[name] = weight
    return weights


class Reward:
    """A weighted sum of rewards.

    Args:
        text: `--reward`.
        references: The references of each training record, for the frequencies of `cider`.

    Raises:
        ValueError: A reward is unknown, or its function cannot be imported.
    """

    def __init__(self, text: str, references: Iterable[Sequence[str]]) -> None:
        self._weights = parse_rewards(text)
        self._functions: dict[str, RewardFunction] = {}
        for name in self._weights:
            self._functions[name] = _build(name, references)

    def __call__(
        self,
        ids: Sequence[str],
        images: Sequence[str],
        references: Sequence[Sequence[str]],
        captions: Sequence[str],
    ) -> list[float]:
        """Return the reward of each caption.

        Args:
            ids: The name of each caption's record, for errors.
            images: Path of its image.
            references: The responses of its record.
            captions: The captions.

        Raises:
            ValueError: A reward fails, or is not finite; the message names the record.
        """
        totals = [0.0] * len(captions)
        for name, weight in self._weights.items():
            values = self._values_of(name, ids, images, references, captions)
            for index, value in enumerate(values):
                if not math.isfinite(value):
                    raise ValueError(
                        f"--reward {name}: the reward of {ids[index]} is {value}; "
                        f"its caption is {captions[index]!r}."
                    )
                totals[index] += weight * value
        return totals

    def _values_of(
        self,
        name: str,
        ids: Sequence[str],
        images: Sequence[str],
        references: Sequence[Sequence[str]],
        captions: Sequence[str],
    ) -> list[float]:
        try:
            values = [float(value) for value in self._functions[name](images, references, captions)]
        except Exception as error:
            raise ValueError(
                f"--reward {name}: {type(error).__name__}: {error}; in the batch of {', '.join(dict.fromkeys(ids))}."
            ) from error
        if len(values) != len(captions):
            raise ValueError(
                f"--reward {name}: {len(values)} rewards for {len(captions)} captions, in the batch of "
                f"{', '.join(dict.fromkeys(ids))}."
            )
        return values


def _build(name: str, references: Iterable[Sequence[str]]) -> RewardFunction:
    if name == "cider":
        return _for_each(CiderScorer(references).score)
    if name == "bleu4":
        return _bleu4
    if name == "rouge_l":
        return _for_each(_rouge_l)
    if name == "word_f1":
        return _for_each(word_f1)
    if name == "length":
        return _for_each(length_reward)
    return _import_function(name)


def _import_function(name: str) -> RewardFunction:
    """Import "module:function", also from the current folder."""
    module_name, _, function_name = name.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"--reward {name}: cannot import {module_name}: {error}. Run the command in the folder of "
            f"{module_name}.py, or install the package."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"--reward {name}: {module_name} has no function {function_name!r}.")
    result: RewardFunction = function
    return result

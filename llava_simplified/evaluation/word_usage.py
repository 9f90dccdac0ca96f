"""Words that a model generates too often or too rarely, compared with the references."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from llava_simplified.evaluation.metrics import Sample

MIN_LOG_LIKELIHOOD = 1.0  # words with a smaller log-likelihood ratio are left out
MAX_WORDS = 12

_WORD = re.compile(r"\w[\w'’-]*")


class WordUsage(NamedTuple):
    """The frequency of a word, counted per image: a word in one of two captions of an image counts 1/2."""

    word: str
    generated: float
    references: float
    log_likelihood: float  # positive if the word is generated too often


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return _WORD.findall(text.lower())


def compare_word_usage(
    samples: Sequence[Sample], max_words: int = MAX_WORDS
) -> tuple[list[WordUsage], list[WordUsage]]:
    """Return the words that are generated too often, and those that are generated too rarely.

    Words are ranked by the log-likelihood ratio (Dunning 1993), which measures how unlikely the two counts are if both
    texts use the word equally often. Unlike a ratio of counts, it does not favor words that occur once.

    Args:
        samples: Images with captions and references.
        max_words: Maximum number of words in each list.
    """
    # Give every image the same weight, regardless of its number of captions and references.
    generated: dict[str, float] = defaultdict(float)
    references: dict[str, float] = defaultdict(float)
    for sample in samples:
        for word, weight in _weighted_words(sample.captions):
            generated[word] += weight
        for word, weight in _weighted_words(sample.references):
            references[word] += weight
    num_generated = sum(generated.values()) or 1
    num_references = sum(references.values()) or 1

    usages = []
    for word in {*generated, *references}:
        ours = generated[word]
        theirs = references[word]
        # Share of the word if captions and references used it equally often. The ratio compares the log-likelihood of
        # the two counts with their own shares to the log-likelihood with this common share.
        expected_share = (ours + theirs) / (num_generated + num_references)
        ratio = 0.0
        for count, total in ((ours, num_generated), (theirs, num_references)):
            if count:  # 0 * log(0) is 0
                ratio += count * math.log(count / (expected_share * total))
        sign = ours / num_generated - theirs / num_references
        usages.append(WordUsage(word, ours, theirs, math.copysign(ratio, sign)))
    usages.sort(key=lambda usage: (usage.log_likelihood, usage.word))

    # The list is ascending: the most underused words come first, the most overused ones last.
    overused = [u for u in usages[::-1][:max_words] if u.log_likelihood > MIN_LOG_LIKELIHOOD]
    underused = [u for u in usages[:max_words] if u.log_likelihood < -MIN_LOG_LIKELIHOOD]
    return overused, underused


def _weighted_words(texts: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Yield (word, weight) for each word of an image's texts. The weight is 1 / number of texts of the image."""
    for text in texts:
        for word in words_of(text):
            yield word, 1 / len(texts)

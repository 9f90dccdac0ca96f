"""CIDEr-D as a reward: each caption is scored with the document frequencies of all training records.

`llava evaluate` counts the frequencies over the images that it scores. A training step has only a few images, in which
nearly every word would seem rare.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_simplified.evaluation.ngram_metrics import CIDER_SCALE, CIDER_SIGMA, MAX_ORDER
from llava_simplified.evaluation.ptb_tokenizer import cached_tokenize, tokenize
from llava_simplified.jobs import atomic_file

logger = logging.getLogger(__name__)

NGram = tuple[str, ...]

FREQUENCIES_FILE = "document_frequencies.json"  # in the output folder of a run


@dataclass
class DocumentFrequencies:
    """For each n-gram, the number of images whose references contain it.

    Attributes:
        num_images: Number of images.
        counts: Number of images by n-gram. N-grams that occur in one image only (two thirds of all) are not stored,
            because `CiderScorer` assumes a count of 1 for n-grams that are missing.
    """

    num_images: int
    counts: dict[NGram, int]

    @classmethod
    def count(cls, references: Iterable[Sequence[str]]) -> DocumentFrequencies:
        """Count the n-grams of a training set.

        Args:
            references: The references of each image.
        """
        counts = Counter[NGram]()
        num_images = 0
        for group in references:
            num_images += 1
            # An n-gram counts once per image, even if several references contain it.
            distinct: set[NGram] = set()
            for reference in group:
                distinct.update(_count_ngrams(tokenize(reference)))
            counts.update(distinct)
        frequent = {gram: count for gram, count in counts.items() if count > 1}
        return cls(num_images, frequent)

    def save(self, path: Path, data_digest: str) -> None:
        """Write the frequencies to a file.

        Args:
            path: A JSON file.
            data_digest: Digest of the training records.
        """
        joined = {" ".join(gram): count for gram, count in self.counts.items()}
        content = {"data": data_digest, "images": self.num_images, "frequencies": joined}
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as part:
            part.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: Path, data_digest: str) -> DocumentFrequencies | None:
        """Read the frequencies that `save` has written; None if there are none for these records."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["data"] != data_digest:
                return None
            counts = {tuple(gram.split(" ")): n for gram, n in content["frequencies"].items()}
            return cls(content["images"], counts)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning(
                "%s cannot be read (%s). The document frequencies are counted again.", path, error
            )
            return None


class CiderScorer:
    """CIDEr-D (Vedantam et al., 2015), computed for one caption at a time.

    Args:
        frequencies: Document frequencies of the training set.

    Raises:
        ValueError: The training set has one image only.
    """

    def __init__(self, frequencies: DocumentFrequencies) -> None:
        if frequencies.num_images < 2:
            raise ValueError(
                "--reward cider: CIDEr weights words by how many images they occur in, but there is only one record. Pass "
                "--reward word_f1."
            )
        self._counts = frequencies.counts
        self._log_images = math.log(frequencies.num_images)

    def score(self, caption: str, references: Sequence[str]) -> float:
        """Return the CIDEr-D of one caption.

        Args:
            caption: The caption.
            references: At least one reference.
        """
        counts = _count_ngrams(cached_tokenize(caption))
        weights, norms = self._weigh(counts)
        total = 0.0
        for reference in references:
            other_counts = _count_ngrams(cached_tokenize(reference))
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
            # Measure lengths in bigrams, as the COCO caption server does.
            difference = _num_bigrams(counts) - _num_bigrams(other_counts)
            penalty = math.exp(-(difference**2) / (2 * CIDER_SIGMA**2))
            total += penalty * cosines / MAX_ORDER
        return CIDER_SCALE * total / len(references)

    def _weigh(self, counts: Counter[NGram]) -> tuple[dict[NGram, float], list[float]]:
        """Return the TF-IDF weight of each n-gram, and for each n the norm of the weights of its n-grams."""
        weights: dict[NGram, float] = {}
        squares = [0.0] * MAX_ORDER
        for gram, count in counts.items():
            frequency = self._counts.get(gram, 1)
            weights[gram] = count * (self._log_images - math.log(frequency))
            squares[len(gram) - 1] += weights[gram] ** 2
        return weights, [math.sqrt(square) for square in squares]


def _count_ngrams(tokens: str) -> Counter[NGram]:
    """Count the n-grams of a text, for n from 1 to `MAX_ORDER`; its tokens are separated by spaces."""
    words = tokens.split()
    counts = Counter[NGram]()
    for order in range(1, MAX_ORDER + 1):
        # zip(words, words[1:], ...) yields the n-grams of this order.
        counts.update(zip(*(words[start:] for start in range(order))))
    return counts


def _num_bigrams(counts: Counter[NGram]) -> int:
    return sum(count for gram, count in counts.items() if len(gram) == 2)

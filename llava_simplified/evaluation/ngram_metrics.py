"""BLEU, CIDEr-D and CIDEr, computed for all captions together with arrays of n-grams.

The scores equal those of pycocoevalcap 1.2, the code of the COCO caption server (Chen et al. 2015, arXiv:1504.00325).
That code compares dictionaries of n-grams, caption by caption. Here, every distinct n-gram of the corpus is an integer,
and a table has one row for each pair of a text and an n-gram that occurs in it:

    text 0: "a cat sees a dog"        text  gram  order  count
                                      0     a       0      2
                                      0     cat     0      1
                                      ...
                                      0     a cat   1      1
                                      ...

Counting, clipping and summing are then operations on whole columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llava_simplified.evaluation.bootstrap import Metric, mean_metric

MAX_ORDER = 4  # n-grams of 1 to 4 words

# Constants against division by zero, as in the server's code. They are necessary for equal scores: without them, the
# BLEU of a caption without any matching n-gram would differ in the last digits.
BLEU_TINY = 1e-15
BLEU_SMALL = 1e-9

CIDER_SIGMA = 6.0  # standard deviation of CIDEr-D's length penalty
CIDER_SCALE = 10.0


def ngram_metrics(captions: list[list[str]], references: list[list[str]]) -> list[Metric]:
    """Return the statistics of CIDEr-D, CIDEr and BLEU-1 to BLEU-4.

    Args:
        captions: Tokens separated by spaces, for each trial and image.
        references: Tokens separated by spaces, for each image and reference.
    """
    corpus = _build_corpus(captions, references)
    cider_d, cider = _cider_scores(corpus)
    bleu = _bleu_statistics(corpus)
    shape = (corpus.num_trials, corpus.num_images)
    return [
        mean_metric("CIDEr-D", cider_d.reshape(shape)),
        mean_metric("CIDEr", cider.reshape(shape)),
        Metric(
            names=("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"),
            statistics=bleu.reshape(*shape, 2 * MAX_ORDER + 2),
            finish=_bleu_scores,
        ),
    ]


# ---- n-grams ----


@dataclass(frozen=True)
class NGramTable:
    """The distinct 1- to 4-grams of texts: one row per text and n-gram that occurs in it.

    Attributes:
        text: Index of the text.
        gram: Id of the n-gram. Ids are unique over all orders: a bigram never has the id of a unigram.
        order: n - 1.
        count: Number of occurrences of the n-gram in the text.
        num_grams: Number of n-gram ids.
    """

    text: np.ndarray
    gram: np.ndarray
    order: np.ndarray
    count: np.ndarray
    num_grams: int

    def select(self, rows: np.ndarray, first_text: int) -> NGramTable:
        """Return the rows where `rows` is true, with texts renumbered so that text `first_text` becomes text 0."""
        return NGramTable(
            text=self.text[rows] - first_text,
            gram=self.gram[rows],
            order=self.order[rows],
            count=self.count[rows],
            num_grams=self.num_grams,
        )

    def sum_by_order(self, weights: np.ndarray, num_texts: int) -> np.ndarray:
        """Return the sum of the rows' weights for each text and order, an array (texts, 4)."""
        groups = self.text * MAX_ORDER + self.order
        sums = np.bincount(groups, weights, minlength=num_texts * MAX_ORDER)
        return sums.reshape(num_texts, MAX_ORDER)


def count_ngrams(texts: Sequence[Sequence[str]]) -> NGramTable:
    """Count the 1- to 4-grams of texts.

    All texts are concatenated to one array of word ids. An n-gram is an (n-1)-gram and one more word, so the pair (id of
    the (n-1)-gram, id of the word) identifies it. The pair is written as one number, `prefix * vocabulary + word`, and
    then numbered from 0 again with `np.unique`, so that the ids are small for every n.
    """
    vocabulary: dict[str, int] = {}
    word_ids = []
    for words in texts:
        word_ids += [vocabulary.setdefault(word, len(vocabulary)) for word in words]
    word = np.array(word_ids, np.int64)
    text_of_word = np.repeat(np.arange(len(texts)), list(map(len, texts)))

    start = np.arange(len(word))  # position of the first word of each n-gram
    gram = word
    num_grams = len(vocabulary)  # number of distinct n-grams of the current order
    total_grams = 0  # number of distinct n-grams of all lower orders
    columns: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    for order in range(MAX_ORDER):
        if order > 0:
            # Keep n-grams that end within the array, and within the text in which they begin.
            fits = start + order < len(word)
            fits[fits] = text_of_word[start[fits] + order] == text_of_word[start[fits]]
            start = start[fits]
            pairs = gram[fits] * len(vocabulary) + word[start + order]
            distinct, gram = np.unique(pairs, return_inverse=True)
            num_grams = len(distinct)
        # As above, write the pair (text, n-gram) as one number, count equal numbers, and split it again.
        divisor = max(num_grams, 1)  # texts without any word have no n-grams
        occurrences = text_of_word[start] * divisor + gram
        distinct_occurrences, count = np.unique(occurrences, return_counts=True)
        text, gram_in_order = np.divmod(distinct_occurrences, divisor)
        columns.append((text, gram_in_order + total_grams, np.full(len(text), order), count))
        total_grams += num_grams

    texts_column, grams_column, orders_column, counts_column = zip(*columns)
    return NGramTable(
        text=np.concatenate(texts_column),
        gram=np.concatenate(grams_column),
        order=np.concatenate(orders_column),
        count=np.concatenate(counts_column),
        num_grams=max(total_grams, 1),
    )


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the value of each wanted key, or 0 for missing keys. `keys` must be sorted."""
    if not len(keys):
        return np.zeros(len(wanted))
    index = np.searchsorted(keys, wanted)
    # For a wanted key above all keys, searchsorted returns len(keys). The comparison below then finds no match.
    index = np.minimum(index, len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0)


@dataclass(frozen=True)
class _Corpus:
    """Captions and references as arrays.

    Caption number `trial * num_images + image` describes `image`. References are numbered over all images.
    """

    num_trials: int
    num_images: int
    caption_lengths: np.ndarray  # (captions,) in words
    caption_ngrams: NGramTable  # `text` is the number of the caption
    reference_lengths: np.ndarray  # (references,) in words
    reference_ngrams: NGramTable  # `text` is the number of the reference
    reference_image: np.ndarray  # (references,): the image that the reference describes

    @property
    def num_captions(self) -> int:
        return self.num_trials * self.num_images


def _build_corpus(captions: list[list[str]], references: list[list[str]]) -> _Corpus:
    """Count the n-grams of all captions and references."""
    caption_words: list[list[str]] = []
    for trial in captions:
        caption_words += [caption.split() for caption in trial]
    reference_words: list[list[str]] = []
    for group in references:
        reference_words += [reference.split() for reference in group]
    # Count captions and references together, so that an n-gram has the same id in both.
    ngrams = count_ngrams(caption_words + reference_words)
    is_caption = ngrams.text < len(caption_words)
    references_per_image = list(map(len, references))
    return _Corpus(
        num_trials=len(captions),
        num_images=len(references),
        caption_lengths=np.array(list(map(len, caption_words))),
        caption_ngrams=ngrams.select(is_caption, first_text=0),
        reference_lengths=np.array(list(map(len, reference_words))),
        reference_ngrams=ngrams.select(~is_caption, first_text=len(caption_words)),
        reference_image=np.repeat(np.arange(len(references)), references_per_image),
    )


# ---- BLEU ----


def _bleu_statistics(corpus: _Corpus) -> np.ndarray:
    """Return the counts that BLEU is computed from, an array (captions, 10).

    Columns 0 to 3 are the correct n-grams of each order, 4 to 7 all n-grams of the caption, 8 the length of the caption
    and 9 the length of the reference with the closest length.

    An n-gram of the caption is correct at most as often as it occurs in a single reference ("clipped" counts): in the
    caption "the the the", only one "the" is correct if each reference has one.
    """
    captions = corpus.caption_ngrams
    references = corpus.reference_ngrams

    # For each image and n-gram, find the largest count in one reference: sort the rows by (image, n-gram), and compute
    # the maximum of each run of equal keys.
    reference_keys = corpus.reference_image[references.text] * references.num_grams
    reference_keys = reference_keys + references.gram
    order = np.argsort(reference_keys, kind="stable")
    keys, run_starts = np.unique(reference_keys[order], return_index=True)
    largest = run_starts
    if len(run_starts):
        largest = np.maximum.reduceat(references.count[order], run_starts)

    image = captions.text % corpus.num_images
    allowed = _lookup(keys, largest, image * captions.num_grams + captions.gram)
    clipped = np.minimum(captions.count, allowed)
    correct = captions.sum_by_order(clipped, corpus.num_captions)

    # A text of L words has L - n + 1 n-grams.
    total = np.maximum(corpus.caption_lengths[:, None] - np.arange(MAX_ORDER), 0)
    closest = _closest_reference_lengths(corpus)
    return np.column_stack([correct, total, corpus.caption_lengths, closest])


def _closest_reference_lengths(corpus: _Corpus) -> np.ndarray:
    """Return for each caption the closest length of a reference; of two equally close lengths, the shorter one."""
    lengths_of_image: list[list[int]] = [[] for _ in range(corpus.num_images)]
    for image, length in zip(corpus.reference_image.tolist(), corpus.reference_lengths.tolist()):
        lengths_of_image[image].append(length)
    closest = []
    for caption, length in enumerate(corpus.caption_lengths.tolist()):
        candidates = lengths_of_image[caption % corpus.num_images]
        _, best = min((abs(candidate - length), candidate) for candidate in candidates)
        closest.append(best)
    return np.array(closest)


def _bleu_scores(sums: np.ndarray, num_images: int) -> np.ndarray:
    """Return BLEU-1 to BLEU-4 (Papineni et al. 2002) of summed statistics.

    BLEU-n is the geometric mean of the precisions of 1- to n-grams, times the brevity penalty exp(1 - r / c) if the
    captions' total length c is below the references' total length r. Precision alone would reward short captions.

    Args:
        sums: The columns of `_bleu_statistics`, summed over images: an array (..., 10).
        num_images: Unused. Every `finish` function receives it, but BLEU is not a mean over images.
    """
    correct = sums[..., :MAX_ORDER]
    total = sums[..., MAX_ORDER : 2 * MAX_ORDER]
    caption_length = sums[..., 2 * MAX_ORDER : 2 * MAX_ORDER + 1]
    reference_length = sums[..., 2 * MAX_ORDER + 1 :]

    precisions = (correct + BLEU_TINY) / (total + BLEU_SMALL)
    products = np.cumprod(precisions, axis=-1)
    geometric_means = products ** (1 / np.arange(1, MAX_ORDER + 1))
    ratio = (caption_length + BLEU_TINY) / (reference_length + BLEU_SMALL)
    with np.errstate(over="ignore"):  # an empty caption: exp(-1e15) is 0
        brevity_penalty = np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)
    return geometric_means * brevity_penalty


# ---- CIDEr ----


def _cider_scores(corpus: _Corpus) -> tuple[np.ndarray, np.ndarray]:
    """Return CIDEr-D and CIDEr (Vedantam et al. 2015, arXiv:1411.5726) of each caption.

    A text is a vector g of TF-IDF weights for each order n. The weight of an n-gram is its count times

        idf = log(number of images / number of images with the n-gram in a reference)

    CIDEr is the mean cosine between the vectors of the caption c and of its m references s_j, averaged over n = 1..4:

        CIDEr(c)   = 10 * mean_n  1/m * sum_j  g(c) . g(s_j) / (|g(c)| |g(s_j)|)

    CIDEr-D clips the caption's weights to those of the reference, so that repeating a word does not help, and
    multiplies by a Gaussian of the difference in length, with sigma = 6:

        CIDEr-D(c) = 10 * mean_n  1/m * sum_j  exp(-(l(c) - l(s_j))^2 / (2 sigma^2))
                                                * min(g(c), g(s_j)) . g(s_j) / (|g(c)| |g(s_j)|)

    The COCO caption server measures the lengths l in bigrams. It does not divide the counts by the length of the
    text, as the paper does: the cosine cancels this factor.

    Returns:
        Two arrays (captions,).
    """
    captions = corpus.caption_ngrams
    references = corpus.reference_ngrams
    num_grams = references.num_grams
    num_references = len(corpus.reference_lengths)

    # Count the images with the n-gram in a reference. `np.unique` counts several references of an image once.
    image_and_gram = corpus.reference_image[references.text] * num_grams + references.gram
    gram_of_pair = np.unique(image_and_gram) % num_grams
    document_frequency = np.bincount(gram_of_pair, minlength=num_grams)
    idf = math.log(corpus.num_images) - np.log(np.maximum(1, document_frequency))

    caption_weights = captions.count * idf[captions.gram]
    reference_weights = references.count * idf[references.gram]
    caption_norms = np.sqrt(captions.sum_by_order(caption_weights**2, corpus.num_captions))
    reference_norms = np.sqrt(references.sum_by_order(reference_weights**2, num_references))
    caption_bigrams = np.maximum(corpus.caption_lengths - 1, 0)
    reference_bigrams = np.maximum(corpus.reference_lengths - 1, 0)

    caption_keys = captions.text * num_grams + captions.gram
    order = np.argsort(caption_keys)
    sorted_keys = caption_keys[order]
    sorted_counts = captions.count[order]
    references_per_image = np.bincount(corpus.reference_image)

    cider_d = np.zeros(corpus.num_captions)
    cider = np.zeros(corpus.num_captions)
    for first in range(0, corpus.num_captions, corpus.num_images):
        # In each trial, a reference is compared with the caption of its image.
        caption = first + corpus.reference_image  # (references,)
        # For each n-gram of a reference, look up how often the caption contains it.
        wanted = caption[references.text] * num_grams + references.gram
        count = _lookup(sorted_keys, sorted_counts, wanted)
        norms = caption_norms[caption] * reference_norms  # (references, 4)
        squared_idf = idf[references.gram] ** 2
        difference = caption_bigrams[caption] - reference_bigrams
        length_penalty = math.e ** (-(difference**2) / (2 * CIDER_SIGMA**2))

        clipped = np.minimum(count, references.count)
        products = clipped * references.count * squared_idf
        penalized = _mean_cosine(references, products, norms) * length_penalty
        products = count * references.count * squared_idf
        unpenalized = _mean_cosine(references, products, norms)
        last = first + corpus.num_images
        for scores, per_reference in ((cider_d, penalized), (cider, unpenalized)):
            mean = np.bincount(corpus.reference_image, per_reference) / references_per_image
            scores[first:last] = CIDER_SCALE * mean
    return cider_d, cider


def _mean_cosine(references: NGramTable, products: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """Return the cosine between each reference and the caption of its image, averaged over the four orders.

    Args:
        references: The n-grams of the references.
        products: Weight in the caption times weight in the reference, for each row of `references`.
        norms: Norm of the caption times norm of the reference, an array (references, 4).
    """
    dot = references.sum_by_order(products, len(norms))
    cosine = np.divide(dot, norms, out=np.zeros_like(norms), where=norms > 0)
    return cosine.mean(axis=1)

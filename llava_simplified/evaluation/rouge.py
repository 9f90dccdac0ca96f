"""ROUGE-L: the longest common subsequence of a caption and its references."""

from __future__ import annotations

from collections.abc import Sequence

BETA = 1.2  # weight of recall against precision, as in the COCO caption server


def rouge_l(caption: str, references: Sequence[str]) -> float:
    """Return the ROUGE-L score (Lin 2004) as the COCO caption server computes it.

    Precision is the length of the longest common subsequence divided by the length of the caption, recall is the same
    divided by the length of the reference. The server uses the best precision and the best recall over the
    references, even if they come from different references, and returns their F score with beta = 1.2.

    Args:
        caption: Tokens, separated by single spaces.
        references: Tokens of each reference, separated by single spaces.
    """
    words = caption.split(" ")
    best_precision = 0.0
    best_recall = 0.0
    for reference in references:
        reference_words = reference.split(" ")
        common = longest_common_subsequence(words, reference_words)
        best_precision = max(best_precision, common / len(words))
        best_recall = max(best_recall, common / len(reference_words))
    if best_precision == 0:
        return 0.0
    weighted = (1 + BETA**2) * best_precision * best_recall
    return weighted / (best_recall + BETA**2 * best_precision)


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence of two sequences of words.

    The usual dynamic program fills a table of len(first) x len(second). Adjacent entries of a row differ by 0 or 1, so a
    row can be stored in the bits of one integer: bit i is 0 where the row increases at word i of `first`. Hyyrö (2004,
    "Bit-parallel LCS-length computation revisited") computes the next row from it with one addition, whose carries
    find the next match of each word. The number of zero bits of the last row is the length.
    """
    positions: dict[str, int] = {}  # word -> bits of its positions in `first`
    for index, word in enumerate(first):
        positions[word] = positions.get(word, 0) | (1 << index)
    all_ones = (1 << len(first)) - 1
    row = all_ones
    for word in second:
        matches = row & positions.get(word, 0)
        row = ((row + matches) | (row - matches)) & all_ones
    return len(first) - row.bit_count()

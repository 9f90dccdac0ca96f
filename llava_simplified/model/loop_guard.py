"""Texts that repeat themselves: "a dog and a dog and a dog and ...". Such a text is cut where it begins to repeat itself.

`captioning.caption_text` cuts the finished text. `DecodingBatch` ends a sequence that would be cut, because a model that
loops goes on until the maximum number of tokens. The cut text is the same with both: what comes after the first loop in a
text does not change where it is cut.

This module does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from llava_simplified.prompt import Prompt

# Chinese and Japanese are written without spaces, so each of their characters counts as a word.
_IDEOGRAPHS = "\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\s{_IDEOGRAPHS}]+")
# A sequence is decoded and searched for a loop only if its last N tokens have occurred in it before. Without a loop this is
# rare, so the check costs little.
_NUM_PROBED_TOKENS = 4


def find_loop(text: str, num_repeated: int) -> int | None:
    """Return the index at which the text before a loop ends; None without a loop.

    In a loop, a sequence of words is repeated directly after itself: at least once completely, and for at
    least `num_repeated` words. With `num_repeated` 4:

        a dog and a dog and a dog and       the words 3 to 6 repeat the words 0 to 3
        a dog and                           the part before the loop

    Args:
        text: The text.
        num_repeated: Number of repeated words that make a loop, and the longest sequence that is found.

    Returns:
        Index of the character after the last word before the loop.
    """
    matches = list(WORD.finditer(text))
    words = [match[0].casefold() for match in matches]
    # repeated[n]: how many consecutive words, up to this one, equal the word n words before them.
    repeated = [0] * (num_repeated + 1)
    for position in range(len(words)):
        for length in range(1, min(num_repeated, position) + 1):
            is_equal = words[position] == words[position - length]
            repeated[length] = repeated[length] + 1 if is_equal else 0
            if repeated[length] == num_repeated:
                return matches[position - num_repeated].end()
    return None


def is_looping(prompt: Prompt, generated_ids: Sequence[int], num_repeated: int) -> bool:
    """Return whether a sequence contains a loop, however it continues.

    A loop that is spelled with other tokens each time is not found. `find_loop` finds it in the finished text.

    Args:
        prompt: Decodes the tokens.
        generated_ids: All token ids of the answer so far.
        num_repeated: See `find_loop`.
    """
    if not _repeats_its_end(generated_ids, min(_NUM_PROBED_TOKENS, num_repeated)):
        return False
    text = prompt.decode(generated_ids, finished=False)
    matches = list(WORD.finditer(text))
    # The next token may continue the last word.
    return bool(matches) and find_loop(text[: matches[-1].start()], num_repeated) is not None


def _repeats_its_end(ids: Sequence[int], size: int) -> bool:
    """Return whether the last `size` token ids occur earlier, too; the two places may overlap."""
    # Return early for most sequences, since this function is called after each token.
    if len(ids) <= size or ids.count(ids[-size]) < 2:
        return False
    end = list(ids[-size:])
    # Search backward: in a loop, the last repetition is near the end.
    for start in range(len(ids) - size - 1, -1, -1):
        if ids[start] == end[0] and list(ids[start : start + size]) == end:
            return True
    return False

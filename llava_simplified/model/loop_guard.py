"""Find texts that repeat themselves, such as "a dog and a dog and a dog and ...", to cut them before the repetition.

Two places use this. `captioning.caption_text` cuts the finished text. `DecodingBatch` ends a sequence early if its text
would be cut, because otherwise, a model in a loop continues until the maximum number of tokens. The result is the same
with and without the early end: a text is cut at its first loop, whatever comes after it.

This module does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from llava_simplified.prompt import Prompt

# Chinese and Japanese are written without spaces, so each of their characters counts as a word.
_IDEOGRAPHS = "\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\s{_IDEOGRAPHS}]+")
# Decoding a sequence and searching it for a loop takes time. So it is only done if the last N token ids have occurred in
# the sequence before, which is rare without a loop.
_NUM_PROBED_TOKENS = 4


def find_loop(text: str, num_repeated: int) -> int | None:
    """Return where a text must be cut, so that it ends before its first loop.

    In a loop, a sequence of words is repeated directly after itself: at least once completely, and for at
    least `num_repeated` words. With `num_repeated` = 4:

        a dog and a dog and a dog and       the words 3 to 6 repeat the words 0 to 3
        a dog and                           the part before the loop

    Args:
        text: The text.
        num_repeated: Minimum number of repeated words that make a loop. It is also the maximum length of the
            sequence of words that is repeated.

    Returns:
        Index of the character after the last word before the loop; None if there is no loop.
    """
    matches = list(WORD.finditer(text))
    words = [match[0].casefold() for match in matches]
    # repeated[n] is the number of consecutive words, up to the current one, that equal the word n words before them.
    repeated = [0] * (num_repeated + 1)
    for position in range(len(words)):
        for length in range(1, min(num_repeated, position) + 1):
            is_equal = words[position] == words[position - length]
            repeated[length] = repeated[length] + 1 if is_equal else 0
            if repeated[length] == num_repeated:
                return matches[position - num_repeated].end()
    return None


def is_looping(prompt: Prompt, generated_ids: Sequence[int], num_repeated: int) -> bool:
    """Return whether an unfinished sequence contains a loop already.

    A loop is missed if its words consist of different tokens in each repetition. `find_loop` still finds it in the
    finished text.

    Args:
        prompt: The prompt renderer, which decodes the tokens.
        generated_ids: All token ids of the answer so far.
        num_repeated: See `find_loop`.
    """
    if not _repeats_its_end(generated_ids, min(_NUM_PROBED_TOKENS, num_repeated)):
        return False
    text = prompt.decode(generated_ids, finished=False)
    matches = list(WORD.finditer(text))
    # Ignore the last word, because the next token may continue it.
    return bool(matches) and find_loop(text[: matches[-1].start()], num_repeated) is not None


def _repeats_its_end(ids: Sequence[int], size: int) -> bool:
    """Return whether the last `size` token ids also occur earlier in the sequence. The two places may overlap."""
    # First try a fast test that excludes most sequences, because this function is called after each token.
    if len(ids) <= size or ids.count(ids[-size]) < 2:
        return False
    end = list(ids[-size:])
    # Search backward: in a loop, the last repetition is near the end.
    for start in range(len(ids) - size - 1, -1, -1):
        if ids[start] == end[0] and list(ids[start : start + size]) == end:
            return True
    return False

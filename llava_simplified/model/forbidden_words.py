"""Words and phrases that are never generated, however their letters are cut into tokens.

Banning the tokens of " cat" is not enough, because a model can spell the word with others, and banning those of
"cat" is too much, because "concat" contains them. So the text decides, not the tokens: before each step, a token is
excluded if with it the generated text would contain a forbidden word.

    forbidden        cat
    generated text   "a c"
    excluded         "at", "at,", "at on"     they complete the word
    allowed          "ats", "atalog", "ar"    they make another word

A word counts as a whole word only: there is no letter or digit before and after it. Upper and lower case, and different
white space between the words of a phrase, are the same. A token that ends with the last letter of the word is excluded,
although the next token might make another word of it ("cat" + "egory"): once the word is there, it would be too late.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from transformers.generation import LogitsProcessor

from llava_simplified.data.device_copy import to_device
from llava_simplified.prompt import Prompt

# Scripts without spaces between words: a forbidden word is found anywhere in them.
_IDEOGRAPHS_FROM, _IDEOGRAPHS_TO = "\u2e80", "\uabff"
# The characters of `str.isspace`, in UTF-8.
_WHITE_SPACE = re.compile(
    rb"(?:[\s\x1c-\x1f]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80)+"
)
_BETWEEN_TOKENS = b"\0"  # in no pattern
_MAX_UTF8_BYTES = 4  # of one character


class ForbiddenWords:
    """Finds the tokens that would complete a forbidden word.

    Args:
        token_texts: The text of each token in UTF-8, by id; see `Prompt.token_texts`.
        phrases: Words and phrases.
    """

    def __init__(self, token_texts: Sequence[bytes], phrases: Sequence[str]) -> None:
        self._token_texts = token_texts
        patterns = sorted({pattern for phrase in phrases for pattern in _spellings(phrase)})
        self._max_length = max(map(len, patterns), default=0)
        # By each beginning of a pattern: the patterns.
        self._by_beginning: dict[bytes, list[bytes]] = {}
        for pattern in patterns:
            for end in range(1, len(pattern)):
                self._by_beginning.setdefault(pattern[:end], []).append(pattern)
        # Tokens with the same beginning are adjacent: one list as they are, one without leading spaces.
        texts = [_normalize(text) for text in token_texts]
        self._sorted = sorted((text, index) for index, text in enumerate(texts) if text)
        self._sorted_stripped = sorted((text.lstrip(), index) for text, index in self._sorted)
        # Tokens that contain a whole pattern: after a boundary within the token, or from its start.
        self._anywhere: list[int] = []
        self._at_boundary: list[int] = []
        self._find_whole_patterns(texts, patterns)
        self._completing: dict[tuple[bytes, bool], list[int]] = {}

    def banned_ids(self, generated_ids: Sequence[int]) -> list[int]:
        """Return the ids of the tokens that would complete a forbidden word.

        Args:
            generated_ids: All token ids of the answer so far.
        """
        tail = self._tail(generated_ids)
        after_space = tail.endswith(b" ")
        banned = list(self._anywhere)
        if _ends_at_boundary(tail):
            banned += self._at_boundary
        for length in range(1, min(self._max_length, len(tail) + 1)):
            begun = tail[len(tail) - length :]
            for pattern in self._by_beginning.get(begun, ()):
                before = tail[: len(tail) - length]
                if not _starts_with_letter(pattern) or _ends_at_boundary(before):
                    banned += self._tokens_that_complete(pattern[length:], after_space)
        return banned

    def _tail(self, generated_ids: Sequence[int]) -> bytes:
        """Return the end of the generated text, long enough for every pattern and what is before it."""
        needed = self._max_length + _MAX_UTF8_BYTES
        parts: list[bytes] = []
        for index in reversed(generated_ids):
            if needed <= 0:
                break
            part = self._token_texts[index] if index < len(self._token_texts) else b""
            parts.append(part)
            # White space does not count, because any amount of it becomes one space.
            needed -= len(part.strip())
        return _normalize(b"".join(reversed(parts)))

    def _tokens_that_complete(self, rest: bytes, after_space: bool) -> list[int]:
        """Return the tokens that begin with the rest of a pattern, which ends a word there."""
        key = (rest, after_space)
        if key not in self._completing:
            tokens = self._sorted_stripped if after_space else self._sorted
            found: list[int] = []
            for place in range(bisect_left(tokens, (rest, -1)), len(tokens)):
                text, index = tokens[place]
                if not text.startswith(rest):
                    break
                if _is_whole_at_end(text, len(rest)):
                    found.append(index)
            self._completing[key] = found
        return self._completing[key]

    def _find_whole_patterns(self, texts: Sequence[bytes], patterns: Sequence[bytes]) -> None:
        """Find the tokens that contain a whole pattern, for `_anywhere` and `_at_boundary`."""
        # Search in one long text: thousands of patterns in each of 150,000 tokens would take a minute.
        joined = _BETWEEN_TOKENS.join(texts)
        lengths = [len(text) + len(_BETWEEN_TOKENS) for text in texts]
        starts = [0, *accumulate(lengths)]
        for pattern in patterns:
            needs_boundary = _starts_with_letter(pattern)
            place = joined.find(pattern)
            while place >= 0:
                index = bisect_right(starts, place) - 1
                text = texts[index]
                start = place - starts[index]
                if _is_whole_at_end(text, start + len(pattern)):
                    if start == 0 and needs_boundary:
                        self._at_boundary.append(index)
                    elif not needs_boundary or _ends_at_boundary(text[:start]):
                        self._anywhere.append(index)
                place = joined.find(pattern, place + 1)


class ForbiddenWordsProcessor(LogitsProcessor):
    """Excludes forbidden words in `generate` of Transformers.

    Args:
        words: The words.
        start_ids: Token ids of the answer before those that `generate` generates.
    """

    def __init__(self, words: ForbiddenWords, start_ids: Sequence[int] = ()) -> None:
        self._words = words
        self._start_ids = list(start_ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Set the scores (rows, vocabulary) of excluded tokens to -inf."""
        scores = scores.clone()
        generated = [self._start_ids + ids for ids in input_ids.tolist()]
        exclude_forbidden_words(scores, generated, self._words)
        return scores


def exclude_forbidden_words(
    logits: torch.Tensor, generated_ids: Sequence[Sequence[int]], words: ForbiddenWords
) -> None:
    """Set the logits of tokens that would complete a forbidden word to -inf, in place.

    Args:
        logits: (rows, vocabulary).
        generated_ids: All token ids of each row's answer so far.
        words: The words.
    """
    rows: list[int] = []
    banned: list[int] = []
    for row, ids in enumerate(generated_ids):
        banned_ids = words.banned_ids(ids)
        rows += [row] * len(banned_ids)
        banned += banned_ids
    # One copy to the device for all rows.
    pairs = to_device(torch.tensor([rows, banned], dtype=torch.long), logits.device)
    logits[pairs[0], pairs[1]] = -torch.inf


@lru_cache(maxsize=4)
def load_forbidden_words(prompt: Prompt, phrases: tuple[str, ...]) -> ForbiddenWords:
    """Return the forbidden words of a tokenizer. They are kept, because sorting all tokens takes a second."""
    return ForbiddenWords(prompt.token_texts(), phrases)


def _spellings(phrase: str) -> set[bytes]:
    """Return a phrase as it can be generated, after `_normalize`.

    Bytes have upper and lower case for ASCII only, so other letters are spelled out.
    """
    words = " ".join(phrase.split())
    cases = {words, words.lower(), words.upper(), words.title(), words.capitalize()}
    spellings: set[bytes] = set()
    for case in cases:
        for form in ("NFC", "NFD"):
            spellings.add(_normalize(unicodedata.normalize(form, case).encode()))
    return {spelling for spelling in spellings if spelling and _BETWEEN_TOKENS not in spelling}


def _normalize(text: bytes) -> bytes:
    """Return a text in lower case, with one space for any white space."""
    return _WHITE_SPACE.sub(b" ", text.lower())


def _ends_at_boundary(text: bytes) -> bool:
    """Return whether a word can begin after a text: it is empty, or does not end with a letter or digit."""
    # An incomplete character at the end becomes U+FFFD, which is no letter: a word may begin there.
    end = text[-_MAX_UTF8_BYTES:].decode(errors="replace")
    return not end or not _is_letter(end[-1])


def _is_whole_at_end(text: bytes, end: int) -> bool:
    """Return whether a word that ends at `end` is not continued there by another letter."""
    following = text[end : end + _MAX_UTF8_BYTES].decode(errors="replace")
    last = text[max(0, end - _MAX_UTF8_BYTES) : end].decode(errors="replace")
    if not following or not last:
        return True
    return not (_is_letter(last[-1]) and _is_letter(following[0]))


def _starts_with_letter(pattern: bytes) -> bool:
    return _is_letter(pattern.decode(errors="replace")[0])


def _is_letter(character: str) -> bool:
    """Return whether a character is part of a word, in a script that has spaces between words."""
    if _IDEOGRAPHS_FROM <= character <= _IDEOGRAPHS_TO:
        return False
    return character.isalnum() or character == "_"

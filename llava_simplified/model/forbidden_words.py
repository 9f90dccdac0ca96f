"""Words and phrases that are never generated, whichever tokens they are made of.

It is not enough to ban the tokens of " cat", because a model can spell the word with other tokens. It is too much to
ban those of "cat", because "concat" contains them, too. So look at the text and not at the tokens: before each step,
exclude every token that would complete a forbidden word in the generated text.

    forbidden        cat
    generated text   "a c"
    excluded         "at", "at,", "at on"     they complete the word
    allowed          "ats", "atalog", "ar"    they make another word

A forbidden word is found only as a whole word, without a letter or digit before and after it. Upper and lower case
do not matter, nor does the white space between the words of a phrase. A token that ends with the last letter of the
word is excluded, although the next token might continue it to another word ("cat" + "egory"): if no such token
followed, the forbidden word could not be taken back.

How the tokens are found. `patterns` are the forbidden words in lower case as UTF-8. A token completes a pattern in one
of two ways:

    the token contains the whole pattern          found once, for all steps (`_find_whole_patterns`)
    the text ends with the pattern's beginning    look up which patterns begin like the end of the text
    and the token begins with the rest            (`_by_beginning`), then search the rest in a sorted list of all
                                                  tokens (`_tokens_that_complete`)
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, islice

import torch
from transformers.generation import LogitsProcessor

from llava_simplified.data.device_copy import to_device
from llava_simplified.prompt import Prompt

# Scripts without spaces between words. In them, a forbidden word is found anywhere, not only as a whole word.
_IDEOGRAPHS_FROM, _IDEOGRAPHS_TO = "\u2e80", "\uabff"
# The characters of `str.isspace`, in UTF-8.
_WHITE_SPACE = re.compile(
    rb"(?:[\s\x1c-\x1f]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80)+"
)
_BETWEEN_TOKENS = b"\0"  # no pattern contains it
_MAX_UTF8_BYTES = 4  # of one character


class ForbiddenWords:
    """Finds the tokens that would complete a forbidden word.

    Args:
        token_texts: The text of each token in UTF-8, by id; see `Prompt.token_texts`.
        phrases: Words and phrases.
    """

    def __init__(self, token_texts: Sequence[bytes], phrases: Sequence[str]) -> None:
        self._token_texts = token_texts
        spellings: set[bytes] = set()
        for phrase in phrases:
            spellings |= _spellings(phrase)
        patterns = sorted(spellings)
        self._max_length = max(map(len, patterns), default=0)
        # Each beginning of a pattern -> the patterns that begin so.
        self._by_beginning: dict[bytes, list[bytes]] = {}
        for pattern in patterns:
            for end in range(1, len(pattern)):
                self._by_beginning.setdefault(pattern[:end], []).append(pattern)
        # In a sorted list, tokens with the same beginning are adjacent. The second list is for texts that end with
        # a space: a leading space of the next token changes nothing then.
        texts = [_normalize(text) for text in token_texts]
        self._sorted = sorted((text, index) for index, text in enumerate(texts) if text)
        self._sorted_stripped = sorted((text.lstrip(), index) for text, index in self._sorted)
        # Tokens that contain a whole pattern: always excluded if a word begins within the token (" cat"), but only
        # at the beginning of a word if the token starts with the pattern ("cat").
        self._anywhere: list[int] = []
        self._at_boundary: list[int] = []
        self._find_whole_patterns(texts, patterns)
        # Cache of `_tokens_that_complete`.
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
        # Patterns whose first `length` bytes are the end of the text.
        for length in range(1, min(self._max_length, len(tail) + 1)):
            before, begun = tail[:-length], tail[-length:]
            for pattern in self._by_beginning.get(begun, ()):
                # A pattern that starts with a letter must be at the beginning of a word.
                if not _starts_with_letter(pattern) or _ends_at_boundary(before):
                    banned += self._tokens_that_complete(pattern[length:], after_space)
        return banned

    def _tail(self, generated_ids: Sequence[int]) -> bytes:
        """Return the end of the generated text: as long as the longest pattern and the character before it."""
        needed = self._max_length + _MAX_UTF8_BYTES
        parts: list[bytes] = []
        for index in reversed(generated_ids):
            if needed <= 0:
                break
            part = self._token_texts[index] if index < len(self._token_texts) else b""
            parts.append(part)
            # Do not count white space, because `_normalize` shortens it.
            needed -= len(part.strip())
        return _normalize(b"".join(reversed(parts)))

    def _tokens_that_complete(self, rest: bytes, after_space: bool) -> list[int]:
        """Return the tokens that begin with the rest of a pattern, and do not continue the word after it.

        Args:
            rest: What is missing from the pattern.
            after_space: Whether the text ends with a space.
        """
        key = (rest, after_space)
        if key not in self._completing:
            tokens = self._sorted_stripped if after_space else self._sorted
            found: list[int] = []
            # (rest, -1) sorts before every token that begins with `rest`.
            first = bisect_left(tokens, (rest, -1))
            for text, index in islice(tokens, first, None):
                if not text.startswith(rest):
                    break
                if _is_whole_at_end(text, len(rest)):
                    found.append(index)
            self._completing[key] = found
        return self._completing[key]

    def _find_whole_patterns(self, texts: Sequence[bytes], patterns: Sequence[bytes]) -> None:
        """Find the tokens that contain a whole pattern, for `_anywhere` and `_at_boundary`."""
        # Search in one long text of all tokens: to search thousands of patterns in each of 150,000 tokens would take
        # a minute.
        joined = _BETWEEN_TOKENS.join(texts)
        lengths = [len(text) + len(_BETWEEN_TOKENS) for text in texts]
        starts = [0, *accumulate(lengths)]
        for pattern in patterns:
            needs_boundary = _starts_with_letter(pattern)
            found = joined.find(pattern)
            while found >= 0:
                # The token in which the pattern was found, and its place in the token.
                index = bisect_right(starts, found) - 1
                text = texts[index]
                start = found - starts[index]
                if _is_whole_at_end(text, start + len(pattern)):
                    if start == 0 and needs_boundary:
                        self._at_boundary.append(index)
                    elif not needs_boundary or _ends_at_boundary(text[:start]):
                        self._anywhere.append(index)
                found = joined.find(pattern, found + 1)


class ForbiddenWordsProcessor(LogitsProcessor):
    """Excludes forbidden words in `generate` of Transformers.

    Args:
        words: The words.
        start_ids: Token ids with which the answer begins, before those that `generate` generates.
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
    # Copy the ids of all rows to the device at once: each copy takes long, whatever its size.
    pairs = to_device(torch.tensor([rows, banned], dtype=torch.long), logits.device)
    logits[pairs[0], pairs[1]] = -torch.inf


@lru_cache(maxsize=4)
def load_forbidden_words(prompt: Prompt, phrases: tuple[str, ...]) -> ForbiddenWords:
    """Return the forbidden words of a tokenizer; cached, because sorting all tokens takes a second."""
    return ForbiddenWords(prompt.token_texts(), phrases)


def _spellings(phrase: str) -> set[bytes]:
    """Return all forms of a phrase that `_normalize` does not make equal.

    It changes bytes, and bytes have upper and lower case for ASCII letters only. So list the forms with other letters
    in upper or lower case, and with accents as one character or two.
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
    # A character that is still incomplete becomes U+FFFD, which is not a letter. So a word may begin after it.
    end = text[-_MAX_UTF8_BYTES:].decode(errors="replace")
    return not end or not _is_letter(end[-1])


def _is_whole_at_end(text: bytes, end: int) -> bool:
    """Return whether a word that ends at `end` is whole: the next character does not continue it."""
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

"""Words and phrases that are never generated, whatever tokens they consist of.

Banning the tokens of " cat" is not enough, because a model can spell the word with other tokens. Banning the tokens of
"cat" is too much, because "concat" contains them too. So this module looks at the text and not at the tokens: before
each step, it excludes every token that would complete a forbidden word in the generated text.

    forbidden        cat
    generated text   "a c"
    excluded         "at", "at,", "at on"     these would complete the word
    allowed          "ats", "atalog", "ar"    these make another word

Only whole words are forbidden: the word must have no letter or digit directly before or after it. Upper and lower
case do not matter, and neither does the kind of white space between the words of a phrase. A token that ends with the
last letter of the word is excluded, although the next token might turn it into another word ("cat" + "egory"). If
the model then chose another next token, the forbidden word would already be part of the text.

How the tokens are found: `patterns` are the forbidden words in lower case as UTF-8. A token completes a pattern in one
of two ways:

    1. The token contains the complete pattern. These tokens are found once, for all steps (`_find_whole_patterns`).
    2. The text ends with the beginning of the pattern, and the token begins with the rest. In each step, look up the
       patterns whose beginning is the end of the text (`_by_beginning`). Then search for tokens that begin with the
       rest in a sorted list of all tokens (`_tokens_that_complete`).
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

# The range of scripts without spaces between words, such as Chinese. There, a forbidden word is found anywhere, not only
# as a whole word.
_IDEOGRAPHS_FROM, _IDEOGRAPHS_TO = "\u2e80", "\uabff"
# All characters for which `str.isspace` is true, in UTF-8.
_WHITE_SPACE = re.compile(
    rb"(?:[\s\x1c-\x1f]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80)+"
)
_BETWEEN_TOKENS = b"\0"  # separator; no pattern contains it
_MAX_UTF8_BYTES = 4  # maximum number of bytes of one character


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
        # Each beginning of a pattern -> the patterns with this beginning.
        self._by_beginning: dict[bytes, list[bytes]] = {}
        for pattern in patterns:
            for end in range(1, len(pattern)):
                self._by_beginning.setdefault(pattern[:end], []).append(pattern)
        # In a sorted list, tokens with the same beginning are adjacent. The second list, without leading spaces, is for
        # texts that end with a space: another space makes no difference there.
        texts = [_normalize(text) for text in token_texts]
        self._sorted = sorted((text, index) for index, text in enumerate(texts) if text)
        self._sorted_stripped = sorted((text.lstrip(), index) for text, index in self._sorted)
        # Ids of the tokens that contain a whole pattern. If the pattern is a separate word within the token (" cat"),
        # the token is always excluded. If the token starts with the pattern ("cat"), it is only excluded where a new
        # word can begin ("con" + "cat" is allowed).
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
        # Find the patterns whose first `length` bytes are the end of the text.
        for length in range(1, min(self._max_length, len(tail) + 1)):
            before, begun = tail[:-length], tail[-length:]
            for pattern in self._by_beginning.get(begun, ()):
                # A pattern that starts with a letter must be at the beginning of a word.
                if not _starts_with_letter(pattern) or _ends_at_boundary(before):
                    banned += self._tokens_that_complete(pattern[length:], after_space)
        return banned

    def _tail(self, generated_ids: Sequence[int]) -> bytes:
        """Return the end of the generated text, long enough for the longest pattern and one character before it."""
        needed = self._max_length + _MAX_UTF8_BYTES
        parts: list[bytes] = []
        for index in reversed(generated_ids):
            if needed <= 0:
                break
            part = self._token_texts[index] if index < len(self._token_texts) else b""
            parts.append(part)
            # Do not count white space at the ends of a token, because `_normalize` may shorten it.
            needed -= len(part.strip())
        return _normalize(b"".join(reversed(parts)))

    def _tokens_that_complete(self, rest: bytes, after_space: bool) -> list[int]:
        """Return the tokens that begin with the rest of a pattern, and after it do not continue the word.

        Args:
            rest: The part of the pattern that is missing at the end of the text.
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
        # Join all tokens into one long text. Searching for thousands of patterns in each of 150,000 tokens would take a
        # minute.
        joined = _BETWEEN_TOKENS.join(texts)
        lengths = [len(text) + len(_BETWEEN_TOKENS) for text in texts]
        starts = [0, *accumulate(lengths)]
        for pattern in patterns:
            needs_boundary = _starts_with_letter(pattern)
            found = joined.find(pattern)
            while found >= 0:
                # Compute in which token the pattern was found, and where in the token it starts.
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
        words: The forbidden words.
        start_ids: Token ids that the answer begins with. They are part of the prompt of `generate`.
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
        words: The forbidden words.
    """
    rows: list[int] = []
    banned: list[int] = []
    for row, ids in enumerate(generated_ids):
        banned_ids = words.banned_ids(ids)
        rows += [row] * len(banned_ids)
        banned += banned_ids
    pairs = torch.tensor([rows, banned], dtype=torch.long)
    # The tokenizer may have tokens without a row in the embedding table, which the model never generates.
    pairs = pairs[:, pairs[1] < logits.shape[1]]
    # Copy the ids of all rows to the device together, because even a small copy is slow.
    pairs = to_device(pairs, logits.device)
    logits[pairs[0], pairs[1]] = -torch.inf


@lru_cache(maxsize=4)
def load_forbidden_words(prompt: Prompt, phrases: tuple[str, ...]) -> ForbiddenWords:
    """Return the forbidden words of a tokenizer; cached, because sorting all tokens takes a second."""
    return ForbiddenWords(prompt.token_texts(), phrases)


def _spellings(phrase: str) -> set[bytes]:
    """Return the forms of a phrase that must be listed separately, because `_normalize` does not make them equal.

    `_normalize` works on bytes, so it converts only ASCII letters to lower case. Other letters occur in upper and lower
    case, and letters with accents can be encoded as one character (NFC) or as two (NFD).
    """
    words = " ".join(phrase.split())
    cases = {words, words.lower(), words.upper(), words.title(), words.capitalize()}
    spellings: set[bytes] = set()
    for case in cases:
        for form in ("NFC", "NFD"):
            spellings.add(_normalize(unicodedata.normalize(form, case).encode()))
    return {spelling for spelling in spellings if spelling and _BETWEEN_TOKENS not in spelling}


def _normalize(text: bytes) -> bytes:
    """Return a text with ASCII letters in lower case, and each run of white space replaced by one space."""
    return _WHITE_SPACE.sub(b" ", text.lower())


def _ends_at_boundary(text: bytes) -> bool:
    """Return whether a word can begin after a text: the text is empty, or does not end with a letter or digit."""
    # An incomplete character at the end becomes U+FFFD, which is not a letter. So a word may begin after it.
    end = text[-_MAX_UTF8_BYTES:].decode(errors="replace")
    return not end or not _is_letter(end[-1])


def _is_whole_at_end(text: bytes, end: int) -> bool:
    """Return whether a word that ends at `end` is a whole word: the next character does not continue it."""
    # Decode the characters before and after `end`. A character takes up to four bytes.
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

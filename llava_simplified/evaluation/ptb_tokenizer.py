"""Penn Treebank tokenization of captions as in the COCO caption server, without Java.

The server runs Stanford's PTBTokenizer 3.4.1 (`-preserveLines -lowerCase`) and then drops punctuation. This module
returns the same tokens. Example:

    "A man's hand, holding two cats' toys."  ->  "a man 's hand holding two cats toys"

It is a maximal-munch scanner: at each position, all rules of `ptb_rules` are tried, and the longest match is used. The
lookahead of a rule counts as part of its match. Of equally long matches, the first one is used.

It was compared with the original for every character of Unicode, and on hundreds of thousands of random texts. It
differs intentionally in these cases:

- Each caption is tokenized separately. The original reads all captions as one stream, where the first word of the next
  caption can affect whether a single letter at the end of this one keeps its full stop.
- All line breaks (also U+000B, U+000C, U+0085, U+2028 and U+2029) are treated as spaces; the original's caller does this
  only for "\n". In the original, the others start a new caption, so every later caption is scored against the
  references of a different image.
- A lone surrogate (half a UTF-16 pair), which cannot be passed to the original, is dropped, as is every character
  without a rule.
- Python converts the tokens to lower case. The tables of Python and Java differ in letters that are newer than one of
  them. These can occur only in web addresses, because no other rule accepts them.
"""

from __future__ import annotations

import re
from functools import lru_cache

from llava_simplified.evaluation.ptb_rules import (
    BEFORE_NUMBERS,
    LINE_BREAKS,
    SECOND_WORD_LENGTH,
    compiled_rules,
)

PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
"""Tokens that the server drops. Brackets are kept: the server tries to drop "-LRB-", but its tokens are in lower case."""

# Tokens that are replaced, by their lower-case form.
_REPLACEMENTS = {
    "{": "-LCB-",
    "}": "-RCB-",
    "[": "-LSB-",
    "]": "-RSB-",
    "&lt;": "<",
    "&gt;": ">",
    "¢": "cents",
    "£": "#",
    "€": "$",
    "¤": "$",
    "₠": "$",
    "\x80": "$",  # the euro sign of Windows-1252
    "¼": "1/4",
    "½": "1/2",
    "¾": "3/4",
    "⅓": "1/3",
    "⅔": "2/3",
    '"': "''",
    "&quot;": "''",
}
for _dash in ("–", "—", "―", "\x96", "\x97", "---", "----", "&md;", "&mdash;", "&ndash;"):
    _REPLACEMENTS[_dash] = "--"

# Typographic quotation marks; \x91 to \x94 are their codes in Windows-1252.
_QUOTES = str.maketrans(
    {
        "\x91": "`",
        "‘": "`",
        "‛": "`",
        "‹": "`",
        "\x92": "'",
        "’": "'",
        "›": "'",
        "\x93": "``",
        "“": "``",
        "«": "``",
        "\x94": "''",
        "”": "''",
        "»": "''",
    }
)
_ELLIPSIS_STARTS = ("..", ". ", ".\xa0", "…")

_AMPERSAND_ENTITY = re.compile("(?i:&amp;)")
_APOSTROPHE_ENTITY = re.compile("&apos;")
_LINE_BREAK = re.compile(f"[{LINE_BREAKS}]")
_ABOVE_BMP = re.compile("[\U00010000-\U0010ffff]")

# Fast path for a word before a space or a comma, the most frequent case in captions: no rule has a longer match there.
_PLAIN_WORD = re.compile(r"[A-Za-z][A-Za-z0-9]*(?=[ \n]|, )")

# A chunk between two spaces that can be tokenized separately, because no rule matches it together with the following
# text: words; chunks without signs or digits that begin longer tokens (numbers, "3 1/2"; tags; brackets; smileys); and
# words with a full stop that are not abbreviations before a number.
_INDEPENDENT_CHUNK = re.compile(
    r"[A-Za-z][A-Za-z0-9]*"
    r"|[^\s\d.<(+]*"
    rf"|(?!(?i:{BEFORE_NUMBERS}|pt[ey]|co)\.)[A-Za-z]{{2,}}\."
)


def tokenize(caption: str) -> str:
    """Return the tokens of a caption in lower case, without punctuation, separated by single spaces.

    Line breaks are treated as spaces. A token may contain a no-break space ("3\\xa01/2"), as in the original.
    """
    text = _LINE_BREAK.sub(" ", caption)
    if text.isascii() or not _ABOVE_BMP.search(text):
        return _tokenize_line(text)
    # The original scans UTF-16, where these characters are two surrogates, which are in none of its character classes.
    tokens = _tokenize_line(_ABOVE_BMP.sub(_to_surrogates, text))
    return tokens.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


# An evaluation scores each caption several times, and training on rewards compares a reference with every sample of its
# image, in every epoch.
cached_tokenize = lru_cache(maxsize=100_000)(tokenize)


def _tokenize_line(text: str) -> str:
    """Tokenize a text without line breaks and without characters above U+FFFF."""
    # If possible, which is the case in nearly all captions, tokenize every chunk separately: most chunks are then
    # found in the cache of `_scan_chunk`.
    chunks = text.split(" ")
    if all(_INDEPENDENT_CHUNK.fullmatch(chunk) for chunk in chunks):
        tokens = [_scan_chunk(chunk + "\n") for chunk in chunks]
        return " ".join(filter(None, tokens))
    return _scan(text + "\n")


def _to_surrogates(match: re.Match[str]) -> str:
    """Return a character above U+FFFF as two surrogates."""
    offset = ord(match[0]) - 0x10000
    return chr(0xD800 + (offset >> 10)) + chr(0xDC00 + (offset & 0x3FF))


def _scan(text: str) -> str:
    """Tokenize a text that ends with a line break; some rules look ahead at the break."""
    tokens = []
    position = 0
    while position < len(text):
        token, position = _next_token(text, position)
        if token:
            tokens.append(token.lower())
    if tokens:
        # An address can end with spaces other than " ". The server strips each line before it splits it.
        tokens[-1] = tokens[-1].rstrip()
    return " ".join(token for token in tokens if token not in PUNCTUATION)


_scan_chunk = lru_cache(maxsize=1 << 17)(_scan)


def _next_token(text: str, position: int) -> tuple[str, int]:
    """Return the token at a position, and the position where the next token may begin.

    The token is empty at a space, and at characters that the server cannot tokenize.
    """
    plain = _PLAIN_WORD.match(text, position)
    if plain and plain[0].lower() not in SECOND_WORD_LENGTH:
        return plain[0], plain.end()

    # Find the longest match. Use `>` and not `>=`, so that the first of equally long matches is kept.
    best: re.Match[str] | None = None
    best_end = position
    for rule in compiled_rules():
        match = rule.match(text, position)
        if match and match.end() > best_end:
            best = match
            best_end = match.end()
    if best is None:
        return "", position + 1

    token = best[1]
    if best.lastgroup == "two":
        token = token[: -SECOND_WORD_LENGTH[token.lower()]]
    # Continue after the token, and not after the match, so that the lookahead is scanned again.
    end = position + len(token)
    if best.lastgroup == "space":
        return "", best_end
    if best.lastgroup == "verbatim":
        return token.replace(" ", "\xa0"), end
    if best.lastgroup == "quote":
        return _APOSTROPHE_ENTITY.sub("'", token).translate(_QUOTES), end
    return _rewrite(token), end


def _rewrite(token: str) -> str:
    """Return a token in the spelling of the Penn Treebank."""
    replacement = _REPLACEMENTS.get(token.lower())
    if replacement is not None:
        return replacement
    if token.startswith(_ELLIPSIS_STARTS):
        return "..."
    token = _AMPERSAND_ENTITY.sub("&", token)
    token = token.replace("\xad", "").replace(" ", "\xa0")  # soft hyphens; spaces within a token
    return token.replace("(", "-LRB-").replace(")", "-RRB-")

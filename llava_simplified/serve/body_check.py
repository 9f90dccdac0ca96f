"""Limits of a JSON body that are checked before it is parsed.

A body of 20 MB may consist of millions of small objects. Parsed, each of them occupies a hundred times the
memory of its text, so counting them afterward would be too late.
"""

from __future__ import annotations

from llava_simplified.serve.engine import RequestError

# A conversation of 100 messages, each with 8 images and as many texts, has some 10,000.
MAX_VALUES = 20_000
# `messages[0].content[0].image_url.url` is the deepest field that exists.
MAX_DEPTH = 16

_BRACKETS = b"[]{}"
_NO_BRACKETS = bytes(set(range(256)) - set(_BRACKETS))


def check_body(body: bytes) -> None:
    """Refuse a body that has too many values, or that is nested too deeply.

    The time is that of a few searches through the body, whatever it contains. The body need not be valid
    JSON: the parser finds out.

    Raises:
        RequestError: The body exceeds a limit.
    """
    # Without escape sequences, every quotation mark begins or ends a string. Remove `\\` first: the second
    # backslash of `"\\"` does not escape the quotation mark after it.
    text = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    # A value is a string, or follows a comma or a bracket.
    if text.count(b'"') > 4 * MAX_VALUES:
        raise _too_many_values()
    # What is between two strings: brackets, commas, colons, numbers and white space.
    structure = b"".join(text.split(b'"')[::2])
    if _count(structure, b",[{") > MAX_VALUES or _count(structure, b"]}") > MAX_VALUES:
        raise _too_many_values()
    depth = 0
    for bracket in structure.translate(None, _NO_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise RequestError(f"The body is nested more than {MAX_DEPTH} levels deep.")


def _count(structure: bytes, characters: bytes) -> int:
    return sum(structure.count(character) for character in characters)


def _too_many_values() -> RequestError:
    return RequestError(
        f"The body has more than {MAX_VALUES} values. Send fewer messages, or fewer parts per message."
    )

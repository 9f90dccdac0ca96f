"""Check the number of values in a JSON body before it is parsed.

A body of 20 MB can contain millions of small values. After parsing, each of them occupies a hundred times the
memory of its text, so counting them afterward would be too late.
"""

from __future__ import annotations

from llava_simplified.serve.engine import RequestError

# A conversation of 100 messages, each with 8 images and 8 texts, has about 10,000 values.
MAX_VALUES = 20_000
# The deepest field that matters, `messages[0].content[0].image_url.url`, is inside 6 brackets.
MAX_DEPTH = 16

_BRACKETS = b"[]{}"
_ALL_EXCEPT_BRACKETS = bytes(set(range(256)) - set(_BRACKETS))


def check_body(body: bytes) -> None:
    """Reject a body that has too many values, or that is nested too deeply.

    The time is linear in the length of the body, regardless of its contents. Invalid JSON is accepted here, and
    rejected by the parser later.

    Raises:
        RequestError: The body exceeds a limit.
    """
    # Remove escape sequences, so that every remaining quotation mark begins or ends a string. Remove `\\` first:
    # the second backslash of `"\\"` does not escape the quotation mark after it.
    text = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    # A value and its key are at most two strings, so they have at most four quotation marks.
    if text.count(b'"') > 4 * MAX_VALUES:
        raise _too_many_values()
    # The text outside of strings: brackets, commas, colons, numbers and white space.
    structure = b"".join(text.split(b'"')[::2])
    # Every value follows a comma or an opening bracket. Closing brackets are counted only to bound the loop below,
    # since invalid JSON can have any number of them.
    if _count(structure, b",[{") > MAX_VALUES or _count(structure, b"]}") > MAX_VALUES:
        raise _too_many_values()
    depth = 0
    for bracket in structure.translate(None, _ALL_EXCEPT_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise RequestError(f"The body is nested more deeply than {MAX_DEPTH} levels.")


def _count(structure: bytes, characters: bytes) -> int:
    """Return the total number of occurrences of the characters."""
    return sum(structure.count(character) for character in characters)


def _too_many_values() -> RequestError:
    return RequestError(
        f"The body has more than {MAX_VALUES} values. Send fewer messages, or fewer parts per message."
    )

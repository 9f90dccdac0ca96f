"""The rules of a robots.txt file (RFC 9309).

Python's `urllib.robotparser` follows an older draft. It does not support wildcards, with which servers often forbid their
images (`Disallow: /*.jpg$`), and obeys the first rule that matches, where the standard requires the longest one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import quote

# The name of a robot at the start of a user-agent line. A version may follow it, as in "robot/1.0".
_PRODUCT = re.compile(r"[a-z_-]+")
_PERCENT_ENCODED = re.compile(r"%([0-9A-Fa-f]{2})")
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]")
_ASCII = "".join(map(chr, range(0x21, 0x7F)))


class _Rule(NamedTuple):
    pattern: str
    is_allowed: bool


class RobotsRules:
    """The rules for one robot.

    Args:
        lines: The lines of the file. Unknown and damaged lines are ignored.
        agent: The name of the robot, in lower case.
    """

    def __init__(self, lines: Iterable[str], agent: str) -> None:
        rules: dict[
            str, list[_Rule]
        ] = {}  # of all groups for a robot, by its name; "*" stands for every other robot
        # A group has one or more user-agent lines and, after them, its rules.
        names: set[str] = set()
        has_rules = False
        for line in lines:
            key, _, value = line.partition("#")[0].partition(":")
            key, value = key.strip().lower(), value.strip()
            if key == "user-agent":
                if has_rules:
                    names, has_rules = set(), False
                product = _PRODUCT.match(value.lower())
                name = product[0] if product else value
                names.add(name)
                # A group without rules allows everything.
                rules.setdefault(name, [])
            elif key in ("allow", "disallow"):
                has_rules = True
                # An empty path matches nothing.
                if value:
                    rule = _Rule(_normalize(value), key == "allow")
                    for name in names:
                        rules[name].append(rule)
        self._rules = rules.get(agent, rules.get("*", []))

    def allow(self, path: str) -> bool:
        """Return whether the robot may request a path, with its query.

        The longest rule that matches decides. Of two equally long ones, it is the one that allows the request.
        """
        path = _normalize(path)
        matching = [rule for rule in self._rules if _matches(rule.pattern, path)]
        best = max(matching, key=lambda rule: (len(rule.pattern), rule.is_allowed), default=None)
        return best is None or best.is_allowed


def _normalize(path: str) -> str:
    """Return a path or pattern in the form in which they are compared (RFC 9309, section 2.2.2)."""

    def decode(match: re.Match[str]) -> str:
        character = chr(int(match[1], 16))
        return character if _UNRESERVED.fullmatch(character) else match[0].upper()

    return _PERCENT_ENCODED.sub(decode, quote(path, safe=_ASCII))


def _matches(pattern: str, path: str) -> bool:
    """Return whether a pattern matches the beginning of a path; `*` matches any text, and a last `$` the end.

    Each part between two wildcards is searched from left to right. A regular expression would take exponential time
    for some patterns.
    """
    first, *parts = pattern.removesuffix("$").split("*")
    if not path.startswith(first):
        return False
    position = len(first)
    # Without a wildcard, the end must follow the first part. Otherwise, the last part must be at the end.
    if pattern.endswith("$"):
        if not parts:
            return position == len(path)
        last = parts.pop()
        end = len(path) - len(last)
        if end < position or not path.endswith(last):
            return False
        path = path[:end]
    for part in parts:
        found = path.find(part, position)
        if found < 0:
            return False
        position = found + len(part)
    return True

"""The tests that the threat table of SECURITY.md names exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def names_of_tests(path: Path) -> set[str]:
    code = path.read_text(encoding="utf-8")
    return set(re.findall(r"^(?:async )?def (test_\w+)", code, re.MULTILINE))


def test_named_tests_exist() -> None:
    attacks: set[str] = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        attacks |= names_of_tests(path)
    table = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(?:(tests/[\w/]+\.py)::)?(test_\w+)`", table)
    assert len(named) >= 30
    for file, name in named:
        found = names_of_tests(ROOT / file) if file else attacks
        assert name in found, f"SECURITY.md names a test that does not exist: {file}::{name}"

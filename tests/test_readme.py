"""The tree in the README names every module, and no two modules have the same file name."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llava_simplified"


def modules_in_tree(text: str) -> set[str]:
    """Return the modules in the README's tree, as paths relative to the package."""
    modules = set()
    folder = ""
    for line in text.split("```tree")[1].split("```")[0].splitlines():
        if match := re.match(r"^    (\w+)/", line):
            folder = match[1] + "/"
        elif match := re.match(r"^( {4,})(\w+\.py) ", line):
            is_nested = len(match[1]) > 4
            modules.add(folder + match[2] if is_nested else match[2])
    return modules


def test_tree_names_every_module() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    expected = {path.relative_to(PACKAGE).as_posix() for path in files}
    assert modules_in_tree((ROOT / "README.md").read_text(encoding="utf-8")) == expected


def test_file_names_are_unique_in_the_package() -> None:
    names = [path.name for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    assert len(names) == len(set(names))

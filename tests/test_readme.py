"""The README's tree stays true. `python tests/test_readme.py` writes the line counts anew."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def lines_of_code(path: Path) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    lines: set[int] = set()
    fresh = True  # a string that begins a statement is a docstring
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            fresh = True
        elif token.type not in (tokenize.NL, tokenize.COMMENT, tokenize.ENDMARKER):
            if not (fresh and token.type == tokenize.STRING):
                lines.update(range(token.start[0], token.end[0] + 1))
            fresh = False
    return len(lines)


def package_files() -> dict[str, Path]:
    found = (p for p in (ROOT / "llava_simplified").rglob("*.py") if p.name != "__init__.py")
    return {str(path.relative_to(ROOT / "llava_simplified")): path for path in found}


def tree_entries(text: str) -> dict[str, int]:
    """Path below llava_simplified -> the count that the README gives."""
    entries, room = {}, ""
    for line in text.split("```tree")[1].split("```")[0].splitlines():
        if folder := re.match(r"^    (\w+)/", line):
            room = folder[1] + "/"
        elif entry := re.match(r"^( {4,})(\S+\.py) +(\d+) ", line):
            entries[(room if len(entry[1]) > 4 else "") + entry[2]] = int(entry[3])
    return entries


def test_the_tree_names_every_module_with_its_lines_of_code() -> None:
    stated = tree_entries(README.read_text(encoding="utf-8"))
    assert stated == {name: lines_of_code(path) for name, path in package_files().items()}


def test_the_way_of_a_sample_can_be_read_in_an_afternoon() -> None:
    """From a record to a gradient, in the order that the README gives, without a detour."""
    files = package_files()
    way = re.search(r"One sample's way: (.*?)\.\n\n", README.read_text(encoding="utf-8"), re.S)
    assert way
    names = re.findall(r"`(\S+\.py)`", way[1])
    assert "model/llava.py" in names and "training/trainer.py" in names
    assert sum(lines_of_code(files[name]) for name in names) < 1500


def test_the_package_grows_no_further() -> None:
    """A new subject pays with lines that go elsewhere."""
    assert sum(map(lines_of_code, package_files().values())) < 10_000


def rewrite() -> None:
    text, room, out = README.read_text(encoding="utf-8"), "", []
    for line in text.splitlines():
        if folder := re.match(r"^    (\w+)/", line):
            room = folder[1] + "/"
        elif entry := re.match(r"^( {4,})(\S+\.py) +(\d+)  (.*)$", line):
            path = ROOT / "llava_simplified" / ((room if len(entry[1]) > 4 else "") + entry[2])
            line = f"{entry[1] + entry[2]:<30}{lines_of_code(path):>5}  {entry[4]}"
        out.append(line)
    README.write_text("\n".join(out) + "\n", encoding="utf-8")


if __name__ == "__main__":
    rewrite()

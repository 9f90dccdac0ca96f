"""Every command in the documentation and in messages, and every option that it names, exists."""

from __future__ import annotations

import ast
import functools
import re
import shlex
import sys
from pathlib import Path

import pytest

from llava_simplified.arguments import MUST_BE_OFF, NO_EFFECT, RENAMED
from llava_simplified.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "configs").glob("*.yaml")),
]
SOURCES = sorted((ROOT / "llava_simplified").rglob("*.py"))
SCRIPTS = {"train.py": "train", "predict.py": "predict"}
# Options that the pages mention, but that no command of `llava` has: most of them belong to other programs.
ELSEWHERE = {
    "--help",
    "--strict",
    "--nproc_per_node",
    "--num_gpus",
    "--num_accelerators",
    "--group_by_length",
    "--pool",
    "--layer",  # of llava_in_one_file.py
    *("--model_args", "--repeats", "--use_cache", "--num_fewshot"),  # of lmms-eval
}
# Options of LLaVA's scripts, which `arguments.py` translates.
TRANSLATED = {f"--{name}" for name in (*RENAMED, *NO_EFFECT, *MUST_BE_OFF)}


@functools.cache
def options_of(command: str) -> frozenset[str]:
    sys.path.insert(0, str(ROOT / "docs"))
    from reference import find_parser

    names = set()
    for action in find_parser(COMMANDS[command].main)._actions:
        for name in action.option_strings:
            # Every command accepts both spellings.
            names |= {name, "--" + name[2:].replace("-", "_"), "--" + name[2:].replace("_", "-")}
    if command == "plan":  # the options of a run, and its own
        return frozenset(names) | options_of("train")
    return frozenset(names) | (ELSEWHERE | TRANSLATED if command == "train" else {"--help"})


def code_in(text: str) -> list[str]:
    """Return the lines of all code: fenced blocks, indented lines, and text in backticks."""
    joined = re.sub(r"\\\n\s*", " ", re.sub(r"(?m)^#", " ", text))
    lines: list[str] = []
    for block in re.findall(r"(?ms)^```(?:bash)?\n(.*?)^```", joined):
        lines += block.splitlines()
    lines += re.findall(r"(?m)^    (.+)$", joined)
    lines = [re.sub(r"\s#.*", "", line) for line in lines]
    return lines + re.findall(r"`([^`\n]+)`", joined)


def commands_in(text: str) -> list[list[str]]:
    """Return every `llava X ...`, `train.py ...` and `predict.py ...` of a page, split into arguments."""
    pattern = r"(?:^|[\s/])(llava [a-z][a-z-]*|train\.py|predict\.py)(\s.*|$)"
    found = []
    for line in code_in(text):
        if match := re.search(pattern, line):
            name = SCRIPTS.get(match[1], match[1].removeprefix("llava "))
            found.append([name, *shlex.split(match[2].replace("...", ""))])
    return found


def strings_in(source: Path) -> list[str]:
    """Return the strings of a Python file: messages, help texts and docstrings. A value in an f-string becomes X."""
    strings = []
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "X" for part in node.values]
            strings.append("".join(map(str, parts)))
    return strings


def assert_commands_exist(text: str, where: str) -> None:
    for name, *arguments in commands_in(text):
        assert name in COMMANDS, f"{where}: there is no command llava {name}"
        for argument in arguments:
            option = argument.partition("=")[0]
            assert not option.startswith("--") or option in options_of(name), (
                f"{where}: llava {name} has no option {option}"
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_command_of_the_pages_exists_with_its_options(page: Path) -> None:
    assert_commands_exist(page.read_text(encoding="utf-8"), page.name)


def test_every_command_in_a_message_exists_with_its_options() -> None:
    for source in SOURCES:
        for text in strings_in(source):
            assert_commands_exist(text, source.name)


def test_every_page_names_the_same_duration_of_the_demo() -> None:
    table = (ROOT / "docs" / "index.md").read_text(encoding="utf-8").split("| `make demo` |")[1]
    rows = re.findall(r"(?m)^\|.*\| ([0-9].*) minutes \|$", table.split("\n\n")[0])
    minutes = [int(number) for row in rows for number in re.findall(r"\d+", row)]
    duration = f"in {min(minutes)} to {max(minutes)} minutes"
    for path in ("README.md", "llava_simplified/demo/demo_command.py"):
        assert duration in (ROOT / path).read_text(encoding="utf-8"), path


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name != "coming-from.md"], ids=lambda path: path.name
)
def test_every_option_that_a_page_names_exists(page: Path) -> None:
    known = frozenset().union(*(options_of(name) for name in COMMANDS)) | ELSEWHERE
    named = set(re.findall(r"`(--[a-z][a-z0-9_-]+)", page.read_text(encoding="utf-8")))
    assert not named - known

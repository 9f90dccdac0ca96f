"""A hook of mkdocs: the reference pages, from the parsers and docstrings of the code that is installed.

No page of it is in the repository, so none can be out of date.
"""

from __future__ import annotations

import argparse
import html
import importlib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from llava_simplified.cli import COMMANDS

PACKAGE = Path(__file__).parents[1] / "llava_simplified"


class Reached(Exception):
    """Carries a command's parser out of it, before it does anything."""


def parser_of(target: str) -> argparse.ArgumentParser:
    """The parser that "module:function" builds for itself."""

    def reach(self: argparse.ArgumentParser, *_: Any, **__: Any) -> Any:
        raise Reached(self)

    module, _, function = target.partition(":")
    stock = argparse.ArgumentParser.parse_known_args
    argparse.ArgumentParser.parse_known_args = reach  # type: ignore[method-assign,assignment]
    try:
        getattr(importlib.import_module(module), function)([])
    except Reached as reached:
        parser: argparse.ArgumentParser = reached.args[0]
        return parser
    finally:
        argparse.ArgumentParser.parse_known_args = stock  # type: ignore[method-assign]
    raise ValueError(f"{target} parses no arguments")


def option_rows(actions: list[argparse.Action]) -> Iterator[str]:
    yield "| option | default | |"
    yield "|---|---|---|"
    for action in actions:
        if isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS:
            continue
        names = [
            name for name in action.option_strings if "-" not in name[2:]
        ] or action.option_strings
        name = ", ".join(names) or action.dest
        takes = (
            ""
            if action.nargs == 0
            else f" {action.metavar or '/'.join(map(str, action.choices or ())) or ''}"
        )
        default = "required" if action.required and action.option_strings else default_of(action)
        said = " ".join(
            (action.help or "")
            .replace("%(default)s", str(action.default))
            .replace("%%", "%")
            .split()
        )
        cells = (
            f"`{(name + takes).strip()}`".replace("|", "\\|"),
            default,
            html.escape(said).replace("|", "\\|"),
        )
        yield "| " + " | ".join(cells) + " |"


def default_of(action: argparse.Action) -> str:
    value = action.default
    if value in (None, "", argparse.SUPPRESS) or value == []:
        return ""
    value = getattr(value, "value", value)  # of an enumeration
    return "" if callable(value) else f"`{value}`"


def command_page() -> str:
    """Every command of `llava`, with every option."""
    from llava_simplified.training_options import DataArguments, ModelArguments, TrainingDefaults

    parts = [
        "# Commands",
        "Made from the parsers of the code. `llava COMMAND --help` says the same in the terminal.",
    ]
    for name, command in COMMANDS.items():
        parser = parser_of(command.main)
        actions = parser._actions
        parts += [f"## llava {name} {{ #{name} }}", f"{command.summary}."]
        if name == "plan":
            parts.append("It takes the options of [llava train](#train), and these:")
        if name != "train":
            parts.append("\n".join(option_rows(actions)))
            continue
        ours = {"Model": ModelArguments, "Data": DataArguments, "Training": TrainingDefaults}
        rest = {action.dest: action for action in actions}
        for title, group in ours.items():
            named = [f.name for f in fields(group) if f.name in group.__annotations__]
            parts += [f"### {title}", "\n".join(option_rows([rest.pop(dest) for dest in named]))]
        parts += [
            "### Inherited from transformers.TrainingArguments",
            "\n".join(option_rows(list(rest.values()))),
        ]
    return "\n\n".join(parts) + "\n"


def python_page() -> str:
    """Every public name of the package, room by room."""
    parts = [
        "# Python",
        "What each module offers, from its docstrings. `Llava` and `Prompt` are where to begin.",
    ]
    modules = sorted(path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    for module in modules:
        if module.name != "__init__":
            parts.append("::: llava_simplified." + ".".join(module.parts))
    return "\n\n".join(parts) + "\n"


def on_files(files: Files, config: Any) -> Files:
    files.append(File.generated(config, "commands.md", content=command_page()))
    files.append(File.generated(config, "python.md", content=python_page()))
    return files

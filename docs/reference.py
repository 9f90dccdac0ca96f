"""A hook of MkDocs that generates the reference pages from the parsers and docstrings of the installed code.

The pages are not in the repository, so they cannot be out of date.
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


class ParserFound(Exception):
    """Carries the parser of a command to `find_parser`, before the command does anything."""


def find_parser(target: str) -> argparse.ArgumentParser:
    """Return the parser of a command.

    Args:
        target: The main function of the command, as "module:function".

    Raises:
        ValueError: The command parses no arguments.
    """

    def stop(self: argparse.ArgumentParser, *_: Any, **__: Any) -> Any:
        raise ParserFound(self)

    # A command creates its parser and then parses the command line. Replace the parsing by a function
    # that raises an exception with the parser.
    module, _, function = target.partition(":")
    original = argparse.ArgumentParser.parse_known_args
    argparse.ArgumentParser.parse_known_args = stop  # type: ignore[method-assign,assignment]
    try:
        getattr(importlib.import_module(module), function)([])
    except ParserFound as found:
        parser: argparse.ArgumentParser = found.args[0]
        return parser
    finally:
        argparse.ArgumentParser.parse_known_args = original  # type: ignore[method-assign]
    raise ValueError(f"{target} parses no arguments")


def option_rows(actions: list[argparse.Action]) -> Iterator[str]:
    """Yield the lines of a Markdown table with one row per option."""
    yield "| Option | Default | Meaning |"
    yield "|---|---|---|"
    # Every command has the options of logging first. They matter least, so list them last.
    for action in sorted(actions, key=lambda action: action.dest in ("verbose", "quiet")):
        if isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS:
            continue
        default = describe_default(action)
        if action.required and action.option_strings:
            default = "required"
        help_text = action.help or ""
        if default:  # it has a column of its own
            help_text = help_text.replace(" (default: %(default)s)", "")
        help_text = help_text.replace("%(default)s", str(action.default))
        help_text = " ".join(help_text.replace("%%", "%").split())
        # A bar would end the table cell.
        cells = (
            f"`{describe_usage(action)}`".replace("|", "\\|"),
            default,
            html.escape(help_text).replace("|", "\\|"),
        )
        yield "| " + " | ".join(cells) + " |"


def describe_usage(action: argparse.Action) -> str:
    """Return the names of an option and the placeholder of its value, such as "--output FILE"."""
    # Every option can be spelled with dashes and with underscores. List only the names with underscores,
    # if there are any.
    names = [name for name in action.option_strings if "-" not in name[2:]]
    usage = ", ".join(names or action.option_strings) or action.dest
    if action.nargs == 0:
        return usage
    choices = "/".join(map(str, action.choices or ()))
    return f"{usage} {action.metavar or choices}".strip()


def describe_default(action: argparse.Action) -> str:
    """Return the default of an option as a table cell; empty if there is none worth showing."""
    value = action.default
    if value in (None, "", argparse.SUPPRESS) or value == []:
        return ""
    value = getattr(value, "value", value)  # the value of an enumeration's member
    return "" if callable(value) else f"`{value}`"


def command_page() -> str:
    """Return the page with every command of `llava` and all of its options."""
    from llava_simplified.training_options import DataArguments, ModelArguments, TrainingDefaults

    parts = [
        "# Commands",
        "This page is generated from the parsers of the code. `llava COMMAND --help` prints the same in the terminal.",
    ]
    for name, command in COMMANDS.items():
        parser = find_parser(command.main)
        actions = parser._actions
        parts += [f"## llava {name} {{ #{name} }}", f"{command.summary}."]
        if name == "plan":
            parts.append("It accepts the options of [llava train](#train), and these:")
        if name != "train":
            parts.append("\n".join(option_rows(actions)))
            continue
        # Options of this project first, in their groups. What remains is inherited from Transformers.
        groups = {"Model": ModelArguments, "Data": DataArguments, "Training": TrainingDefaults}
        remaining = {action.dest: action for action in actions}
        for title, group in groups.items():
            names = [field.name for field in fields(group) if field.name in group.__annotations__]
            rows = option_rows([remaining.pop(dest) for dest in names])
            parts += [f"### {title}", "\n".join(rows)]
        parts += [
            "### Inherited from transformers.TrainingArguments",
            "\n".join(option_rows(list(remaining.values()))),
        ]
    return "\n\n".join(parts) + "\n"


def python_page() -> str:
    """Return the page with the public names of every module."""
    parts = [
        "# Python",
        "The public names of each module, with their docstrings. Start with `Llava` and `Prompt`.",
    ]
    modules = sorted(path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    for module in modules:
        if module.name != "__init__":
            # mkdocstrings replaces such a line by the documentation of the module.
            parts.append("::: llava_simplified." + ".".join(module.parts))
    return "\n\n".join(parts) + "\n"


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages to the site. MkDocs calls this function."""
    files.append(File.generated(config, "commands.md", content=command_page()))
    files.append(File.generated(config, "python.md", content=python_page()))
    return files

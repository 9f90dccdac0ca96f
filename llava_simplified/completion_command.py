"""`llava completion`: print a script that completes commands and options in bash or zsh."""

from __future__ import annotations

import argparse

import shtab

from llava_simplified import __version__
from llava_simplified.cli import COMMANDS, resolve
from llava_simplified.options import CommandParser

# The attributes (`dest`) of options and arguments whose values are paths. The parsers of the commands do not
# mark them as paths, so they are listed here: first those that are always folders, then files and other folders.
FOLDERS = {"image_folder", "train_image_folder", "val_image_folder"}
FILES = {
    "config",
    "data",
    "data_path",
    "eval_data_path",
    "image",
    "model_base",
    "model_name_or_path",
    "model_path",
    "output",
    "output_dir",
    "train_data_path",
    "vision_tower",
}


def build_parser() -> CommandParser:
    """Return the parser of `llava completion`."""
    parser = CommandParser(
        "llava completion",
        "Print a shell completion script.",
        epilog='bash: eval "$(llava completion bash)"    '
        'zsh: llava completion zsh > "${fpath[1]}/_llava"',
    )
    parser.add_argument("shell", choices=["bash", "zsh"], help="Shell that runs the script")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run `llava completion`."""
    args = build_parser().parse_args(argv)
    print(shtab.complete(build_llava_parser(), shell=args.shell))
    return 0


def build_llava_parser() -> argparse.ArgumentParser:
    """Return one parser of `llava` with all subcommands and their options, which shtab requires."""
    parser = argparse.ArgumentParser("llava")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", parser_class=argparse.ArgumentParser)
    for name, command in COMMANDS.items():
        command_parser = resolve(command.parser)()
        # The attribute `complete` of an option tells shtab how to complete its value.
        for action in command_parser._actions:
            # Positional arguments are paths too, unless they have choices. If they had no completion, zsh would show
            # their description instead of completing options.
            is_free_argument = not action.option_strings and not action.choices
            if action.dest in FOLDERS:
                action.complete = shtab.DIRECTORY
            elif action.dest in FILES or is_free_argument:
                action.complete = shtab.FILE
        # Copy the options of the command. Omit `--help`, which the parent parser has already.
        commands.add_parser(name, help=command.summary, parents=[command_parser], add_help=False)
    return parser

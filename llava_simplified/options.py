"""The parser of all commands, and the command-line options that several commands share.

Every option is accepted with dashes and with underscores (`--image-folder`, `--image_folder`), is never
abbreviated, and a misspelt one is answered with the nearest name. Nothing heavy is imported here: `--help`
must be fast.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import sys
from collections.abc import Sequence
from typing import Any, NoReturn


class CommandParser(argparse.ArgumentParser):
    """The argument parser of one `llava` command.

    Args:
        command: The command as the user types it, for example "llava caption".
        description: One sentence in the imperative.
        options: Passed on to `argparse.ArgumentParser`.
    """

    def __init__(self, command: str, description: str, **options: Any) -> None:
        super().__init__(command, description=description, allow_abbrev=False, **options)
        messages = self.add_argument_group("messages")
        messages.add_argument("--verbose", action="store_true", help="Log details of what is done")
        messages.add_argument("--quiet", action="store_true", help="Log warnings and errors only")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments, and set the log level as `--verbose` and `--quiet` say."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(describe_unknown(unknown, self._option_string_actions))
        configure_logging(verbose=parsed.verbose, quiet=parsed.quiet)
        del parsed.verbose, parsed.quiet
        return parsed

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments with either spelling of each option."""
        words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(
            normalize_spelling(words, self._option_string_actions), namespace
        )

    def error(self, message: str) -> NoReturn:
        """Print one line that says what is wrong, and exit with status 2."""
        self.exit(2, f"error: {message}\n`{self.prog} --help` lists the options.\n")


def normalize_spelling(words: Sequence[str], known: Any) -> list[str]:
    """Replace each option by the spelling under which the parser knows it.

    Args:
        words: The command line.
        known: The option strings of the parser, for example {"--image-folder", "--bits"}.
    """
    normalized: list[str] = []
    for position, word in enumerate(words):
        if word == "--":  # only positional arguments follow
            return normalized + list(words[position:])
        name, equals, value = word.partition("=")
        if name.startswith("--") and name not in known:
            for spelling in (name.replace("_", "-"), "--" + name[2:].replace("-", "_")):
                if spelling in known:
                    name = spelling
                    break
        normalized.append(name + equals + value)
    return normalized


def describe_unknown(unknown: Sequence[str], known: Any) -> str:
    """Say which arguments are unknown, and which options were probably meant."""
    descriptions = []
    for word in unknown:
        name = word.partition("=")[0]
        hint = nearest(name, known) if name.startswith("-") else ""
        descriptions.append(f"unknown argument {name}{hint}")
    return "; ".join(descriptions)


def nearest(name: str, known: Any) -> str:
    """Return "; did you mean X?" for the known name that is most similar, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def configure_logging(*, verbose: bool = False, quiet: bool = False) -> None:
    """Send the package's log messages to standard error: what is not the result of a command."""
    level = logging.INFO
    if verbose:
        level = logging.DEBUG
    elif quiet:
        level = logging.WARNING
    logger = logging.getLogger("llava_simplified")
    logger.setLevel(level)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.propagate = False


# ---- options of several commands ----


def add_checkpoint_options(parser: Any, *, positional: bool = False) -> None:
    """Add the options that load a checkpoint: `model_path`, `model_base`, `vision_tower`, `bits`.

    Args:
        parser: A parser, or one of its groups.
        positional: The checkpoint is the first argument, and not `--model-path`.
    """
    checkpoint_help = "Checkpoint folder, as written by `llava train`"
    if positional:
        parser.add_argument("model_path", metavar="CHECKPOINT", help=checkpoint_help)
    else:
        parser.add_argument("--model-path", required=True, help=checkpoint_help)
    add_base_model_options(parser)
    parser.add_argument(
        "--bits",
        type=int,
        choices=[4, 8, 16],
        help="Bits of the language model's weights (default: as trained)",
    )


def add_base_model_options(parser: Any) -> None:
    """Add `--model-base` and `--vision-tower`: where the pretrained parts of a checkpoint are."""
    parser.add_argument(
        "--model-base", help="Language model (default: where it was during training)"
    )
    parser.add_argument(
        "--vision-tower", help="Vision tower (default: where it was during training)"
    )


def add_generation_options(parser: Any, *, temperature: float) -> None:
    """Add the options of `GenerationOptions`, except the number of sequences.

    Args:
        parser: A parser.
        temperature: Default of `--temperature`.
    """
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        help="Sampling temperature; 0 is greedy (default: %(default)s)",
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="Sample from the most likely tokens with this total probability (default: %(default)s)",
    )
    group.add_argument(
        "--top-k", type=int, default=0, help="Sample from the K most likely tokens; 0: from all"
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="Values over 1 make generated tokens less likely to repeat (default: %(default)s)",
    )
    group.add_argument(
        "--num-beams", type=int, default=1, help="Beams of beam search (default: %(default)s)"
    )
    group.add_argument(
        "--length-penalty",
        type=float,
        default=1.0,
        help="Exponent of the length that beam scores are divided by (default: %(default)s)",
    )
    group.add_argument(
        "--min-new-tokens",
        type=int,
        default=0,
        help="Minimum number of new tokens per caption (default: %(default)s)",
    )
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=64,
        help="Maximum number of new tokens per caption (default: %(default)s)",
    )
    group.add_argument(
        "--seed", type=int, default=0, help="Seed of the sampling (default: %(default)s)"
    )


def add_image_folder_option(parser: Any, default: str = "the folder of the records") -> None:
    """Add `--image-folder`."""
    parser.add_argument("--image-folder", help=f"Folder of the images (default: {default})")


def add_batch_size_option(parser: Any) -> None:
    """Add `--batch-size` for captioning."""
    parser.add_argument(
        "--batch-size", type=int, default=16, help="Images per batch (default: %(default)s)"
    )


def add_limit_option(parser: Any, what: str) -> None:
    """Add `--limit`.

    Args:
        parser: A parser.
        what: What is counted, for example "records".
    """
    parser.add_argument("--limit", type=int, help=f"Process only the first N {what}")


def add_worker_options(parser: Any) -> None:
    """Add `--engine`, `--workers` and `--shards`, for commands that split their work into tasks."""
    group = parser.add_argument_group("workers")
    group.add_argument(
        "--engine",
        choices=["local", "ray"],
        default="local",
        help="Run tasks in local processes, or on a Ray cluster (default: %(default)s)",
    )
    group.add_argument(
        "--workers", type=int, default=0, help="Number of tasks that run at once (default: by CPUs)"
    )
    group.add_argument(
        "--shards",
        default="",
        metavar="i/n",
        help="Process every n-th task from the i-th, counted from 0: one job of an array",
    )

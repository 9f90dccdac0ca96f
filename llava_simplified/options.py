"""The parser of all commands, and the command-line options that several commands share.

Every option is accepted with dashes and with underscores (`--image-folder`, `--image_folder`).
Options cannot be abbreviated; the error for an unknown option suggests a similar one, if there is one.
Nothing heavy is imported here, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

# The scripts of LLaVA's tutorial each run one command. Their help and error messages contain the name of
# the script.
SCRIPTS = {
    "llava train": "train.py",
    "llava predict": "predict.py",
    "llava download": "retrieve_images.py",
    "llava convert": "reformat.py",
    "llava clean": "clean.py",
    "llava reduce": "reduce.py",
}

# C0 and C1 controls except for tab and line feed, marks that reverse the order of text, and halves of surrogate pairs.
_CONTROL_CHARACTERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


class CommandParser(argparse.ArgumentParser):
    """The argument parser of one `llava` command.

    Args:
        command: The command as the user types it, for example "llava caption".
        description: One sentence in the imperative.
        options: Keyword arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, command: str, description: str, **options: Any) -> None:
        super().__init__(
            program_name(command), description=description, allow_abbrev=False, **options
        )
        self._messages = self.add_argument_group("messages")
        self._messages.add_argument("--verbose", action="store_true", help="Log details")
        self._messages.add_argument(
            "--quiet", action="store_true", help="Log warnings and errors only"
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments, and set the log level according to `--verbose` and `--quiet`."""
        argv = sys.argv[1:] if args is None else list(args)
        # Check for misspelled options first: for a misspelled required option, argparse would only report that the
        # required option is missing.
        self._reject(unknown_options(argv, self._option_string_actions))
        parsed, unknown = self.parse_known_args(argv, namespace)
        self._reject(unknown)
        configure_logging(verbose=parsed.verbose, quiet=parsed.quiet)
        # Remove the options that are handled here, because some commands pass all others on to a function.
        del parsed.verbose, parsed.quiet
        return parsed

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments with either spelling of each option, and return unknown arguments separately."""
        argv = sys.argv[1:] if args is None else list(args)
        # Normalize the spelling before parsing, because argparse supports only one spelling per option.
        return super().parse_known_args(
            normalize_spelling(argv, self._option_string_actions), namespace
        )

    def format_help(self) -> str:
        """Return the help text, with `--verbose` and `--quiet`, which all commands have, at the end."""
        # Move the group to the end: argparse prints groups in the order in which they were added.
        self._action_groups.remove(self._messages)
        self._action_groups.append(self._messages)
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Print a short error message without the usage, and exit with status 2."""
        shown = escape_control_characters(message)
        self.exit(2, f"error: {shown}\n`{self.prog} --help` lists the options.\n")

    def _reject(self, unknown: Sequence[str]) -> None:
        if unknown:
            self.error(describe_unknown(unknown, self._option_string_actions))


def quote_arguments(argv: Iterable[str]) -> str:
    """Return command-line arguments as one line that can be pasted into a shell of this machine."""
    if sys.platform == "win32":
        # Use double quotes: for cmd.exe, a single quote is an ordinary character.
        return subprocess.list2cmdline(argv)
    return shlex.join(argv)


def program_name(command: str) -> str:
    """Return the name under which a command was started, for example `llava predict` or `predict.py`."""
    script = SCRIPTS.get(command)
    if script and Path(sys.argv[0]).name == script:
        return script
    return command


def normalize_spelling(argv: Sequence[str], known: Iterable[str]) -> list[str]:
    """Replace each option by the spelling that the parser supports.

    Args:
        argv: The command line.
        known: The option strings of the parser, for example {"--image-folder", "--bits"}.

    Returns:
        The command line. Unknown options and values are unchanged, as is everything after "--".
    """
    spellings = {name.replace("_", "-"): name for name in known}
    normalized: list[str] = []
    for position, argument in enumerate(argv):
        if argument == "--":  # only positional arguments follow
            return normalized + list(argv[position:])
        # Change the name only: in --output=my_file, the underscore is part of the value.
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = spellings.get(name.replace("_", "-"), name)
        normalized.append(name + equals + value)
    return normalized


def unknown_options(argv: Sequence[str], known: Iterable[str]) -> list[str]:
    """Return the arguments that look like options but are not in `known`.

    As in argparse, an argument with a space is a value even if it begins with dashes.
    """
    spellings = {name.replace("_", "-") for name in known}
    unknown = []
    for argument in argv:
        if argument == "--":
            break
        name = argument.partition("=")[0]
        looks_like_option = name.startswith("--") and " " not in name
        if looks_like_option and name.replace("_", "-") not in spellings:
            unknown.append(argument)
    return unknown


def describe_unknown(unknown: Sequence[str], known: Iterable[str]) -> str:
    """Return an error message with the unknown arguments and the most similar options."""
    descriptions = []
    for argument in unknown:
        name = argument.partition("=")[0]
        if name.startswith("-"):
            descriptions.append(f"unknown option {name}{suggest(name, known)}")
        else:
            descriptions.append(f"unexpected argument {argument!r}")
    return "; ".join(descriptions)


def suggest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" with the most similar known name, or an empty string."""
    # Compare the spellings with dashes, so that an underscore is not a difference.
    originals = {candidate.replace("_", "-"): candidate for candidate in known}
    close = difflib.get_close_matches(name.replace("_", "-"), originals, n=1, cutoff=0.6)
    if not close:
        return ""
    return f"; did you mean {originals[close[0]]}?"


def escape_control_characters(text: str) -> str:
    """Replace the characters that control a terminal by their escapes, for example "\\x1b".

    Messages contain file names, captions and headers, which may come from anybody. A terminal would execute control
    sequences in them: change colors, the title and the clipboard, or overwrite other lines. Line breaks and tabs are kept.
    """
    return _CONTROL_CHARACTERS.sub(lambda match: ascii(match[0])[1:-1], text)


def print_text(text: str, *, end: str = "\n", file: TextIO | None = None) -> None:
    """Print text for people. All commands print with this function: see `escape_control_characters`.

    Args:
        text: The text.
        end: What follows it.
        file: A text stream; None is the current standard output.
    """
    stream = sys.stdout if file is None else file
    shown = _encodable(escape_control_characters(text), getattr(stream, "encoding", None))
    # Flush, because the text may be a part of a caption that is being generated.
    print(shown, end=end, file=stream, flush=True)


def _encodable(text: str, encoding: str | None) -> str:
    """Replace the characters that an output cannot encode by their escapes.

    On Windows, output to a pipe or a file has the encoding of the locale, such as cp1252, which has no Chinese characters.
    """
    if not encoding:
        return text
    return text.encode(encoding, "backslashreplace").decode(encoding)


class MessageFormatter(logging.Formatter):
    """Format log messages and their tracebacks, with control characters escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a log message."""
        return escape_control_characters(super().format(record))


class StderrHandler(logging.StreamHandler):
    """Write log messages to the current `sys.stderr`, which tests and notebooks replace."""

    def __init__(self) -> None:
        # Skip StreamHandler.__init__, which would set the stream: it is a property here.
        logging.Handler.__init__(self)
        self.setFormatter(MessageFormatter("%(message)s"))

    @property
    def stream(self) -> TextIO:
        """The current standard error."""
        return sys.stderr


def configure_logging(*, verbose: bool = False, quiet: bool = False) -> None:
    """Write the log messages of this package to standard error, so that standard output contains only results.

    Args:
        verbose: Include debug messages.
        quiet: Show warnings and errors only; `verbose` takes precedence.
    """
    level = logging.INFO
    if verbose:
        level = logging.DEBUG
    elif quiet:
        level = logging.WARNING
        # Hide progress bars of libraries. This must happen before tqdm is imported, because it reads the
        # variable only during the import.
        os.environ.setdefault("TQDM_DISABLE", "1")
    logger = logging.getLogger("llava_simplified")
    logger.setLevel(level)
    # Add the handler only once, because a process may run several commands.
    if not any(isinstance(handler, StderrHandler) for handler in logger.handlers):
        logger.addHandler(StderrHandler())


def log_level() -> int | None:
    """Return the level that `configure_logging` has set in this process; None if it was not called."""
    logger = logging.getLogger("llava_simplified")
    is_configured = any(isinstance(handler, StderrHandler) for handler in logger.handlers)
    return logger.level if is_configured else None


# ---- options of several commands ----
#
# Options with the same meaning are defined once, so that all commands have the same name, default and help
# text for them. Import nothing heavy here: `--help` imports this module.


# The names of the values of the options that `add_checkpoint_options` adds.
CHECKPOINT_OPTIONS = (
    "model_path",
    "model_base",
    "vision_tower",
    "bits",
    "dtype",
    "quantize",
    "trust_remote_code",
)


def add_checkpoint_options(parser: Any, *, positional: bool = False, required: bool = True) -> None:
    """Add the options that load a checkpoint: its path, its parts and their precision.

    Args:
        parser: A parser, or one of its groups.
        positional: Accept the checkpoint as the first argument instead of `--model-path`.
        required: Whether `--model-path` is required.
    """
    checkpoint_help = "Checkpoint folder, as written by `llava train`"
    if positional:
        parser.add_argument("model_path", metavar="CHECKPOINT", help=checkpoint_help)
    else:
        parser.add_argument("--model-path", required=required, help=checkpoint_help)
    add_base_model_options(parser)
    parser.add_argument(
        "--bits",
        type=int,
        choices=[4, 8, 16],
        help="Bits per weight of the language model (default: as in training)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "stored"],
        help="Data type of the weights (default: stored, which means as in the checkpoint, or float32 on a CPU on which "
        "this is much faster)",
    )
    parser.add_argument(
        "--quantize",
        choices=["int8"],
        help="Quantize the language model for faster generation on a CPU; captions may change slightly",
    )
    add_trust_option(parser)


def checkpoint_options(args: Any) -> dict[str, Any]:
    """Return the values of the options that `add_checkpoint_options` adds, as keyword arguments of `CaptionJob`.

    Args:
        args: The parsed options. If no checkpoint was given, `model_path` becomes "".
    """
    values = {name: getattr(args, name) for name in CHECKPOINT_OPTIONS}
    return {**values, "model_path": args.model_path or ""}


def add_base_model_options(parser: Any) -> None:
    """Add `--model-base` and `--vision-tower`: the locations of a checkpoint's pretrained parts."""
    parser.add_argument(
        "--model-base",
        help="Path of the base language model, if it has moved since training",
    )
    parser.add_argument(
        "--vision-tower", help="Path of the vision tower, if it has moved since training"
    )


def add_trust_option(parser: Any) -> None:
    """Add `--trust-remote-code`. Without it, no code that comes with a model is executed."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="Run the Python code that comes with the language model or its tokenizer; its author can then "
        "do whatever you can do on this machine",
    )


def check_at_least(minimum: int, **values: float | None) -> None:
    """Check numeric options. Call this before anything is loaded.

    Args:
        minimum: The smallest valid value.
        **values: Values by name, for example `batch_size=16`. None, an option that was not given, is valid.

    Raises:
        ValueError: A value is below the minimum, or NaN.
    """
    for name, value in values.items():
        if (
            value is not None and not value >= minimum
        ):  # written this way, because a NaN must fail too
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {value}: must be at least {minimum}")


def add_generation_options(parser: Any, *, temperature: float, beam_search: bool = True) -> None:
    """Add the options for sampling, beam search, the number of new tokens and the seed; see `GenerationOptions`.

    Args:
        parser: A parser.
        temperature: Default of `--temperature`.
        beam_search: Whether the command supports beam search. If not, it has no options for it, but their defaults are
            among the parsed values.
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
        metavar="P",
        help="Sample from the most likely tokens whose probabilities add up to P (default: %(default)s)",
    )
    group.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="Sample from the K most likely tokens; 0 means all (default: %(default)s)",
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="Penalty for repeated tokens; 1 means none (default: %(default)s)",
    )
    if beam_search:
        group.add_argument(
            "--num-beams",
            type=int,
            default=1,
            help="Number of beams; over 1 selects beam search (default: %(default)s)",
        )
        group.add_argument(
            "--length-penalty",
            type=float,
            default=1.0,
            help="For beam search: scores are divided by length ** LENGTH_PENALTY, so higher values favor longer "
            "captions (default: %(default)s)",
        )
    else:
        parser.set_defaults(num_beams=1, length_penalty=1.0)
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
    group.add_argument("--seed", type=int, default=0, help="Random seed (default: %(default)s)")


def add_image_folder_option(parser: Any, default: str = "the folder of the records") -> None:
    """Add `--image-folder`.

    Args:
        parser: A parser.
        default: Description of the default, for the help text.
    """
    parser.add_argument("--image-folder", help=f"Image folder (default: {default})")


def add_batch_size_option(parser: Any) -> None:
    """Add `--batch-size`, for commands that caption images."""
    parser.add_argument(
        "--batch-size", type=int, default=16, help="Images per batch (default: %(default)s)"
    )


def add_limit_option(parser: Any, items: str) -> None:
    """Add `--limit`.

    Args:
        parser: A parser.
        items: Name of the items in the plural, for example "records".
    """
    parser.add_argument("--limit", type=int, metavar="N", help=f"Process only the first N {items}")


def add_shards_option(parser: Any) -> None:
    """Add `--shards`, which selects a slice of the tasks for this process; see `workers.parse_slice`."""
    parser.add_argument(
        "--shards",
        default="",
        metavar="i/n",
        help="Process only slice i of n slices (i from 0 to n-1), for example in a job array",
    )


def add_engine_option(parser: Any) -> None:
    """Add `--engine`, which selects where tasks run; see `workers.run_tasks`."""
    parser.add_argument(
        "--engine",
        choices=["local", "ray"],
        default="local",
        help="Run on this machine or on a Ray cluster (default: %(default)s)",
    )


def add_worker_options(parser: Any) -> None:
    """Add `--engine`, `--workers` and `--shards`, for commands that split their work into tasks."""
    group = parser.add_argument_group("workers")
    add_engine_option(group)
    group.add_argument(
        "--workers",
        type=int,
        default=0,
        help="Number of tasks to run in parallel (default: depends on the number of CPUs)",
    )
    add_shards_option(group)

"""`llava encode`: compute the vision features of all images before training.

It accepts the options of the training run, which then reads the features from disk. The job can be
killed and restarted.
"""

from __future__ import annotations

import sys

from llava_simplified.options import CommandParser, print_text
from llava_simplified.training_options import add_training_options, exit_with_help


def build_parser() -> CommandParser:
    """Return the parser of `llava encode`, for help and completion."""
    parser = CommandParser(
        "llava encode",
        "Compute the image features of a training run in advance. Accepts the options of the run.",
        usage="%(prog)s [options]",
    )
    add_training_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run `llava encode`."""
    argv = sys.argv[1:] if argv is None else argv
    exit_with_help(argv, build_parser())

    # Import these here, because they import transformers, which takes seconds.
    from llava_simplified.arguments import parse_arguments
    from llava_simplified.training.encode import encode_data

    groups = parse_arguments(argv)
    encoded, unreadable, mode = encode_data(*groups)
    print_text(
        f"{encoded:,} images are in the cache, {unreadable:,} could not be read. "
        f"Train with the same options and --cache_vision_features {mode}."
    )
    return 0

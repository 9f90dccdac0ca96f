"""`llava encode`: run the vision tower over all images ahead of training.

It accepts the options of the training run, which then finds the features on disk. The job can be
killed and restarted.
"""

from __future__ import annotations

import sys

from llava_simplified.options import configure_logging


def main(argv: list[str] | None = None) -> int:
    """Run `llava encode`."""
    from llava_simplified.arguments import parse_arguments
    from llava_simplified.training.encode import encode_data

    configure_logging()
    groups = parse_arguments(sys.argv[1:] if argv is None else argv)
    encoded, unreadable, mode = encode_data(*groups)
    print(
        f"{encoded:,} images are in the cache, {unreadable:,} could not be read. Train with the same options and "
        f"--cache_vision_features {mode}."
    )
    return 0

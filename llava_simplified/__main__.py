"""Run the `llava` command with `python -m llava_simplified`."""

import sys

from llava_simplified.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""Caption images with a trained model. Same as `llava predict`."""

import sys

from llava_simplified.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("predict", sys.argv[1:]))

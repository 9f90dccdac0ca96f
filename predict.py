"""Caption pictures with a trained model: `python predict.py --model-path CHECKPOINT`."""

import sys

from llava_simplified.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("llava_simplified.captioning.caption_command:main", None))

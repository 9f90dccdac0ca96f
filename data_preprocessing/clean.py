"""Separate the records that training can use from those that it cannot.

    python data_preprocessing/clean.py data/cc3m/train \
        --vision_tower openai/clip-vit-base-patch16 --output data/cc3m/train.json

The folder is one that retrieve_images.py has written. A file of records works too, with --image-folder.
"""

import sys

from llava_simplified.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("clean", sys.argv[1:]))

"""Separate the records that training can use from those that it cannot.

    python data_preprocessing/clean.py conceptual_captions_instruct_train.json --image-folder data/train/images \
        --vision_tower openai/clip-vit-base-patch16 --output conceptual_captions_instruct_train_clean.json
"""

import sys

from llava_simplified.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("clean", sys.argv[1:]))

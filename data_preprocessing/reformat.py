"""Make the training JSON from a file of captions and the folder of its images.

    python data_preprocessing/reformat.py Train_GCC-training.tsv --image-folder data/train/images \
        --output conceptual_captions_instruct_train.json
"""

import sys

from llava_simplified.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("convert", sys.argv[1:]))

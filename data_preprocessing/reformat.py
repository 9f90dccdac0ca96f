"""Make the training JSON from a file of captions and the folder of its images.

    python data_preprocessing/reformat.py captions.tsv --image-folder data/mine/train --output data/mine/train.json

Images that retrieve_images.py has downloaded need no such file: their folder contains records.json.
"""

import sys

from llava_simplified.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("convert", sys.argv[1:]))

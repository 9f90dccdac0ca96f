"""Download the images of a list of URLs into a folder of files.

    python data_preprocessing/retrieve_images.py Train_GCC-training.tsv --output data/cc3m/train

The images are written to data/cc3m/train/images/INDEX_CRC.jpg, and the records of those that were downloaded to
data/cc3m/train/records.json. For more than about ten thousand images use `llava download`, which writes shards.
"""

import sys

from llava_simplified.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("download", ["--output-format", "files", *sys.argv[1:]]))

"""Fetch the pictures of a list of URLs into a folder of files.

    python data_preprocessing/retrieve_images.py Train_GCC-training.tsv --output data/train

The pictures are data/train/images/INDEX_CRC.jpg, the captions of those that came data/train/records.json. For more
than some ten thousand, `llava download` writes shards instead.
"""

import sys

from llava_simplified.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("download", ["--output-format", "files", *sys.argv[1:]]))

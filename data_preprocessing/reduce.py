"""Draw a random sample of the records; the same seed gives the same sample.

python data_preprocessing/reduce.py data/cc3m/train.json --count 1000 --seed 0
"""

import sys

from llava_simplified.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("reduce", sys.argv[1:]))

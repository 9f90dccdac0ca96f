"""Fine-tune a language model to see: `python train.py`, `torchrun ... train.py`, `deepspeed train.py`."""

import sys

from llava_simplified.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("llava_simplified.training.train_command:main", None))

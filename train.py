"""Train a LLaVA model. Same as `llava train`; also for torchrun, accelerate launch and deepspeed."""

import sys

from llava_simplified.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("train", sys.argv[1:]))

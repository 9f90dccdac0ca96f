"""One training run: check, build, train, save. `train.py` and `llava train` come here."""

from __future__ import annotations

import sys
from pathlib import Path

from llava_simplified.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    parse_arguments,
)
from llava_simplified.training.build_trainer import build_trainer
from llava_simplified.training.plots import plot_training
from llava_simplified.training.preflight import preflight
from llava_simplified.training.trainer import LlavaTrainer


def main(argv: list[str] | None = None) -> int:
    """The command line of `train.py`."""
    argv = sys.argv[1:] if argv is None else argv
    if any(word in ("-h", "--help") for word in argv):
        parse_arguments(["--help"])
    groups = parse_arguments(argv)
    preflight(argv, *groups)
    train(*groups)
    return 0


def train(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> Path:
    """Train, and save into `args.output_dir`; returns that folder.

    Raises:
        ValueError: what is asked for can't be done; found before the weights are loaded, wherever possible.
    """
    trainer, resumed = build_trainer(model_args, data_args, args)
    trainer.train(resume_from_checkpoint=str(resumed / "trainer_state") if resumed else None)
    trainer.save_final()
    output_dir = Path(str(args.output_dir))
    if trainer.is_world_process_zero():
        plot_training(output_dir / "trainer_log.jsonl", output_dir / "training.png")
    trainer.accelerator.print(f"saved in {output_dir}; {_counted(trainer)}")
    trainer.accelerator.wait_for_everyone()  # a process whose peers are gone may hang in saying good-bye
    trainer.accelerator.end_training()
    return output_dir


def _counted(trainer: LlavaTrainer) -> str:
    found = [f"{count:,} {kind}" for kind, count in sorted(trainer.seen.items())]
    return f"{', '.join(found) or 'nothing was left to be'} seen by this process"

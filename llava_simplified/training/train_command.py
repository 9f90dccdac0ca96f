"""`llava train`, `train.py` and `llava_simplified.train`: check, build, train, save."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava_simplified.extras import MissingExtraError
from llava_simplified.options import CommandParser, program_name, quote_arguments
from llava_simplified.training_options import add_training_options, exit_with_help

if TYPE_CHECKING:
    from llava_simplified.arguments import DataArguments, ModelArguments, TrainingArguments

logger = logging.getLogger(__name__)


def build_parser() -> CommandParser:
    """Return the parser of `llava train`, for help and completion."""
    parser = CommandParser("llava train", "Train a LLaVA model.", usage="%(prog)s [options]")
    add_training_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run `llava train`."""
    argv = sys.argv[1:] if argv is None else argv
    exit_with_help(argv, build_parser())

    # Import these here, because they import transformers, which takes seconds.
    from llava_simplified.arguments import parse_arguments
    from llava_simplified.training.preflight import preflight

    groups = parse_arguments(argv)
    preflight(argv, *groups)
    try:
        train(*groups)
    except KeyboardInterrupt as interrupt:
        args = groups[2]
        if args.process_index == 0:
            checkpoint = getattr(interrupt, "checkpoint", None)
            message = describe_interruption(argv, Path(str(args.output_dir)), checkpoint)
            logger.warning("%s", message)
        # By convention, the exit status of a process that a signal has ended is 128 plus the signal.
        return 128 + getattr(interrupt, "signal", signal.SIGINT)
    return 0


def describe_interruption(
    argv: Sequence[str], output_dir: Path, checkpoint: Path | None = None
) -> str:
    """Return a message with the last checkpoint of an interrupted run, and the command that continues it.

    Args:
        argv: Options of the run.
        output_dir: Output folder of the run.
        checkpoint: The checkpoint that the interruption has saved, or None if it has saved none.
    """
    from llava_simplified.training.resume import find_last_checkpoint, has_trainer_state

    last = find_last_checkpoint(output_dir)
    checkpoint = checkpoint or last
    if checkpoint is None:
        return (
            "Interrupted before the first checkpoint. The same command starts from the beginning."
        )
    if not has_trainer_state(checkpoint):
        return (
            f"Interrupted. The last checkpoint is {checkpoint}. With --save_only_model True, this run cannot be continued. Start "
            f"a new run from the trained weights with --init_from {checkpoint} and another --output_dir."
        )
    # If the run was resumed from an earlier checkpoint, later ones may exist. "true" would choose one of them.
    resume_from = "true" if checkpoint == last else str(checkpoint)
    resume_argv = [*argv, "--resume_from_checkpoint", resume_from]
    launcher = " (with the same launcher)" if "LOCAL_RANK" in os.environ else ""
    return (
        f"Interrupted. The last checkpoint is {checkpoint}. Continue{launcher}:\n"
        f"  {program_name('llava train')} {quote_arguments(resume_argv)}"
    )


def train(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> Path:
    """Train a model, and save it into `args.output_dir`.

    Args:
        model_args: Base models and trained parts.
        data_args: Records, images and batches.
        args: Options of `transformers.TrainingArguments`, and a few more.

    Returns:
        The output folder, which `Llava.from_pretrained` can load.

    Raises:
        ValueError: The options are not valid. Most errors are found before weights are loaded.
        FloatingPointError: The loss or the gradient is not finite.
        TrainingInterrupted: A signal (Ctrl-C, SIGTERM) has ended the run; a checkpoint was saved.
    """
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    from llava_simplified.training.build_trainer import build_trainer
    from llava_simplified.training.interruption import TrainingInterrupted

    trainer, resumed = build_trainer(model_args, data_args, args)
    state_folder = str(resumed / "trainer_state") if resumed else None
    output_dir = Path(str(args.output_dir))
    with trainer.interruption.watch_signals():
        trainer.train(resume_from_checkpoint=state_folder)
        if trainer.interruption.was_stopped:
            step = trainer.state.global_step
            checkpoint = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            number = trainer.interruption.signal or signal.SIGINT
            raise TrainingInterrupted(number, step, checkpoint)
        trainer.save_final()

    if trainer.is_world_process_zero():
        _plot(output_dir)
    if trainer.accelerator.is_local_main_process:
        counts = trainer.sample_warnings.summary()
        logger.info(
            "Saved the model in %s. Images and warnings of this process: %s.", output_dir, counts
        )
    # Wait for all processes: if others have exited already, `destroy_process_group()` may hang.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return output_dir


def _plot(output_dir: Path) -> None:
    """Plot the log of the run, if matplotlib is installed."""
    from llava_simplified.training.plots import plot_training

    target = output_dir / "training.png"
    try:
        plot_training(output_dir / "trainer_log.jsonl", target)
    except MissingExtraError as error:
        logger.info("Skipped the plot %s: %s", target, error)

"""The dry run of `--preflight`: a few steps, a save, a load and a caption, in a separate process.

Usage: python -m llava_simplified.training.dry_run TRAINING_OPTIONS

The result is written to `report.json` in the parent of the output folder.
"""

from __future__ import annotations

import gc
import inspect
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from llava_simplified.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    parse_arguments,
)
from llava_simplified.data.dataset import drop_bad_records
from llava_simplified.data.images import ImageError, read_image_bytes
from llava_simplified.data.records import ALL_RECORDS, open_records
from llava_simplified.model.checkpoint import load_checkpoint
from llava_simplified.model.llava import Llava
from llava_simplified.process_memory import peak_memory
from llava_simplified.training.build_trainer import build_trainer
from llava_simplified.training.policy_trainer import PolicyTrainer

# Maximum difference between the logits of the trained and the loaded model, relative to the largest logit.
_TOLERANCE_FLOAT32 = 1e-3
_TOLERANCE_16_BIT = 3e-2


class TrainedSteps(NamedTuple):
    """The result of training a few steps.

    Attributes:
        batch: A batch of two training examples.
        logits: Logits of the trained model for this batch.
        seconds: Seconds of the last step.
        sampling_seconds: Seconds of sampling and rewards in that step; 0 if the objective samples nothing.
    """

    batch: dict[str, torch.Tensor]
    logits: torch.Tensor
    seconds: float
    sampling_seconds: float


def dry_run(argv: Sequence[str]) -> None:
    """Train a few steps, save, load, compare the logits, and caption an image.

    Args:
        argv: Training options.

    Raises:
        ValueError: The logits of the loaded checkpoint differ from those of the trained model.
    """
    model_args, data, args = parse_arguments(list(argv))
    output = Path(str(args.output_dir))
    is_float32 = args.frozen_dtype == "float32"
    precision = torch.autocast(
        args.device.type, getattr(torch, args.frozen_dtype), enabled=not is_float32
    )
    trained = _train_and_save(model_args, data, args, precision)
    peak = _peak_memory(args.device)

    # Free the trained model first, so that two models are never in memory together.
    gc.collect()
    if args.device.type == "cuda":
        torch.cuda.empty_cache()
    loaded = load_checkpoint(
        output,
        device=args.device,
        dtype="stored",
        attn_implementation=model_args.attn_implementation,
        trust_remote_code=model_args.trust_remote_code,
    ).eval()
    with torch.no_grad(), precision:
        logits = loaded(**trained.batch).logits.float()
    difference = float((trained.logits - logits).abs().max() / trained.logits.abs().max())
    tolerance = _TOLERANCE_FLOAT32 if is_float32 else _TOLERANCE_16_BIT
    if not difference < tolerance:  # written this way, because a NaN must fail too
        raise ValueError(
            f"the logits of the saved checkpoint differ from those of the trained model by {difference:.2%}; "
            f"expected less than {tolerance:.2%}. Please report this as a bug."
        )
    report = {
        "seconds": trained.seconds,
        "sampling_seconds": trained.sampling_seconds,
        "peak": peak,
        "caption": _caption_first_record(loaded, data),
    }
    (output.parent / "report.json").write_text(json.dumps(report), encoding="utf-8")


def _train_and_save(
    model_args: ModelArguments,
    data: DataArguments,
    args: TrainingArguments,
    precision: torch.autocast,
) -> TrainedSteps:
    """Train and save as a run does, and return the logits of the trained model for two examples."""
    trainer, _ = build_trainer(model_args, data, args)
    trainer.train()
    seconds = trainer.throughput.last_step
    sampling_seconds = trainer.sampling_seconds if isinstance(trainer, PolicyTrainer) else 0.0
    examples = cast(Any, trainer.train_dataset)
    first_examples = [examples[index] for index in range(min(2, len(examples)))]
    loaded = cast(Any, trainer.data_collator(first_examples))
    [prepared] = trainer.prepare_micro_batches([loaded])
    # Leave out metadata, and tensors that only the loss of an objective uses.
    accepted = inspect.signature(Llava.forward).parameters
    inputs = {name: value for name, value in prepared.items() if name in accepted}
    batch = trainer._prepare_inputs(inputs)
    model = cast(Llava, trainer.model).eval()
    with torch.no_grad(), precision:
        logits = model(**batch).logits.float()
    trainer.save_final()
    trainer.accelerator.free_memory()
    return TrainedSteps(batch, logits, seconds, sampling_seconds)


def _caption_first_record(model: Llava, data: DataArguments) -> str | None:
    """Return a caption of the first record, or None if it has no image or an unreadable one."""
    records = open_records(str(data.train_data_path), max_bad_records=ALL_RECORDS)
    record = drop_bad_records(records, max_bad_records=ALL_RECORDS)[0]
    if not record.images:
        return None
    with suppress(ImageError):  # training will report and count this image
        images = [read_image_bytes(name, str(data.train_image_folder)) for name in record.images]
        return model.chat(record.turns, images, max_new_tokens=16)
    return None


def _peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of the tensors on the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak_memory()


if __name__ == "__main__":
    try:
        dry_run(sys.argv[1:])
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")

"""Resume a run: find the checkpoint, and check that it belongs to the same run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from llava_simplified.arguments import TrainingArguments
from llava_simplified.model.config import LlavaConfig, read_checkpoint_config

# A run that is killed and resumed ends with the weights of an uninterrupted run, bit for bit on one
# CPU process. For this, `checkpoint-N/` contains the trained weights and the folder
# `trainer_state/`:
#
#     optimizer.safetensors    optimizer state by weight and key, whole tensors (see `sharding`)
#     scheduler.pt             position in the learning-rate schedule
#     scaler.pt                loss scale, with --fp16 only
#     rng_state*.pth           random states of each process (Python, NumPy, torch), for dropout
#     trainer_state.json       step and epoch, log history, best metric, patience of early stopping
#
# The position in the data is not stored, because it follows from the step: the order of the samples
# depends only on the seed and the epoch. The resumed run draws the same order, and skips the batches
# that were trained.
#
# All of this requires the same values of all options that affect the weights, the samples or their
# order. `check_same_run` compares them with those in `llava.json` of the checkpoint.

# These options must not change: the weights or samples would differ, or samples would be used twice or
# never.
_MUST_NOT_CHANGE = (
    "train_data_path",
    "share_prefix",
    "packing",
    "pack_length",
    "model_max_length",
    "train_sampling_strategy",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
    "lora_enable",
    "lora_r",
    "lora_alpha",
    "lora_bias",
    "tune_mm_mlp_adapter",
    "freeze_backbone",
    "tune_vision_tower",
)
# Changes of these are not reported. "steps" and "epochs" are progress, not options.
_NOT_COMPARED = {
    "resume_from_checkpoint",
    "output_dir",
    "accelerator_config",
    "config",
    "steps",
    "epochs",
    "disable_tqdm",
    "preflight",
}
# Do not compare the paths of the base models, which may have moved; compare the digests of their weights
# instead.
_LOCATIONS = ("language_model", "vision_tower")


def is_resuming(args: TrainingArguments) -> bool:
    """Return True if `--resume_from_checkpoint` names a checkpoint, or is "true"."""
    return args.resume_from_checkpoint not in (None, "", "False", "false", False)


def find_resume_folder(args: TrainingArguments) -> Path | None:
    """Return the checkpoint of `--resume_from_checkpoint`; "true" is the last complete one.

    Returns:
        The checkpoint folder, or None if the run is new.

    Raises:
        ValueError: The checkpoint does not exist, or has no trainer state.
    """
    if not is_resuming(args):
        return None
    requested = str(args.resume_from_checkpoint)
    if requested.lower() == "true":
        output_dir = str(args.output_dir)
        last = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
        if last is None:
            raise ValueError(
                f"--resume_from_checkpoint true: no checkpoint in {output_dir}. Name a checkpoint folder, or start "
                "a new run with --resume_from_checkpoint false."
            )
        requested = last
    folder = Path(requested)
    if not (folder / "trainer_state").is_dir():
        raise ValueError(
            f"--resume_from_checkpoint {folder}: the folder has no trainer_state/, so the run cannot be resumed "
            f"from it. Resume from a checkpoint-N folder, or start a new run with --init_from {folder}."
        )
    return folder


def check_same_run(folder: Path, config: LlavaConfig, settings: Mapping[str, Any]) -> list[str]:
    """Compare this run with the run that wrote a checkpoint.

    Args:
        folder: The checkpoint.
        config: The model of this run.
        settings: The options of this run that differ from their defaults, and `processes`.

    Returns:
        One line for each difference that is allowed.

    Raises:
        ValueError: An option that must not change, or the model, differs.
    """
    checkpoint = read_checkpoint_config(folder)
    _check_same_model(folder, config, checkpoint["architecture"])

    before, now = checkpoint["training"], dict(settings)
    differences = []
    # Both sides contain only options that differ from their defaults.
    for name in sorted({*before, *now} - _NOT_COMPARED):
        if before.get(name) == now.get(name):
            continue
        old_value, new_value = before.get(name, "default"), now.get(name, "default")
        if name in _MUST_NOT_CHANGE:
            raise ValueError(
                f"--{name}: {folder} was trained with {old_value}, this run has {new_value}, so it is not the same "
                f"run. Pass the old value, or start a new run from the trained weights with --init_from {folder}."
            )
        differences.append(f"--{name} was {old_value}, is {new_value}")
    if before.get("processes") != now.get("processes"):
        differences.append(
            "the number of processes differs: if the total batch size differs too, some samples of this epoch are "
            "used twice or never"
        )
    return differences


def _check_same_model(folder: Path, config: LlavaConfig, stored: Mapping[str, Any]) -> None:
    for name, value in asdict(config).items():
        if isinstance(value, tuple):  # JSON stores lists
            value = list(value)
        if name not in _LOCATIONS and value != stored.get(name):
            raise ValueError(
                f"{folder}: its model has {name} {stored.get(name)}, the model of this run has {name} {value}. "
                f"Pass the old value, or start a new run with a different --output_dir."
            )

"""Resume a run: find the checkpoint, and check that it belongs to the same run."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llava_simplified.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    non_default_options,
)
from llava_simplified.data.rows import find_records
from llava_simplified.model.config import LlavaConfig, read_checkpoint_config
from llava_simplified.training_options import INHERITED

logger = logging.getLogger(__name__)

# A run that is killed and resumed ends with the weights of an uninterrupted run, bit for bit on one
# CPU process. For this, `checkpoint-N/` contains the trained weights and the folder
# `trainer_state/`:
#
#     optimizer.safetensors    optimizer state by weight and key, full tensors (see `sharding`)
#     scheduler.pt             position in the learning-rate schedule
#     scaler.pt                loss scale, with --fp16 only
#     rng_state*.pth           random states of each process (Python, NumPy, torch), for dropout
#     trainer_state.json       step and epoch, log history, best metric, patience of early stopping
#
# The position in the data is not stored, because it follows from the step: the order of the samples
# depends only on the records, the seed and the epoch. The resumed run draws the same order, and skips
# the batches that were trained.
#
# All of this requires the same values of all options that affect the weights, the samples or their
# order. `check_same_run` compares them with those in `llava.json` of the checkpoint.

# These options must not change: the weights or samples would differ, or samples would be repeated or
# skipped. The contents of the training records and the records of a step must not change either; they are
# checked separately (`_check_same_records`, `_check_same_steps`).
_MUST_NOT_CHANGE = (
    "share_prefix",
    "packing",
    "pack_length",
    "model_max_length",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "accelerator_config",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
    "optim",
    "lora_enable",
    "lora_r",
    "lora_alpha",
    "lora_bias",
    "lora_options",
    "tune_mm_mlp_adapter",
    "freeze_backbone",
    "tune_vision_tower",
    "objective",
    "reward",
    "reward_clip",
    "reward_endpoint_model",
    "reward_tries",
    "num_samples",
    "sample_temperature",
    "sample_max_tokens",
    "kl_coef",
    "dpo_beta",
    "dpo_label_smoothing",
    "sft_weight",
)
# The comparison of options skips these. Some do not affect the result, "steps" and "epochs" are progress and not
# options, and the training data and the number of processes are compared separately.
_NOT_COMPARED = {
    "resume_from_checkpoint",
    "output_dir",
    "config",
    "steps",
    "epochs",
    "disable_tqdm",
    "preflight",
    "train_data_path",
    "train_data_sha256",
    "processes",
}
# The base models may have moved, so do not compare their paths. Compare the digests of their weights instead.
_LOCATIONS = ("language_model", "vision_tower")


# Resuming requires this file of `trainer_state/`; see above.
OPTIMIZER_FILE = "optimizer.safetensors"

_BATCH_OPTIONS = ("per_device_train_batch_size", "gradient_accumulation_steps")
_BLOCK_BYTES = 1 << 22


def run_settings(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments
) -> dict[str, Any]:
    """Return what identifies a run: every checkpoint contains it, and `check_same_run` compares it.

    Returns:
        The options that differ from their defaults, the number of processes, and a digest of the
        training records.
    """
    settings = non_default_options(model_args, data_args, args)
    # Some options of Transformers are enums. Store and compare their values, as they are on the command line.
    settings = {name: getattr(value, "value", value) for name, value in settings.items()}
    # Transformers replaces this option with an object. Store only its fields that affect the order of the samples.
    accelerator_config = args.accelerator_config
    settings["accelerator_config"] = {
        name: getattr(accelerator_config, name)
        for name in ("split_batches", "even_batches", "use_seedable_sampler")
    }
    settings["processes"] = args.world_size
    settings["train_data_sha256"] = _file_digest(find_records(Path(str(data_args.train_data_path))))
    return settings


def _file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, which takes about a second for a gigabyte.

    Comparing the size and the modification time would be cheaper. But a copy of the file, on another
    machine or downloaded again, has another time, and an edit may keep the size.
    """
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def is_resuming(args: TrainingArguments) -> bool:
    """Return True if `--resume_from_checkpoint` is a checkpoint folder or "true"."""
    return args.resume_from_checkpoint not in (None, "", "False", "false", False)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the folders `checkpoint-N` of an output folder, sorted by N."""
    steps: dict[Path, int] = {}
    for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        # A folder that the user has renamed, such as checkpoint-500-good, is no checkpoint of a run anymore.
        if step.isdecimal() and folder.is_dir():
            steps[folder] = int(step)
    return sorted(steps, key=lambda folder: steps[folder])


def has_trainer_state(checkpoint: Path) -> bool:
    """Return whether a run can be resumed from a checkpoint. With `--save_only_model True`, it cannot."""
    return (checkpoint / "trainer_state" / OPTIMIZER_FILE).is_file()


def find_last_checkpoint(output_dir: Path) -> Path | None:
    """Return the checkpoint with the highest step in an output folder, or None."""
    checkpoints = list_checkpoints(output_dir)
    return checkpoints[-1] if checkpoints else None


def find_resume_folder(args: TrainingArguments) -> Path | None:
    """Return the checkpoint of `--resume_from_checkpoint`; "true" is the last complete one.

    Returns:
        The checkpoint folder, or None if the run is new.

    Raises:
        ValueError: The checkpoint does not exist, or has no trainer state; or the run is new, but its output folder
            contains checkpoints of another run.
    """
    output_dir = Path(str(args.output_dir))
    last = find_last_checkpoint(output_dir)
    if not is_resuming(args):
        # Checkpoints are told apart by their step only. `--resume_from_checkpoint true` would continue the other run
        # if that run was longer, and `--save_total_limit` would count its checkpoints.
        if last is not None:
            raise ValueError(
                f"--output_dir {output_dir}: it contains {last.name} of another run. Continue that run with "
                f"--resume_from_checkpoint true, delete its {PREFIX_CHECKPOINT_DIR}-N folders, or pass another "
                "--output_dir."
            )
        return None
    requested = str(args.resume_from_checkpoint)
    if requested.lower() == "true":
        if last is None:
            raise ValueError(
                f"--resume_from_checkpoint true: no checkpoint in {output_dir}. Name a checkpoint folder, or start "
                "a new run with --resume_from_checkpoint false."
            )
        folder = last
    else:
        folder = Path(requested)
    if not has_trainer_state(folder):
        missing = "there is no folder trainer_state/ in it"
        if (folder / "trainer_state").is_dir():
            missing = "it was saved with --save_only_model True, without the state of the optimizer"
        raise ValueError(
            f"--resume_from_checkpoint {folder}: {missing}, so the run cannot be resumed from it. Pass an existing checkpoint-N "
            "folder, or start a new run from a saved model with --init_from."
        )
    _warn_of_later_checkpoints(folder, last)
    return folder


def _warn_of_later_checkpoints(folder: Path, last: Path | None) -> None:
    """Log a warning if a run is resumed from `folder`, which is not the `last` checkpoint of its output folder."""
    if last is None or folder.parent.resolve() != last.parent.resolve() or folder.name == last.name:
        return
    logger.warning(
        "resuming %s: %s has later checkpoints, up to %s. Until this run has passed that step, "
        "--resume_from_checkpoint true would choose one of them. Delete them, or pass another --output_dir.",
        folder,
        last.parent,
        last.name,
    )


def check_same_run(folder: Path, config: LlavaConfig, settings: Mapping[str, Any]) -> list[str]:
    """Compare this run with the run that wrote a checkpoint.

    Args:
        folder: The checkpoint.
        config: The model of this run.
        settings: The `run_settings` of this run.

    Returns:
        One line for each difference that is allowed.

    Raises:
        ValueError: An option that must not change, or the model, differs.
    """
    checkpoint = read_checkpoint_config(folder)
    _check_same_model(folder, config, checkpoint["architecture"])

    before, now = dict(checkpoint["training"]), dict(settings)
    if not isinstance(before.get("accelerator_config"), dict):
        # Version 0.1.0 did not store these values. Assume that they are the same.
        before["accelerator_config"] = now["accelerator_config"]
    _check_same_records(folder, before, now)
    _check_same_steps(folder, before, now)
    differences = []
    # `before` and `now` contain only options that differ from their defaults.
    for name in sorted({*before, *now} - _NOT_COMPARED):
        if before.get(name) == now.get(name):
            continue
        if name == "optim" and _optimizer_name(before) == _optimizer_name(now):
            continue
        old_value, new_value = before.get(name, "default"), now.get(name, "default")
        if name in _MUST_NOT_CHANGE:
            raise ValueError(
                f"--{name}: {folder} was trained with {old_value}, but this run has {new_value}. This option cannot "
                "change when a run is resumed. Pass the value of the checkpoint, or start a new run with "
                f"--init_from {folder}."
            )
        differences.append(f"--{name} was {old_value}, is {new_value}")
    if before.get("processes") != now.get("processes"):
        differences.append(
            f"the number of processes was {before.get('processes')}, is {now.get('processes')}"
        )
    return differences


def _optimizer_name(settings: Mapping[str, Any]) -> str:
    """Return the name of a run's optimizer, without the variants that have the same state."""
    name = str(settings.get("optim", "adamw_torch"))
    return name.removesuffix("_fused").removeprefix("paged_")


def _check_same_records(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError unless the checkpoint was trained on the same records. Their file may have moved."""
    path, old_path = now.get("train_data_path"), before.get("train_data_path")
    digest = before.get("train_data_sha256")
    if digest is None:  # version 0.1.0 stored only the path
        is_same = path == old_path
    else:
        is_same = digest == now["train_data_sha256"]
    if not is_same:
        raise ValueError(
            f"--train_data_path {path}: {folder} was trained on other records, which were in {old_path}. A run can only be "
            "resumed with the same records in the same order; otherwise, some would be repeated or skipped. Restore the "
            f"old file, or start a new run from the trained weights with --init_from {folder}."
        )


def _check_same_steps(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError if a step would contain other records than in the run of the checkpoint.

    A resumed run skips the batches of the earlier steps. With another number of records per step, these
    batches would contain other records than those that were trained on.
    """
    if now.get("ignore_data_skip"):
        raise ValueError(
            f"--ignore_data_skip True: the records that {folder} has trained on in this epoch would be repeated. Pass "
            f"--ignore_data_skip False, or start a new run from the trained weights with --init_from {folder}."
        )
    old, new = _StepSize.of(before), _StepSize.of(now)
    # `group_by_length` sorts records within groups of one batch of all processes. The size of these groups
    # must not change either. So, in addition to the number of records per step, compare the number of
    # accumulation steps.
    is_same = old.records == new.records
    requirement = "that give the same number of records in each step"
    if now.get("train_sampling_strategy") == "group_by_length":
        is_same = is_same and old.accumulation == new.accumulation
        requirement = "that give the same number of accumulation steps and the same number of records in each step"
    if not is_same:
        raise ValueError(
            f"--per_device_train_batch_size, --gradient_accumulation_steps: {folder} was trained with {old} in each "
            f"step, but this run has {new}. Records of this epoch would be repeated or skipped. Pass values "
            f"{requirement}, or start a new run from the trained weights with --init_from {folder}."
        )


class _StepSize(NamedTuple):
    """The number of records in an optimizer step, as a product of three numbers."""

    per_device: int
    accumulation: int
    processes: int

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> _StepSize:
        """Return the batch size, accumulation and number of processes of a run."""
        # Options that do not differ from their defaults are not stored.
        per_device, accumulation = (
            int(settings.get(name, INHERITED[name].default)) for name in _BATCH_OPTIONS
        )
        # With `split_batches`, the processes share a batch of the given size.
        is_split = settings["accelerator_config"]["split_batches"]
        processes = 1 if is_split else int(settings.get("processes", 1))
        return cls(per_device, accumulation, processes)

    @property
    def records(self) -> int:
        """Number of records in an optimizer step."""
        return self.per_device * self.accumulation * self.processes

    def __str__(self) -> str:
        return (
            f"{self.per_device} x {self.accumulation} x {self.processes} records (batch size x accumulation x "
            "processes)"
        )


def _check_same_model(folder: Path, config: LlavaConfig, stored: Mapping[str, Any]) -> None:
    """Raise ValueError if the model of this run differs from that of the checkpoint."""
    # Settings that an older version did not store have their default values.
    before = asdict(LlavaConfig.from_dict(stored))
    for name, value in asdict(config).items():
        if name not in _LOCATIONS and value != before[name]:
            raise ValueError(
                f"{folder}: the model of the checkpoint has {name} {before[name]}, but the model of this run has {name} {value}. "
                "Pass the same base models, records and model options as for the checkpoint, or start a new run in another "
                "--output_dir."
            )

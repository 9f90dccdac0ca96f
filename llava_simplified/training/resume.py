"""Going on with a run that ended early: which checkpoint, and is it really the same run?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from llava_simplified.arguments import TrainingArguments
from llava_simplified.model.config import LlavaConfig, read_checkpoint_config

# Changed, these would make one run out of two: other weights, other samples, or samples that come twice or never.
_FIXED = (
    *("train_data_path", "share_prefix", "packing", "pack_length", "model_max_length"),
    *("train_sampling_strategy", "seed", "data_seed", "bf16", "fp16"),
    *("lora_enable", "lora_r", "lora_alpha", "lora_bias", "tune_mm_mlp_adapter", "freeze_backbone"),
    "tune_vision_tower",
)
_FREE = {
    *(
        "resume_from_checkpoint",
        "output_dir",
        "accelerator_config",
        "config",
        "steps",
        "epochs",
        "disable_tqdm",
    ),
    "preflight",
}


def resume_folder(args: TrainingArguments) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means (true: the last whole one), or None.

    Raises:
        ValueError: there is none, or it holds no trainer state.
    """
    wanted: Any = args.resume_from_checkpoint
    if wanted in (None, "", "False", "false"):
        return None
    if wanted in ("True", "true"):
        folder = str(args.output_dir)
        wanted = get_last_checkpoint(folder) if Path(folder).is_dir() else None
        if wanted is None:
            raise ValueError(f"--resume_from_checkpoint true: no checkpoint in {args.output_dir}")
    if not (Path(wanted) / "trainer_state").is_dir():
        raise ValueError(
            f"--resume_from_checkpoint {wanted}: no trainer_state/ in it; it can't be resumed"
        )
    return Path(wanted)


def check_same_run(
    folder: Path, architecture: LlavaConfig, settings: Mapping[str, Any]
) -> list[str]:
    """What differs between the run that wrote the checkpoint in `folder` and this one, a line each.

    Raises:
        ValueError: with that difference it would be another run; its trained weights can still start a new one.
    """
    manifest = read_checkpoint_config(folder)
    before, now = manifest["training"], dict(settings)
    changed = [
        (name, before.get(name, "default"), now.get(name, "default"))
        for name in sorted({*before, *now} - _FREE)
        if before.get(name) != now.get(name)
    ]
    parts, stored = asdict(architecture), manifest["architecture"]
    for (
        name,
        value,
    ) in parts.items():  # a model that moved is the same model: its weights' fingerprints tell
        value = list(value) if isinstance(value, tuple) else value
        if name not in ("language_model", "vision_tower") and value != stored.get(name):
            raise ValueError(
                f"{folder}: {name} was {stored.get(name)}, is {value}: that is another model"
            )
    for name, was, value in changed:
        if name in _FIXED:
            raise ValueError(
                f"{folder}: --{name} was {was}, is {value}: not the same run. Give it as it was, or start a new run from "
                "the trained weights with --init_from"
            )
    notes = [f"--{name} was {was}, is {value}" for name, was, value in changed]
    if before.get("processes") != now.get("processes"):
        notes.append(
            "another number of processes: with another total batch, samples come twice or never this epoch"
        )
    return notes

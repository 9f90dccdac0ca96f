"""Merge the adapters of a checkpoint into its weights."""

from __future__ import annotations

from pathlib import Path

from llava_simplified.model.checkpoint import save_checkpoint
from llava_simplified.model.config import LlavaConfig, read_checkpoint_config, resolve_path
from llava_simplified.model.llava import Llava


def merge_checkpoint(
    checkpoint: str | Path,
    output: Path,
    *,
    model_base: str | None = None,
    vision_tower: str | None = None,
) -> None:
    """Write a checkpoint of the same model without adapters.

    Where the checkpoint has `adapter/` and `vision_adapter/`, the new one has `language_model/` and
    `vision_tower/`. A quantised language model is dequantised before: the adapter was trained on these
    values.

    Args:
        checkpoint: Folder written by `llava train`.
        output: Folder to create.
        model_base: Language model, if it was moved since the training.
        vision_tower: Vision tower, if it was moved since the training.

    Raises:
        ValueError: The checkpoint has no adapter.
        FileExistsError: `output` exists already.
    """
    checkpoint_config = read_checkpoint_config(checkpoint)
    trained = checkpoint_config["trained"]
    trained_tower = checkpoint_config.get("trained_tower", "off")
    if trained != "adapter" and trained_tower != "lora":
        raise ValueError(f"{checkpoint} has no adapter to merge.")
    if output.exists():
        raise FileExistsError(f"--output: {output} exists already; choose another folder")
    model = Llava.from_pretrained(
        checkpoint, device="cpu", merge=True, model_base=model_base, vision_tower=vision_tower
    )
    # `save_checkpoint` writes what has `requires_grad`: the merged parts, completely.
    model.language_model.requires_grad_(trained != "projector")
    model.vision_tower.requires_grad_(trained_tower != "off")
    settings = dict(checkpoint_config["architecture"])
    settings["language_model"] = resolve_path(model_base or settings["language_model"])
    settings["vision_tower"] = resolve_path(vision_tower or settings["vision_tower"])
    if trained != "projector":
        settings["bits"] = 16
    save_checkpoint(model, output, LlavaConfig(**settings), checkpoint_config["training"])

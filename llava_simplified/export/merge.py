"""Merge the adapters of a checkpoint into its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llava_simplified.model.config import (
    LlavaConfig,
    TrainedParts,
    read_checkpoint_config,
    resolve_path,
)


def merge(
    checkpoint: str | Path,
    output: Path,
    model_base: str | None = None,
    vision_tower: str | None = None,
) -> None:
    """Write a checkpoint of the same model without adapters: `language_model/`, `vision_tower/` in their place.

    Raises:
        ValueError: there is no adapter, or the folder exists.
    """
    from llava_simplified.model.checkpoint import save_checkpoint
    from llava_simplified.model.llava import Llava

    manifest = read_checkpoint_config(checkpoint)
    trained = TrainedParts.from_stored(manifest)
    if trained.language_model != "adapter" and trained.vision_tower != "lora":
        raise ValueError(f"{checkpoint}: has no adapter to merge")
    if output.exists():
        raise ValueError(f"{output} exists: choose another --output")
    where = {"model_base": model_base, "vision_tower": vision_tower}
    model = Llava.from_pretrained(checkpoint, device="cpu", merge=True, **where)
    config = LlavaConfig.from_dict(manifest["architecture"])
    config = replace(
        config,
        language_model=resolve_path(model_base or config.language_model),
        vision_tower=resolve_path(vision_tower or config.vision_tower),
        bits=config.bits if trained.language_model == "none" else 16,
    )
    # Merged weights are stored as if they had been trained themselves.
    merged = TrainedParts(
        language_model="none" if trained.language_model == "none" else "full",
        vision_tower="none" if trained.vision_tower == "none" else "full",
    )
    save_checkpoint(model, output, config, merged, manifest["training"])

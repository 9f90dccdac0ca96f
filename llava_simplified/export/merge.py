"""Merge the adapters of a checkpoint into its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llava_simplified.model.checkpoint import save_checkpoint
from llava_simplified.model.config import (
    LlavaConfig,
    TrainedParts,
    read_checkpoint_config,
    resolve_path,
)
from llava_simplified.model.llava import Llava


def merge_checkpoint(
    checkpoint: str | Path,
    output: Path,
    *,
    model_base: str | None = None,
    vision_tower: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write a checkpoint of the same model without adapters.

    The folders `adapter/` and `vision_adapter/` are replaced by `language_model/` and `vision_tower/`. A
    quantized language model is dequantized first: the adapter was trained with these values, not with the
    original ones.

    Args:
        checkpoint: Folder written by `llava train`.
        output: Folder to create.
        model_base: Path of the base language model, if it has moved since training.
        vision_tower: Path of the vision tower, if it has moved since training.
        trust_remote_code: Run the Python code that the language model or its tokenizer comes with.

    Raises:
        ValueError: The checkpoint has no adapter.
        FileExistsError: `output` exists already.
    """
    checkpoint_config = read_checkpoint_config(checkpoint)
    trained = TrainedParts.from_stored(checkpoint_config)
    if trained.language_model != "adapter" and trained.vision_tower != "lora":
        raise ValueError(f"{checkpoint} has no adapter to merge. Use the checkpoint as it is.")
    if output.exists():
        raise FileExistsError(f"--output: {output} exists already; choose another folder")
    # Use the CPU, since the merged model is only written and never run.
    model = Llava.from_pretrained(
        checkpoint,
        device="cpu",
        dtype="stored",
        merge=True,
        model_base=model_base,
        vision_tower=vision_tower,
        trust_remote_code=trust_remote_code,
    )
    config = LlavaConfig.from_dict(checkpoint_config["architecture"])
    # Store the current paths of the parts that were not trained.
    config = replace(
        config,
        language_model=resolve_path(model_base or config.language_model),
        vision_tower=resolve_path(vision_tower or config.vision_tower),
        bits=config.bits if trained.language_model == "none" else 16,
    )
    # Declare merged parts as trained in full, so that their weights are stored.
    merged = TrainedParts(
        language_model="none" if trained.language_model == "none" else "full",
        vision_tower="none" if trained.vision_tower == "none" else "full",
    )
    save_checkpoint(model, output, config, merged, checkpoint_config["training"])

"""Merge the adapters of a checkpoint into its weights."""

from __future__ import annotations

from pathlib import Path

from llava_simplified.model.config import read_checkpoint_config


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
    from llava_simplified.model.config import LlavaConfig, resolve_path
    from llava_simplified.model.llava import Llava

    manifest = read_checkpoint_config(checkpoint)
    text, tower = manifest["trained"], manifest.get("trained_tower", "off")
    if text != "adapter" and tower != "lora":
        raise ValueError(f"{checkpoint}: has no adapter to merge")
    if output.exists():
        raise ValueError(f"{output} exists: choose another --output")
    where = {"model_base": model_base, "vision_tower": vision_tower}
    model = Llava.from_pretrained(checkpoint, device="cpu", merge=True, **where)
    # trained whole, as far as saving goes
    model.language_model.requires_grad_(text != "projector")
    model.vision_tower.requires_grad_(tower != "off")
    parts = dict(manifest["architecture"])
    for name, moved in (("language_model", model_base), ("vision_tower", vision_tower)):
        parts[name] = resolve_path(moved or parts[name])
    if text != "projector":
        parts["bits"] = 16
    save_checkpoint(model, output, LlavaConfig(**parts), manifest["training"])

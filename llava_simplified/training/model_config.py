"""Derive the model config and the trained parts from the training options."""

from __future__ import annotations

from typing import Literal

from llava_simplified.arguments import ModelArguments
from llava_simplified.model.config import LlavaConfig, TrainedParts, resolve_path


def model_config(args: ModelArguments, dtype: str) -> LlavaConfig:
    """Return the config that the options describe, without weight digests.

    Args:
        args: The options of the model.
        dtype: Data type of the frozen weights, as torch names it.
    """
    # The option is a list; a single layer is stored as a number.
    layers = tuple(args.mm_vision_select_layer)
    return LlavaConfig(
        language_model=resolve_path(args.model_name_or_path),
        vision_tower=resolve_path(args.vision_tower),
        mm_projector_type=args.mm_projector_type,
        mm_vision_select_layer=layers[0] if len(layers) == 1 else layers,
        mm_vision_select_feature=args.mm_vision_select_feature,
        mm_token_pool=args.mm_token_pool,
        image_aspect_ratio=args.image_aspect_ratio,
        template=args.template,
        dtype=dtype,
        bits=args.bits,
    )


def trained_parts(args: ModelArguments) -> TrainedParts:
    """Return which parts of the language model and the vision tower are trained with these options.

    Raises:
        ValueError: `--tune_vision_tower` has an unknown value.
    """
    vision_towers: dict[str, Literal["none", "lora", "full"]] = {
        "off": "none",
        "lora": "lora",
        "full": "full",
    }
    if args.tune_vision_tower not in vision_towers:
        raise ValueError(
            f"--tune_vision_tower must be off, full or lora, not {args.tune_vision_tower!r}"
        )
    # With `--tune_mm_mlp_adapter`, the language model stays frozen, and its other options have no effect.
    language_model: Literal["none", "adapter", "full"] = "none"
    if args.lora_enable and not args.tune_mm_mlp_adapter:
        language_model = "adapter"
    elif not (args.freeze_backbone or args.tune_mm_mlp_adapter):
        language_model = "full"
    return TrainedParts(language_model, vision_towers[args.tune_vision_tower])

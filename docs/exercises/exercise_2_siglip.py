"""Exercise 2: swap CLIP for SigLIP.

Task: predict, before you run anything: with SigLIP base (224 pixels, patches of 16), how many tokens does an image
have, and how many channels? SigLIP has no CLS token: which line of `encode_images` would drop a patch in its place,
and does it? What does `load_image` do differently?

The towers here have the shape of the real ones, but two layers and random weights: only shapes matter.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import transformers
from common import llava, new_model, parse, read_records
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

# ---- solution ----

SHAPE = {
    "hidden_size": 768,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}


def save_towers(folder: Path) -> dict[str, Path]:
    """Write a CLIP and a SigLIP tower with random weights, and return their folders by name."""
    torch.manual_seed(0)
    clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SHAPE))
    siglip = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SHAPE))
    for name, model, processor in (
        ("clip", clip, CLIPImageProcessorPil()),
        ("siglip", siglip, SiglipImageProcessorPil()),
    ):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return {"clip": folder / "clip", "siglip": folder / "siglip"}


def main(argv: list[str] | None = None) -> None:
    """Compare what the file computes with both towers."""
    args = parse(argv, __doc__)
    record = read_records(args)[0]
    lengths = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, tower in save_towers(Path(folder)).items():
            args.vision_tower = tower
            model = new_model(args)
            pixels = llava.load_image(Path(args.images) / record["image"], model.processor)[None]
            states = model.vision_tower(
                pixels.to(model.vision_tower.dtype), output_hidden_states=True
            ).hidden_states
            features = model.encode_images(pixels)
            ids, _ = llava.make_sequence(model.tokenizer, record, features.shape[1])
            lengths[name] = (states[-2].shape[1], features.shape[1], len(ids))
            print(f"{name}: hidden state {tuple(states[-2].shape)}, image tokens {features.shape}")
            print(
                f"    normalized with mean {model.processor.image_mean}, resized to {model.processor.size}"
            )

    # Both have (224 / 16) ** 2 = 196 patches. CLIP has a CLS token before them, SigLIP has none:
    # `features[:, -side * side :]` keeps the last 196 in both cases, since isqrt(197) is 14 too.
    assert lengths["clip"][0] == 197
    assert lengths["siglip"][0] == 196
    assert lengths["clip"][1:] == lengths["siglip"][1:]
    # `load_image` crops the center for CLIP and stretches the image for SigLIP, whose pixels are normalized to
    # -1 ... 1. No line of the file changes: both are in `preprocessor_config.json`.


if __name__ == "__main__":
    main()

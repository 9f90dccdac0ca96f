"""The names of the tested language models, images and batches, which the tests of this folder share."""

from __future__ import annotations

from typing import Any

import torch

from llava_simplified.data.collate import Collator, Example
from llava_simplified.model.llava import Llava

LANGUAGE_MODELS = ["mistral", "llama", "qwen2", "gemma2", "phi"]


def make_images(model: Llava, count: int) -> torch.Tensor:
    """Return random images, uint8 (count, 3, height, width), the same at every call."""
    generator = torch.Generator().manual_seed(3)
    shape = (count, 3, *model.vision_tower.transform.crop)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def collate(model: Llava, rows: list[Example] | list[Example | list[Example]]) -> dict[str, Any]:
    """Return a batch as `Llava.forward` accepts it."""
    batch = Collator(model.vision_tower.num_tokens, 1)(rows)
    batch.pop("metadata")
    return batch

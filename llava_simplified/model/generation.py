"""Prompts and pictures -> captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llava_simplified.data.batching import expand_images, pad

if TYPE_CHECKING:
    from llava_simplified.model.llava import Llava


@dataclass(frozen=True)
class GenerationOptions:
    """How to decode.

    Attributes:
        max_new_tokens: the longest caption, in tokens.
        temperature: 0 is greedy; higher is more varied.
        top_p: sample from the most likely tokens that together have this probability.
        num_beams: over 1: beam search.
        num_return_sequences: captions per picture.
        seed: of the sampling.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1
    num_return_sequences: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.num_beams < 1 or self.max_new_tokens < 1:
            raise ValueError(
                "temperature >= 0, 0 < top_p <= 1, num_beams >= 1 and max_new_tokens >= 1 are needed"
            )
        if self.num_return_sequences > max(self.num_beams, 1) and self.temperature == 0:
            raise ValueError("several different captions of a picture need temperature > 0, or as many beams")

    def to_transformers(self) -> dict[str, Any]:
        """The arguments of `PreTrainedModel.generate`."""
        sampling = (
            {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0} if self.temperature else {}
        )
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.temperature > 0,
            "num_beams": self.num_beams,
            "num_return_sequences": self.num_return_sequences,
            **sampling,
        }


@torch.inference_mode()
def generate(
    model: Llava,
    prompts: Sequence[Sequence[int]],
    pixel_values: torch.Tensor | None,
    options: GenerationOptions,
) -> list[list[str]]:
    """Continue each prompt.

    Args:
        prompts: token ids from `Prompt.render(turns, None)`, one IMAGE_INDEX per image.
        pixel_values: uint8 (images, 3, height, width), all prompts' images in order.

    Returns:
        For each prompt, `num_return_sequences` texts, without special tokens and outer white space.
    """
    was_training = model.training
    model.eval()
    try:
        if options.seed is not None:
            torch.manual_seed(options.seed)
        features = None if pixel_values is None else model.vision_tower(pixel_values.to(model.device))
        rows = [expand_images(prompt, model.vision_tower.num_tokens) for prompt in prompts]
        # padded left, so that every row's next token is the last column's
        input_ids = pad(rows, model.prompt.end_id, side="left").to(model.device)
        attention_mask = pad([np.ones(len(row)) for row in rows], 0, side="left").to(model.device)
        text_model: Any = model.language_model
        ids = text_model.generate(
            inputs_embeds=model.splice(input_ids, features),
            attention_mask=attention_mask,
            eos_token_id=model.prompt.stop_ids,
            pad_token_id=model.prompt.end_id,
            **options.to_transformers(),
        )
    finally:
        model.train(was_training)
    texts = [text.strip() for text in model.tokenizer.batch_decode(ids, skip_special_tokens=True)]
    count = options.num_return_sequences
    return [texts[i : i + count] for i in range(0, len(texts), count)]

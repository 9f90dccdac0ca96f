"""Where in its pictures a model looked for each word that it said."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from llava_simplified.data.collate import expand_images
from llava_simplified.data.images import ImageSource
from llava_simplified.model.generation import encode_images
from llava_simplified.model.language_model import cache_kwarg_name, lm_head_at_positions
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import IMAGE_INDEX, Message

# A word with the white space before it. Chinese and Japanese know no spaces: every sign is a word.
WORD = re.compile(r"\s*(?:[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+)")


@torch.inference_mode()
def attention_grids(
    model: Llava, prompt: Sequence[int], answer: Sequence[int], image_features: torch.Tensor
) -> torch.Tensor:
    """For each token of an answer the attention to the patches, while it was chosen: the mean over layers and heads.

    A token is chosen where the one before it is read: the rows are those of that place, as `generate` with
    `output_attentions` gives them. The prompt passes through the model's own attention kernel; only the answer's rows
    need the eager one, which alone tells its weights.

    Args:
        prompt: token ids from `Prompt.render(turns, None)`, one IMAGE_INDEX per image.
        answer: the ids that followed.
        image_features: (images, tokens, vision width) from the tower.

    Returns:
        float32 (answer, images, rows, columns)
    """
    ids = expand_images([*prompt, *answer[:-1]], model.vision_tower.num_tokens)
    embeds = model.splice(torch.from_numpy(ids)[None].to(model.device), image_features)
    start = embeds.shape[1] - len(answer)
    text_model: Any = model.language_model
    cache: Any = {cache_kwarg_name(text_model): DynamicCache(config=model.config)}
    kernel = model.config._attn_implementation
    with lm_head_at_positions(text_model, torch.tensor([0], device=model.device)):
        text_model(inputs_embeds=embeds[:, :start], use_cache=True, **cache)
        model.config._attn_implementation = "eager"
        try:
            outputs = text_model(
                inputs_embeds=embeds[:, start:], use_cache=True, output_attentions=True, **cache
            )
        finally:
            model.config._attn_implementation = kernel
    # a layer with a sliding window has forgotten what came first: its columns are the last ones
    layers = [layer[0].float().mean(0) for layer in outputs.attentions if layer is not None]
    rows = torch.stack([pad(layer, (len(ids) - layer.shape[-1], 0)) for layer in layers]).mean(0)
    patches = rows[:, torch.from_numpy(ids == IMAGE_INDEX).to(rows.device)].unflatten(
        1, (len(image_features), -1)
    )
    height, width = model.vision_tower.grid
    return patches[..., -height * width :].unflatten(
        2, (height, width)
    )  # CLS tokens stand in front of the patches


def look(
    model: Llava, turns: str | Sequence[Message], images: Sequence[ImageSource], answer: str
) -> torch.Tensor:
    """Where in the pictures each `WORD` of an answer came from: `attention_grids`, the mean over a word's tokens.

    Args:
        turns, images: as `Llava.stream` takes them; at least one picture.
        answer: what the model said to them.

    Returns:
        float32 (words, images, rows, columns)
    """
    prompt, pixels = model.prepare_inputs(turns, images)
    if pixels is None:
        raise ValueError("there is no picture to look at")
    _, ([*ids, _end],) = model.prompt.render_branches([Message("user", "")], [answer])
    grids = attention_grids(model, prompt, ids, encode_images(model, pixels))
    said = [model.prompt.decode(ids[: count + 1]).rstrip("\ufffd") for count in range(len(ids))]
    ends = np.array([len(text) for text in said])
    starts = np.concatenate([[0], ends[:-1]])
    ends = np.maximum(ends, starts + 1)  # half a letter belongs to the whole that is coming
    words = [match.span() for match in WORD.finditer(said[-1])]
    return torch.stack([grids[(starts < end) & (ends > start)].mean(0) for start, end in words])

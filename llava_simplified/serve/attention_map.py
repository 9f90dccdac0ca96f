"""Attention maps: which image patches each generated word attended to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from llava_simplified.data.collate import expand_image_placeholders
from llava_simplified.data.images import ImageSource
from llava_simplified.model.generation import encode_images
from llava_simplified.model.language_model import cache_kwarg_name, lm_head_at_positions
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import IMAGE_INDEX, Message

# A word with the white space in front of it. Chinese and Japanese are written without spaces: each character is a word.
# page.js splits answers by the same rule.
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
    ids = expand_image_placeholders([*prompt, *answer[:-1]], model.vision_tower.num_tokens)
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
    """Return the attention map of each `WORD` of an answer to a conversation.

    Args:
        model: The model that generated the answer.
        turns: A question or a conversation, as for `Llava.stream`.
        images: The images of the conversation, at least one.
        answer: The text that the model generated.

    Returns:
        float32 (words, images, rows, columns)

    Raises:
        ValueError: There is no image.
    """
    prompt, pixels = model.prepare_inputs(turns, images)
    if pixels is None:
        raise ValueError("the conversation has no image; attention maps need at least one")
    _, grids = word_attention(model, prompt, pixels, encode_answer(model, answer))
    return grids


def encode_answer(model: Llava, answer: str) -> list[int]:
    """Return the token ids of an answer, without the end token."""
    _, ([*ids, _end],) = model.prompt.render_branches([Message("user", "")], [answer])
    return ids


def word_attention(
    model: Llava, prompt: Sequence[int], pixels: torch.Tensor, answer_ids: Sequence[int]
) -> tuple[list[str], torch.Tensor]:
    """Return the words of an answer and, for each, the mean of `attention_grids` over its tokens.

    Args:
        model: The model that generated the answer.
        prompt: Token ids of the conversation, with one IMAGE_INDEX per image.
        pixels: uint8 (images, 3, height, width) from the vision tower's transform.
        answer_ids: Token ids of the answer, without the end token.

    Returns:
        The words, each with the white space in front of it, and float32 (words, images, rows, columns).

    Raises:
        ValueError: The answer contains no word.
    """
    grids = attention_grids(model, prompt, answer_ids, encode_images(model, pixels))
    # The text that the first N tokens decode to, for every N. A token belongs to each word that it lengthens.
    texts = [
        model.prompt.decode(answer_ids[: count + 1]).rstrip("\ufffd")
        for count in range(len(answer_ids))
    ]
    ends = np.array([len(text) for text in texts])
    starts = np.concatenate([[0], ends[:-1]])
    ends = np.maximum(
        ends, starts + 1
    )  # an incomplete character belongs to the one that the next token completes
    words: list[str] = []
    maps: list[torch.Tensor] = []
    for match in WORD.finditer(texts[-1]):
        start, end = match.span()
        words.append(match.group())
        maps.append(grids[(starts < end) & (ends > start)].mean(0))
    if not words:
        raise ValueError("the answer contains no word")
    return words, torch.stack(maps)

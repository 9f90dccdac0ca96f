"""Attention maps: which image patches each generated word attended to.

A token is predicted at the position before it: the last prompt token predicts the first answer token. The
attention weights of an answer token are therefore those of the position that predicted it:

    keys:      [ prompt and image patches        | answer          ]
    query "ASSISTANT:"  . . # # # # . . .                              -> predicts "a"
    query "a"           . . # # # # . . .          .                   -> predicts "cat"
    query "cat"         . . # # # # . . .          .  .                -> predicts the end
                            ^^^^^^^ the columns that are returned

Only the eager attention kernel returns weights, and it needs memory for all queries x keys. Therefore the
prompt is processed with the model's own kernel and a KV cache, and only the answer with the eager kernel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

# A word with the whitespace before it. Each Chinese or Japanese character is a word, since these languages
# are written without spaces. page_attention.js splits answers by the same rule.
WORD = re.compile(r"\s*(?:[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+)")


@torch.inference_mode()
def token_attention(
    model: Llava, prompt: Sequence[int], answer_ids: Sequence[int], image_features: torch.Tensor
) -> torch.Tensor:
    """Return the attention to the image patches at the position that predicted each answer token.

    The weights are averaged over all attention layers and their heads. They equal those of Transformers'
    `generate(output_attentions=True)`.

    Args:
        model: The model that generated the answer.
        prompt: Token ids from `Prompt.render(messages, None)`, with one IMAGE_INDEX per image.
        answer_ids: Token ids of the answer.
        image_features: (images, tokens, vision hidden size) from the vision tower.

    Returns:
        float32 (answer tokens, images, rows, columns)
    """
    # Omit the last token of the answer: its position predicts the end token, which is not in `answer_ids`.
    ids = expand_image_placeholders([*prompt, *answer_ids[:-1]], model.vision_tower.num_tokens)
    embeds = model.splice(torch.from_numpy(ids)[None].to(model.device), image_features)
    length = embeds.shape[1]
    start = length - len(answer_ids)  # the position that predicts the first answer token

    language_model: Any = model.language_model
    cache: Any = {cache_kwarg_name(language_model): DynamicCache(config=model.config)}
    # No logits are needed, so restrict the lm_head to one position, the minimum.
    with lm_head_at_positions(language_model, torch.tensor([0], device=model.device)):
        language_model(inputs_embeds=embeds[:, :start], use_cache=True, **cache)
        with _eager_attention(model.config):
            outputs = language_model(
                inputs_embeds=embeds[:, start:], use_cache=True, output_attentions=True, **cache
            )

    layers: list[torch.Tensor] = []
    for weights in outputs.attentions:
        if weights is None:  # a layer without attention, such as a convolution
            continue
        mean = weights[0].float().mean(0)  # (heads, queries, keys) -> (queries, keys)
        # A sliding-window layer keeps only the last keys. Pad the left side, so that all layers have `length` keys.
        layers.append(pad(mean, (length - mean.shape[-1], 0)))
    attention = torch.stack(layers).mean(0)

    is_image = torch.from_numpy(ids == IMAGE_INDEX).to(attention.device)
    patches = attention[:, is_image].unflatten(1, (len(image_features), -1))
    height, width = model.vision_tower.grid
    # Some towers have CLS tokens before the patches. Remove them.
    return patches[..., -height * width :].unflatten(2, (height, width))


@contextmanager
def _eager_attention(config: Any) -> Iterator[None]:
    """Use the eager attention kernel, the only one that returns attention weights."""
    implementation = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = implementation


def attention_map(
    model: Llava, messages: str | Sequence[Message], images: Sequence[ImageSource], answer: str
) -> torch.Tensor:
    """Return the attention map of each `WORD` of an answer to a conversation.

    Args:
        model: The model that generated the answer.
        messages: A question or a conversation, as for `Llava.stream`.
        images: The images of the conversation, at least one.
        answer: The generated text.

    Returns:
        float32 (words, images, rows, columns)

    Raises:
        ValueError: The conversation has no image, or the answer contains no words.
    """
    prompt, pixel_values = model.prepare_inputs(messages, images)
    if pixel_values is None:
        raise ValueError("the conversation has no image; attention maps require at least one")
    _, maps = word_attention(model, prompt, pixel_values, encode_answer(model, answer))
    return maps


def encode_answer(model: Llava, answer: str) -> list[int]:
    """Return the token ids of an answer, without the end token.

    Raises:
        ValueError: The answer contains no words.
    """
    if not answer.strip():
        raise ValueError("the answer contains no words")
    _, (answer_ids,) = model.prompt.render_branches([Message("user", "")], [answer])
    return answer_ids[:-1]


def word_attention(
    model: Llava, prompt: Sequence[int], pixel_values: torch.Tensor, answer_ids: Sequence[int]
) -> tuple[list[str], torch.Tensor]:
    """Return the words of an answer and, for each, the mean of `token_attention` over its tokens.

    Args:
        model: The model that generated the answer.
        prompt: Token ids of the conversation, with one IMAGE_INDEX per image.
        pixel_values: uint8 (images, 3, height, width) from the vision tower's transform.
        answer_ids: Token ids of the answer, without the end token.

    Returns:
        The words, each with the whitespace before it, and float32 (words, images, rows, columns).

    Raises:
        ValueError: The answer contains no words.
    """
    grids = token_attention(model, prompt, answer_ids, encode_images(model, pixel_values))
    text, starts, ends = _token_spans(model, answer_ids)
    words: list[str] = []
    maps: list[torch.Tensor] = []
    for match in WORD.finditer(text):
        start, end = match.span()
        overlaps = (starts < end) & (ends > start)
        words.append(match.group())
        maps.append(grids[overlaps].mean(0))
    if not words:
        raise ValueError("the answer contains no words")
    return words, torch.stack(maps)


def _token_spans(model: Llava, answer_ids: Sequence[int]) -> tuple[str, np.ndarray, np.ndarray]:
    """Return the text of an answer, and the span of each token in it.

    Each token is decoded together with all previous ones, because a single token may not be valid UTF-8.

    Returns:
        The text, and int (tokens,) starts and ends in characters. Spans are half-open and never empty: a
        token that does not complete a character is assigned to the character that a later one completes.
    """
    texts: list[str] = []
    for count in range(1, len(answer_ids) + 1):
        texts.append(model.prompt.decode(answer_ids[:count], finished=False))
    ends = np.array([len(text) for text in texts])
    starts = np.concatenate([[0], ends[:-1]])
    ends = np.maximum(ends, starts + 1)
    return texts[-1], starts, ends

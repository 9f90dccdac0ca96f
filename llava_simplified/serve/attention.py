"""Where in its pictures a model looked for each word that it said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from unicodedata import east_asian_width

import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from llava_simplified.data.batching import expand_images
from llava_simplified.data.images import ImageSource
from llava_simplified.model.generation import encode
from llava_simplified.model.language_model import head_at
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import IMAGE_INDEX, Message


class WordAttention(NamedTuple):
    """`text`: a word, with the space before it. `grids`: float32 (images, rows, columns), the share of its attention
    that went to each place of the pictures; what is missing to 1 went to text."""

    text: str
    grids: torch.Tensor


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
    cache: Any = DynamicCache(config=model.config)
    kernel = model.config._attn_implementation
    with head_at(text_model, torch.tensor([0], device=model.device)):
        text_model(inputs_embeds=embeds[:, :start], past_key_values=cache, use_cache=True)
        model.config._attn_implementation = "eager"
        try:
            outputs = text_model(
                inputs_embeds=embeds[:, start:], past_key_values=cache, use_cache=True, output_attentions=True
            )
        finally:
            model.config._attn_implementation = kernel
    # a layer with a sliding window has forgotten what came first: its columns are the last ones
    layers = [layer[0].float().mean(0) for layer in outputs.attentions if layer is not None]
    rows = torch.stack([pad(layer, (len(ids) - layer.shape[-1], 0)) for layer in layers]).mean(0)
    patches = rows[:, torch.from_numpy(ids == IMAGE_INDEX).to(rows.device)].unflatten(1, (len(image_features), -1))
    height, width = model.vision_tower.grid
    return patches[..., -height * width :].unflatten(2, (height, width))  # CLS tokens stand in front of the patches


def look(
    model: Llava, turns: str | Sequence[Message], images: Sequence[ImageSource], answer: str
) -> list[WordAttention]:
    """Where in the pictures each word of an answer came from: `attention_grids`, the mean over a word's tokens.

    Args:
        turns, images: as `Llava.stream` takes them; at least one picture.
        answer: what the model said to them. The texts of its words together are the answer.
    """
    prompt, pixels = model.ask(turns, images)
    if pixels is None:
        raise ValueError("there is no picture to look at")
    _, ([*ids, _end],) = model.prompt.render_branches([Message("user", "")], [answer])
    grids = attention_grids(model, prompt, ids, encode(model, pixels))
    words: list[tuple[str, list[int]]] = []
    said = ""
    for index in range(len(ids)):
        text = model.prompt.decode(ids[: index + 1])
        if index + 1 < len(ids):
            text = text.rstrip("\ufffd")  # the next token completes the letter
        piece, said = text[len(said) :], text
        # a word begins at a space; in writings without spaces, at every token
        begins = piece[:1].isspace() or east_asian_width(piece[:1] or "x") in "WF"
        if not words or (begins and words[-1][0].strip()):
            words.append(("", []))
        words[-1] = (words[-1][0] + piece, [*words[-1][1], index])
    return [WordAttention(text, grids[indices].mean(0)) for text, indices in words]

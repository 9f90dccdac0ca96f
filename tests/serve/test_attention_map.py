"""Attention maps equal the attentions that Transformers returns for the whole sequence at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import build_llava
from transformers import Lfm2Config, Lfm2ForCausalLM

from llava_simplified.data.collate import expand_image_placeholders
from llava_simplified.model.llava import Llava
from llava_simplified.model.lora import add_lora
from llava_simplified.prompt import IMAGE_INDEX, Message
from llava_simplified.serve.attention_map import WORD, attention_map, token_attention

ANSWER_IDS = [40, 7, 150, 31, 260, 99]
QUESTION = "Compare <image> with <image>"


def prepare_question(model: Llava, question: str) -> tuple[list[int], torch.Tensor]:
    """Return the prompt of a question, and random pixels for its images."""
    shape = (question.count("<image>"), 3, *model.vision_tower.transform.crop)
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return model.prompt.render([Message("user", question)], None).input_ids, pixels


def expected_attention(model: Llava, prompt: list[int], pixels: torch.Tensor) -> np.ndarray:
    """Return (answer, images, tokens), computed by plain loops over the attentions of one forward pass."""
    language_model = model.language_model
    ids = expand_image_placeholders([*prompt, *ANSWER_IDS], model.vision_tower.num_tokens)
    language_model.config._attn_implementation = "eager"
    with torch.no_grad():
        embeds = model.splice(torch.tensor(ids)[None], model.vision_tower(pixels))
        outputs = language_model(inputs_embeds=embeds, output_attentions=True, use_cache=False)
    language_model.config._attn_implementation = "sdpa"

    # Each layer: (heads, queries, keys)
    layers = [weights[0].double().numpy() for weights in outputs.attentions if weights is not None]
    image_columns = [column for column, token in enumerate(ids) if token == IMAGE_INDEX]
    first_answer_position = len(ids) - len(ANSWER_IDS)
    expected = np.zeros((len(ANSWER_IDS), len(image_columns)))
    for token in range(len(ANSWER_IDS)):
        query = first_answer_position + token - 1
        for number, column in enumerate(image_columns):
            weights = [head[query, column] for layer in layers for head in layer]
            expected[token, number] = sum(weights) / len(weights)
    return expected.reshape(len(ANSWER_IDS), len(pixels), -1)


def check_token_attention(model: Llava) -> torch.Tensor:
    """Assert that `token_attention` equals `expected_attention`, and return what it has computed."""
    prompt, pixels = prepare_question(model, QUESTION)
    grids = token_attention(model, prompt, ANSWER_IDS, model.vision_tower(pixels))
    patches_per_image = grids[0, 0].numel()
    expected = expected_attention(model, prompt, pixels)[..., -patches_per_image:]
    np.testing.assert_allclose(grids.flatten(2).numpy(), expected, atol=1e-6)
    assert expected.max() > 1e-3
    assert np.ptp(expected, axis=0).max() > 1e-3, "the tokens must differ"
    return grids


@pytest.mark.parametrize("language_model", ["mistral", "llama", "qwen2", "gemma2", "phi"])
def test_token_attention_equals_one_eager_forward(models_folder: Path, language_model: str) -> None:
    model = build_llava(models_folder, language_model)
    grids = check_token_attention(model)
    assert grids.shape == (len(ANSWER_IDS), 2, 4, 4)
    assert model.config._attn_implementation == "sdpa", "the model's own kernel must be restored"
    if language_model == "mistral":
        # The window of 24 tokens is shorter than the prompt, so a part of the first image is outside.
        assert (grids[:, 0] == 0).any()


def test_token_attention_includes_adapter(models_folder: Path) -> None:
    model = build_llava(models_folder, "llama")
    before = check_token_attention(model)
    add_lora(model, 2, 4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    after = check_token_attention(model.eval())
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("vision_tower", "config", "grid"),
    [
        ("clip", {"mm_vision_select_feature": "cls_patch"}, (4, 4)),
        ("clip", {"mm_token_pool": 3}, (3, 3)),
        ("efficientnet", {"mm_vision_select_layer": -1}, (2, 2)),
        ("convnext", {"mm_vision_select_layer": -1, "mm_token_pool": 1}, (1, 1)),
    ],
)
def test_token_attention_has_grid_of_vision_tower(
    models_folder: Path, vision_tower: str, config: dict[str, Any], grid: tuple[int, int]
) -> None:
    model = build_llava(models_folder, "llama", vision_tower, **config)
    assert check_token_attention(model).shape[2:] == grid


def test_token_attention_ignores_layers_without_attention(models_folder: Path) -> None:
    model = build_llava(models_folder, "llama")
    config = Lfm2Config(
        vocab_size=len(model.tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv"],
    )
    torch.manual_seed(0)
    model.language_model = Lfm2ForCausalLM(config).eval()
    check_token_attention(model)


def test_attention_map_averages_tokens_of_each_word(models_folder: Path) -> None:
    model = build_llava(models_folder, "llama")
    prompt, pixels = prepare_question(model, "<image>\nWhat is this?")
    image = pixels[0].permute(1, 2, 0).numpy()
    answer = "a bedroom, with 日本 a café 🙂."
    assert WORD.findall(answer) == ["a", " bedroom,", " with", " 日", "本", " a", " café", " 🙂."]
    maps = attention_map(model, "What is this?", [image], answer)
    assert maps.shape == (8, 1, 4, 4)

    def count_tokens(text: str) -> int:
        _, (ids,) = model.prompt.render_branches([Message("user", "")], [text])
        return len(ids) - 1  # without the end token

    _, (answer_ids,) = model.prompt.render_branches([Message("user", "")], [answer])
    grids = token_attention(model, prompt, answer_ids[:-1], model.vision_tower(pixels))
    ends = [count_tokens(answer[:end]) for end in (1, 10, 15, 17, 18, 20, 25, 28)]
    assert ends[1] > 2, "the text must have a word of several tokens"
    assert ends[3] > ends[2] + 1, "the text must have a character of several tokens"
    for word_map, start, end in zip(maps, [0, *ends], ends):
        torch.testing.assert_close(word_map, grids[start:end].mean(0))


def test_attention_map_needs_image_and_word(models_folder: Path) -> None:
    model = build_llava(models_folder, "llama")
    image = np.zeros((20, 20, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="image"):
        attention_map(model, "What is this?", [], "a cat")
    with pytest.raises(ValueError, match="word"):
        attention_map(model, "What is this?", [image], "   ")

"""Where the model looked, against transformers' own attentions of the whole sequence in one eager forward."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Lfm2Config, Lfm2ForCausalLM

from llava_simplified.data.collate import expand_image_placeholders
from llava_simplified.model.build import build_model
from llava_simplified.model.config import LlavaConfig
from llava_simplified.model.llava import Llava
from llava_simplified.model.lora import add_lora
from llava_simplified.prompt import IMAGE_INDEX, Message
from llava_simplified.serve.attention_map import WORD, attention_grids, look

ANSWER = [40, 7, 150, 31, 260, 99]
TWO = "Compare <image> with <image>"


def build(folder: Path, text: str, tower: str = "clip", **choices) -> Llava:
    torch.manual_seed(2)
    model = build_model(LlavaConfig(str(folder / text), str(folder / tower), **choices))
    for parameter in model.projector.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


def ask(model: Llava, question: str) -> tuple[list[int], torch.Tensor]:
    shape = (question.count("<image>"), 3, *model.vision_tower.transform.crop)
    pixels = torch.randint(
        0, 256, shape, generator=torch.Generator().manual_seed(3), dtype=torch.uint8
    )
    return model.prompt.render([Message("user", question)], None).input_ids, pixels


def whole(model: Llava, prompt: list[int], pixels: torch.Tensor) -> np.ndarray:
    """(answer, images, tokens) by a plain loop over the attentions (layer, head, row, column) of one forward."""
    text = model.language_model
    ids = expand_image_placeholders([*prompt, *ANSWER], model.vision_tower.num_tokens)
    text.config._attn_implementation = "eager"
    with torch.no_grad():
        embeds = model.splice(torch.tensor(ids)[None], model.vision_tower(pixels))
        attentions = text(inputs_embeds=embeds, output_attentions=True, use_cache=False).attentions
    text.config._attn_implementation = "sdpa"
    weights = [a[0].double().numpy() for a in attentions if a is not None]
    columns = [i for i, token in enumerate(ids) if token == IMAGE_INDEX]
    first = len(ids) - len(ANSWER)
    out = np.zeros((len(ANSWER), len(columns)))
    for place in range(len(ANSWER)):
        for number, column in enumerate(columns):
            values = [
                layer[head, first + place - 1, column]
                for layer in weights
                for head in range(layer.shape[0])
            ]
            out[place, number] = sum(values) / len(values)
    return out.reshape(len(ANSWER), len(pixels), -1)


def check(model: Llava) -> torch.Tensor:
    prompt, pixels = ask(model, TWO)
    grids = attention_grids(model, prompt, ANSWER, model.vision_tower(pixels))
    expected = whole(model, prompt, pixels)[..., -grids[0, 0].numel() :]
    np.testing.assert_allclose(grids.flatten(2).numpy(), expected, atol=1e-6)
    assert expected.max() > 1e-3
    assert np.ptp(expected, axis=0).max() > 1e-3, "every token looks somewhere else"
    return grids


@pytest.mark.parametrize("text", ["mistral", "llama", "qwen2", "gemma2", "phi"])
def test_rows_of_the_answer_are_those_of_one_eager_forward(models_folder: Path, text: str) -> None:
    """Mistral's window of 24 is shorter than the prompt: its pictures are partly forgotten, and that is shown."""
    model = build(models_folder, text)
    grids = check(model)
    assert grids.shape == (len(ANSWER), 2, 4, 4)
    assert model.config._attn_implementation == "sdpa", "decoding goes on with its own kernel"
    if text == "mistral":
        assert (grids[:, 0] == 0).any()


def test_the_adapter_takes_part(models_folder: Path) -> None:
    model = build(models_folder, "llama")
    before = check(model)
    add_lora(model, 2, 4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    after = check(model.eval())
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("tower", "choices", "grid"),
    [
        ("clip", {"mm_vision_select_feature": "cls_patch"}, (4, 4)),
        ("clip", {"mm_token_pool": 3}, (3, 3)),
        ("efficientnet", {"mm_vision_select_layer": -1}, (2, 2)),
        ("convnext", {"mm_vision_select_layer": -1, "mm_token_pool": 1}, (1, 1)),
    ],
)
def test_the_grid_is_the_towers(
    models_folder: Path, tower: str, choices: dict, grid: tuple[int, int]
) -> None:
    assert check(build(models_folder, "llama", tower, **choices)).shape[2:] == grid


def test_layers_without_attention_have_no_say(models_folder: Path) -> None:
    model = build(models_folder, "llama")
    common = {
        "vocab_size": len(model.tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
    }
    config = Lfm2Config(
        **common,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv"],
    )
    torch.manual_seed(0)
    model.language_model = Lfm2ForCausalLM(config).eval()
    check(model)


def test_a_word_has_the_attention_of_its_tokens(models_folder: Path) -> None:
    model = build(models_folder, "llama")
    prompt, pixels = ask(model, "<image>\nWhat is this?")
    answer = "a bedroom, with 日本 a café 🙂."
    assert WORD.findall(answer) == ["a", " bedroom,", " with", " 日", "本", " a", " café", " 🙂."]
    words = look(model, "What is this?", [pixels[0].permute(1, 2, 0).numpy()], answer)
    assert words.shape == (8, 1, 4, 4)
    _, ([*ids, _],) = model.prompt.render_branches([Message("user", "")], [answer])
    grids = attention_grids(model, prompt, ids, model.vision_tower(pixels))
    ends = [
        len(model.prompt.render_branches([Message("user", "")], [answer[:end]])[1][0]) - 1
        for end in (1, 10, 15, 17, 18, 20, 25, 28)
    ]
    assert ends[1] > 2 and ends[3] > ends[2] + 1, "words of several tokens, signs of several tokens"
    for word, start, end in zip(words, [0, *ends], ends):
        torch.testing.assert_close(word, grids[start:end].mean(0))
    with pytest.raises(ValueError, match="has no image"):
        look(model, "What is this?", [], answer)

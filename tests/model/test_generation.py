"""The decode loop against transformers' `generate`, and rows that must not feel their neighbours."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_llava import LANGUAGE_MODELS, build, pictures
from transformers import AutoModelForCausalLM, Lfm2Config, MambaConfig, RwkvConfig, xLSTMConfig

from llava_simplified.data.collate import expand_image_placeholders, pad_sequences
from llava_simplified.model.generation import DecodingBatch, GenerationOptions, generate
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import Message

TEXTS = ["What?", "<image>\nWhat is this?", "Compare <image> with <image>, please, in a few words."]


def ask(model: Llava, texts: list[str] = TEXTS) -> tuple[list[list[int]], torch.Tensor]:
    prompts = [model.prompt.render([Message("user", text)], None).input_ids for text in texts]
    return prompts, pictures(model, sum(text.count("<image>") for text in texts))


def stock(
    model: Llava, prompts: list[list[int]], pixels: torch.Tensor | None, **options
) -> list[list[int]]:
    """transformers' own loop on the same spliced embeddings; cut at the end token."""
    rows = [expand_image_placeholders(prompt, model.vision_tower.num_tokens) for prompt in prompts]
    features = None if pixels is None else model.vision_tower(pixels)
    with torch.no_grad():
        ids = model.language_model.generate(
            inputs_embeds=model.splice(pad_sequences(rows, 1, "left"), features),
            attention_mask=pad_sequences([np.ones(len(row)) for row in rows], 0, "left"),
            eos_token_id=model.prompt.stop_ids,
            pad_token_id=1,
            do_sample=False,
            **options,
        ).tolist()
    ends = [
        next((i + 1 for i, t in enumerate(row) if t in model.prompt.stop_ids), len(row))
        for row in ids
    ]
    return [row[:end] for row, end in zip(ids, ends)]


def run(decoding: DecodingBatch) -> list[list[int]]:
    while decoding.live:
        decoding.step()
    return list(decoding.tokens.values())


def with_states(folder: Path, text: str) -> Llava:
    """`build`, or a model with a state in place of keys and values: in some of its layers (lfm2), or in all."""
    if text in LANGUAGE_MODELS:
        return build(folder, text)
    model = build(folder, "llama")
    common = {
        "vocab_size": model.config.vocab_size,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "initializer_range": 0.3,
    }
    heads = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    configs = {
        "lfm2": Lfm2Config(**common, **heads, layer_types=["conv", "full_attention"]),
        "mamba": MambaConfig(**common),
        "rwkv": RwkvConfig(**common),
        "xlstm": xLSTMConfig(**common, num_heads=2),
    }
    torch.manual_seed(0)
    model.language_model = AutoModelForCausalLM.from_config(configs[text])
    return model.eval()


@pytest.mark.parametrize(
    "options",
    [{}, {"repetition_penalty": 1.7}, {"min_new_tokens": 12}],
    ids=lambda o: "".join(o) or "greedy",
)
@pytest.mark.parametrize("text", [*LANGUAGE_MODELS, "lfm2", "mamba"])
def test_greedy_is_transformers_greedy(models_folder: Path, text: str, options: dict) -> None:
    model = with_states(models_folder, text)
    model.prompt.stop_ids = [
        *model.prompt.stop_ids,
        *range(3, 130),
    ]  # a random model would never end
    prompts, pixels = ask(model)
    ours = run(
        DecodingBatch(
            model,
            prompts,
            model.vision_tower(pixels),
            GenerationOptions(max_new_tokens=16, **options),
        )
    )
    # one by one: in a padded batch transformers 5 counts the padding off what is penalised
    alone = [
        stock(model, [prompt], images, max_new_tokens=16, **options)[0]
        for prompt, images in zip(prompts, (None, pixels[:1], pixels[1:]))
    ]
    assert ours == alone
    assert len({len(row) for row in ours}) > 1 or options or text not in LANGUAGE_MODELS, (
        "rows must end at different steps"
    )


@pytest.mark.parametrize("text", ["rwkv", "xlstm"])
def test_a_model_that_goes_on_from_something_of_its_own_is_refused(
    models_folder: Path, text: str
) -> None:
    with pytest.raises(
        ValueError, match=f"{text} takes no DynamicCache: it can be trained, but not be asked"
    ):
        with_states(models_folder, text).chat([Message("user", "What?")])


def test_samples_of_one_prefill_depend_on_seed_picture_and_prompt_alone(
    models_folder: Path,
) -> None:
    model = build(models_folder, "mistral")
    prompts, pixels = ask(model)
    options = GenerationOptions(max_new_tokens=8, temperature=1.0, num_return_sequences=3, seed=5)
    together = generate(model, prompts, pixels, options)
    assert len(set(together[1])) == 3, "three samples are three draws"
    assert generate(model, prompts[1:2], pixels[:1], options)[0] == together[1]
    assert generate(model, prompts[::-1], pixels[[1, 2, 0]], options)[::-1] == together
    assert generate(model, prompts, pixels, replace(options, seed=6)) != together
    assert generate(model, prompts[1:2], pixels[1:2], options)[0] != together[1], "another picture"


def test_samples_follow_the_models_distribution(models_folder: Path) -> None:
    """The first token of 4,000 samples, against the softmax of transformers' processed logits."""
    from transformers.generation.logits_process import (
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    model = build(models_folder, "llama")
    prompts, pixels = ask(model, ["<image> What?"])
    options = GenerationOptions(
        1, temperature=3.0, top_p=0.8, top_k=20, num_return_sequences=4000, seed=0
    )
    drawn = torch.tensor(
        [row[0] for row in run(DecodingBatch(model, prompts, model.vision_tower(pixels), options))]
    )
    ids = torch.from_numpy(expand_image_placeholders(prompts[0], model.vision_tower.num_tokens))[
        None
    ]
    with torch.no_grad():
        scores = model.language_model(
            inputs_embeds=model.splice(ids, model.vision_tower(pixels))
        ).logits[:, -1]
    for warp in (TemperatureLogitsWarper(3.0), TopKLogitsWarper(20), TopPLogitsWarper(0.8)):
        scores = warp(ids, scores)
    wanted = scores.softmax(-1)[0]
    seen = torch.bincount(drawn, minlength=len(wanted)) / 4000
    assert set(drawn.tolist()) <= set(wanted.nonzero().flatten().tolist())
    assert (seen - wanted).abs().sum() < 0.12 < (seen - wanted.roll(1)).abs().sum()


def test_every_row_has_its_own_options(models_folder: Path) -> None:
    model = build(models_folder, "qwen2")
    prompts, pixels = ask(model)
    features = model.vision_tower(pixels)
    options = [
        GenerationOptions(4),
        GenerationOptions(9, min_new_tokens=9, temperature=0.7, num_return_sequences=2, seed=1),
        GenerationOptions(6, repetition_penalty=1.5),
    ]
    keys = [b"a", b"b", b"c"]
    together = run(DecodingBatch(model, prompts, features, options, keys))
    alone = [
        row
        for i, pictures_of in enumerate((None, features[:1], features[1:]))
        for row in run(DecodingBatch(model, [prompts[i]], pictures_of, options[i], [keys[i]]))
    ]
    assert together == alone
    assert [len(row) for row in together] == [4, 9, 9, 6]


@pytest.mark.parametrize("text", [*LANGUAGE_MODELS, "lfm2", "mamba"])
def test_rows_join_a_batch_under_way(models_folder: Path, text: str) -> None:
    """Longer prompts than those inside, and shorter ones; also where the sliding window is full, and where it is not."""
    model = with_states(models_folder, text)
    prompts, pixels = ask(model)
    features = model.vision_tower(pixels)
    asked = [
        (prompts[0], None, GenerationOptions(20)),
        (prompts[2], features[1:], GenerationOptions(9, repetition_penalty=1.5)),
        (
            prompts[1],
            features[:1],
            GenerationOptions(6, temperature=0.7, num_return_sequences=2, seed=1),
        ),
        (prompts[0], None, GenerationOptions(5)),
    ]
    wanted = [
        row
        for prompt, images, options in asked
        for row in run(DecodingBatch(model, [prompt], images, options))
    ]
    decoding = DecodingBatch(model, [asked[0][0]], *asked[0][1:])
    for number, (prompt, images, options) in enumerate(asked[1:], start=1):
        decoding.step()
        assert decoding.join([prompt], images, options) == (
            [number] if number < 2 else [2, 3] if number < 3 else [4]
        )
    assert run(decoding) == wanted


def test_a_batch_that_never_empties_keeps_its_size(models_folder: Path) -> None:
    model = build(models_folder, "mistral")
    prompts, _ = ask(model, ["What?"])
    wanted = run(DecodingBatch(model, prompts, None, GenerationOptions(6, min_new_tokens=6)))[0]
    decoding = DecodingBatch(model, prompts, None, GenerationOptions(6, min_new_tokens=6))
    for _ in range(30):
        decoding.step()
        decoding.step()
        decoding.join(prompts, None, GenerationOptions(6, min_new_tokens=6))
        assert decoding._mask.shape[1] <= len(prompts[0]) + 1 + 6
        assert len(decoding._generators) == len(decoding.live) <= 3
        for row in set(decoding.tokens) - set(decoding.live):
            assert decoding.tokens.pop(row) == wanted
    assert run(decoding) == [wanted] * 3


def test_a_dropped_row_leaves_and_the_others_go_on(models_folder: Path) -> None:
    model = build(models_folder, "gemma2")
    prompts, pixels = ask(model)
    features = model.vision_tower(pixels)
    whole = run(DecodingBatch(model, prompts, features, GenerationOptions(8)))
    decoding = DecodingBatch(model, prompts, features, GenerationOptions(8))
    assert [row for row, _ in decoding.step()] == [0, 1, 2]
    decoding.drop(1)
    decoding.drop(1)  # a second time does no harm
    assert [row for row, _ in decoding.step()] == [0, 2]
    assert run(decoding) == [whole[0], whole[1][:1], whole[2]]


def test_beams_are_transformers_beams(models_folder: Path) -> None:
    model = build(models_folder, "llama")
    prompts, pixels = ask(model)
    options = {
        "num_beams": 3,
        "num_return_sequences": 2,
        "length_penalty": 0.5,
        "max_new_tokens": 6,
    }
    ours = generate(model, prompts, pixels, GenerationOptions(**options))
    texts = [model.prompt.decode(row).strip() for row in stock(model, prompts, pixels, **options)]
    assert ours == [texts[:2], texts[2:4], texts[4:]]


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"min_new_tokens": 9, "max_new_tokens": 8},
        {"repetition_penalty": 0},
        {"num_return_sequences": 3},
        {"num_return_sequences": 3, "num_beams": 2},
    ],
    ids=str,
)
def test_options_that_make_no_sense(bad: dict) -> None:
    with pytest.raises(ValueError, match="needed|need temperature"):
        GenerationOptions(**bad)


def test_a_streamed_answer_is_the_whole_one_in_pieces(models_folder: Path) -> None:
    model = build(models_folder, "mistral")
    (pixels,) = pictures(model, 1)
    image = pixels.permute(1, 2, 0).numpy()
    pieces = list(model.stream("What is this?", [image], max_new_tokens=12))
    assert len(pieces) > 3
    assert "".join(pieces).strip() == model.caption(image, "What is this?", max_new_tokens=12)


def test_nothing_is_called_by_a_name_that_was_given_up(models_folder: Path) -> None:
    model = build(models_folder, "mistral")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model.caption(pictures(model, 1)[0].permute(1, 2, 0).numpy(), max_new_tokens=2)


def test_a_conversation_goes_on(models_folder: Path) -> None:
    model = build(models_folder, "qwen2")
    first, second = (p.permute(1, 2, 0).numpy() for p in pictures(model, 2))
    turns = [Message("user", "What?"), Message("assistant", "a cat"), Message("user", "Where?")]
    answer = model.chat(turns, [first], max_new_tokens=6)
    placed = [Message("user", "<image>\nWhat?"), *turns[1:]]
    assert model.chat(placed, [first], max_new_tokens=6) == answer
    assert model.chat(turns[:1], [first], max_new_tokens=6) != answer, "it heard the rest"
    assert model.chat(turns, [second], max_new_tokens=6) != answer, "it saw the picture"
    with pytest.raises(ValueError, match=r"2 image\(s\), but the text says <image> 1 time"):
        model.chat(placed, [first, second])
    system = Message("system", "Be brief.")
    answer = model.chat([system, *turns], [first], max_new_tokens=6)
    assert model.chat([system, *placed], [first], max_new_tokens=6) == answer


def test_many_pictures_are_captioned_batch_by_batch(models_folder: Path) -> None:
    model = build(models_folder, "llama")
    images = [p.permute(1, 2, 0).numpy() for p in pictures(model, 3)]
    options = {"instruction": "What?", "n": 2, "seed": 0, "max_new_tokens": 6}
    together = model.caption(images, **options)
    assert [len(texts) for texts in together] == [2, 2, 2]
    assert model.caption(images, batch_size=2, **options) == together
    assert model.caption([], **options) == []

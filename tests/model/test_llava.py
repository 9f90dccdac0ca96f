"""The splice and the loss, against stock transformers and against a plain loop."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny import CAPTIONS, make_language_model, make_vision_model
from torch.nn.functional import cross_entropy
from transformers import LlavaConfig as StockLlavaConfig
from transformers import LlavaForConditionalGeneration

from llava_simplified.data.collate import (
    Collator,
    Example,
    expand_image_placeholders,
    pad_sequences,
)
from llava_simplified.model.build import build_model
from llava_simplified.model.config import LlavaConfig
from llava_simplified.model.generation import GenerationOptions, generate
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import IGNORE_INDEX, IMAGE_INDEX, Message

LANGUAGE_MODELS = ["mistral", "llama", "qwen2", "gemma2", "phi"]


def build(folder: Path, text: str = "mistral", tower: str = "clip", **choices) -> Llava:
    torch.manual_seed(2)
    model = build_model(LlavaConfig(str(folder / text), str(folder / tower), **choices))
    # random models of 0.02 deviation see no difference between pictures: make the image tokens loud
    for parameter in model.projector.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


def pictures(model: Llava, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(
        0,
        256,
        (count, 3, *model.vision_tower.transform.crop),
        generator=generator,
        dtype=torch.uint8,
    )


def examples(model: Llava, pixels: torch.Tensor) -> list[Example]:
    """One with a picture, one text-only, one with two pictures; of different lengths."""
    texts = [
        "<image>\nWhat is this?",
        "Say something.",
        "Compare <image> with <image>, please, in a few words.",
    ]
    out, used = [], 0
    for text, caption in zip(texts, CAPTIONS):
        rendered = model.prompt.render([Message("user", text)], caption)
        count = text.count("<image>")
        images = pixels[used : used + count] if count else None
        out.append(Example(rendered.input_ids, rendered.labels, images))
        used += count
    return out


def collate(model: Llava, samples: list[Example]) -> dict[str, torch.Tensor]:
    batch = Collator(model.vision_tower.num_tokens, 1)(samples)
    batch.pop("metadata")
    return batch


def plain_loss(model: Llava, sample: Example) -> torch.Tensor:
    """One sample, full logits, a Python loop over the tokens: the definition that the fast way must equal."""
    tokens = model.vision_tower.num_tokens
    ids = expand_image_placeholders(sample.input_ids, tokens)
    labels = expand_image_placeholders(sample.input_ids, tokens, sample.labels)
    rows, image = [], 0
    features = (
        None
        if sample.pixel_values is None
        else model.projector(model.vision_tower(sample.pixel_values).double())
    )
    flat = None if features is None else features.flatten(0, 1)
    for token in ids:
        if token == IMAGE_INDEX:
            rows.append(flat[image])
            image += 1
        else:
            rows.append(model.language_model.get_input_embeddings()(torch.tensor(token)))
    logits = model.language_model(inputs_embeds=torch.stack(rows)[None]).logits[0]
    losses = [
        cross_entropy(logits[i - 1 : i], torch.tensor([label]))
        for i, label in enumerate(labels)
        if label != IGNORE_INDEX
    ]
    return sum(losses)


@pytest.mark.parametrize("text", LANGUAGE_MODELS)
def test_loss_and_gradients_equal_a_plain_float64_loop(models_folder: Path, text: str) -> None:
    model = build(models_folder, text).double()
    samples = examples(model, pictures(model, 3))
    model.vision_tower.requires_grad_(False)
    loss = model(**collate(model, samples)).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = sum(plain_loss(model, sample) for sample in samples)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    assert "projector.weight" in gradients
    # Gemma's own norms compute in float32, whatever they are given
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if text == "gemma2" else {"rtol": 1e-8, "atol": 1e-10}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, **tolerance, msg=name)


def test_only_trained_positions_get_logits(models_folder: Path) -> None:
    model = build(models_folder)
    batch = collate(model, examples(model, pictures(model, 3)))
    logits = model(**batch).logits
    assert logits.shape == (len(batch["labels"]), model.language_model.config.vocab_size)
    assert len(batch["labels"]) < batch["input_ids"].numel() / 4
    # and the hook is gone: a plain call of the language model gives all of them
    assert model.language_model(torch.tensor([[0, 5, 7]])).logits.shape[1] == 3


@pytest.mark.parametrize("text", ["llama", "mistral"])
@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_the_splice_equals_stock_llava(models_folder: Path, text: str, feature: str) -> None:
    """Same weights, same logits as LlavaForConditionalGeneration, every position, with our ids as its ids."""
    model = build(
        models_folder,
        text,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
        mm_vision_select_feature=feature,
    )
    image_token = model.language_model.config.vocab_size - 1
    stock = LlavaForConditionalGeneration(
        StockLlavaConfig(
            vision_config=model.vision_tower.model.config,
            text_config=model.language_model.config,
            image_token_index=image_token,
            vision_feature_layer=-2,
            vision_feature_select_strategy={"patch": "default", "cls_patch": "full"}[feature],
        )
    ).eval()
    stock.model.vision_tower.load_state_dict(model.vision_tower.model.state_dict())
    stock.model.language_model.load_state_dict(model.language_model.model.state_dict())
    stock.lm_head.load_state_dict(model.language_model.lm_head.state_dict())
    for ours, theirs in ((0, "linear_1"), (2, "linear_2")):
        getattr(stock.model.multi_modal_projector, theirs).load_state_dict(
            model.projector[ours].state_dict()
        )

    pixels = pictures(model, 2)
    ids = expand_image_placeholders(
        model.prompt.render([Message("user", "<image> and <image>?")], "no").input_ids,
        model.vision_tower.num_tokens,
    )
    ids = torch.from_numpy(ids)[None]
    with torch.no_grad():
        ours = model.language_model(
            inputs_embeds=model.splice(ids, model.vision_tower(pixels))
        ).logits
        theirs = stock(
            input_ids=ids.masked_fill(ids == IMAGE_INDEX, image_token),
            pixel_values=model.vision_tower.transform.normalize(pixels),
        ).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_picture_changes_the_logits(models_folder: Path) -> None:
    model = build(models_folder)
    batch = collate(model, examples(model, pictures(model, 3)))
    other = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    assert (model(**batch).logits - model(**other).logits).abs().max() > 1e-3


def test_changing_one_sample_never_moves_another(models_folder: Path) -> None:
    model = build(models_folder)
    samples = examples(model, pictures(model, 3))
    batch = collate(model, samples)
    longer = model.prompt.render(
        [Message("user", "Say something.")], CAPTIONS[1] + " and much more of it, for long"
    )
    changed = collate(model, [samples[0], Example(longer.input_ids, longer.labels), samples[2]])
    first = sum(label != IGNORE_INDEX for label in samples[0].labels)
    torch.testing.assert_close(
        model(**batch).logits[:first], model(**changed).logits[:first], rtol=0, atol=1e-6
    )


def test_a_wrong_number_of_pictures_is_an_error(models_folder: Path) -> None:
    model = build(models_folder)
    batch = collate(model, examples(model, pictures(model, 3)))
    batch["pixel_values"] = batch["pixel_values"][:2]
    with pytest.raises(
        ValueError, match=r"2 image\(s\) of 16 tokens, but the text has room for 48"
    ):
        model(**batch)


def test_a_blank_image_changes_nothing_and_gives_the_projector_a_zero_gradient(
    models_folder: Path,
) -> None:
    model = build(models_folder).train()
    batch = collate(model, [examples(model, pictures(model, 3))[1]])
    blank = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    loss = model(**batch, pixel_values=blank).loss
    assert torch.equal(loss, model(**batch).loss)
    loss.backward()
    assert model.projector.weight.grad is not None
    assert not model.projector.weight.grad.any()
    with pytest.raises(ValueError, match="2 image.s. of 16 tokens, but the text has room for 0"):
        model(**batch, pixel_values=blank.expand(2, -1, -1, -1))


@pytest.mark.parametrize("text", LANGUAGE_MODELS)
def test_batched_captions_equal_single_ones(models_folder: Path, text: str) -> None:
    model = build(models_folder, text)
    pixels = pictures(model, 4)
    questions = [
        "<image>\nWhat?",
        "<image>\nGenerate a caption of this image:",
        "Where is <image> from, do you think?",
        "<image>",
    ]
    prompts = [model.prompt.render([Message("user", q)], None).input_ids for q in questions]
    options = GenerationOptions(max_new_tokens=12)
    together = generate(model, prompts, pixels, options)
    alone = [
        generate(model, [prompt], pixels[i : i + 1], options)[0] for i, prompt in enumerate(prompts)
    ]
    assert together == alone
    assert len({texts[0] for texts in together}) > 1, (
        "all captions alike: the test would see nothing"
    )


@pytest.mark.parametrize("text", ["mistral", "gemma2"])
def test_greedy_generation_equals_the_full_forward(models_folder: Path, text: str) -> None:
    """Every generated token is the argmax of a forward without any cache."""
    model = build(models_folder, text)
    pixels = pictures(model, 1)
    prompt = model.prompt.render([Message("user", "<image>\nWhat?")], None).input_ids
    caption = generate(model, [prompt], pixels, GenerationOptions(max_new_tokens=10))[0][0]
    ids = torch.from_numpy(expand_image_placeholders(prompt, model.vision_tower.num_tokens))[None]
    new: list[int] = []
    with torch.no_grad():
        embeds = model.splice(ids, model.vision_tower(pixels))
        for _ in range(10):
            token = int(
                model.language_model(inputs_embeds=embeds, use_cache=False).logits[0, -1].argmax()
            )
            if token in model.prompt.stop_ids:
                break
            new.append(token)
            embeds = torch.cat(
                [embeds, model.language_model.get_input_embeddings()(torch.tensor([[token]]))], 1
            )
    assert caption == model.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_caption_takes_paths_bytes_arrays_and_pil(models_folder: Path, data_folder: Path) -> None:
    from PIL import Image

    model = build(models_folder)
    path = data_folder / "images" / "0.jpg"
    image = Image.open(path)
    forms = [path, str(path), path.read_bytes(), image]
    captions = {model.caption(form, max_new_tokens=6) for form in forms}
    assert len(captions) == 1
    assert model.caption(forms, max_new_tokens=6) == [captions.pop()] * 4


def test_sampling_repeats_with_its_seed(models_folder: Path) -> None:
    model = build(models_folder)
    prompt = model.prompt.render([Message("user", "<image>")], None).input_ids
    options = GenerationOptions(max_new_tokens=10, temperature=1.0, num_return_sequences=3, seed=7)
    first = generate(model, [prompt], pictures(model, 1), options)
    assert first == generate(model, [prompt], pictures(model, 1), options)
    assert len(set(first[0])) > 1
    beams = generate(
        model, [prompt], pictures(model, 1), GenerationOptions(max_new_tokens=10, num_beams=3)
    )
    assert len(beams[0]) == 1


def test_images_make_room_and_rows_are_padded_on_the_side_asked() -> None:
    rows = [expand_image_placeholders([5, IMAGE_INDEX, 6], 3), expand_image_placeholders([7], 3)]
    assert pad_sequences(rows, 0).tolist() == [
        [5, IMAGE_INDEX, IMAGE_INDEX, IMAGE_INDEX, 6],
        [7, 0, 0, 0, 0],
    ]
    assert pad_sequences(rows, 0, "left").tolist()[1] == [0, 0, 0, 0, 7]


def test_generation_options_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="temperature"):
        GenerationOptions(temperature=-1)
    with pytest.raises(ValueError, match="several different captions"):
        GenerationOptions(num_return_sequences=3)


def test_gradient_checkpointing_changes_nothing(models_folder: Path) -> None:
    model = build(models_folder).train()
    batch = collate(model, examples(model, pictures(model, 3)))
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for m in (model, again):
        m(**batch).loss.backward()
    torch.testing.assert_close(model.projector.weight.grad, again.projector.weight.grad)


def test_fixtures_are_of_the_true_classes() -> None:
    assert type(make_language_model("mistral", 300)).__name__ == "MistralForCausalLM"
    assert type(make_vision_model("clip")).__name__ == "CLIPVisionModel"

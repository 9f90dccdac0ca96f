"""The splice and the loss, compared with stock Transformers and with a plain loop."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from model_helpers import LANGUAGE_MODELS, collate, make_images
from PIL import Image
from tiny import CAPTIONS, build_llava, make_language_model, make_vision_model
from torch.nn.functional import cross_entropy
from transformers import LlavaConfig as StockLlavaConfig
from transformers import LlavaForConditionalGeneration

from llava_simplified.data.collate import (
    Example,
    expand_image_placeholders,
    pad_sequences,
)
from llava_simplified.model.generation import generate
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import IGNORE_INDEX, IMAGE_INDEX, Message


def make_examples(model: Llava, pixels: torch.Tensor) -> list[Example]:
    """Return examples of different lengths, with one image, no image and two images."""
    texts = [
        "<image>\nWhat is this?",
        "Say something.",
        "Compare <image> with <image>, please, in a few words.",
    ]
    examples: list[Example] = []
    used = 0
    for text, caption in zip(texts, CAPTIONS):
        tokenized = model.prompt.render([Message("user", text)], caption)
        count = text.count("<image>")
        images = pixels[used : used + count] if count else None
        examples.append(Example(tokenized.input_ids, tokenized.labels, images))
        used += count
    return examples


def plain_loss(model: Llava, example: Example) -> torch.Tensor:
    """Compute the loss of one example by definition: full logits, and a loop over the tokens."""
    num_tokens = model.vision_tower.num_tokens
    ids = expand_image_placeholders(example.input_ids, num_tokens)
    labels = expand_image_placeholders(example.input_ids, num_tokens, example.labels)
    image_tokens: list[torch.Tensor] = []
    if example.pixel_values is not None:
        features = model.vision_tower(example.pixel_values).double()
        image_tokens = list(model.projector(features).flatten(0, 1))

    embeds: list[torch.Tensor] = []
    for token in ids:
        if token == IMAGE_INDEX:
            embeds.append(image_tokens.pop(0))
        else:
            embeds.append(model.language_model.get_input_embeddings()(torch.tensor(token)))
    logits = model.language_model(inputs_embeds=torch.stack(embeds)[None]).logits[0]
    losses = [
        cross_entropy(logits[i - 1 : i], torch.tensor([label]))
        for i, label in enumerate(labels)
        if label != IGNORE_INDEX
    ]
    return sum(losses)


# ---- loss ----


@pytest.mark.parametrize("text", LANGUAGE_MODELS)
def test_forward_loss_and_gradients_equal_a_plain_float64_loop(
    models_folder: Path, text: str
) -> None:
    model = build_llava(models_folder, text).double()
    examples = make_examples(model, make_images(model, 3))
    model.vision_tower.requires_grad_(False)
    loss = model(**collate(model, examples)).loss
    loss.backward()
    gradients: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.clone()

    model.zero_grad()
    expected = sum(plain_loss(model, example) for example in examples)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    assert "projector.weight" in gradients
    tolerance = {"rtol": 1e-8, "atol": 1e-10}
    if text == "gemma2":
        # Use a larger tolerance, because Gemma's norms compute in float32 for every input.
        tolerance = {"rtol": 1e-4, "atol": 1e-5}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, **tolerance, msg=name)


def test_forward_computes_logits_at_trained_positions_only(models_folder: Path) -> None:
    model = build_llava(models_folder)
    batch = collate(model, make_examples(model, make_images(model, 3)))
    logits = model(**batch).logits
    assert logits.shape == (len(batch["labels"]), model.language_model.config.vocab_size)
    assert len(batch["labels"]) < batch["input_ids"].numel() / 4
    # The hook is removed: a plain call of the language model returns logits at all positions.
    assert model.language_model(torch.tensor([[0, 5, 7]])).logits.shape[1] == 3


def test_forward_examples_of_a_batch_do_not_affect_each_other(models_folder: Path) -> None:
    model = build_llava(models_folder)
    examples = make_examples(model, make_images(model, 3))
    batch = collate(model, examples)
    longer = model.prompt.render(
        [Message("user", "Say something.")], CAPTIONS[1] + " and much more of it, for long"
    )
    changed = collate(model, [examples[0], Example(longer.input_ids, longer.labels), examples[2]])
    # The second example is longer now. The logits of the first one must not change.
    num_trained = sum(label != IGNORE_INDEX for label in examples[0].labels)
    before = model(**batch).logits[:num_trained]
    after = model(**changed).logits[:num_trained]
    torch.testing.assert_close(before, after, rtol=0, atol=1e-6)


def test_gradient_checkpointing_leaves_the_gradient_unchanged(models_folder: Path) -> None:
    model = build_llava(models_folder).train()
    batch = collate(model, make_examples(model, make_images(model, 3)))
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model(**batch).loss.backward()
    checkpointed(**batch).loss.backward()
    torch.testing.assert_close(model.projector.weight.grad, checkpointed.projector.weight.grad)


# ---- splice ----


@pytest.mark.parametrize("text", ["llama", "mistral"])
@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_splice_equals_stock_llava(models_folder: Path, text: str, feature: str) -> None:
    """The logits at all positions equal those of LlavaForConditionalGeneration with the same weights."""
    model = build_llava(
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
    # Copy all weights to the model of Transformers.
    stock.model.vision_tower.load_state_dict(model.vision_tower.model.state_dict())
    stock.model.language_model.load_state_dict(model.language_model.model.state_dict())
    stock.lm_head.load_state_dict(model.language_model.lm_head.state_dict())
    projector = stock.model.multi_modal_projector
    projector.linear_1.load_state_dict(model.projector[0].state_dict())
    projector.linear_2.load_state_dict(model.projector[2].state_dict())

    pixels = make_images(model, 2)
    tokenized = model.prompt.render([Message("user", "<image> and <image>?")], "no")
    expanded = expand_image_placeholders(tokenized.input_ids, model.vision_tower.num_tokens)
    ids = torch.from_numpy(expanded)[None]
    with torch.no_grad():
        embeds = model.splice(ids, model.vision_tower(pixels))
        logits = model.language_model(inputs_embeds=embeds).logits
        expected = stock(
            input_ids=ids.masked_fill(ids == IMAGE_INDEX, image_token),
            pixel_values=model.vision_tower.transform.normalize(pixels),
        ).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_splice_image_changes_the_logits(models_folder: Path) -> None:
    model = build_llava(models_folder)
    batch = collate(model, make_examples(model, make_images(model, 3)))
    flipped = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    assert (model(**batch).logits - model(**flipped).logits).abs().max() > 1e-3


def test_splice_refuses_a_wrong_number_of_images(models_folder: Path) -> None:
    model = build_llava(models_folder)
    batch = collate(model, make_examples(model, make_images(model, 3)))
    batch["pixel_values"] = batch["pixel_values"][:2]
    with pytest.raises(ValueError, match=r"2 image\(s\) of 16 tokens .* 48 image"):
        model(**batch)


def test_splice_refuses_placeholders_without_images(models_folder: Path) -> None:
    model = build_llava(models_folder)
    ids = torch.tensor([[0, IMAGE_INDEX, 5]])
    for positions in (None, torch.tensor([1])):
        with pytest.raises(ValueError, match="no images were given, .* 1 image placeholder"):
            model.splice(ids, None, positions)
    assert model.splice(torch.tensor([[0, 5]]), None).shape == (1, 2, 32)


def test_splice_dummy_image_changes_nothing_and_gives_the_projector_a_zero_gradient(
    models_folder: Path,
) -> None:
    model = build_llava(models_folder).train()
    text_only = make_examples(model, make_images(model, 3))[1]
    batch = collate(model, [text_only])
    dummy = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    loss = model(**batch, pixel_values=dummy).loss
    assert torch.equal(loss, model(**batch).loss)
    loss.backward()
    assert model.projector.weight.grad is not None
    assert not model.projector.weight.grad.any()
    with pytest.raises(ValueError, match=r"2 image\(s\) of 16 tokens .* 0 image"):
        model(**batch, pixel_values=dummy.expand(2, -1, -1, -1))


def test_image_placeholders_are_expanded_and_rows_padded_on_either_side() -> None:
    rows = [expand_image_placeholders([5, IMAGE_INDEX, 6], 3), expand_image_placeholders([7], 3)]
    assert pad_sequences(rows, 0).tolist() == [
        [5, IMAGE_INDEX, IMAGE_INDEX, IMAGE_INDEX, 6],
        [7, 0, 0, 0, 0],
    ]
    assert pad_sequences(rows, 0, "left").tolist()[1] == [0, 0, 0, 0, 7]


# ---- generation ----


@pytest.mark.medium
@pytest.mark.parametrize("text", LANGUAGE_MODELS)
def test_generate_in_a_batch_equals_generate_alone(models_folder: Path, text: str) -> None:
    model = build_llava(models_folder, text)
    pixels = make_images(model, 4)
    questions = [
        "<image>\nWhat?",
        "<image>\nGenerate a caption of this image:",
        "Where is <image> from, do you think?",
        "<image>",
    ]
    prompts = []
    for question in questions:
        rendered = model.prompt.render([Message("user", question)], None)
        prompts.append(rendered.input_ids)
    options = GenerationOptions(max_new_tokens=12)
    together = generate(model, prompts, pixels, options)
    alone = []
    for prompt, image in zip(prompts, pixels.split(1)):
        alone += generate(model, [prompt], image, options)
    assert together == alone
    # Make sure that the captions differ; otherwise the test would not detect mixed-up images.
    assert len({texts[0] for texts in together}) > 1


@pytest.mark.parametrize("text", ["mistral", "gemma2"])
def test_generate_greedy_equals_the_argmax_of_a_forward_without_a_cache(
    models_folder: Path, text: str
) -> None:
    model = build_llava(models_folder, text)
    pixels = make_images(model, 1)
    prompt = model.prompt.render([Message("user", "<image>\nWhat?")], None).input_ids
    caption = generate(model, [prompt], pixels, GenerationOptions(max_new_tokens=10))[0][0]

    expanded = expand_image_placeholders(prompt, model.vision_tower.num_tokens)
    embed = model.language_model.get_input_embeddings()
    generated: list[int] = []
    # A plain greedy loop, which computes the whole sequence again for every token.
    with torch.no_grad():
        features = model.vision_tower(pixels)
        embeds = model.splice(torch.from_numpy(expanded)[None], features)
        for _ in range(10):
            logits = model.language_model(inputs_embeds=embeds, use_cache=False).logits
            token = int(logits[0, -1].argmax())
            if token in model.prompt.stop_ids:
                break
            generated.append(token)
            embeds = torch.cat([embeds, embed(torch.tensor([[token]]))], 1)
    assert caption == model.tokenizer.decode(generated, skip_special_tokens=True).strip()


def test_generate_sampling_is_reproducible_with_a_seed(models_folder: Path) -> None:
    model = build_llava(models_folder)
    prompt = model.prompt.render([Message("user", "<image>")], None).input_ids
    pixels = make_images(model, 1)
    options = GenerationOptions(max_new_tokens=10, temperature=1.0, num_return_sequences=3, seed=7)
    first = generate(model, [prompt], pixels, options)
    assert first == generate(model, [prompt], pixels, options)
    assert len(set(first[0])) > 1
    beams = generate(model, [prompt], pixels, GenerationOptions(max_new_tokens=10, num_beams=3))
    assert len(beams[0]) == 1


def test_caption_accepts_paths_bytes_and_pil_images(models_folder: Path, data_folder: Path) -> None:
    model = build_llava(models_folder)
    path = data_folder / "images" / "0.jpg"
    sources = [path, str(path), path.read_bytes(), Image.open(path)]
    captions = {model.caption(source, max_new_tokens=6) for source in sources}
    assert len(captions) == 1
    assert model.caption(sources, max_new_tokens=6) == [captions.pop()] * 4


def test_caption_samples_several_captions_with_one_beam(
    models_folder: Path, data_folder: Path
) -> None:
    model = build_llava(models_folder)
    path = data_folder / "images" / "0.jpg"
    options = {"num_return_sequences": 2, "max_new_tokens": 6, "seed": 1}
    assert model.caption(path, num_beams=1, **options) == model.caption(path, **options)
    assert len(model.caption(path, num_beams=2, **options)) == 2


def test_threads_take_turns(models_folder: Path, data_folder: Path) -> None:
    model = build_llava(models_folder, "llama")
    path = data_folder / "images" / "0.jpg"
    # Batches of different sizes, because a wrong batch is an error only if its shape differs.
    requests = [[path], [path] * 3, [path] * 2]
    expected = [model.caption(images, max_new_tokens=4) for images in requests]

    def caption_and_chat(number: int) -> None:
        images = requests[number % 3]
        assert model.caption(images, max_new_tokens=4) == expected[number % 3]
        assert model.chat("What?", images, max_new_tokens=4) == answers[number % 3]

    answers = [model.chat("What?", images, max_new_tokens=4) for images in requests]
    unfinished = model.stream("What?", [path], max_new_tokens=4, min_new_tokens=4)
    next(unfinished)  # a stream that is not read to its end must not keep the lock
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(caption_and_chat, range(40)))


def test_generation_options_refuse_invalid_values() -> None:
    with pytest.raises(ValueError, match="temperature"):
        GenerationOptions(temperature=-1)
    with pytest.raises(ValueError, match="num_return_sequences"):
        GenerationOptions(num_return_sequences=3)


def test_tiny_models_are_of_the_real_classes() -> None:
    assert type(make_language_model("mistral", 300)).__name__ == "MistralForCausalLM"
    assert type(make_vision_model("clip")).__name__ == "CLIPVisionModel"

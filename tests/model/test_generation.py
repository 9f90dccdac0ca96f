"""The decode loop, compared with `generate` of Transformers; and sequences that do not affect each other."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_helpers import LANGUAGE_MODELS, make_images
from tiny import build_llava
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    Lfm2Config,
    MambaConfig,
    PreTrainedTokenizerFast,
    RwkvConfig,
    xLSTMConfig,
)
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llava_simplified.data.collate import expand_image_placeholders, pad_sequences
from llava_simplified.model.generation import (
    DecodingBatch,
    encode_images,
    generate,
    generate_from_features,
    generate_separately,
    stream,
)
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.model.llava import Llava
from llava_simplified.model.lora import add_lora
from llava_simplified.model.sampling import draw, random_numbers
from llava_simplified.prompt import IMAGE_INDEX, Message, Prompt

TEXTS = ["What?", "<image>\nWhat is this?", "Compare <image> with <image>, please, in a few words."]


def make_prompts(model: Llava, texts: list[str] = TEXTS) -> tuple[list[list[int]], torch.Tensor]:
    """Return the token ids of the prompts, and their images."""
    prompts = []
    num_images = 0
    for text in texts:
        rendered = model.prompt.render([Message("user", text)], None)
        prompts.append(rendered.input_ids)
        num_images += text.count("<image>")
    return prompts, make_images(model, num_images)


def stock_generate(
    model: Llava, prompts: list[list[int]], pixels: torch.Tensor | None, **options: Any
) -> list[list[int]]:
    """Generate with Transformers, from the same spliced embeddings; truncate after the end token."""
    num_tokens = model.vision_tower.num_tokens
    rows = [expand_image_placeholders(prompt, num_tokens) for prompt in prompts]
    input_ids = pad_sequences(rows, 1, "left")
    ones = [np.ones(len(row)) for row in rows]
    attention_mask = pad_sequences(ones, 0, "left")
    features = None
    if pixels is not None:
        features = model.vision_tower(pixels)
    with torch.no_grad():
        sequences = model.language_model.generate(
            inputs_embeds=model.splice(input_ids, features),
            attention_mask=attention_mask,
            eos_token_id=model.prompt.stop_ids,
            pad_token_id=1,
            do_sample=False,
            **options,
        ).tolist()
    return [truncate_after_end(model, ids) for ids in sequences]


def truncate_after_end(model: Llava, ids: list[int]) -> list[int]:
    for i, token in enumerate(ids):
        if token in model.prompt.stop_ids:
            return ids[: i + 1]
    return ids


def run(batch: DecodingBatch) -> list[list[int]]:
    """Decode until all sequences are finished."""
    while batch.active:
        batch.step()
    return list(batch.generated_ids.values())


def build_any(folder: Path, text: str) -> Llava:
    """Return a model of `build_llava`, or one with recurrent states instead of keys and values in some or all layers."""
    if text in LANGUAGE_MODELS:
        return build_llava(folder, text)
    model = build_llava(folder, "llama")
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


# ---- greedy search, sampling, beam search ----


@pytest.mark.medium
@pytest.mark.parametrize(
    "options",
    [{}, {"repetition_penalty": 1.7}, {"min_new_tokens": 12}],
    ids=lambda options: "".join(options) or "greedy",
)
@pytest.mark.parametrize("text", [*LANGUAGE_MODELS, "lfm2", "mamba"])
def test_decoding_batch_greedy_equals_transformers(
    models_folder: Path, text: str, options: dict[str, Any]
) -> None:
    model = build_any(models_folder, text)
    # Treat a third of the vocabulary as end tokens, because random models would never stop.
    model.prompt.stop_ids = [*model.prompt.stop_ids, *range(3, 130)]
    prompts, pixels = make_prompts(model)
    features = model.vision_tower(pixels)
    generation_options = GenerationOptions(max_new_tokens=16, **options)
    generated = run(DecodingBatch(model, prompts, features, generation_options))

    # Generate one by one: in a padded batch, Transformers 5 applies the repetition penalty to fewer
    # tokens.
    images_of_prompts = (None, pixels[:1], pixels[1:])
    expected = [
        stock_generate(model, [prompt], images, max_new_tokens=16, **options)[0]
        for prompt, images in zip(prompts, images_of_prompts)
    ]
    assert generated == expected
    if text in LANGUAGE_MODELS and not options:
        lengths = {len(ids) for ids in generated}
        assert len(lengths) > 1, "sequences must end at different steps"


@pytest.mark.parametrize("text", ["rwkv", "xlstm"])
def test_generation_refuses_a_model_without_dynamic_cache(models_folder: Path, text: str) -> None:
    with pytest.raises(ValueError, match=f"{text} does not support DynamicCache"):
        build_any(models_folder, text).chat([Message("user", "What?")])


@pytest.mark.medium
def test_generate_samples_depend_on_seed_image_and_prompt_alone(models_folder: Path) -> None:
    model = build_llava(models_folder, "mistral")
    prompts, pixels = make_prompts(model)
    options = GenerationOptions(max_new_tokens=8, temperature=1.0, num_return_sequences=3, seed=5)
    together = generate(model, prompts, pixels, options)
    assert len(set(together[1])) == 3, "three samples are three draws"

    # Neither the other prompts of the batch nor their order change the samples.
    alone = generate(model, prompts[1:2], pixels[:1], options)
    assert alone[0] == together[1]
    reverse_images = pixels[[1, 2, 0]]
    reverse = generate(model, prompts[::-1], reverse_images, options)
    assert reverse[::-1] == together

    # The seed and the image change them.
    other_seed = replace(options, seed=6)
    assert generate(model, prompts, pixels, other_seed) != together
    other_image = generate(model, prompts[1:2], pixels[1:2], options)
    assert other_image[0] != together[1]


def test_generate_samples_follow_the_distribution_of_the_model(models_folder: Path) -> None:
    """Compare the first tokens of 4,000 samples with the softmax of logits that Transformers has processed."""
    model = build_llava(models_folder, "llama")
    prompts, pixels = make_prompts(model, ["<image> What?"])
    features = model.vision_tower(pixels)
    options = GenerationOptions(
        1, temperature=3.0, top_p=0.8, top_k=20, num_return_sequences=4000, seed=0
    )
    sequences = run(DecodingBatch(model, prompts, features, options))
    drawn = torch.tensor([ids[0] for ids in sequences])

    # The expected distribution, from a plain forward pass and the warpers of Transformers.
    expanded = expand_image_placeholders(prompts[0], model.vision_tower.num_tokens)
    ids = torch.from_numpy(expanded)[None]
    with torch.no_grad():
        embeds = model.splice(ids, features)
        outputs = model.language_model(inputs_embeds=embeds)
    logits = outputs.logits[:, -1]
    for warper in (TemperatureLogitsWarper(3.0), TopKLogitsWarper(20), TopPLogitsWarper(0.8)):
        logits = warper(ids, logits)
    expected = logits.softmax(-1)[0]
    frequencies = torch.bincount(drawn, minlength=len(expected)) / 4000
    assert set(drawn.tolist()) <= set(expected.nonzero().flatten().tolist())
    assert (frequencies - expected).abs().sum() < 0.12
    # Make sure that the bound detects a distribution that is shifted by one token.
    assert (frequencies - expected.roll(1)).abs().sum() > 0.12


def test_generate_beams_equal_transformers(models_folder: Path) -> None:
    model = build_llava(models_folder, "llama")
    prompts, pixels = make_prompts(model)
    options = {
        "num_beams": 3,
        "num_return_sequences": 2,
        "length_penalty": 0.5,
        "max_new_tokens": 6,
    }
    generated = generate(model, prompts, pixels, GenerationOptions(**options))
    sequences = stock_generate(model, prompts, pixels, **options)
    texts = [model.prompt.decode(ids).strip() for ids in sequences]
    assert generated == [texts[:2], texts[2:4], texts[4:]]


@pytest.mark.medium
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_generate_ignores_the_generation_config_of_the_base_model(
    models_folder: Path, sampled: bool, adapted: bool
) -> None:
    """Beam search, with and without sampling, inherits no settings from `generation_config.json` or `config.json`."""
    options = GenerationOptions(
        max_new_tokens=8, num_beams=3, num_return_sequences=2, temperature=float(sampled), seed=1
    )
    model = build_llava(models_folder, "llama")
    if adapted:
        add_lora(model, 2, 4, 0.0)
    prompts, pixels = make_prompts(model)
    expected = generate(model, prompts, pixels, options)
    base = model.language_model
    if adapted:
        base = base.get_base_model()
    inherited = GenerationConfig(
        no_repeat_ngram_size=1,
        suppress_tokens=list(range(40, 200)),
        begin_suppress_tokens=list(range(40, 300)),
        bad_words_ids=[[token] for token in range(200, 260)],
        typical_p=0.1,
        min_p=0.9,
        top_k=1,
        epsilon_cutoff=0.9,
        encoder_repetition_penalty=3.0,
        exponential_decay_length_penalty=(1, 3.0),
        forced_eos_token_id=7,
        early_stopping=True,
        remove_invalid_values=True,
        renormalize_logits=True,
        max_time=1e-9,
        stop_strings=["a"],
    )
    base.generation_config = inherited
    base.config.no_repeat_ngram_size = 1  # where older models have such settings
    assert generate(model, prompts, pixels, options) == expected
    assert base.generation_config is inherited, "the model keeps its settings"


@pytest.mark.parametrize(
    "invalid",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"min_new_tokens": 9, "max_new_tokens": 8},
        {"repetition_penalty": 0},
        {"num_return_sequences": 0},
        {"num_return_sequences": 3},
        {"num_return_sequences": 3, "num_beams": 2},
    ],
    ids=str,
)
def test_generation_options_name_the_invalid_option(invalid: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(invalid))):
        GenerationOptions(**invalid)


# ---- continuous batching ----


def test_decoding_batch_every_prompt_has_its_own_options(models_folder: Path) -> None:
    model = build_llava(models_folder, "qwen2")
    prompts, pixels = make_prompts(model)
    features = model.vision_tower(pixels)
    options = [
        GenerationOptions(4),
        GenerationOptions(9, min_new_tokens=9, temperature=0.7, num_return_sequences=2, seed=1),
        GenerationOptions(6, repetition_penalty=1.5),
    ]
    hashes = [b"a", b"b", b"c"]
    together = run(DecodingBatch(model, prompts, features, options, hashes))
    # The three prompts have no, one and two images.
    alone: list[list[int]] = []
    for i, images in enumerate((None, features[:1], features[1:])):
        batch = DecodingBatch(model, [prompts[i]], images, options[i], [hashes[i]])
        alone += run(batch)
    assert together == alone
    assert [len(ids) for ids in together] == [4, 9, 9, 6]


@pytest.mark.parametrize("text", ["llama", "mamba"])
def test_samples_with_equal_beginnings_share_a_row(models_folder: Path, text: str) -> None:
    """Each sample equals the tokens that its random numbers select from forward passes over its own sequence."""
    model = build_any(models_folder, text)
    prompts, pixels = make_prompts(model)
    features = model.vision_tower(pixels)
    samples, temperature = 5, 0.1
    options = GenerationOptions(7, temperature=temperature, num_return_sequences=samples, seed=3)
    hashes = [b"a", b"b", b"c"]
    rows: list[int] = []

    def count_rows(_: torch.nn.Module, arguments: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if "input_ids" in kwargs:  # a step, and not the prompts
            rows.append(len(kwargs["input_ids"]))

    handle = model.language_model.register_forward_pre_hook(count_rows, with_kwargs=True)
    batch = DecodingBatch(model, prompts, features, options, hashes)
    cancelled = 4
    expected_rows: list[int] = []
    while batch.active:
        batch.step()
        if len(rows) == 2:
            batch.cancel(cancelled)
        beginnings = {(i // samples, tuple(batch.generated_ids[i])) for i in batch.active}
        if beginnings and len(rows) != 2:
            expected_rows.append(len(beginnings))
    handle.remove()
    del rows[1]  # was counted before the sequence was cancelled
    assert rows == expected_rows
    # Some of the samples have separated by now, and some have not.
    assert any(len(prompts) < count < samples * len(prompts) - 1 for count in rows)

    num_images = 0
    for number, (prompt, prompt_hash) in enumerate(zip(prompts, hashes)):
        images = prompt.count(IMAGE_INDEX)
        own_features = features[num_images : num_images + images] if images else None
        num_images += images
        prefix = expand_image_placeholders(prompt, model.vision_tower.num_tokens)
        for sample in range(samples):
            ids = batch.generated_ids[number * samples + sample]
            whole = torch.tensor([[*prefix.tolist(), *ids]])
            with torch.no_grad():
                embeds = model.splice(whole, own_features)
                logits = model.language_model(inputs_embeds=embeds, use_cache=False).logits[0]
            numbers = random_numbers(3, prompt_hash, sample)
            predicted = logits[len(prefix) - 1 : -1] / temperature
            drawn = [int(draw(row[None], torch.tensor([next(numbers)]))) for row in predicted]
            assert drawn == ids


@pytest.mark.medium
@pytest.mark.parametrize("text", [*LANGUAGE_MODELS, "lfm2", "mamba"])
def test_decoding_batch_sequences_join_while_others_are_in_flight(
    models_folder: Path, text: str
) -> None:
    """Longer and shorter prompts than those in the batch join it, before and after a sliding window is full."""
    model = build_any(models_folder, text)
    prompts, pixels = make_prompts(model)
    features = model.vision_tower(pixels)
    sampled = GenerationOptions(6, temperature=0.7, num_return_sequences=2, seed=1)
    # (prompt, image features, options) in the order in which they join.
    requests = [
        (prompts[0], None, GenerationOptions(20)),
        (prompts[2], features[1:], GenerationOptions(9, repetition_penalty=1.5)),
        (prompts[1], features[:1], sampled),
        (prompts[0], None, GenerationOptions(5)),
    ]
    expected: list[list[int]] = []
    for prompt, images, options in requests:
        expected += run(DecodingBatch(model, [prompt], images, options))

    # Start with the first request; after each step, one more joins.
    first_prompt, first_images, first_options = requests[0]
    batch = DecodingBatch(model, [first_prompt], first_images, first_options)
    new_ids = [[1], [2, 3], [4]]
    for (prompt, images, options), ids in zip(requests[1:], new_ids):
        batch.step()
        assert batch.join([prompt], images, options) == ids
    assert run(batch) == expected


@pytest.mark.medium
def test_decoding_batch_that_never_empties_does_not_grow(models_folder: Path) -> None:
    model = build_llava(models_folder, "mistral")
    prompts, _ = make_prompts(model, ["What?"])
    options = GenerationOptions(6, min_new_tokens=6)
    expected = run(DecodingBatch(model, prompts, None, options))[0]
    batch = DecodingBatch(model, prompts, None, options)
    # The prompt, the masked column for CPUs, and six new tokens.
    max_columns = len(prompts[0]) + 1 + 6
    for _ in range(30):
        batch.step()
        batch.step()
        batch.join(prompts, None, options)
        assert batch._mask.shape[1] <= max_columns
        assert len(batch._options) == len(batch.active) <= 3
        finished = set(batch.generated_ids) - set(batch.active)
        for sequence_id in finished:
            assert batch.generated_ids.pop(sequence_id) == expected
    assert run(batch) == [expected] * 3


def test_decoding_batch_cancel_leaves_the_others_unchanged(models_folder: Path) -> None:
    model = build_llava(models_folder, "gemma2")
    prompts, pixels = make_prompts(model)
    features = model.vision_tower(pixels)
    expected = run(DecodingBatch(model, prompts, features, GenerationOptions(8)))
    batch = DecodingBatch(model, prompts, features, GenerationOptions(8))
    assert [sequence_id for sequence_id, _ in batch.step()] == [0, 1, 2]
    batch.cancel(1)
    batch.cancel(1)  # Has no effect.
    assert [sequence_id for sequence_id, _ in batch.step()] == [0, 2]
    assert run(batch) == [expected[0], expected[1][:1], expected[2]]


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer like those of Llama 2 and Mistral, whose tokens are mostly single bytes."""
    names = ["<s>", "</s>", "<unk>", "▁", "▁a", "x", "日", "\n"]
    names += [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


# ---- the length of the context ----


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("text", ["opt", "llama"])
def test_generation_ends_where_the_context_is_full(
    models_folder: Path, text: str, num_beams: int
) -> None:
    model = build_llava(models_folder, text)
    prompts, pixels = make_prompts(model)
    features = encode_images(model, pixels)
    hashes = [b""] * len(prompts)
    options = GenerationOptions(8, min_new_tokens=8, num_beams=num_beams)
    complete = generate(model, prompts, pixels, options)
    num_tokens = model.vision_tower.num_tokens
    lengths = [len(expand_image_placeholders(prompt, num_tokens)) for prompt in prompts]
    assert lengths[0] < lengths[1] < lengths[2]

    # The third prompt has exactly as many tokens as the context. The second one leaves room for fewer than 8 tokens.
    model.config.max_position_embeddings = lengths[2]
    prompts[1] += [prompts[1][-1]] * (lengths[2] - lengths[1] - 3)
    shorter = replace(options, max_new_tokens=3, min_new_tokens=3)
    results = generate_separately(model, prompts, features, options, hashes)
    assert results[0] == complete[0]
    assert results[1] == generate(model, prompts[1:2], pixels[:1], shorter)[0]
    assert isinstance(results[2], ValueError)
    with pytest.raises(ValueError, match=rf"{lengths[2]} tokens.*context"):
        generate(model, prompts, pixels, options)
    assert generate_from_features(model, prompts, features, options, hashes)[2] == [""]


def test_generation_from_prompts_that_all_exceed_the_context_runs_no_model(
    models_folder: Path,
) -> None:
    model = build_llava(models_folder, "opt")
    prompts, pixels = make_prompts(model)
    model.config.max_position_embeddings = 2
    features = encode_images(model, pixels)
    hashes = [b""] * len(prompts)
    results = generate_separately(model, prompts, features, GenerationOptions(), hashes)
    assert all(isinstance(result, ValueError) for result in results)


def test_stream_checks_the_length_of_the_context(models_folder: Path) -> None:
    model = build_llava(models_folder, "opt")
    [prompt], _ = make_prompts(model, TEXTS[:1])
    (expected,) = generate(model, [prompt], None, GenerationOptions(3))[0]
    model.config.max_position_embeddings = len(prompt) + 3
    *_, last = stream(model, prompt, None, GenerationOptions(50))
    assert last == expected
    # The forced beginning of the answer counts too.
    with pytest.raises(ValueError, match="context"):
        list(stream(model, prompt, None, GenerationOptions(start_with="a cat on a mat")))
    model.config.max_position_embeddings = len(prompt)
    with pytest.raises(ValueError, match="context"):
        list(stream(model, prompt, None, GenerationOptions(3)))


def test_stream_refuses_beam_search(models_folder: Path) -> None:
    model = build_llava(models_folder, "mistral")
    [prompt], _ = make_prompts(model, TEXTS[:1])
    with pytest.raises(ValueError, match="num_beams must be 1 when streaming, not 2"):
        list(stream(model, prompt, None, GenerationOptions(num_beams=2)))


# ---- the methods of Llava ----


def test_stream_pieces_add_up_to_the_caption(models_folder: Path) -> None:
    model = build_llava(models_folder, "mistral")
    image = make_images(model, 1)[0].permute(1, 2, 0).numpy()
    pieces = list(model.stream("What is this?", [image], max_new_tokens=12))
    assert len(pieces) > 3
    assert "".join(pieces) == model.caption(image, "What is this?", max_new_tokens=12)


@pytest.mark.medium
@pytest.mark.parametrize("seed", range(12))
def test_stream_equals_generate_for_text_of_any_bytes(models_folder: Path, seed: int) -> None:
    """The model generates random bytes, including incomplete characters, and white space at both ends."""
    model = build_llava(models_folder, "mistral")
    tokenizer = byte_fallback_tokenizer()
    model.prompt = Prompt(tokenizer, "plain")
    prompt = model.prompt.render([Message("user", "What?")], None).input_ids
    options = GenerationOptions(max_new_tokens=30, temperature=1.0, seed=seed)
    with torch.no_grad():  # make all tokens about equally likely
        model.language_model.get_output_embeddings().weight.mul_(0.1)
    texts = list(stream(model, prompt, None, options))
    assert texts[-1] == generate(model, [prompt], None, options)[0][0]
    for text, following in pairwise(texts):
        assert following.startswith(text)


def test_caption_uses_no_deprecated_names(models_folder: Path) -> None:
    model = build_llava(models_folder, "mistral")
    image = make_images(model, 1)[0].permute(1, 2, 0).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model.caption(image, max_new_tokens=2)


def test_chat_continues_a_conversation(models_folder: Path) -> None:
    model = build_llava(models_folder, "qwen2")
    first, second = (pixels.permute(1, 2, 0).numpy() for pixels in make_images(model, 2))
    turns = [Message("user", "What?"), Message("assistant", "a cat"), Message("user", "Where?")]
    answer = model.chat(turns, [first], max_new_tokens=6)
    # Without a placeholder, the image is put before the text of the first user turn.
    with_placeholder = [Message("user", "<image>\nWhat?"), *turns[1:]]
    assert model.chat(with_placeholder, [first], max_new_tokens=6) == answer
    assert model.chat(turns[:1], [first], max_new_tokens=6) != answer, "later turns matter"
    assert model.chat(turns, [second], max_new_tokens=6) != answer, "the image matters"
    with pytest.raises(ValueError, match=r"2 image.*\b1\b"):
        model.chat(with_placeholder, [first, second])
    system = Message("system", "Be brief.")
    answer = model.chat([system, *turns], [first], max_new_tokens=6)
    assert model.chat([system, *with_placeholder], [first], max_new_tokens=6) == answer


def test_caption_does_not_depend_on_the_batch_size(models_folder: Path) -> None:
    model = build_llava(models_folder, "llama")
    images = [pixels.permute(1, 2, 0).numpy() for pixels in make_images(model, 3)]
    options = {"instruction": "What?", "num_return_sequences": 2, "seed": 0, "max_new_tokens": 6}
    together = model.caption(images, **options)
    assert [len(texts) for texts in together] == [2, 2, 2]
    assert model.caption(images, batch_size=2, **options) == together
    assert model.caption([], **options) == []


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_decoding_batch_finishes_only_the_sequence_whose_logits_are_not_finite(
    models_folder: Path, temperature: float
) -> None:
    """The other sequences of the batch generate the same tokens as without the failed one."""
    model = build_llava(models_folder).eval()
    prompts, pixels = make_prompts(model)
    options = GenerationOptions(6, temperature=temperature, seed=1)
    hashes = [b"a", b"b", b"c"][: len(prompts)]
    features = model.vision_tower(pixels)

    undisturbed = DecodingBatch(model, prompts, features, options, hashes)
    expected = run(undisturbed)
    batch = DecodingBatch(model, prompts, features, options, hashes)
    batch.step()
    # Break the logits of sequence 0. They are inference tensors, which can be changed in this mode only.
    with torch.inference_mode():
        batch._logits[0, 3] = float("nan")
    run(batch)
    assert list(batch.errors) == [0]
    assert isinstance(batch.errors[0], FloatingPointError)
    assert batch.generated_ids[0] == expected[0][:1]
    assert [batch.generated_ids[i] for i in range(1, len(prompts))] == expected[1:]
    with pytest.raises(FloatingPointError):
        batch.raise_errors()


# ---- a forced beginning ----


def test_start_is_tokenized_as_in_a_trained_answer(models_folder: Path) -> None:
    """`start_with` has the same tokens as the beginning of an answer in training, and is part of the returned text."""
    model = build_llava(models_folder)
    prompts, pixels = make_prompts(model)
    options = GenerationOptions(max_new_tokens=5, start_with=" A photo of ")
    features = model.vision_tower(pixels)
    answers = run(DecodingBatch(model, prompts, features, options))
    _, (trained,) = model.prompt.render_branches([Message("user", "x")], ["A photo of a dog"])
    start = model.prompt.encode_start("A photo of")
    assert len(start) > 1
    assert trained[: len(start)] == start
    for answer in answers:
        assert answer[: len(start)] == start
        assert len(answer) <= len(start) + 5
    for (text,) in generate(model, prompts, pixels, options):
        assert text.startswith("A photo of")


@pytest.mark.parametrize("beams", [1, 3])
def test_start_is_continued_as_by_transformers(models_folder: Path, beams: int) -> None:
    model = build_llava(models_folder)
    prompts, pixels = make_prompts(model)
    options = GenerationOptions(
        max_new_tokens=8, min_new_tokens=3, num_beams=beams, start_with="A photo"
    )
    start = model.prompt.encode_start("A photo")
    longer = [[*prompt, *start] for prompt in prompts]
    expected = stock_generate(
        model, longer, pixels, max_new_tokens=8, min_new_tokens=3, num_beams=beams
    )
    texts = [text for (text,) in generate(model, prompts, pixels, options)]
    assert texts == [model.prompt.decode([*start, *ids]).strip() for ids in expected]


def test_repetition_penalty_of_beam_search_includes_the_start(models_folder: Path) -> None:
    """Forbid all tokens except those of the start and another one. A large penalty leaves the other one."""
    model = build_llava(models_folder, "llama")
    prompts, pixels = make_prompts(model)
    options = GenerationOptions(
        max_new_tokens=1, min_new_tokens=1, start_with="A photo", repetition_penalty=1e6
    )
    start = model.prompt.encode_start("A photo")
    other = next(id for id in range(50, 300) if id not in start)

    def leave_few(_: torch.nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        logits = torch.full_like(output, -50.0)
        logits[..., start] = 1.0
        logits[..., other] = 0.9
        return logits

    handle = model.language_model.get_output_embeddings().register_forward_hook(leave_few)
    greedy = generate(model, prompts, pixels, options)
    beams = generate(model, prompts, pixels, replace(options, num_beams=2))
    handle.remove()
    assert beams == greedy
    assert greedy[0] == [model.prompt.decode([*start, other]).strip()]


def test_beam_search_is_refused_for_families_that_do_not_support_it(models_folder: Path) -> None:
    model = build_llava(models_folder, "llama")
    prompts, pixels = make_prompts(model)

    def prepare_inputs_for_generation(input_ids: torch.Tensor) -> None: ...

    model.language_model.prepare_inputs_for_generation = prepare_inputs_for_generation
    with pytest.raises(ValueError, match="num_beams=2: .*beam search.* llama; use num_beams 1"):
        generate(model, prompts, pixels, GenerationOptions(num_beams=2))
    assert generate(model, prompts, pixels, GenerationOptions(max_new_tokens=2))


def test_start_may_differ_within_a_batch(models_folder: Path) -> None:
    model = build_llava(models_folder)
    prompts, pixels = make_prompts(model)
    options = [
        GenerationOptions(max_new_tokens=6, start_with=text) for text in ("", "a", "two dogs")
    ]
    together = run(DecodingBatch(model, prompts, model.vision_tower(pixels), options))
    num_images = [0, 1, 2]
    for index, prompt in enumerate(prompts):
        first = sum(num_images[:index])
        own = pixels[first : first + num_images[index]]
        features = model.vision_tower(own) if len(own) else None
        assert run(DecodingBatch(model, [prompt], features, options[index])) == [together[index]]


def test_start_is_the_first_text_of_a_stream(models_folder: Path) -> None:
    model = build_llava(models_folder)
    prompts, _ = make_prompts(model, ["What?"])
    options = GenerationOptions(max_new_tokens=4, start_with="two dogs")
    pieces = list(stream(model, prompts[0], None, options))
    assert all(piece.startswith("two dogs") for piece in pieces)
    assert pieces[-1] == generate(model, prompts, None, options)[0][0]

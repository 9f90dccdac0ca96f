"""Decoding in static buffers, compared with decoding in a `DynamicCache`; without a GPU, so without graphs."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from model_helpers import make_images
from synchronizations import SynchronizationFinder
from tiny import build_llava
from transformers import AutoModelForCausalLM, FalconConfig, Llama4TextConfig

from llava_simplified.model import generation, static_decoding
from llava_simplified.model.generation import DecodingBatch
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.model.llava import Llava
from llava_simplified.model.lora import add_lora
from llava_simplified.model.static_decoding import (
    BuffersTooLargeError,
    StaticDecoder,
    StaticDecodingError,
    find_static_decoder,
    num_columns,
    num_slots,
)
from llava_simplified.prompt import Message

TEXTS = ["What?", "<image>\nWhat is this?", "Compare <image> with <image>, please, in a few words."]


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the buffers so small that sequences have to move every few steps."""
    monkeypatch.setattr(static_decoding, "num_columns", lambda length: length + length % 2)
    monkeypatch.setattr(static_decoding, "RESERVED_COLUMNS", 3)


def use_static_decoder(monkeypatch: pytest.MonkeyPatch, model: Llava) -> StaticDecoder:
    """Decode as on a GPU, but without graphs."""
    decoder = StaticDecoder(model, use_graphs=False)
    monkeypatch.setattr(generation, "find_static_decoder", lambda _: decoder)
    return decoder


def make_requests(model: Llava) -> list[tuple[list[int], torch.Tensor | None, GenerationOptions]]:
    """Return prompts of different lengths with no, one and two images, greedy and sampled."""
    prompts = [model.prompt.render([Message("user", text)], None).input_ids for text in TEXTS]
    features = model.vision_tower(make_images(model, 3))
    sampled = GenerationOptions(11, temperature=0.7, num_return_sequences=2, seed=1)
    return [
        (prompts[0], None, GenerationOptions(25)),
        (prompts[2], features[1:], GenerationOptions(9, repetition_penalty=1.5)),
        (prompts[1], features[:1], sampled),
        (prompts[0], None, GenerationOptions(5)),
    ]


def generate_with_joins(model: Llava) -> list[list[int]]:
    """Add the requests to one batch, one after each step; return the tokens of all sequences."""
    requests = make_requests(model)
    batch = DecodingBatch(model, [requests[0][0]], requests[0][1], requests[0][2])
    for prompt, features, options in requests[1:]:
        batch.step()
        batch.join([prompt], features, options)
    batch.cancel(0)
    return run(batch)


def run(batch: DecodingBatch) -> list[list[int]]:
    while batch.active:
        batch.step()
    return list(batch.generated_ids.values())


@pytest.mark.parametrize("text", ["mistral", "llama", "llama with LoRA", "qwen2", "phi"])
@pytest.mark.usefixtures("small_buffers")
def test_static_decoding_equals_decoding_in_a_dynamic_cache(
    models_folder: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """The cases include grouped-query attention, a sliding window, and sequences that join and end at different steps."""
    model = build_llava(models_folder, text.split()[0])
    if "LoRA" in text:
        add_lora(model, 2, 4)
        for name, parameter in model.language_model.named_parameters():
            if "lora_B" in name:  # zero at first, so that the adapter would have no effect
                torch.nn.init.normal_(parameter, std=0.1)
    expected = generate_with_joins(model)
    decoder = use_static_decoder(monkeypatch, model)
    steps: list[tuple[int, int]] = []
    step = decoder.step

    def recorded(token_ids: list[int]) -> torch.Tensor:
        logits = step(token_ids)
        buffers: Any = decoder._current
        steps.append((buffers.slots, buffers.columns))
        return logits

    monkeypatch.setattr(decoder, "step", recorded)
    assert generate_with_joins(model) == expected
    assert {slots for slots, _ in steps} >= {1, 2, 4}, "rows move together"
    assert len({columns for _, columns in steps}) > 3, "buffers grow"
    assert not decoder.is_loaded(None) and decoder._current is None


@pytest.mark.usefixtures("small_buffers")
def test_two_batches_take_turns_in_the_buffers(
    models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_llava(models_folder, "llama")
    requests = make_requests(model)[:2]
    expected = [run(DecodingBatch(model, [prompt], *rest)) for prompt, *rest in requests]
    use_static_decoder(monkeypatch, model)
    batches = [DecodingBatch(model, [prompt], *rest) for prompt, *rest in requests]
    while any(batch.active for batch in batches):
        for batch in batches:
            batch.step()
    assert [list(batch.generated_ids.values()) for batch in batches] == expected


def test_values_that_are_not_finite_do_not_spread_to_later_batches(
    models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A masked column has the weight 0, but 0 * NaN is NaN."""
    model = build_llava(models_folder, "llama")
    prompt, features, options = make_requests(model)[1]
    expected = run(DecodingBatch(model, [prompt], features, options))
    decoder = use_static_decoder(monkeypatch, model)
    assert run(DecodingBatch(model, [prompt], features, options)) == expected
    assert decoder._storage is not None
    with torch.inference_mode():
        for keys, values in decoder._storage.flat:
            keys.fill_(torch.nan)
            values.fill_(torch.nan)
    assert run(DecodingBatch(model, [prompt], features, options)) == expected


def test_static_step_reads_the_device_once(
    models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph cannot contain a read. Whatever the options are, the host reads only the new tokens, after the step."""
    model = build_llava(models_folder, "mistral")
    use_static_decoder(monkeypatch, model)
    requests = make_requests(model)
    prompts = [prompt for prompt, _, _ in requests[:3]]
    features = torch.cat([requests[1][1], requests[2][1]])
    options = [
        GenerationOptions(9, repetition_penalty=1.5),
        GenerationOptions(9, min_new_tokens=9, temperature=0.7, top_k=9, top_p=0.9),
        GenerationOptions(9, temperature=0.7, num_return_sequences=2),
    ]
    batch = DecodingBatch(model, prompts, features, options)
    batch.step()
    with SynchronizationFinder() as finder:
        batch.step()
    (place,) = finder.places
    assert place.startswith("tolist < generation.py:_choose_tokens")


def test_failed_recording_continues_in_the_dynamic_cache_and_says_why(
    models_folder: Path, monkeypatch: pytest.MonkeyPatch, package_log: pytest.LogCaptureFixture
) -> None:
    model = build_llava(models_folder, "llama")
    prompt, features, options = make_requests(model)[1]
    expected = run(DecodingBatch(model, [prompt], features, options))
    decoder = use_static_decoder(monkeypatch, model)
    step = decoder.step

    def fail_at_third(token_ids: list[int]) -> torch.Tensor:
        if len(batch.generated_ids[0]) == 3:
            raise StaticDecodingError("the step cannot be recorded")
        return step(token_ids)

    monkeypatch.setattr(decoder, "step", fail_at_third)
    batch = DecodingBatch(model, [prompt], features, options)
    assert run(batch) == expected
    (message,) = package_log.messages
    assert "without CUDA graphs: the step cannot be recorded" in message


def pretend_to_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the streams of CUDA, so that steps can be warmed up without a GPU."""
    monkeypatch.setattr(torch.cuda, "Stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())


def test_any_error_while_recording_continues_in_the_dynamic_cache(
    models_folder: Path, monkeypatch: pytest.MonkeyPatch, package_log: pytest.LogCaptureFixture
) -> None:
    """A model may refuse the 4D mask of a step with any exception; Falcon with ALiBi raises a ValueError."""
    model = build_llava(models_folder, "llama")
    prompt, features, options = make_requests(model)[1]
    expected = run(DecodingBatch(model, [prompt], features, options))
    pretend_to_record(monkeypatch)
    decoder = StaticDecoder(model, use_graphs=True)
    monkeypatch.setattr(generation, "find_static_decoder", lambda _: decoder)

    def refuse(_: Any) -> None:
        raise ValueError("a 4D mask is not supported")

    monkeypatch.setattr(decoder, "_forward", refuse)
    assert run(DecodingBatch(model, [prompt], features, options)) == expected
    (message,) = package_log.messages
    assert "without CUDA graphs: the step cannot be recorded (a 4D mask" in message


def test_models_that_compute_positions_have_no_static_decoder(
    models_folder: Path, monkeypatch: pytest.MonkeyPatch, package_log: pytest.LogCaptureFixture
) -> None:
    model = build_llava(models_folder, "llama").requires_grad_(False)
    monkeypatch.setattr(Llava, "device", torch.device("cuda"))
    assert find_static_decoder(model) is not None
    falcon = build_llava(models_folder, "llama")
    falcon.language_model = AutoModelForCausalLM.from_config(
        FalconConfig(vocab_size=50, hidden_size=32, num_attention_heads=4, alibi=True)
    )
    falcon.requires_grad_(False)
    falcon.config._attn_implementation = "sdpa"
    assert find_static_decoder(falcon) is None
    (message,) = package_log.messages
    assert "falcon is decoded without CUDA graphs: it does not accept `position_ids`" in message


def test_layers_with_other_masks_are_decoded_in_the_dynamic_cache(
    models_folder: Path, monkeypatch: pytest.MonkeyPatch, package_log: pytest.LogCaptureFixture
) -> None:
    """A token of a layer with chunked attention does not attend to earlier chunks."""
    model = build_llava(models_folder, "llama")
    config = Llama4TextConfig(
        vocab_size=model.config.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        intermediate_size_mlp=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        attention_chunk_size=16,
        no_rope_layers=[1, 0],
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    model.language_model = AutoModelForCausalLM.from_config(config).eval()
    prompt, features, options = make_requests(model)[2]
    expected = run(DecodingBatch(model, [prompt], features, options))
    use_static_decoder(monkeypatch, model)
    assert run(DecodingBatch(model, [prompt], features, options)) == expected
    (message,) = package_log.messages
    assert "layers of the types chunked_attention" in message


def test_batch_that_is_too_large_is_decoded_in_the_dynamic_cache(
    models_folder: Path, monkeypatch: pytest.MonkeyPatch, package_log: pytest.LogCaptureFixture
) -> None:
    """When some sequences have ended, the remaining ones fit into static buffers."""
    model = build_llava(models_folder, "llama")
    expected = generate_with_joins(model)
    decoder = use_static_decoder(monkeypatch, model)
    events: list[str] = []
    step = decoder.step

    def check_memory(layers: Any, slots: int, columns: int, own: int) -> None:
        if slots > 2:
            events.append("refused")
            raise BuffersTooLargeError("the buffers are too large")

    def recorded(token_ids: list[int]) -> torch.Tensor:
        events.append("step")
        return step(token_ids)

    monkeypatch.setattr(static_decoding, "_check_memory", check_memory)
    monkeypatch.setattr(decoder, "step", recorded)
    assert generate_with_joins(model) == expected
    assert events[0] == "step" and "refused" in events and events[-1] == "step"
    (message,) = package_log.messages
    assert "the buffers are too large" in message


def test_cpu_models_have_no_static_decoder(models_folder: Path) -> None:
    assert find_static_decoder(build_llava(models_folder, "llama")) is None


def test_sizes_are_rounded_up_to_few_values() -> None:
    assert [num_slots(rows) for rows in (1, 2, 3, 5, 64, 65)] == [1, 2, 4, 8, 64, 128]
    sizes = {num_columns(length) for length in range(1, 4097)}
    assert len(sizes) < 30
    for length in range(1, 4097):
        assert length <= num_columns(length) <= 1.25 * length + 64

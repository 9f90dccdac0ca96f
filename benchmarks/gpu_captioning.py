"""Section "captioning" of `bench_gpu.py`: captions per second and memory, compared with stock LLaVA's `generate`.

Both sides have the same weights in bfloat16, without adapters, and the same images and prompts. With random weights,
the model generates no end token, so the caption lengths are drawn beforehand, and are the same for both sides. Every
batch is generated twice, and the second run is measured: the first one compiles, records CUDA graphs and allocates
memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_exactness import dynamic_cache
from gpu_machine import Limits
from gpu_models import build, caption_prompt, make_images, to_stock
from gpu_report import Report, Values
from gpu_workload import Workload
from transformers import StoppingCriteria
from workload import MAX_CAPTION_LENGTH, draw_caption_lengths

from llava_simplified.model.generation import DecodingBatch
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import IMAGE_INDEX

TEMPERATURE = 0.7


def run(workload: Workload, report: Report) -> None:
    """Run the section."""
    model = build(workload, workload.large).requires_grad_(False)
    stock = to_stock(model)
    limits = Limits.measure(workload)
    # (images in a batch, samples per image)
    sizes = workload.pick([(64, 1), (64, 3), (16, 1), (16, 3), (256, 1)], [(2, 1), (2, 3)])
    for batch, samples in sizes:
        name = f"batch {batch}, {samples} sample(s)"
        ours = report.attempt(
            f"ours, {name}", partial(measure_ours, workload, model, batch, samples)
        )
        if report.seconds_left > 10:  # stock LLaVA needs about this long for a batch
            side = partial(measure_stock, workload, model, stock, batch, samples)
            theirs = report.attempt(f"stock generate, {name}", side)
            _add_ratio(report, name, ours, theirs)
    # Measure the two phases of our side separately, and compare each with the limits of the device.
    batch, _ = sizes[0]
    report.attempt(
        f"prefill, batch {batch}", partial(measure_prefill, workload, model, batch, limits)
    )
    report.attempt(
        f"decode, batch {batch}", partial(measure_decode, workload, model, batch, limits)
    )
    with dynamic_cache():
        report.attempt(
            f"decode without graphs, batch {batch}",
            partial(measure_decode, workload, model, batch, limits),
        )
    if workload.is_tiny:
        return  # compiling for a CPU would take minutes
    # A static cache makes `generate` compile the whole model, which takes about a minute.
    compiled = partial(
        measure_stock, workload, model, stock, batch, 1, cache_implementation="static"
    )
    report.attempt(f"stock, static cache, batch {batch}", compiled, seconds=40)


def _add_ratio(report: Report, name: str, ours: Values | None, stock: Values | None) -> None:
    """Write our speed / stock's speed, unless a side has failed and has no values."""
    if ours and stock:
        ratio = ours["captions/s"] / stock["captions/s"]
        report.add(f"ours / stock, {name}", ratio=ratio)


# ---- whole batches ----


def measure_twice(workload: Workload, run_batch: Callable[[], int]) -> Values:
    """Run a batch twice, and measure the second run.

    Args:
        workload: The device.
        run_batch: Returns the number of captions.
    """
    run_batch()
    if workload.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    workload.synchronize()
    start = time.perf_counter()
    count = run_batch()
    workload.synchronize()
    seconds = time.perf_counter() - start
    return {"captions/s": count / seconds, "seconds": seconds, "memory": workload.peak_memory()}


def make_inputs(workload: Workload, count: int) -> tuple[torch.Tensor, list[int]]:
    """Return `count` uint8 images in the memory of the CPU, and the caption length of each."""
    images = list(make_images(workload).values())
    pixels = torch.stack([images[index % len(images)] for index in range(count)])
    return pixels, draw_caption_lengths(count)


def start_batch(
    model: Llava, pixels: torch.Tensor, lengths: list[int], samples: int
) -> DecodingBatch:
    """Encode the images, and prefill the KV cache."""
    options = []
    for length in lengths:
        # With an equal minimum and maximum, a caption ends at exactly this length.
        option = GenerationOptions(
            max_new_tokens=length,
            min_new_tokens=length,
            temperature=TEMPERATURE,
            num_return_sequences=samples,
            seed=0,
        )
        options.append(option)
    prompts = [caption_prompt(model)] * len(lengths)
    with torch.inference_mode():
        features = model.vision_tower(pixels.to(model.device))
        return DecodingBatch(model, prompts, features, options)


def measure_ours(workload: Workload, model: Llava, count: int, samples: int) -> Values:
    """Caption a batch with our decoding loop."""
    pixels, lengths = make_inputs(workload, count)

    def run_batch() -> int:
        batch = start_batch(model, pixels, lengths, samples)
        while batch.active:
            batch.step()
        batch.raise_errors()
        return len(batch.generated_ids)

    return measure_twice(workload, run_batch)


class EndsAtLength(StoppingCriteria):
    """End each caption at the length that was drawn for its image."""

    def __init__(self, limits: torch.Tensor) -> None:
        self.limits = limits

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.limits


def measure_stock(
    workload: Workload, model: Llava, stock: Any, count: int, samples: int, **options: Any
) -> Values:
    """Caption a batch with `LlavaForConditionalGeneration.generate`."""
    pixels, lengths = make_inputs(workload, count)
    # Stock LLaVA expects one placeholder for each image token, and our side expects one for each image.
    prompt = caption_prompt(model)
    position = prompt.index(IMAGE_INDEX)
    image = [stock.config.image_token_id] * model.vision_tower.num_tokens
    ids = torch.tensor(prompt[:position] + image + prompt[position + 1 :], device=model.device)
    # `generate` has one maximum for the whole batch. A stopping criterion ends each caption at its own length.
    limits = torch.tensor(lengths, device=model.device) + len(ids)

    def run_batch() -> int:
        # Our side normalizes images on the device, so do the same here.
        normalized = model.vision_tower.transform.normalize(pixels.to(model.device))
        with torch.inference_mode():
            output = stock.generate(
                input_ids=ids.expand(count, -1),
                attention_mask=torch.ones(count, len(ids), dtype=torch.long, device=model.device),
                pixel_values=normalized.to(stock.dtype),
                max_new_tokens=MAX_CAPTION_LENGTH,
                min_new_tokens=MAX_CAPTION_LENGTH,
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=0,
                num_return_sequences=samples,
                stopping_criteria=[EndsAtLength(limits.repeat_interleave(samples))],
                pad_token_id=1,
                eos_token_id=model.prompt.stop_ids,
                **options,
            )
        return len(output)

    return measure_twice(workload, run_batch)


# ---- prefill and decode separately ----


def language_model_weights(model: Llava) -> tuple[int, int]:
    """Return the number of weights of all layers, and of the lm_head."""
    head = model.language_model.get_output_embeddings().weight.numel()
    embeddings = model.language_model.get_input_embeddings().weight.numel()
    total = sum(parameter.numel() for parameter in model.language_model.parameters())
    layers = total - embeddings
    # A tied lm_head shares its weights with the embedding table, so they were subtracted above.
    if not model.language_model.config.tie_word_embeddings:
        layers -= head
    return layers, head


def measure_prefill(workload: Workload, model: Llava, count: int, limits: Limits) -> Values:
    """Encode and prefill a batch, and compare the FLOP/s with those of a large matrix product."""
    pixels, lengths = make_inputs(workload, count)

    def run_batch() -> int:
        return len(start_batch(model, pixels, lengths, samples=1).active)

    values = measure_twice(workload, run_batch)
    layers, head = language_model_weights(model)
    tower = sum(parameter.numel() for parameter in model.vision_tower.parameters())
    # The placeholder of the image is replaced by `num_tokens` positions.
    positions = len(caption_prompt(model)) - 1 + model.vision_tower.num_tokens
    # A weight costs two FLOPs per position (multiply, add). The lm_head is needed at the last position only.
    flops = 2 * count * (positions * layers + head + model.vision_tower.num_tokens * tower)
    rate = flops / values["seconds"]
    return {
        "seconds": values["seconds"],
        "TFLOP/s": rate / 1e12,
        "share of matmul": rate / limits.flops,
    }


def measure_decode(workload: Workload, model: Llava, count: int, limits: Limits) -> Values:
    """Decode with a full batch, and compare the bytes per second with the memory bandwidth.

    Only bytes that every step must read are counted: the weights, and the keys and values.
    """
    steps = workload.pick(24, 3)
    warm_up = 3
    pixels, _ = make_inputs(workload, count)
    # The captions must be long enough that none of them ends during the measurement.
    batch = start_batch(model, pixels, [steps + warm_up + 2] * count, samples=1)
    for _ in range(warm_up):
        batch.step()
    workload.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        batch.step()
    workload.synchronize()
    seconds = (time.perf_counter() - start) / steps
    # Free the buffers for the next measurement.
    for sequence_id in list(batch.active):
        batch.cancel(sequence_id)

    config = model.language_model.config
    itemsize = model.language_model.dtype.itemsize
    # The KV cache grows while it is measured. Use its length in the middle of the measurement.
    positions = len(caption_prompt(model)) - 1 + model.vision_tower.num_tokens + warm_up + steps / 2
    head_size = config.hidden_size // config.num_attention_heads
    # The factor 2 stands for keys and values.
    per_position = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size
    layers, head = language_model_weights(model)
    num_bytes = itemsize * (layers + head + count * positions * per_position)
    return {
        "ms per step": 1000 * seconds,
        "tokens/s": count / seconds,
        "GB/s": num_bytes / seconds / 1e9,
        "share of bandwidth": num_bytes / seconds / limits.bandwidth,
    }

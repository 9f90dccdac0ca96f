"""Section "exactness" of `bench_gpu.py`: check on this device the equalities that the tests check on a CPU.

All weights of a small model except the vision tower's are trained, so that all of their gradients are compared. The
reported `difference` is the largest difference of a loss or a gradient, divided by its largest absolute value.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from gpu_models import (
    build,
    caption_prompt,
    make_images,
    make_records,
    to_stock,
)
from gpu_report import Report, Values
from gpu_workload import Workload
from torch.nn.functional import cross_entropy

from llava_simplified.data.collate import Collator, Example
from llava_simplified.data.dataset import CaptionDataset
from llava_simplified.model import chunked_loss, generation
from llava_simplified.model.generation import DecodingBatch
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import IMAGE_INDEX

Rows = list[Example | list[Example]]
Result = tuple[torch.Tensor, dict[str, torch.Tensor]]  # loss, gradients by name

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
# Half-precision kernels may differ from each other by rounding errors.
HALF_PRECISION_TOLERANCE = 0.05


def run(workload: Workload, report: Report) -> None:
    """Run the section."""
    # TF32 rounds the inputs of float32 products to 10 bits, which would hide errors.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    for dtype in TOLERANCES:
        name = str(dtype).removeprefix("torch.")
        for comparison, compare in COMPARISONS.items():
            with computed_in(dtype):
                report.attempt(f"{comparison}, {name}", partial(compare, workload, dtype))
    report.attempt("batched == single, greedy, float32", partial(compare_batch_sizes, workload))
    report.attempt("graphs == dynamic cache, greedy", partial(compare_decoders, workload))
    report.attempt("ours == stock generate, greedy", partial(compare_with_stock, workload))
    report.attempt("loss in chunks, float32", partial(compare_chunks, workload))
    report.attempt(
        "half precision compared with float32", partial(compare_half_precision, workload)
    )
    # Expected seconds of each comparison. FlexAttention is slow to start, because it is compiled.
    kernels = {"flex_attention": 40.0}
    if find_spec("flash_attn"):
        kernels["flash_attention_2"] = 5.0
    for kernel, seconds in kernels.items():
        measure = partial(compare_kernel, workload, kernel)
        report.attempt(f"{kernel} == sdpa, packed", measure, seconds)
    report.attempt("flex_attention == sdpa, shared prefixes", partial(compare_flex, workload))


@contextmanager
def computed_in(dtype: torch.dtype) -> Iterator[None]:
    """Within a `with` block, let normalization layers compute in float64 if that is the data type of the model.

    The normalization layers of Transformers convert their input to `torch.float32`, which would limit the precision.
    They look up this name whenever they run, so it refers to float64 within the block.
    """
    single = torch.float32
    if dtype == torch.float64:
        torch.float32 = dtype  # type: ignore[misc]
    try:
        yield
    finally:
        torch.float32 = single  # type: ignore[misc]


# ---- batches ----


def make_examples(workload: Workload, model: Llava, share_prefix: bool) -> list[Example]:
    """Return examples of 3 images with 3 captions each."""
    records = make_records(3, captions=3)
    dataset = CaptionDataset(
        records,
        model.prompt,
        "",
        model.vision_tower.transform,
        share_prefix=share_prefix,
        features=make_images(workload),
    )
    return [dataset[index] for index in range(len(dataset))]


def collate(model: Llava, rows: Rows) -> dict[str, Any]:
    """Return a batch on the model's device. Examples in a list are packed into one row."""
    batch: dict[str, Any] = dict(Collator(model.vision_tower.num_tokens, 1)(rows))
    del batch["metadata"]
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def loss_and_gradients(model: Llava, rows: Rows) -> Result:
    """Return the loss of a batch, and the gradients of all weights that it depends on."""
    model.zero_grad()
    loss = model(**collate(model, rows)).loss
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.clone()
    return loss.detach(), gradients


def build_trained(workload: Workload, dtype: torch.dtype) -> Llava:
    """Build the small model, with a projector of the same data type."""
    model = build(workload, workload.small, dtype)
    model.projector.to(dtype)
    model.vision_tower.requires_grad_(False)
    return model


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference of two tensors, divided by the largest expected value."""
    scale = expected.double().abs().max().clamp_min(1e-30)
    return float((actual.double() - expected.double()).abs().max() / scale)


def check(actual: Result, expected: Result, tolerance: float) -> Values:
    """Return the largest difference of losses and gradients.

    Raises:
        AssertionError: A difference exceeds the tolerance, or the two results have gradients of different weights.
    """
    actual_loss, actual_gradients = actual
    expected_loss, expected_gradients = expected
    different = sorted(actual_gradients.keys() ^ expected_gradients.keys())
    assert not different, f"only one of the two results has gradients of {', '.join(different)}"
    differences = [relative_difference(actual_loss, expected_loss)]
    for name, gradient in expected_gradients.items():
        differences.append(relative_difference(actual_gradients[name], gradient))
    worst = max(differences)
    # A comparison with NaN is false, so NaN fails too.
    assert worst <= tolerance, f"the difference is {worst:.3g}, but at most {tolerance} is allowed"
    return {"difference": worst, "limit": tolerance}


# ---- losses and gradients ----


def compare_shared(workload: Workload, dtype: torch.dtype) -> Values:
    """Compare captions that share a prompt with the same captions as separate sequences."""
    model = build_trained(workload, dtype)
    separate: Rows = list(make_examples(workload, model, share_prefix=False))
    shared: Rows = list(make_examples(workload, model, share_prefix=True))
    expected = loss_and_gradients(model, separate)
    return check(loss_and_gradients(model, shared), expected, TOLERANCES[dtype])


def compare_packed(workload: Workload, dtype: torch.dtype) -> Values:
    """Compare examples packed into one row with one example per row."""
    model = build_trained(workload, dtype)
    examples = make_examples(workload, model, share_prefix=False)
    expected = loss_and_gradients(model, list(examples))
    return check(loss_and_gradients(model, [examples]), expected, TOLERANCES[dtype])


def compare_positions(workload: Workload, dtype: torch.dtype) -> Values:
    """Compare logits computed at trained positions only with those computed at all positions."""
    model = build_trained(workload, dtype)
    batch = collate(model, list(make_examples(workload, model, share_prefix=False)))
    with torch.no_grad():
        logits = model(**batch).logits
        features = model.vision_tower(batch["pixel_values"])
        embeds = model.splice(batch["input_ids"], features, batch["image_positions"])
        outputs = model.language_model(
            inputs_embeds=embeds, attention_mask=batch["attention_mask"], use_cache=False
        )
    expected = outputs.logits.flatten(0, 1)[batch["logit_positions"]]
    return check((logits, {}), (expected, {}), TOLERANCES[dtype])


COMPARISONS = {
    "shared == separate": compare_shared,
    "packed == unpacked": compare_packed,
    "logits where trained == full": compare_positions,
}


def compare_chunks(workload: Workload) -> Values:
    """Compare the loss computed in chunks with PyTorch's."""
    logits = torch.randn(64, 1000, device=workload.device, requires_grad=True)
    labels = torch.randint(0, 1000, (64,), device=workload.device)
    expected = cross_entropy(logits, labels, reduction="sum")
    (expected_grad,) = torch.autograd.grad(expected, logits)
    # With 7 rows per chunk, the last chunk of the 64 rows is smaller than the others.
    before = chunked_loss.CHUNK_SIZE
    chunked_loss.CHUNK_SIZE = 7 * 1000
    try:
        loss = chunked_loss.token_cross_entropy(logits, labels).sum()
    finally:
        chunked_loss.CHUNK_SIZE = before
    (grad,) = torch.autograd.grad(loss, logits)
    actual = (loss.detach(), {"logits": grad})
    return check(actual, (expected.detach(), {"logits": expected_grad}), 1e-5)


# ---- attention kernels ----


def compare_kernel(workload: Workload, kernel: str) -> Values:
    """Compare packed rows, forward and backward, between another attention kernel and sdpa."""
    return _compare_kernel(workload, kernel, share_prefix=False)


def compare_flex(workload: Workload) -> Values:
    """Compare captions that share a prompt, forward and backward, between FlexAttention and sdpa."""
    return _compare_kernel(workload, "flex_attention", share_prefix=True)


def _compare_kernel(workload: Workload, kernel: str, share_prefix: bool) -> Values:
    """Compare losses and gradients of packed examples between an attention kernel and sdpa."""
    if workload.device.type == "cpu":
        return {"skipped": f"{kernel} has no backward pass on a CPU"}
    is_flash = kernel.startswith("flash")
    # FlashAttention supports only half precision.
    dtype = torch.bfloat16 if is_flash else torch.float32
    model = build_trained(workload, dtype)
    rows: Rows = [make_examples(workload, model, share_prefix)]
    expected = loss_and_gradients(model, rows)
    model.language_model.set_attn_implementation(kernel)
    # The Triton kernels of FlexAttention may round products to TF32.
    tolerance = 0.01
    if is_flash:
        tolerance = HALF_PRECISION_TOLERANCE
    return check(loss_and_gradients(model, rows), expected, tolerance)


def compare_half_precision(workload: Workload) -> Values:
    """Compare logits in bfloat16 with those in float32, for our model and for stock LLaVA.

    The rounding error of bfloat16 should be about the same on both sides.
    """
    model = build_trained(workload, torch.float32)
    stock = to_stock(model)
    batch = collate(model, list(make_examples(workload, model, share_prefix=False)))
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        stock.to(dtype)
        with torch.no_grad():
            results["ours", dtype] = model(**batch).logits
            results["stock", dtype] = _stock_logits(model, stock, batch)
    differences = {}
    for side in ("ours", "stock"):
        half, full = results[side, torch.bfloat16], results[side, torch.float32]
        differences[side] = relative_difference(half, full)
    both = relative_difference(results["ours", torch.float32], results["stock", torch.float32])
    assert both < TOLERANCES[torch.float32], f"ours and stock differ by {both:.3g} in float32"
    return {**differences, "ours compared with stock, float32": both}


def _stock_logits(model: Llava, stock: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Return the logits of stock LLaVA at the trained positions of our batch."""
    # Both sides have one placeholder for each image token, but with different ids.
    is_image = batch["input_ids"] == IMAGE_INDEX
    outputs = stock(
        input_ids=batch["input_ids"].masked_fill(is_image, stock.config.image_token_id),
        attention_mask=batch["attention_mask"],
        pixel_values=model.vision_tower.transform.normalize(batch["pixel_values"]).to(stock.dtype),
    )
    return outputs.logits.flatten(0, 1)[batch["logit_positions"]]


# ---- generation ----


@contextmanager
def dynamic_cache() -> Iterator[None]:
    """Within a `with` block, decode without static buffers and CUDA graphs."""
    find = generation.find_static_decoder
    generation.find_static_decoder = lambda _: None  # type: ignore[assignment]
    try:
        yield
    finally:
        generation.find_static_decoder = find


def generate(
    workload: Workload, model: Llava, prompts: list[list[int]], pixels: torch.Tensor
) -> list[list[int]]:
    """Return the token ids of greedy search; each prompt has one image."""
    with torch.inference_mode():
        features = model.vision_tower(pixels.to(model.device))
        options = GenerationOptions(max_new_tokens=num_tokens(workload))
        batch = DecodingBatch(model, prompts, features, options)
    while batch.active:
        batch.step()
    batch.raise_errors()
    return list(batch.generated_ids.values())


def num_tokens(workload: Workload) -> int:
    """Return the number of tokens to generate."""
    return workload.pick(24, 8)


def make_prompts(workload: Workload) -> tuple[Llava, list[list[int]], torch.Tensor]:
    """Return a model in float32, prompts of different lengths, and an image for each."""
    model = build_trained(workload, torch.float32).requires_grad_(False)
    prompt = caption_prompt(model)
    # Append different numbers of text tokens, so that the prompts have different lengths, and one image each.
    prompts = [prompt + prompt[2:4] * number for number in range(workload.pick(6, 3))]
    pixels = torch.stack(list(make_images(workload).values())[: len(prompts)])
    return model, prompts, pixels


def compare_batch_sizes(workload: Workload) -> Values:
    """Compare captions of prompts in one batch with captions of each prompt in a batch of its own."""
    model, prompts, pixels = make_prompts(workload)
    together = generate(workload, model, prompts, pixels)
    alone = []
    for index, prompt in enumerate(prompts):
        alone += generate(workload, model, [prompt], pixels[index : index + 1])
    assert together == alone, f"in one batch: {together}; one by one: {alone}"
    return {"tokens": sum(len(ids) for ids in together)}


def compare_decoders(workload: Workload) -> Values:
    """Compare captions decoded with static buffers and CUDA graphs with those of a `DynamicCache`."""
    model, prompts, pixels = make_prompts(workload)
    with dynamic_cache():
        expected = generate(workload, model, prompts, pixels)
    actual = generate(workload, model, prompts, pixels)
    assert actual == expected, f"static buffers: {actual}; dynamic cache: {expected}"
    uses_graphs = generation.find_static_decoder(model) is not None
    if workload.device.type == "cuda":
        assert uses_graphs, "CUDA graphs were not used; the reason is a warning in the .log file"
    return {"tokens": sum(len(ids) for ids in actual), "graphs": uses_graphs}


def compare_with_stock(workload: Workload) -> Values:
    """Compare our greedy search with `generate` of stock LLaVA."""
    model, prompts, pixels = make_prompts(workload)
    prompts = [prompts[0]] * len(prompts)
    actual = generate(workload, model, prompts, pixels)
    stock = to_stock(model)
    position = prompts[0].index(IMAGE_INDEX)
    image = [stock.config.image_token_id] * model.vision_tower.num_tokens
    expanded = prompts[0][:position] + image + prompts[0][position + 1 :]
    ids = torch.tensor([expanded] * len(prompts))
    normalized = model.vision_tower.transform.normalize(pixels.to(model.device))
    output = stock.generate(
        input_ids=ids.to(model.device),
        attention_mask=torch.ones_like(ids).to(model.device),
        pixel_values=normalized,
        max_new_tokens=num_tokens(workload),
        do_sample=False,
        eos_token_id=model.prompt.stop_ids,
        pad_token_id=1,
    )
    # Rows of stock LLaVA are padded to the longest one.
    for ours, row in zip(actual, output[:, ids.shape[1] :].tolist()):
        assert ours == row[: len(ours)], f"ours: {ours}; stock: {row}"
    return {"tokens": sum(len(ids) for ids in actual)}

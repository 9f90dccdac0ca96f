"""The forecast of a run: memory, FLOPs, steps and disk space, before any weights are loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from llava_simplified.arguments import DataArguments, ModelArguments, TrainingArguments
from llava_simplified.data.collate import expand_example
from llava_simplified.data.dataset import CaptionDataset, set_bad_records_aside
from llava_simplified.data.records import Record, open_records
from llava_simplified.model.build import build_model
from llava_simplified.model.config import DEFAULT_INSTRUCTION
from llava_simplified.model.llava import Llava
from llava_simplified.model.lora import check_trainable, count_parameters
from llava_simplified.prompt import IMAGE_PLACEHOLDER, Message
from llava_simplified.training.build_trainer import set_trainable
from llava_simplified.training.kernels import choose_attention
from llava_simplified.training.memory_tracker import MemoryTracker
from llava_simplified.training.model_config import model_config, trained_parts

# Records whose tokens are counted: half of them evenly spread over the data, half those with the
# longest texts.
SAMPLED_RECORDS = 2000
# Without --train_data_path, captions are assumed to be as long as those of Conceptual Captions,
# about a dozen words.
ASSUMED_CAPTION = "a caption of about a dozen words, as those of Conceptual Captions are"


@dataclass(frozen=True)
class Plan:
    """What a run needs. Bytes are per device; FLOPs are per sample, forward and backward.

    Attributes:
        table: Parameters by part of the model, as text.
        memory: Bytes by use: weights, optimizer, gradients, activations, logits.
        peak: Largest number of bytes at a time.
        positions: Positions of a mean sample, image tokens included.
        longest: Positions of the longest sample.
        trained: Trained tokens of a mean sample.
        flops: FLOPs of a mean sample.
        samples: Samples of the whole run (of one step, if the length of the run is unknown).
        steps: Steps of the whole run (0 if unknown).
        checkpoint: Bytes of one checkpoint.
        features: Bytes of a feature cache of all images.
        cached: True if the vision tower runs before the steps, and not in them.
    """

    table: str
    memory: dict[str, float]
    peak: float
    positions: float
    longest: int
    trained: float
    flops: float
    samples: int
    steps: int
    checkpoint: int
    features: int
    cached: bool

    def count_checkpoints(self, args: TrainingArguments) -> int:
        """Return how many checkpoints are on the disk at the end of the run."""
        if args.save_strategy == "no":
            return 0
        if args.save_strategy == "steps":
            # A value below 1 is a share of all steps.
            share = args.save_steps < 1
            interval = math.ceil(args.save_steps * self.steps if share else args.save_steps)
            saves = math.ceil(self.steps / interval)
        else:
            saves = math.ceil(args.num_train_epochs)
        return min(args.save_total_limit or saves, saves)


class ExampleLength(NamedTuple):
    """Length of one example, image tokens included. Ordered by `positions` first."""

    positions: int
    trained: int
    has_branches: bool


@dataclass(frozen=True)
class DataLengths:
    """Lengths of the examples of a run.

    Attributes:
        count: Number of examples.
        mean_positions: Positions of a mean example.
        mean_trained: Trained tokens of a mean example.
        longest: The longest example.
        images: Largest number of images of an example.
        has_branches: True if some examples have several answers that share a prompt.
    """

    count: int
    mean_positions: float
    mean_trained: float
    longest: ExampleLength
    images: int
    has_branches: bool


# ---- the model, without weights ----


def build_meta_model(model_args: ModelArguments, args: TrainingArguments) -> Llava:
    """Build the model of a run on the meta device, frozen and adapted as for training.

    Raises:
        ValueError: A configuration or the tokenizer cannot be read.
    """
    # Other kernels do not accept fake tensors; they save as little for backward as sdpa does.
    attention = model_args.attn_implementation
    if attention not in (None, "eager"):
        attention = "sdpa"
    config = model_config(model_args, args.frozen_dtype)
    model = build_model(
        config,
        device="meta",
        attn_implementation=attention,
        trust_remote_code=model_args.trust_remote_code,
    )
    choose_attention(model.language_model, model_args.attn_implementation, args.device.type)
    with torch.device("meta"):  # the adapters too
        set_trainable(model, model_args, trained_parts(model_args))
    if args.gradient_checkpointing:
        # Fake tensors have no random state that could be preserved.
        options = {"preserve_rng_state": False, "use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model.train()


# ---- the data, measured ----


def measure_lengths(model: Llava, data: DataArguments, args: TrainingArguments) -> DataLengths:
    """Measure the examples of `--train_data_path`; without it, assume one caption of a dozen words.

    Raises:
        ValueError: The records cannot be read.
    """
    records: Sequence[Record]
    if data.train_data_path:
        share = data.max_bad_records
        opened = open_records(data.train_data_path, max_bad_records=share)
        opened = set_bad_records_aside(opened, share, model.prompt, args.model_max_length)
        records = opened
        spread_count = min(len(records), SAMPLED_RECORDS // 2)
        indices = np.linspace(0, len(records) - 1, spread_count).astype(int)
        spread = [records[int(index)] for index in indices]
        longest = [records[int(index)] for index in opened.longest(SAMPLED_RECORDS // 2)]
    else:
        turns = (Message("user", f"{IMAGE_PLACEHOLDER}\n{DEFAULT_INSTRUCTION}"),)
        records = [Record(("assumed.jpg",), turns, (ASSUMED_CAPTION,), "assumed")]
        spread, longest = list(records), []

    # The mean is taken over the evenly spread records alone: the longest ones would distort it.
    spread_lengths = _example_lengths(model, spread, data, args)
    all_lengths = spread_lengths + _example_lengths(model, longest, data, args)
    examples_per_record = len(spread_lengths) / len(spread)
    return DataLengths(
        count=round(len(records) * examples_per_record),
        mean_positions=float(np.mean([length.positions for length in spread_lengths])),
        mean_trained=float(np.mean([length.trained for length in spread_lengths])),
        longest=max(all_lengths),
        images=max(len(record.images) for record in [*spread, *longest]),
        has_branches=any(length.has_branches for length in spread_lengths),
    )


def _example_lengths(
    model: Llava, records: Sequence[Record], data: DataArguments, args: TrainingArguments
) -> list[ExampleLength]:
    if not records:
        return []
    dataset = CaptionDataset(
        records,
        model.prompt,
        "",
        model.vision_tower.transform,
        args.model_max_length,
        data.share_prefix,
    )
    lengths = []
    for index in range(len(dataset)):
        example = dataset.tokenize(*dataset.locate(index))
        expanded = expand_example(example, model.vision_tower.num_tokens)
        lengths.append(
            ExampleLength(
                positions=len(expanded.input_ids),
                trained=len(expanded.labels),
                has_branches=bool(expanded.branch_ids.any()),
            )
        )
    return lengths


def _largest_batch(
    model: Llava, lengths: DataLengths, data: DataArguments, rows: int, cached: bool
) -> dict[str, torch.Tensor]:
    """Return the largest batch of the run: zeros in the shapes that `Collator` would give.

    Args:
        model: The meta model.
        lengths: Lengths of the examples.
        data: Data options.
        rows: Rows of a batch.
        cached: The batch contains features, and not pixels.
    """
    tower = model.vision_tower
    positions, trained, images = lengths.longest.positions, lengths.longest.trained, lengths.images
    if data.packing:
        # A pack holds as many mean examples as fit.
        examples_per_pack = data.pack_length / lengths.mean_positions
        positions = data.pack_length
        trained = round(examples_per_pack * lengths.mean_trained)
        images = max(1, round(examples_per_pack * images))
    ids = torch.zeros(rows, positions, dtype=torch.long)
    batch = {
        "input_ids": ids,
        "logit_positions": torch.zeros(rows * trained, dtype=torch.long),
        "labels": torch.zeros(rows * trained, dtype=torch.long),
        "position_ids": ids,
    }
    if cached:
        batch["image_features"] = torch.empty(
            rows * images, tower.num_tokens, tower.width, dtype=tower.dtype
        )
    else:
        batch["pixel_values"] = torch.empty(
            rows * images, 3, *tower.transform.crop, dtype=torch.uint8
        )
    if data.packing or lengths.has_branches:
        batch |= {"segment_ids": ids, "branch_ids": ids}
    return batch


# ---- one step, on fake tensors ----


class _TrainingStep(nn.Module):
    """Forward and backward as one module: with checkpointing, backward needs the weights too."""

    def __init__(self, model: Llava) -> None:
        super().__init__()
        self.model = model
        # The check reads values, and fake tensors have none.
        model.check_image_token_count = lambda *_: None  # type: ignore[method-assign]

    def forward(self, batch: dict[str, torch.Tensor]) -> None:
        self.model(**batch).loss.backward()


class StepCost(NamedTuple):
    """Cost of one training step of the largest batch: bytes by use, and FLOPs."""

    weights: int
    activations: int
    logits: int
    flops: int


def measure_step(
    model: Llava,
    lengths: DataLengths,
    data: DataArguments,
    args: TrainingArguments,
    cached: bool,
) -> StepCost:
    """Measure memory and FLOPs of forward and backward of the largest batch."""
    step = _TrainingStep(model)
    dtype = getattr(torch, args.frozen_dtype)
    # The weights of the meta model are replaced by fake ones on "cpu": autocast and the kernels
    # then behave as on a real device.
    with FakeTensorMode(allow_non_fake_inputs=True), MemoryTracker() as tracker:
        fake_weights = {}
        for name, tensor in [*step.named_parameters(), *step.named_buffers()]:
            fake = torch.empty_like(tensor, device="cpu")
            fake_weights[name] = fake.requires_grad_(tensor.requires_grad)
        weights = tracker.live  # nothing else is alive yet
        batch = _largest_batch(model, lengths, data, args.per_device_train_batch_size, cached)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            functional_call(step, fake_weights, (batch,))

    # Logits and their gradients are the storages whose last dimension is the vocabulary.
    head = model.language_model.get_output_embeddings()
    vocabulary = head.weight.shape[0]
    logits = 0
    for size, shape in tracker.at_peak:
        if len(shape) > 1 and shape[-1] == vocabulary:
            logits += size
    activations = tracker.peak - weights - logits
    return StepCost(weights, activations, logits, tracker.flops)


# ---- the plan ----
#
# How memory is forecast:
#
# 1. The model is built on the *meta* device: configs and the tokenizer are enough.
# 2. A sample of the records is measured: the lengths of a mean example and of the longest one. The
#    longest one gives the shapes of the largest batch of the run.
# 3. One training step, forward and backward, runs on fake tensors under `MemoryTracker`, which
#    counts the bytes that are alive, and FLOPs.
# 4. The peak of the run is composed:
#
#        weights + optimizer state + max(activations + logits, gradients)
#
#    Gradients appear during backward while activations disappear, so the two are not added. With
#    gradient accumulation they are: the gradients of earlier micro-batches exist during the step.


def make_plan(
    model_args: ModelArguments,
    data: DataArguments,
    args: TrainingArguments,
    devices: int = 1,
    zero: int = 0,
) -> Plan:
    """Forecast what a run needs.

    Args:
        model_args: Model options.
        data: Data options.
        args: Training options.
        devices: Number of processes that share the batches.
        zero: Stage of ZeRO: 2 shards gradients and optimizer state, 3 the weights too. FSDP is 3.

    Raises:
        ValueError: A configuration, the tokenizer or the data cannot be read.
    """
    model = build_meta_model(model_args, args)
    lengths = measure_lengths(model, data, args)
    tower = model.vision_tower
    rows = args.per_device_train_batch_size

    # Where the features are cached, the tower is not part of the step.
    bytes_per_image = tower.num_tokens * tower.width * tower.dtype.itemsize
    features = lengths.count * lengths.images * bytes_per_image
    cached = tower.frozen and _uses_feature_cache(features, data, args)
    cost = measure_step(model, lengths, data, args, cached)

    trained = sum(part.trained for part in count_parameters(model))
    weights = cost.weights - _saved_by_quantization(model, model_args.bits)
    weight_share = 1 / devices if zero == 3 else 1
    state_share = 1 / devices if zero else 1
    # ZeRO-2 shards gradients and optimizer state, ZeRO-3 the weights too. Trained weights and their
    # gradients are float32: 4 bytes.
    memory = {
        "weights": weights * weight_share,
        "optimizer": _optimizer_bytes(args.optim) * trained * state_share,
        "gradients": 4 * trained * state_share,
        "activations": cost.activations,
        "logits": cost.logits,
    }
    step_peak = max(cost.activations + cost.logits, memory["gradients"])
    if args.gradient_accumulation_steps > 1:
        step_peak = cost.activations + cost.logits + memory["gradients"]

    # A row of a batch is a sample, or a pack of several.
    samples_per_row = data.pack_length / lengths.mean_positions if data.packing else 1
    rows_per_step = rows * args.gradient_accumulation_steps * devices
    steps = _count_steps(lengths.count / samples_per_row, rows_per_step, data, args)
    row_positions = data.pack_length if data.packing else lengths.longest.positions

    # FLOPs are measured on the largest batch and scaled to a mean sample. Attention is not linear
    # in the length, but its share is small at these lengths.
    return Plan(
        table=check_trainable(model, trained_parts(model_args)),
        memory=memory,
        peak=memory["weights"] + memory["optimizer"] + step_peak,
        positions=lengths.mean_positions,
        longest=lengths.longest.positions,
        trained=lengths.mean_trained,
        flops=cost.flops * lengths.mean_positions / (rows * row_positions),
        samples=round(max(1, steps) * rows_per_step * samples_per_row),
        steps=steps,
        checkpoint=(4 + _optimizer_bytes(args.optim)) * trained,
        features=features,
        cached=cached,
    )


def _uses_feature_cache(features: int, data: DataArguments, args: TrainingArguments) -> bool:
    """Return True if the run will cache features that take `features` bytes."""
    if data.cache_vision_features in ("memory", "disk"):
        return True
    sees_images_again = args.num_train_epochs > 1 or args.max_steps > 0
    fits = features <= data.feature_cache_gb * 1e9
    return data.cache_vision_features == "auto" and sees_images_again and fits


def _saved_by_quantization(model: Llava, bits: int) -> int:
    """Return the bytes that `--bits` saves on linear layers; head and norms are not quantized."""
    adapted = 0
    for name, parameter in model.language_model.named_parameters():
        if name.endswith("base_layer.weight"):
            adapted += parameter.nbytes
    return round(adapted * (1 - bits / 16))


def _count_steps(
    rows: float, rows_per_step: int, data: DataArguments, args: TrainingArguments
) -> int:
    """Return the steps of the run, or 0 if neither `--max_steps` nor the data says how many."""
    if args.max_steps > 0:
        return args.max_steps
    if not data.train_data_path:
        return 0
    steps_per_epoch = math.ceil(round(rows) / rows_per_step)
    return round(steps_per_epoch * args.num_train_epochs)


def _optimizer_bytes(optim: str) -> int:
    """Return the bytes of optimizer state per trained parameter: AdamW keeps two moments."""
    name = str(getattr(optim, "value", optim))
    if name == "sgd":
        return 0
    if "8bit" in name:
        return 2
    return 8


def format_estimate(seconds: float) -> str:
    """Return an estimated duration with two or three significant digits, such as "2.3 days"."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds > 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} seconds"

"""Estimate memory, FLOPs, steps and disk space of a run, without loading any weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from llava_simplified.arguments import DataArguments, ModelArguments, TrainingArguments
from llava_simplified.data.collate import expand_example
from llava_simplified.data.dataset import drop_bad_records
from llava_simplified.data.records import Record, open_records
from llava_simplified.model.build import build_model
from llava_simplified.model.config import DEFAULT_INSTRUCTION
from llava_simplified.model.llava import Llava
from llava_simplified.model.lora import check_trainable, count_parameters
from llava_simplified.prompt import IMAGE_PLACEHOLDER, Message
from llava_simplified.training.build_trainer import (
    build_dataset,
    check_options,
    set_trainable,
)
from llava_simplified.training.kernels import choose_attention
from llava_simplified.training.memory_tracker import MemoryTracker
from llava_simplified.training.model_config import model_config, trained_parts
from llava_simplified.training.policy_trainer import kl_coefficient
from llava_simplified.training.preference_pairs import record_problem
from llava_simplified.training.resume import find_resume_folder
from llava_simplified.training.rollouts import PromptExample, branch_examples

# Number of records whose tokens are counted. One half of them is evenly spread over the data, the other
# half has the longest texts.
SAMPLED_RECORDS = 2000
# Decoding a batch ends with its longest sample, which has about this multiple of the mean length.
LONGEST_TO_MEAN_LENGTH = 2
# Without --train_data_path, captions are assumed to be as long as this one.
ASSUMED_CAPTION = "a caption of about a dozen words, as most in Conceptual Captions"


class SamplingPlan(NamedTuple):
    """The captions that are sampled in a run with rewards.

    Attributes:
        tokens: Sampled tokens of the whole run, on all devices.
        steps: Decoding steps of the whole run, one after the other. Each generates one token of every
            sample of a batch.
        bytes_per_step: Bytes that a decoding step reads: the language model and the KV cache. Reading
            them takes longer than computing with them.
    """

    tokens: int
    steps: int
    bytes_per_step: float


@dataclass(frozen=True)
class Plan:
    """The resources that a run requires. Bytes are per device.

    Attributes:
        table: Parameters by part of the model, as text.
        memory: Bytes by use: weights, optimizer, gradients, activations, logits; the reference and the
            KV cache of the samples, if the objective has them.
        peak: Maximum number of bytes in use.
        positions: Mean number of positions per sample, image tokens included.
        longest: Number of positions of the longest sample.
        trained: Mean number of trained tokens per sample.
        flops: Mean FLOPs per sample, for sampling, the reference and training together.
        samples: Samples of the whole run (of one step, if the length of the run is unknown).
        steps: Steps of the whole run (0 if unknown).
        checkpoint: Bytes of one checkpoint, with the state of the optimizer.
        final_model: Bytes of the trained weights in the output folder.
        features: Bytes of a feature cache of all images.
        cached: True if the features are cached, so that the vision tower does not run in the steps.
        sampling: The captions that are sampled, or None if the objective samples nothing.
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
    final_model: int
    features: int
    cached: bool
    sampling: SamplingPlan | None = None

    def count_checkpoints(self, args: TrainingArguments) -> int:
        """Return the number of checkpoints on the disk at the end of the run.

        With `--save_strategy best`, it is an upper bound: every evaluation could be the best one.
        """
        saves = self._count_saves(args)
        kept = args.save_total_limit or saves
        if args.load_best_model_at_end and kept == 1:
            kept = 2  # the best one and the last one
        return min(kept, saves)

    def disk_peak(self, args: TrainingArguments) -> int:
        """Return the maximum number of bytes of the run's checkpoints and of the final model on the disk."""
        # A new checkpoint is complete before an old one is deleted.
        count = min(self.count_checkpoints(args) + 1, self._count_saves(args))
        return count * self.checkpoint + self.final_model

    def _count_saves(self, args: TrainingArguments) -> int:
        """Return how many checkpoints the run writes, at most."""
        if args.save_strategy == "no":
            return 0
        strategy, interval = args.save_strategy, args.save_steps
        if strategy == "best":
            strategy, interval = args.eval_strategy, args.eval_steps or args.logging_steps
        if strategy == "epoch":
            return math.ceil(args.num_train_epochs)
        if interval < 1:  # a fraction of all steps
            interval *= self.steps
        return math.ceil(self.steps / math.ceil(interval))


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
        mean_positions: Mean number of positions per example.
        mean_trained: Mean number of trained tokens per example.
        longest: The longest example.
        images: Maximum number of images per example.
        has_branches: True if some examples have several answers that share a prompt.
        mean_answer: Mean number of tokens of an answer, the end token included.
    """

    count: int
    mean_positions: float
    mean_trained: float
    longest: ExampleLength
    images: int
    has_branches: bool
    mean_answer: float


# ---- the model, without weights ----


def build_meta_model(model_args: ModelArguments, args: TrainingArguments) -> Llava:
    """Build the model of a run on the meta device, frozen and adapted as for training.

    Raises:
        ValueError: A configuration or the tokenizer cannot be read.
    """
    # The other attention kernels do not support fake tensors. Use sdpa instead, which saves as little for
    # backward as they do.
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
    with torch.device("meta"):  # new adapters must be on the meta device, too
        set_trainable(model, model_args, trained_parts(model_args))
    if args.gradient_checkpointing:
        # Fake tensors have no random state that could be preserved.
        options = {"preserve_rng_state": False, "use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model.train()


# ---- the data, measured ----


def measure_lengths(model: Llava, data: DataArguments, args: TrainingArguments) -> DataLengths:
    """Measure the lengths of the examples; without `--train_data_path`, assume a typical caption.

    Raises:
        ValueError: The records cannot be read.
    """
    records: Sequence[Record]
    if data.train_data_path:
        share = data.max_bad_records
        opened = open_records(data.train_data_path, max_bad_records=share)
        opened = drop_bad_records(
            opened, share, model.prompt, args.model_max_length, record_problem(args.objective)
        )
        records = opened
        spread_count = min(len(records), SAMPLED_RECORDS // 2)
        indices = np.linspace(0, len(records) - 1, spread_count).astype(int)
        spread = [records[int(index)] for index in indices]
        longest = [records[int(index)] for index in opened.longest(SAMPLED_RECORDS // 2)]
    else:
        turns = (Message("user", f"{IMAGE_PLACEHOLDER}\n{DEFAULT_INSTRUCTION}"),)
        rejected = f"{ASSUMED_CAPTION}, but another one"
        records = [Record(("assumed.jpg",), turns, (ASSUMED_CAPTION,), "assumed", rejected)]
        spread, longest = list(records), []

    # Compute the mean over the evenly spread records only: the longest ones would distort it.
    mean_answer = _mean_answer(model, spread, data, args)
    # Assume that samples are as long as responses on average, and reach the limit in the largest batch.
    expected = min(math.ceil(mean_answer), args.sample_max_tokens)
    spread_lengths = _example_lengths(model, spread, data, args, expected)
    all_lengths = _example_lengths(model, [*spread, *longest], data, args, args.sample_max_tokens)
    dataset = build_dataset(model, spread, "", data, args, args.objective)
    examples_per_record = len(dataset) / len(spread)
    return DataLengths(
        count=round(len(records) * examples_per_record),
        mean_positions=float(np.mean([length.positions for length in spread_lengths])),
        mean_trained=float(np.mean([length.trained for length in spread_lengths])),
        longest=max(all_lengths),
        images=max(len(record.images) for record in [*spread, *longest]),
        has_branches=any(length.has_branches for length in spread_lengths),
        mean_answer=mean_answer,
    )


def _mean_answer(
    model: Llava, records: Sequence[Record], data: DataArguments, args: TrainingArguments
) -> float:
    """Return the mean number of tokens of a response, the end token included."""
    dataset = build_dataset(model, records, "", data, args, "sft")
    lengths: list[int] = []
    for record in records:
        _, answers, _ = dataset.tokenize_answers(record, record.responses)
        lengths += map(len, answers)
    return float(np.mean(lengths))


def _example_lengths(
    model: Llava,
    records: Sequence[Record],
    data: DataArguments,
    args: TrainingArguments,
    sampled: int,
) -> list[ExampleLength]:
    """Return the lengths of the examples that records become; images are not read.

    Args:
        model: The meta model.
        records: The records.
        data: Data options.
        args: Training options.
        sampled: Number of tokens that each sampled caption is assumed to have, if the objective samples captions.
    """
    dataset = build_dataset(model, records, "", data, args, args.objective)
    lengths = []
    for index in range(len(dataset)):
        example = dataset.tokenize(*dataset.locate(index))
        rows = [example]
        if isinstance(example, PromptExample):
            # The token ids of the samples do not matter, only how many there are.
            samples = [[0] * sampled] * args.num_samples
            rows = branch_examples(
                example, [*samples, *example.reference_answers], data.share_prefix
            )
        for row in rows:
            expanded = expand_example(row, model.vision_tower.num_tokens)
            lengths.append(
                ExampleLength(
                    positions=len(expanded.input_ids),
                    trained=len(expanded.labels),
                    has_branches=bool(expanded.branch_ids.any()),
                )
            )
    return lengths


def _rows_per_example(data: DataArguments, args: TrainingArguments) -> int:
    """Return the number of rows of a batch that one example of the dataset becomes."""
    if data.share_prefix or args.objective == "sft":
        return 1
    # A pair is one example of the dataset: its length includes both answers.
    return 1 if args.objective == "dpo" else args.num_samples


def _largest_batch(
    model: Llava, lengths: DataLengths, data: DataArguments, rows: int, cached: bool
) -> dict[str, torch.Tensor]:
    """Return the largest batch of the run: zeros with the shapes of a `Collator` batch.

    Args:
        model: The meta model.
        lengths: Lengths of the examples.
        data: Data options.
        rows: Number of rows of the batch.
        cached: The batch contains features instead of pixels.
    """
    tower = model.vision_tower
    positions, trained, images = lengths.longest.positions, lengths.longest.trained, lengths.images
    if data.packing:
        # Assume that packs are full, and consist of examples of mean length.
        examples_per_pack = data.pack_length / lengths.mean_positions
        positions = data.pack_length
        trained = round(examples_per_pack * lengths.mean_trained)
        images = max(1, round(examples_per_pack * images)) if images else 0
    ids = torch.zeros(rows, positions, dtype=torch.long)
    num_image_tokens = rows * images * tower.num_tokens
    # A batch without images contains a dummy image, which no position refers to.
    num_images = max(rows * images, 1)
    batch = {
        "input_ids": ids,
        "image_positions": torch.zeros(num_image_tokens, dtype=torch.long),
        "logit_positions": torch.zeros(rows * trained, dtype=torch.long),
        "labels": torch.zeros(rows * trained, dtype=torch.long),
        "position_ids": ids,
    }
    if cached:
        batch["image_features"] = torch.empty(
            num_images, tower.num_tokens, tower.width, dtype=tower.dtype
        )
    else:
        batch["pixel_values"] = torch.empty(num_images, 3, *tower.transform.crop, dtype=torch.uint8)
    if data.packing or lengths.has_branches:
        batch |= {"segment_ids": ids, "branch_ids": ids}
    return batch


# ---- one step, on fake tensors ----


class _WithModel(nn.Module):
    """A module whose `forward` runs any function of the model, so that `functional_call` can replace the weights.

    `functional_call` replaces weights only while `forward` runs. Backward must therefore run within `forward`: with
    gradient checkpointing it runs layers again, which need the replaced weights.
    """

    def __init__(self, model: Llava) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[Llava], int]) -> int:
        return compute(self.model)


class StepCost(NamedTuple):
    """Cost of the largest batch: bytes by use, and FLOPs.

    Attributes:
        weights: Bytes of the weights.
        activations: Bytes of activations at the peak of forward and backward.
        logits: Bytes of logits and their gradients at the same peak.
        flops: FLOPs of forward and backward.
        forward_flops: FLOPs of a forward pass without gradients; 0 if the objective needs none.
        cache: Bytes of the KV cache per position.
    """

    weights: int
    activations: int
    logits: int
    flops: int
    forward_flops: int
    cache: int


def measure_step(
    model: Llava,
    lengths: DataLengths,
    data: DataArguments,
    args: TrainingArguments,
    cached: bool,
) -> StepCost:
    """Measure memory and FLOPs of forward and backward of the largest batch."""
    dtype = getattr(torch, args.frozen_dtype)
    rows = args.per_device_train_batch_size * _rows_per_example(data, args)
    with_model = _WithModel(model)
    # Replace the weights of the meta model with fake ones on "cpu", so that autocast and the kernels behave
    # as on a real device.
    with FakeTensorMode(allow_non_fake_inputs=True):
        with MemoryTracker() as tracker:
            fake_weights = {}
            for name, tensor in [*with_model.named_parameters(), *with_model.named_buffers()]:
                fake = torch.empty_like(tensor, device="cpu")
                fake_weights[name] = fake.requires_grad_(tensor.requires_grad)
            weights = tracker.live  # nothing else is alive yet
            batch = _largest_batch(model, lengths, data, rows, cached)

            def train(replaced: Llava) -> int:
                replaced(**batch).loss.backward()
                return tracker.flops

            def predict(replaced: Llava) -> int:
                replaced(**batch)
                return tracker.flops

            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                all_flops = flops = functional_call(with_model, fake_weights, (train,))
                if _count_forward_passes(args):
                    with torch.no_grad():
                        # `tracker.flops` is a running total: subtract the first pass below.
                        all_flops = functional_call(with_model, fake_weights, (predict,))
        # Only objectives that sample captions need a KV cache in training.
        cache = 0
        if args.objective not in ("sft", "dpo"):
            with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                cache = functional_call(with_model, fake_weights, (_cache_bytes,))

    # Logits and their gradients are the storages whose last dimension is the vocabulary.
    lm_head = model.language_model.get_output_embeddings()
    vocabulary = lm_head.weight.shape[0]
    logits = 0
    for size, shape in tracker.at_peak:
        if len(shape) > 1 and shape[-1] == vocabulary:
            logits += size
    activations = tracker.peak - weights - logits
    return StepCost(weights, activations, logits, flops, all_flops - flops, cache)


def _cache_bytes(model: Llava) -> int:
    """Return the bytes of the KV cache per position."""
    embedding = model.language_model.get_input_embeddings()
    embeds = embedding(torch.zeros(1, 1, dtype=torch.long))
    model.eval()  # in training mode, gradient checkpointing turns the cache off
    cache = model.language_model(inputs_embeds=embeds, use_cache=True).past_key_values
    model.train()
    size = 0
    for layer in cache.layers:
        for name in ("keys", "values"):
            tensor = getattr(layer, name, None)
            size += 0 if tensor is None else tensor.nbytes
    return size


# ---- the plan ----
#
# How memory is estimated:
#
# 1. Build the model on the *meta* device, which requires only the configs and the tokenizer.
# 2. Measure a sample of the records: the mean length of the examples and the longest one. The longest
#    example determines the shapes of the largest batch of the run.
# 3. Run one training step, forward and backward, on fake tensors. `MemoryTracker` counts the bytes of
#    live tensors, and FLOPs.
# 4. Compute the peak of the run:
#
#        weights + optimizer state + max(activations + logits, gradients)
#
#    Gradients appear during backward while activations disappear, so the two are not added. With
#    gradient accumulation they are: the gradients of earlier micro-batches exist during the step.
#    Captions are sampled before forward and backward. Their KV cache is not added either, because it is
#    freed before gradients and activations exist.


def make_plan(
    model_args: ModelArguments,
    data: DataArguments,
    args: TrainingArguments,
    devices: int = 1,
    zero: int = 0,
) -> Plan:
    """Estimate the resources that a run requires.

    Args:
        model_args: Model options.
        data: Data options.
        args: Training options.
        devices: Number of devices (data-parallel processes).
        zero: ZeRO stage: 2 shards gradients and optimizer state, 3 the weights too. Use 3 for FSDP.

    Raises:
        ValueError: A configuration, the tokenizer or the data cannot be read, or an option is invalid.
    """
    check_options(model_args, data, args, planning=True)
    find_resume_folder(args)
    _check_files(data)
    model = build_meta_model(model_args, args)
    lengths = measure_lengths(model, data, args)
    tower = model.vision_tower
    rows = args.per_device_train_batch_size

    # If the features are cached, the tower is not part of the step.
    bytes_per_image = tower.num_tokens * tower.width * tower.dtype.itemsize
    features = lengths.count * lengths.images * bytes_per_image
    cached = tower.frozen and _uses_feature_cache(features, data, args)
    cost = measure_step(model, lengths, data, args, cached)

    trained = sum(part.trained for part in count_parameters(model))
    weights = cost.weights - _saved_by_quantization(model, model_args.bits)
    weight_share = 1 / devices if zero == 3 else 1
    state_share = 1 / devices if zero else 1
    # Count 4 bytes per gradient: trained weights and their gradients are float32.
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
    reference = 4 * trained if _has_reference(args) else 0
    if reference:
        memory["reference"] = reference
    samples_captions = args.objective not in ("sft", "dpo")
    if samples_captions:
        prompt = lengths.longest.positions
        if data.share_prefix:
            prompt -= lengths.longest.trained
        cached_positions = prompt + args.sample_max_tokens
        memory["KV cache"] = rows * args.num_samples * cached_positions * cost.cache
        step_peak = max(step_peak, memory["KV cache"])

    # A row of a batch is one sample, or a pack of several.
    samples_per_row = data.pack_length / lengths.mean_positions if data.packing else 1
    rows_per_step = rows * args.gradient_accumulation_steps * devices
    steps = _count_steps(lengths.count / samples_per_row, rows_per_step, data, args)
    row_positions = data.pack_length if data.packing else lengths.longest.positions
    samples = round(max(1, steps) * rows_per_step * samples_per_row)
    sampling = None
    if samples_captions:
        batches = max(1, steps) * args.gradient_accumulation_steps
        cache = memory["KV cache"] * lengths.mean_positions / row_positions
        sampling = _plan_sampling(model, model_args.bits, lengths, args, samples, batches, cache)

    # Scale the FLOPs of the largest batch to a sample of mean length. The cost of attention is not linear
    # in the length, but attention is only a small part of the FLOPs at these lengths.
    batch_flops = cost.flops + _count_forward_passes(args) * cost.forward_flops
    return Plan(
        table=check_trainable(model, trained_parts(model_args)),
        memory=memory,
        peak=memory["weights"] + memory["optimizer"] + reference + step_peak,
        positions=lengths.mean_positions,
        longest=lengths.longest.positions,
        trained=lengths.mean_trained,
        flops=batch_flops * lengths.mean_positions / (rows * row_positions),
        samples=samples,
        steps=steps,
        # The trained weights in float32, and their optimizer state.
        checkpoint=(4 + _optimizer_bytes(args.optim)) * trained,
        final_model=4 * trained,
        features=features,
        cached=cached,
        sampling=sampling,
    )


def _has_reference(args: TrainingArguments) -> bool:
    return args.objective == "dpo" or (args.objective != "sft" and kl_coefficient(args) > 0)


def _count_forward_passes(args: TrainingArguments) -> float:
    """Return how many forward passes without gradients the reference model and sampling are worth."""
    forwards = 1.0 if _has_reference(args) else 0.0
    if args.objective not in ("sft", "dpo"):
        # Sampling with a KV cache computes every position once, so it costs as much as one forward pass. `scst` also
        # decodes a greedy caption.
        greedy = 1 if args.objective == "scst" else 0
        forwards += (args.num_samples + greedy) / args.num_samples
    return forwards


def _plan_sampling(
    model: Llava,
    bits: int,
    lengths: DataLengths,
    args: TrainingArguments,
    images: int,
    batches: int,
    cache: float,
) -> SamplingPlan:
    """Estimate the tokens that are sampled, and the cost of decoding them.

    Args:
        model: The meta model.
        bits: `--bits`.
        lengths: Lengths of the examples. Samples are assumed to be as long as the responses.
        args: Training options.
        images: Images of the whole run.
        batches: Micro-batches of the whole run on a device.
        cache: Mean size of the KV cache in bytes.
    """
    mean = min(lengths.mean_answer, args.sample_max_tokens)
    steps_per_batch = min(args.sample_max_tokens, math.ceil(LONGEST_TO_MEAN_LENGTH * mean))
    samples = args.num_samples
    if args.objective == "scst":
        # The greedy captions are decoded separately, after the samples.
        samples += 1
        steps_per_batch *= 2
    language_model = sum(parameter.nbytes for parameter in model.language_model.parameters())
    return SamplingPlan(
        tokens=round(images * samples * mean),
        steps=batches * steps_per_batch,
        bytes_per_step=language_model - _saved_by_quantization(model, bits) + cache,
    )


def _check_files(data: DataArguments) -> None:
    """Raise ValueError if a file or folder that the options name is missing."""
    if data.eval_data_path:
        open_records(data.eval_data_path, max_bad_records=data.max_bad_records)
    folders = {
        "--train_image_folder": data.train_image_folder,
        "--val_image_folder": data.val_image_folder,
    }
    for option, folder in folders.items():
        if folder and not Path(folder).is_dir():
            raise ValueError(
                f"{option} {folder}: no such folder. Pass the folder that contains the images."
            )


def _uses_feature_cache(features: int, data: DataArguments, args: TrainingArguments) -> bool:
    """Return True if the run will cache features that take `features` bytes."""
    if data.cache_vision_features in ("memory", "disk"):
        return True
    repeats_images = args.num_train_epochs > 1 or args.max_steps > 0
    fits = features <= data.feature_cache_gb * 1e9
    return data.cache_vision_features == "auto" and repeats_images and fits


def _saved_by_quantization(model: Llava, bits: int) -> int:
    """Return the bytes that `--bits` saves on linear layers; lm_head and norms are not quantized."""
    adapted = 0
    for name, parameter in model.language_model.named_parameters():
        if name.endswith("base_layer.weight"):
            adapted += parameter.nbytes
    return round(adapted * (1 - bits / 16))


def _count_steps(
    rows: float, rows_per_step: int, data: DataArguments, args: TrainingArguments
) -> int:
    """Return the number of steps, or 0 if neither `--max_steps` nor the data is given."""
    if args.max_steps > 0:
        return args.max_steps
    if not data.train_data_path:
        return 0
    steps_per_epoch = math.ceil(round(rows) / rows_per_step)
    return round(steps_per_epoch * args.num_train_epochs)


def _optimizer_bytes(optim: str) -> int:
    """Return the bytes of optimizer state per trained parameter."""
    name = str(getattr(optim, "value", optim))
    if name == "sgd":
        return 0
    # AdamW has two moments per parameter, of 1 byte each in 8 bits, or 4 bytes each in float32.
    if "8bit" in name:
        return 2
    return 8


def format_estimate(seconds: float) -> str:
    """Return an estimated duration as text, such as "2.3 days"."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds > 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} seconds"

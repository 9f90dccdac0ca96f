"""What a run will cost, before a weight is loaded: `llava plan`.

One training step is run on tensors that have shapes and no data. The model's own code then says what it keeps for the
backward pass and how much it multiplies, whatever its architecture, precision or adapter: there is no formula to go stale.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from llava_simplified.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    parse_arguments,
)
from llava_simplified.data.collate import expand_example
from llava_simplified.data.dataset import CaptionDataset
from llava_simplified.data.records import Record, open_records
from llava_simplified.model.build import build_model
from llava_simplified.model.config import DEFAULT_INSTRUCTION
from llava_simplified.model.llava import Llava
from llava_simplified.model.lora import check_trainable, count_parameters
from llava_simplified.prompt import IMAGE_PLACEHOLDER, Message
from llava_simplified.training.build_trainer import prepare
from llava_simplified.training.kernels import choose_attention
from llava_simplified.training.model_config import model_config, trained_parts

SAMPLED = (
    2000  # records whose tokens are counted: half of them the longest texts, half evenly spread
)
ASSUMED = "a caption of about a dozen words, as those of Conceptual Captions are"
_aten: Any = torch.ops.aten
FLOPS: dict[Any, Any] = {
    **flop_registry,  # which counts attention on other devices alone
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *qkv, **_: (
        sdpa_backward_flop_count(*(tensor.shape for tensor in qkv[:4]))
    ),
}


@dataclass(frozen=True)
class Plan:
    """Bytes are those of one device, FLOPs those of one sample, forward and backward.

    Attributes:
        table: parameters by part.
        memory: weights, optimizer, gradients, activations, logits.
        peak: the most at a time: gradients come as activations go.
        positions, trained: of a mean sample, image tokens included; `longest`: of the longest one.
        samples, steps: of the whole run; where nothing says how many there will be: of one step, and 0.
        checkpoint, features: bytes on disk, of a checkpoint and of a feature cache of all pictures.
        cached: the tower runs before the steps, not in them.
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

    def kept(self, args: TrainingArguments) -> int:
        """How many checkpoints lie on the disk at the end."""
        if args.save_strategy == "no":
            return 0
        every = math.ceil(
            args.save_steps * (self.steps if args.save_steps < 1 else 1)
        )  # below 1: share of all steps
        saves = (
            math.ceil(self.steps / every)
            if args.save_strategy == "steps"
            else math.ceil(args.num_train_epochs)
        )
        return min(args.save_total_limit or saves, saves)


@dataclass(frozen=True)
class Lengths:
    """Of examples: positions and trained tokens of the mean and of the longest one; `count`: how many there are."""

    count: int
    mean: tuple[float, float]
    longest: tuple[int, int]
    images: int
    branches: bool


class MemoryTracker(TorchDispatchMode):
    """Keeps account of the bytes of all storages that live, and of FLOPs, while operations run on tensors with or without data.

    torch's own counter of FLOPs keeps what gradient checkpointing computes anew alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self.at_peak: list[tuple[int, tuple[int, ...]]] = []
        self._sizes: dict[int, tuple[int, tuple[int, ...]]] = {}

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if count := FLOPS.get(func._overloadpacket):
            self.flops += count(*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes:
                    self._sizes[storage._cdata] = storage.nbytes(), tuple(tensor.shape)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._free, storage._cdata)
        if self.live > self.peak:
            self.peak, self.at_peak = self.live, list(self._sizes.values())
        return out


class _Step(nn.Module):
    """Forward and back: checkpointing needs the weights on the way back too."""

    def __init__(self, model: Llava) -> None:
        super().__init__()
        self.model = model
        model.check_image_token_count = lambda *_: None  # type: ignore[method-assign]  # there is no data to look at

    def forward(self, batch: dict[str, torch.Tensor]) -> None:
        self.model(**batch).loss.backward()


def _model_without_weights(model_args: ModelArguments, args: TrainingArguments) -> Llava:
    """The model of a run on the meta device, with its parts frozen and adapted as for training."""
    # the other kernels take no tensors without data, and keep as little
    kernel = (
        model_args.attn_implementation
        if model_args.attn_implementation in (None, "eager")
        else "sdpa"
    )
    config = model_config(model_args, args.frozen_dtype)
    model = build_model(config, device="meta", attn_implementation=kernel)
    choose_attention(model.language_model, model_args.attn_implementation, args.device.type)
    with torch.device("meta"):  # also for the adapters
        prepare(model, model_args)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"preserve_rng_state": False, "use_reentrant": False}
        )
    return model.train()


def measure_lengths(model: Llava, data: DataArguments, args: TrainingArguments) -> Lengths:
    """How long the examples are: from `--train_data_path`, or one caption that is assumed where there is none."""
    turns = (Message("user", f"{IMAGE_PLACEHOLDER}\n{DEFAULT_INSTRUCTION}"),)
    records: Sequence[Record] = [Record(("assumed.jpg",), turns, (ASSUMED,), "assumed")]
    chosen, spread = records, 1
    if data.train_data_path:
        records = open_records(data.train_data_path)
        spread = min(len(records), SAMPLED // 2)
        even = np.linspace(0, len(records) - 1, spread).astype(int)
        chosen = [records[int(index)] for index in (*even, *records.longest(SAMPLED // 2))]
    transform = model.vision_tower.transform

    def examples(of: Sequence[Record]) -> list[tuple[int, int, int]]:
        dataset = CaptionDataset(
            of, model.prompt, "", transform, args.model_max_length, data.share_prefix
        )
        laid = [
            expand_example(dataset.tokenize(*dataset.locate(i)), model.vision_tower.num_tokens)
            for i in range(len(dataset))
        ]
        return [(len(s.input_ids), len(s.labels), int(s.branch_ids.any())) for s in laid]

    mean, longest = np.array(examples(chosen[:spread])), max(examples(chosen))
    return Lengths(
        count=round(len(records) * len(mean) / spread),
        mean=(float(mean[:, 0].mean()), float(mean[:, 1].mean())),
        longest=longest[:2],
        images=max(len(record.images) for record in chosen),
        branches=bool(mean[:, 2].any()),
    )


def _batch(
    model: Llava, lengths: Lengths, data: DataArguments, rows: int, cached: bool
) -> dict[str, torch.Tensor]:
    """The largest batch of the run, in shapes."""
    length, trained = lengths.longest
    images, tower = lengths.images, model.vision_tower
    if data.packing:
        fit = data.pack_length / lengths.mean[0]
        length, trained, images = (
            data.pack_length,
            round(fit * lengths.mean[1]),
            max(1, round(fit * images)),
        )
    text = torch.zeros(rows, length, dtype=torch.long)
    batch = {
        "input_ids": text,
        "logit_positions": torch.zeros(rows * trained, dtype=torch.long),
        "labels": torch.zeros(rows * trained, dtype=torch.long),
        "position_ids": text,
    }
    if cached:
        batch["image_features"] = torch.empty(
            rows * images, tower.num_tokens, tower.width, dtype=tower.dtype
        )
    else:
        batch["pixel_values"] = torch.empty(
            rows * images, 3, *tower.transform.crop, dtype=torch.uint8
        )
    if data.packing or lengths.branches:
        batch |= {"segment_ids": text, "branch_ids": text}
    return batch


def make_plan(
    model_args: ModelArguments,
    data: DataArguments,
    args: TrainingArguments,
    devices: int = 1,
    zero: int = 0,
) -> Plan:
    """Count what a run will need.

    Args:
        devices: processes that share the batches.
        zero: what they share besides: 2 gradients and optimizer, 3 the weights too (ZeRO's stages; FSDP is 3).

    Raises:
        ValueError: a configuration, the tokenizer or the data can't be read.
    """
    model = _model_without_weights(model_args, args)
    lengths = measure_lengths(model, data, args)
    tower, rows = model.vision_tower, args.per_device_train_batch_size
    features = (
        lengths.count * lengths.images * tower.num_tokens * tower.width * tower.dtype.itemsize
    )
    cached = data.cache_vision_features in ("memory", "disk") or (
        data.cache_vision_features == "auto"
        and (args.num_train_epochs > 1 or args.max_steps > 0)
        and features <= data.feature_cache_gb * 1e9
    )
    cached = cached and tower.frozen
    step, kind = _Step(model), getattr(torch, args.frozen_dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), MemoryTracker() as ledger:
        fake = {
            name: torch.empty_like(tensor, device="cpu").requires_grad_(tensor.requires_grad)
            for name, tensor in (*step.named_parameters(), *step.named_buffers())
        }
        weights = ledger.live
        batch = _batch(model, lengths, data, rows, cached)
        with torch.autocast("cpu", kind, enabled=kind != torch.float32):
            functional_call(step, fake, (batch,))
    vocabulary = model.language_model.get_output_embeddings().weight.shape[0]
    logits = sum(
        size for size, shape in ledger.at_peak if len(shape) > 1 and shape[-1] == vocabulary
    )
    trained = sum(part.trained for part in count_parameters(model))
    share = 1 / devices
    adapted = sum(
        p.nbytes
        for name, p in model.language_model.named_parameters()
        if name.endswith("base_layer.weight")
    )
    weights -= round(
        adapted * (1 - model_args.bits / 16)
    )  # those are kept quantized; the head and the norms are not
    ledger.peak -= round(adapted * (1 - model_args.bits / 16))
    memory = {
        "weights": weights * (share if zero == 3 else 1),
        "optimizer": _optimizer_bytes(args.optim) * trained * (share if zero else 1),
        "gradients": 4 * trained * (share if zero else 1),
        "activations": ledger.peak - weights - logits,
        "logits": logits,
    }
    each = max(memory["activations"] + logits, memory["gradients"])
    if (
        args.gradient_accumulation_steps > 1
    ):  # those of the micro-batches before are there all the time
        each = memory["activations"] + logits + memory["gradients"]
    samples_a_step = rows * args.gradient_accumulation_steps * devices
    a_row = data.pack_length / lengths.mean[0] if data.packing else 1
    steps = (
        args.max_steps if args.max_steps > 0 else -(-round(lengths.count / a_row) // samples_a_step)
    )
    steps = steps if args.max_steps > 0 else round(steps * args.num_train_epochs)
    steps = steps if args.max_steps > 0 or data.train_data_path else 0
    in_batch = rows * (data.pack_length if data.packing else lengths.longest[0])
    return Plan(
        table=check_trainable(model, trained_parts(model_args)),
        memory=memory,
        peak=memory["weights"] + memory["optimizer"] + each,
        positions=lengths.mean[0],
        longest=lengths.longest[0],
        trained=lengths.mean[1],
        flops=ledger.flops * lengths.mean[0] / in_batch,
        samples=round(max(1, steps) * samples_a_step * a_row),
        steps=steps,
        checkpoint=(4 + _optimizer_bytes(args.optim)) * trained,
        features=features,
        cached=cached,
    )


def _optimizer_bytes(optim: Any) -> int:
    """Bytes of state for each trained number: AdamW keeps two of them."""
    name = str(getattr(optim, "value", optim))
    return 0 if name == "sgd" else 2 if "8bit" in name else 8


def matmul_limit(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that a large matrix product reaches here: what a step could at most reach."""
    a = torch.ones(2048, 2048, device=device, dtype=dtype)
    best = 0.0
    for _ in range(4):
        start = time.perf_counter()
        float((a @ a)[0, 0])
        best = max(best, 2 * 2048**3 / (time.perf_counter() - start))
    return best


def describe_plan(
    plan: Plan, args: TrainingArguments, tflops: float, mfu: float, devices: int
) -> str:
    """The plan as people read it."""
    gb = 1e9
    seconds = plan.flops * plan.samples / (tflops * 1e12 * mfu * devices)
    run = f"the run           {plan.steps:,} steps, "
    disk = f", {plan.kept(args)} kept; {plan.features / gb:.2f} GB where all"
    if not plan.steps:  # nothing says how many there will be
        run, disk = (
            "one step          (--train_data_path says how many) ",
            f"; {plan.features / 1e3:.0f} KB a picture where",
        )
    lines = [
        plan.table,
        f"a sample          {plan.positions:.0f} positions (longest {plan.longest}), {plan.trained:.0f} trained, "
        f"{plan.flops / 1e9:,.1f} GFLOP",
        f"{run}{plan.samples:,} samples, {plan.flops * plan.samples / 1e15:,.2f} PFLOP",
        f"time              {duration(seconds)} on {devices} device(s) of {tflops:.3g} TFLOP/s at {mfu:.0%} of that",
        "memory, each device, at the longest batch:",
        *(f"  {name:<16}{size / gb:>8.2f} GB" for name, size in plan.memory.items()),
        f"  {'at the peak':<16}{plan.peak / gb:>8.2f} GB, without what libraries and the allocator keep for themselves",
        f"disk              {plan.checkpoint / gb:.2f} GB a checkpoint{disk} features are cached",
    ]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """As people say it."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds > 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} seconds"


def zero_stage(config: Path | None) -> int:
    """What a DeepSpeed configuration shares between the devices.

    Raises:
        ValueError: it names no stage.
    """
    try:
        return (
            int(json.loads(config.read_text(encoding="utf-8"))["zero_optimization"]["stage"])
            if config
            else 0
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"--deepspeed {config}: no ZeRO stage can be read there: {error!r}"
        ) from error


def main(argv: list[str] | None = None) -> int:
    """`llava plan`: the options of `llava train`, and what the machine is to be."""
    parser = argparse.ArgumentParser(
        prog="llava plan",
        description="What a run will need. All options of `llava train`, and:",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--tflops",
        type=float,
        help="what a device reaches in a matrix product; default: measured here",
    )
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="the share of it that training reaches"
    )
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument(
        "--deepspeed", type=Path, help="its configuration: the ZeRO stage is read from it"
    )
    own, rest = parser.parse_known_args(argv)
    groups = parse_arguments(rest)
    args = groups[2]
    plan = make_plan(*groups, devices=own.devices, zero=zero_stage(own.deepspeed))
    tflops = own.tflops or matmul_limit(args.device, getattr(torch, args.frozen_dtype)) / 1e12
    print(describe_plan(plan, args, tflops, own.mfu, own.devices))
    return 0

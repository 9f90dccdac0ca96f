"""Run `llava plan --cluster`: measure or read the rates, and describe the plan."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from llava_simplified.arguments import DataArguments, ModelArguments, TrainingArguments
from llava_simplified.model.vision import VisionTower
from llava_simplified.training.cluster_plan import (
    Cluster,
    Rates,
    Work,
    describe_cluster_plan,
    read_rates,
)
from llava_simplified.training.cluster_rates import Workload, measure_rates
from llava_simplified.training.memory_tracker import MemoryTracker
from llava_simplified.training.plan import build_meta_model, make_plan

BITS_PER_BYTE = 8


def plan_cluster(
    plan_options: argparse.Namespace,
    training_options: Sequence[str],
    model_args: ModelArguments,
    data: DataArguments,
    args: TrainingArguments,
) -> str:
    """Return the plan of all steps, from download to captioning, on a cluster, as text.

    Args:
        plan_options: The options of `llava plan`.
        training_options: All other options: the options of `llava train`.
        model_args: Model options.
        data: Data options.
        args: Training options.

    Raises:
        ValueError: The rates cannot be read or measured, or the vision tower is trained.
    """
    if model_args.tune_vision_tower != "off":
        raise ValueError(
            f"--cluster: the plan encodes each image once, before training, so it does not support --tune_vision_tower "
            f"{model_args.tune_vision_tower}. Leave out --cluster to plan the training alone."
        )
    # The images are encoded in a step before training, so the vision tower is not part of a training step.
    data = replace(data, cache_vision_features="memory")
    train_flops = make_plan(model_args, data, args).flops
    model = build_meta_model(model_args, args)
    encode_flops = count_tower_flops(model.vision_tower)
    if plan_options.measure:
        rates = measure(plan_options, training_options, encode_flops, train_flops, model.tokenizer)
        rates.save(plan_options.rates)
    else:
        rates = read_rates(plan_options.rates)
    # Without --tflops, the cluster has devices like the one that was measured.
    device_flops = None
    if plan_options.tflops is not None:
        device_flops = plan_options.tflops * 1e12 * plan_options.mfu
    cluster = Cluster(
        machines=plan_options.cluster,
        cores=plan_options.cores,
        devices=plan_options.devices,
        # Networks are specified in bits per second, files in bytes.
        egress=plan_options.egress * 1e9 / BITS_PER_BYTE,
        endpoints=plan_options.num_endpoints or plan_options.cluster,
        device_flops_per_second=device_flops,
    )
    works = []
    for urls in plan_options.urls:
        works.append(Work(urls, encode_flops, train_flops, args.num_train_epochs))
    return describe_cluster_plan(works, rates, cluster)


def measure(
    plan_options: argparse.Namespace,
    training_options: Sequence[str],
    encode_flops: float,
    train_flops: float,
    tokenizer: Any,
) -> Rates:
    """Measure the rates of `plan_cluster`; the tokens of captions are those of the run's tokenizer."""

    def count_tokens(caption: str) -> int:
        return len(tokenizer(caption, add_special_tokens=False).input_ids)

    endpoint_options = []
    if plan_options.endpoint:
        endpoint_options = ["--endpoint", plan_options.endpoint, "--model", plan_options.model]
    workload = Workload(
        source=plan_options.measure,
        rows=plan_options.measure_rows,
        training_options=training_options,
        encode_flops=encode_flops,
        train_flops=train_flops,
        endpoint_options=endpoint_options,
        allow_private=plan_options.allow_private,
    )
    return measure_rates(workload, count_tokens)


def count_tower_flops(tower: VisionTower) -> int:
    """Return the FLOPs that a vision tower needs for one image, counted with fake tensors."""
    pixels = torch.empty(1, 3, *tower.transform.crop, dtype=torch.uint8)
    with FakeTensorMode(allow_non_fake_inputs=True), MemoryTracker() as tracker, torch.no_grad():
        weights = {}
        for name, tensor in [*tower.named_parameters(), *tower.named_buffers()]:
            # Use fake weights as well: the number of operations does not depend on their values.
            weights[name] = torch.empty_like(tensor, device="cpu")
        functional_call(tower, weights, (pixels,))
    return tracker.flops

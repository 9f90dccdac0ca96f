"""Parameter groups of the optimizer, and the learning-rate schedule of a resumed run."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from llava_simplified.arguments import TrainingArguments


def build_parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    decayed_names: Collection[str],
    args: TrainingArguments,
) -> list[dict[str, Any]]:
    """Group the trained parameters by learning rate and weight decay.

    The projector has `--mm_projector_lr`, the vision tower `--vision_lr`, everything else
    `--learning_rate`.

    Args:
        parameters: All parameters by name.
        decayed_names: Names of the parameters with weight decay (no biases, no norms).
        args: Training options.

    Returns:
        Groups for the optimizer. Those with `--learning_rate` come first, because the trainer logs the
        learning rate of the first group.
    """
    rates = {"projector": args.mm_projector_lr, "vision_tower": args.vision_lr}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        part = name.partition(".")[0]
        rate = rates.get(part)
        if rate is None:
            rate = args.learning_rate
        groups.setdefault((rate, name in decayed_names), []).append(parameter)

    # False sorts before True: groups with `--learning_rate` come first.
    ordered = sorted(groups.items(), key=lambda group: group[0][0] != args.learning_rate)
    parameter_groups = []
    for (rate, has_decay), group in ordered:
        decay = args.weight_decay if has_decay else 0.0
        parameter_groups.append({"params": group, "lr": rate, "weight_decay": decay})
    return parameter_groups


def load_scheduler_state(
    scheduler: LRScheduler, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Continue a schedule at the stored step, with the learning rates of this command line.

    The stored state contains the learning rates of the run that wrote it. A resumed run may have
    different ones, so they are computed again from the position in the schedule.

    Args:
        scheduler: The schedule, changed in place.
        optimizer: The optimizer, whose groups get the learning rates.
        state: `state_dict()` of the stored schedule.
    """
    if isinstance(scheduler, LambdaLR):
        # torch calls the position an epoch, but the trainer counts steps.
        position = state["last_epoch"]
        rates = []
        for base_rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas):
            rates.append(base_rate * factor(position))
        # The stored run may also have more groups. Its functions have no state, so nothing of them is restored.
        no_state = [None] * len(scheduler.lr_lambdas)
        state = {**state, "base_lrs": scheduler.base_lrs, "_last_lr": rates, "lr_lambdas": no_state}
    scheduler.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, state["_last_lr"]):
        group["lr"] = rate

"""Gather and split sharded weights and optimizer state: one checkpoint format for DDP, ZeRO and FSDP."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from llava_simplified.model.config import TrainedParts
from llava_simplified.model.llava import Llava

# DDP gives every process a copy of the model. ZeRO and FSDP split it: a process stores one *shard*
# of each tensor.
#
#                    weights     gradients   optimizer state
#     DDP            full        full        full
#     ZeRO-2         full        shard       shard
#     ZeRO-3, FSDP   shard       shard       shard
#
# Every run starts with a full model in every process, which the engine (DDP, DeepSpeed or FSDP) then
# splits. Every save gathers full tensors again, so that a checkpoint does not depend on the engine:
#
#     process 0    [shard 0]  --+                                    +--  [shard 0]
#                               +-> gather -> full tensor -> split --+
#     process 1    [shard 1]  --+              in a file             +--  [shard 1]
#
# A single process can load the checkpoint, and a run can be resumed with a different engine and a
# different number of processes.
#
# Gathering is a collective operation: *all* processes must iterate over `full_state_dict` and
# `full_optimizer_state_dict`, although only one of them writes the result. A process that skips it
# makes the others wait forever.

# If DeepSpeed trains in half precision, its optimizer updates a float32 copy of the weights ("master
# weights"). The copy is stored with the optimizer's state, under this key.
_MASTER_WEIGHT = "float32"

# State of one weight: {"exp_avg": tensor, "exp_avg_sq": tensor, "step": scalar}.
ParameterState = dict[str, torch.Tensor]


def enable_fsdp_on_cpu(accelerator: Accelerator, options: Mapping[str, Any]) -> None:
    """Let FSDP run on CPUs too.

    Accelerate enables FSDP on accelerators only. On CPUs it runs DDP instead, without a warning.

    Args:
        accelerator: The accelerator of the trainer, before it prepares the model.
        options: Arguments of `FullyShardedDataParallelPlugin`. The plugin reads the settings of
            `accelerate launch` from environment variables.
    """
    wants_fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if not wants_fsdp or accelerator.distributed_type != DistributedType.MULTI_CPU:
        return
    plugin = FullyShardedDataParallelPlugin(**options)
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP


# ---- weights ----


def full_state_dict(model: Llava, parts: TrainedParts) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the trained weights by name, in float32, gathered from all processes.

    All processes must iterate over it.

    Args:
        model: The unwrapped model.
        parts: The trained parts. With `vision_tower="full"`, the tower is saved as a complete model folder, so
            its frozen weights (the layers above the selected one) are yielded too.
    """
    for name, parameter in _trained_parameters(model):
        if _is_zero(parameter):
            from deepspeed.utils import safe_get_full_fp32_param

            yield name, safe_get_full_fp32_param(parameter)
        else:
            yield name, _gather(parameter.detach())
    if parts.vision_tower == "full":
        yield from _frozen_tower_weights(model)


def _frozen_tower_weights(model: Llava) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the frozen weights of the vision tower, gathered from all processes."""
    state = model.vision_tower.state_dict(keep_vars=True, prefix="vision_tower.")
    for name, tensor in state.items():
        if tensor.requires_grad:
            continue
        if hasattr(tensor, "ds_id"):  # ZeRO-3 splits frozen weights too
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters([tensor]):
                yield name, tensor.detach().clone()
        else:
            yield name, _gather(tensor.detach())


# ---- optimizer ----


def full_optimizer_state_dict(
    model: nn.Module, optimizer: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the optimizer's state of every trained weight, gathered from all processes.

    All processes must iterate over it.

    Args:
        model: The unwrapped model.
        optimizer: The prepared optimizer.

    Yields:
        Pairs such as `("projector.weight/exp_avg", tensor)`; the tensor has the shape of the full
        weight.
    """
    trained = dict(_trained_parameters(model))
    if any(_is_zero(parameter) for parameter in trained.values()):
        yield from _full_zero_state(trained, optimizer.optimizer)
        return
    for name, parameter in trained.items():
        for key, value in optimizer.state[parameter].items():
            yield f"{name}/{key}", _gather(torch.as_tensor(value))


@torch.no_grad()
def load_optimizer_state_dict(
    model: nn.Module, optimizer: Any, state: Mapping[str, torch.Tensor]
) -> None:
    """Load the tensors of `full_optimizer_state_dict` into an optimizer before its first step.

    Args:
        model: The unwrapped model.
        optimizer: The prepared optimizer.
        state: Full tensors by `name/key`.
    """
    stored: dict[str, ParameterState] = defaultdict(dict)
    for path, value in state.items():
        name, _, key = path.rpartition("/")
        stored[name][key] = value

    trained = dict(_trained_parameters(model))
    if any(_is_zero(parameter) for parameter in trained.values()):
        _load_zero_state(trained, optimizer.optimizer, stored)
        return

    # Build the state by index: `Optimizer.load_state_dict` identifies a weight by its index in the
    # parameter groups.
    names = {parameter: name for name, parameter in trained.items()}
    state_by_index: dict[int, ParameterState] = {}
    index = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            if name in stored:
                state_by_index[index] = _shard_state(stored[name], parameter)
            index += 1
    param_groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state_by_index, "param_groups": param_groups})


def _shard_state(state: ParameterState, parameter: nn.Parameter) -> ParameterState:
    return {key: _shard(value, parameter) for key, value in state.items() if key != _MASTER_WEIGHT}


# ---- DeepSpeed's ZeRO ----
#
# ZeRO's inner optimizer does not contain the weights themselves, but a few flat float32 tensors. Each is
# this process's shard of all weights of a parameter group:
#
#     weights of a group    [w0 ......][w1 ...][w2 .........]
#     flat tensor           [w0 ......w1 ...w2 .........]
#     this process's shard             [..w1 ...w2 ..]
#
# DeepSpeed's `safe_get_full_*` and `safe_set_full_*` translate between a weight and its place in
# the flat tensors.


def _full_zero_state(
    trained: Mapping[str, nn.Parameter], zero_optimizer: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the full optimizer state of ZeRO, by weight and key. All processes must take part."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    _link_zero_state(zero_optimizer)
    # All flat tensors have the same keys, such as exp_avg. Take them from the first one.
    first_state = next(iter(zero_optimizer.optimizer.state.values()))
    for name, parameter in trained.items():
        for key, value in first_state.items():
            # Gather tensors only: scalars (the step count) are the same for all weights.
            if torch.is_tensor(value) and value.dim() > 0:
                value = safe_get_full_optimizer_state(parameter, key)
            yield f"{name}/{key}", torch.as_tensor(value, dtype=torch.float32)
        if parameter.dtype != torch.float32:
            yield f"{name}/{_MASTER_WEIGHT}", safe_get_full_fp32_param(parameter)


def _load_zero_state(
    trained: Mapping[str, nn.Parameter], zero_optimizer: Any, stored: Mapping[str, ParameterState]
) -> None:
    """Load full optimizer state into ZeRO, which splits it into the shards of the processes."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    _create_empty_zero_state(zero_optimizer, next(iter(stored.values())))
    _link_zero_state(zero_optimizer)
    for name, parameter in trained.items():
        for key, value in stored[name].items():
            if key == _MASTER_WEIGHT:
                safe_set_full_fp32_param(parameter, value.to(parameter.device))
            elif value.dim() > 0:
                safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)


def _create_empty_zero_state(zero_optimizer: Any, example: ParameterState) -> None:
    """Create the state that the inner optimizer would create in its first step, filled with zeros.

    Args:
        zero_optimizer: DeepSpeed's ZeRO optimizer.
        example: The stored state of any weight, from which the keys and the scalars are taken.
    """
    inner = zero_optimizer.optimizer
    flat_shards = getattr(zero_optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3
    if not flat_shards:
        flat_shards = zero_optimizer.single_partition_of_fp32_groups  # ZeRO-2
    for flat in flat_shards:
        for key, value in example.items():
            if key == _MASTER_WEIGHT:
                continue
            if value.dim() > 0:
                inner.state[flat][key] = torch.zeros_like(flat)
            else:
                # Fused AdamW requires its step count on the device, the plain one on the CPU.
                device = flat.device if inner.defaults.get("fused") else "cpu"
                inner.state[flat][key] = value.to(device, copy=True)


def _link_zero_state(zero_optimizer: Any) -> None:
    """Link each weight to its optimizer state, for `safe_get_full_*` with ZeRO-2.

    DeepSpeed links them too, but only once, at a time when only the first parameter group has a state.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    if not hasattr(zero_optimizer, "bit16_groups"):  # ZeRO-3 needs no links
        return
    shards = zero_optimizer.single_partition_of_fp32_groups
    for weights, flat in zip(zero_optimizer.bit16_groups, shards):
        lazy_init_hp_params_optimizer_state(weights, flat, zero_optimizer.optimizer.state)


# ---- shared ----


def _trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that are trained, by name."""
    for module in model.modules():
        # After an evaluation, FSDP leaves gathered copies in place of the sharded parameters. Restore the
        # sharded ones, because the optimizer has those.
        if isinstance(module, FSDPModule):
            module.reshard()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def _is_zero(parameter: nn.Parameter) -> bool:
    """Return True if DeepSpeed manages the parameter: ZeRO-3 sets `ds_id`, ZeRO-2 `_hp_mapping`."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    """Return the full tensor; FSDP's shards are gathered from all processes."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    return tensor


def _shard(value: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """Return the shard of a full tensor, split like an FSDP parameter; scalars are not split."""
    if not isinstance(parameter, DTensor) or value.dim() == 0:
        return value
    on_device = value.to(parameter.device)
    return distribute_tensor(on_device, parameter.device_mesh, parameter.placements)

"""Engines: how several processes train one model. DDP copies it; DeepSpeed's ZeRO and FSDP cut it up.

A run starts with a whole model, which its engine cuts up, and saves whole tensors again: a checkpoint says nothing of
the engine that wrote it, loads in a single process, and goes on under any engine with any number of processes.
"""

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


def shard_on_cpus(accelerator: Accelerator, options: Mapping[str, Any]) -> None:
    """Run FSDP on CPUs as well: accelerate takes it for a matter of GPUs and would run DDP without a word.

    Args:
        options: of `FullyShardedDataParallelPlugin`; what `accelerate launch` says comes through the environment.
    """
    if (
        os.environ.get("ACCELERATE_USE_FSDP") == "true"
        and accelerator.distributed_type == DistributedType.MULTI_CPU
    ):
        plugin = FullyShardedDataParallelPlugin(**options)
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = DistributedType.FSDP


def full_state_dict(model: Llava, parts: TrainedParts) -> Iterator[tuple[str, torch.Tensor]]:
    """What is trained, by name, in float32. All processes have to go through it: shards are gathered on the way."""
    for name, parameter in _trained(model):
        if _is_zero(parameter):
            from deepspeed.utils import safe_get_full_fp32_param

            yield name, safe_get_full_fp32_param(parameter)
        else:
            yield name, _whole(parameter.detach())
    if (
        parts.vision_tower == "full"
    ):  # its folder holds the layers behind the last that is trained, too
        for name, tensor in model.vision_tower.state_dict(
            keep_vars=True, prefix="vision_tower."
        ).items():
            if hasattr(tensor, "ds_id") and not tensor.requires_grad:
                from deepspeed.runtime.zero import GatheredParameters

                with GatheredParameters([tensor]):
                    yield name, tensor.detach().clone()
            elif not tensor.requires_grad:
                yield name, _whole(tensor.detach())


def full_optimizer_state_dict(
    model: nn.Module, optimizer: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """What the optimizer keeps of every trained weight, as `("projector.weight/exp_avg", tensor)`.

    All processes have to go through it: shards are gathered on the way.
    """
    trained = dict(_trained(model))
    if any(map(_is_zero, trained.values())):
        yield from _whole_zero_state(trained, optimizer.optimizer)
        return
    for name, parameter in trained.items():
        for key, value in optimizer.state[parameter].items():
            yield f"{name}/{key}", _whole(torch.as_tensor(value))


@torch.no_grad()
def load_optimizer_state_dict(
    model: nn.Module, optimizer: Any, state: Mapping[str, torch.Tensor]
) -> None:
    """Give an optimizer that has not stepped yet what `full_optimizer_state_dict` read, whichever engine that was."""
    stored: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for path, value in state.items():
        name, _, key = path.rpartition("/")
        stored[name][key] = value
    trained = dict(_trained(model))
    if any(map(_is_zero, trained.values())):
        _restore_zero(trained, optimizer.optimizer, stored)
        return
    names = {parameter: name for name, parameter in trained.items()}
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shares = {
        index: {
            key: _share(value, parameter)
            for key, value in stored[names[parameter]].items()
            if key != _MASTER
        }
        for index, parameter in enumerate(order)
        if names[parameter] in stored
    }
    optimizer.load_state_dict(
        {"state": shares, "param_groups": optimizer.state_dict()["param_groups"]}
    )


_MASTER = (
    "float32"  # where DeepSpeed trains in a lower precision: the weight that it really updates
)


def _whole_zero_state(
    trained: Mapping[str, nn.Parameter], zero: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    _link(zero)
    keys = next(iter(zero.optimizer.state.values()))
    for name, parameter in trained.items():
        for key, value in keys.items():
            whole = (
                safe_get_full_optimizer_state(parameter, key)
                if torch.is_tensor(value) and value.dim()
                else value
            )
            yield f"{name}/{key}", torch.as_tensor(whole, dtype=torch.float32)
        if parameter.dtype != torch.float32:
            yield f"{name}/{_MASTER}", safe_get_full_fp32_param(parameter)


def _restore_zero(
    trained: Mapping[str, nn.Parameter], zero: Any, stored: Mapping[str, dict[str, torch.Tensor]]
) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    # its optimizer sees a few flat tensors, this process's shares of all weights behind one another
    for flat in (
        getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups
    ):
        for key, value in next(iter(stored.values())).items():
            if key != _MASTER:
                device = flat.device if zero.optimizer.defaults.get("fused") else "cpu"
                zero.optimizer.state[flat][key] = (
                    torch.zeros_like(flat) if value.dim() else value.to(device, copy=True)
                )
    _link(zero)
    for name, parameter in trained.items():
        for key, value in stored[name].items():
            if key == _MASTER:
                safe_set_full_fp32_param(parameter, value.to(parameter.device))
            elif value.dim():
                safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)


def _link(zero: Any) -> None:
    """Let ZeRO-2 find what its optimizer keeps; it looks itself, once, when only the first group of weights has any."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    if hasattr(zero, "bit16_groups"):
        for weights, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups):
            lazy_init_hp_params_optimizer_state(weights, flat, zero.optimizer.state)


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # an evaluation leaves whole weights in place of those that the optimizer knows
    return (
        (name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
    )


def _is_zero(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _share(value: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    if not isinstance(parameter, DTensor) or not value.dim():
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements
    )

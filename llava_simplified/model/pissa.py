"""PiSSA (Meng et al., 2024): start the adapter from the largest singular values of the frozen weights.

LoRA starts from B = 0. PiSSA moves the principal part of each weight W into the adapter, where it is
trained, and freezes what is left (s is the scale of the adapter):

    W = W_rest + s B0 A0            before the first step
    W_rest + s B A                  after training

An adapter (A, B) alone would be wrong: it fits W_rest, but everybody has W. A checkpoint therefore
contains an adapter of twice the rank, which fits W and which any tool can load:

    W_rest + s B A  =  W + s [B, -B0] [A; A0]

The two halves are all that a resumed run needs, too: `split` separates them, and `subtract` computes
W_rest in the same way as in the first run, so that it is the same bit for bit. Converted in this way,
DoRA still normalizes the same sum, and rsLoRA has the same scale (see `joined_config`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from llava_simplified.model.peft_names import LoraConfig, LoraLayer, PeftModel, transpose

Weights = dict[str, torch.Tensor]

# The fields of `LoraConfig` that differ between the trained adapter and that of twice the rank.
SCALED_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")


def wants_pissa(config: LoraConfig) -> bool:
    """Return whether an adapter is (to be) initialized by PiSSA."""
    method = config.init_lora_weights
    return isinstance(method, str) and method.startswith("pissa")


def initial_weights(model: Any) -> Weights | None:
    """Return A0 and B0 of a model's adapter by their names in files; None without PiSSA.

    They are no parameters: they are neither trained, nor sharded, nor moved to the device.
    """
    weights: Weights | None = getattr(model, "pissa_initial_weights", None)
    return weights


@torch.no_grad()
def initialize(model: Any) -> None:
    """Start an adapter from the frozen weights, and subtract that from them; nothing unless its config asks for it.

    Args:
        model: A model with a new adapter. Nothing is done if a checkpoint has been loaded into it.

    Raises:
        ValueError: The rank is larger than that of a layer.
    """
    if not isinstance(model, PeftModel):
        return
    config: Any = model.peft_config["default"]
    if not wants_pissa(config) or initial_weights(model) is not None:
        return
    initial: Weights = {}
    for name, layer in _adapted_layers(model):
        rank, largest = layer.r["default"], min(layer.in_features, layer.out_features)
        if rank > largest:
            raise ValueError(
                f"--lora_options: PiSSA cannot start with rank {rank} in {name}, which has {largest} singular values; "
                f"pass --lora_r {largest}"
            )
        layer.pissa_init("default", config.init_lora_weights)
        for matrix in ("lora_A", "lora_B"):
            weight = getattr(layer, matrix)["default"].weight
            initial[f"{name}.{matrix}.weight"] = weight.detach().cpu().clone().contiguous()
    _keep(model, initial)


@torch.no_grad()
def subtract(model: PeftModel, initial: Weights) -> None:
    """Subtract s B0 A0 from the frozen weights, as PEFT does when it initializes an adapter."""
    if initial_weights(model) is not None:
        raise RuntimeError("the principal part has been subtracted from the frozen weights already")
    for name, layer in _adapted_layers(model):
        base: Any = layer.get_base_layer()
        lora_a = initial[f"{name}.lora_A.weight"].to(base.weight.device)
        lora_b = initial[f"{name}.lora_B.weight"].to(base.weight.device)
        weight = transpose(base.weight.data.float(), layer.fan_in_fan_out)
        # The same operations in the same order as in `pissa_init`.
        weight = weight - layer.scaling["default"] * lora_b @ lora_a
        base.weight.data = transpose(weight.to(base.weight.dtype), layer.fan_in_fan_out)
    _keep(model, initial)


def join(weights: Mapping[str, torch.Tensor], initial: Mapping[str, torch.Tensor]) -> Weights:
    """Return the adapter of twice the rank, which fits the original weights.

    Args:
        weights: The trained adapter: A (r, in) and B (out, r), and what else it has.
        initial: A0 and B0.
    """
    joined = dict(weights)
    for name, start in initial.items():
        trained = weights[name].cpu()
        if name.endswith("lora_A.weight"):
            joined[name] = torch.cat([trained, start.to(trained.dtype)], dim=0)
        else:
            joined[name] = torch.cat([trained, -start.to(trained.dtype)], dim=1)
    return joined


def split(joined: Mapping[str, torch.Tensor]) -> tuple[Weights, Weights]:
    """Return the trained adapter, and A0 and B0: the reverse of `join`."""
    weights, initial = dict(joined), {}
    for name, weight in joined.items():
        if name.endswith("lora_A.weight"):
            rank = weight.shape[0] // 2
            weights[name] = weight[:rank].contiguous()
            initial[name] = weight[rank:].contiguous()
        elif name.endswith("lora_B.weight"):
            rank = weight.shape[-1] // 2
            weights[name] = weight[..., :rank].contiguous()
            initial[name] = -weight[..., rank:].contiguous()
    return weights, initial


def scaled_fields(config: LoraConfig) -> dict[str, Any]:
    """Return the entries of a config that `joined_config` changes, for the checkpoint."""
    return {name: getattr(config, name) for name in SCALED_FIELDS}


def joined_config(trained: Mapping[str, Any], use_rslora: bool) -> dict[str, Any]:
    """Return the entries of the config of the adapter of twice the rank, which has the same scale.

    The scale is alpha / r, and alpha / sqrt(r) with rsLoRA.

    Args:
        trained: The result of `scaled_fields`.
        use_rslora: The adapter is scaled as in rsLoRA.
    """
    factor = math.sqrt(2) if use_rslora else 2
    return {
        "r": 2 * trained["r"],
        "lora_alpha": factor * trained["lora_alpha"],
        "rank_pattern": {name: 2 * rank for name, rank in trained["rank_pattern"].items()},
        "alpha_pattern": {name: factor * alpha for name, alpha in trained["alpha_pattern"].items()},
    }


def _adapted_layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    """Return the adapted layers, with the names that their weights have in files."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _keep(model: Any, initial: Weights) -> None:
    model.pissa_initial_weights = initial

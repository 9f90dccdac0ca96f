"""PiSSA (Meng et al., 2024): start the adapter from the largest singular values of the frozen weights.

LoRA starts with B = 0. PiSSA moves the principal part of each weight W (its largest singular values) into the
adapter, where it is trained, and freezes the rest (s is the scale of the adapter):

    W = W_rest + s B0 A0            before the first step
    W_rest + s B A                  after training

A checkpoint cannot contain just A and B: they must be added to W_rest, but other tools only have W. So a
checkpoint contains a "joined" adapter of twice the rank, which is added to W:

    W_rest + s B A  =  W + s [B, -B0] [A; A0]

To resume a run, `split` separates the two halves, and `subtract` computes W_rest again. It uses the same
operations as the first run, so that all bits are equal. The joined adapter also works with DoRA (which
normalizes the same sum) and with rsLoRA (see `joined_config`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from llava_simplified.model.peft_names import LoraConfig, LoraLayer, PeftModel, transpose

Weights = dict[str, torch.Tensor]

# The fields of `LoraConfig` that differ between the trained adapter and the joined adapter.
SCALED_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")


def uses_pissa(config: LoraConfig) -> bool:
    """Return whether the config of an adapter requests PiSSA."""
    method = config.init_lora_weights
    return isinstance(method, str) and method.startswith("pissa")


def initial_weights(model: Any) -> Weights | None:
    """Return A0 and B0 of a model's adapter, by their names in checkpoints; None if PiSSA has not been applied.

    They are not parameters, so they are not trained, sharded, or moved to the device.
    """
    weights: Weights | None = getattr(model, "pissa_initial_weights", None)
    return weights


@torch.no_grad()
def initialize(model: Any) -> None:
    """Move the principal part of the frozen weights into a new adapter, if its config requests PiSSA.

    Args:
        model: A model with an adapter. If a checkpoint has been loaded into it, nothing is changed.

    Raises:
        ValueError: The rank of the adapter is larger than the number of singular values of a layer.
    """
    if not isinstance(model, PeftModel):
        return
    config: Any = model.peft_config["default"]
    if not uses_pissa(config) or initial_weights(model) is not None:
        return
    initial: Weights = {}
    for name, layer in _adapted_layers(model):
        rank = layer.r["default"]
        num_singular_values = min(layer.in_features, layer.out_features)
        if rank > num_singular_values:
            raise ValueError(
                f"--lora_options: PiSSA cannot start with rank {rank} in {name}, which has {num_singular_values} "
                f"singular values; choose a rank of at most {num_singular_values} (--lora_r, or rank_pattern in "
                "--lora_options)"
            )
        # PEFT sets A and B, and subtracts their product from the frozen weight.
        layer.pissa_init("default", config.init_lora_weights)
        # Store copies of A0 and B0, because training changes the matrices of the adapter.
        for matrix in ("lora_A", "lora_B"):
            weight = getattr(layer, matrix)["default"].weight
            initial[f"{name}.{matrix}.weight"] = weight.detach().cpu().clone().contiguous()
    _store_initial_weights(model, initial)


@torch.no_grad()
def subtract(model: PeftModel, initial: Weights) -> None:
    """Subtract s B0 A0 from the frozen weights, as PEFT does when it initializes an adapter.

    Args:
        model: A model with an adapter, and with the original frozen weights.
        initial: A0 and B0 by their names in checkpoints.

    If the same s B0 A0 has been subtracted already, as when a run with a reference model is resumed, nothing is changed.

    Raises:
        ValueError: Another s B0 A0 has been subtracted. A second subtraction would corrupt the weights.
    """
    subtracted = initial_weights(model)
    if subtracted is not None:
        if all(torch.equal(matrix, subtracted[name]) for name, matrix in initial.items()):
            return
        raise ValueError(
            "PiSSA: the checkpoint was started from other singular vectors than this machine computes. Resume the run on "
            "the machine on which it began, or start from an adapter that was saved: --init_from."
        )
    for name, layer in _adapted_layers(model):
        base: Any = layer.get_base_layer()
        lora_a = initial[f"{name}.lora_A.weight"].to(base.weight.device)
        lora_b = initial[f"{name}.lora_B.weight"].to(base.weight.device)
        weight = transpose(base.weight.data.float(), layer.fan_in_fan_out)
        # Use the same operations in the same order as PEFT's `pissa_init`, to get the same rounding errors.
        weight = weight - layer.scaling["default"] * lora_b @ lora_a
        base.weight.data = transpose(weight.to(base.weight.dtype), layer.fan_in_fan_out)
    _store_initial_weights(model, initial)


def join(weights: Mapping[str, torch.Tensor], initial: Mapping[str, torch.Tensor]) -> Weights:
    """Return the joined adapter, which has twice the rank and fits the original weights.

    Args:
        weights: The weights of the trained adapter: A (r, in) and B (out, r). Other weights (of DoRA) are not changed.
        initial: A0 and B0 by their names in checkpoints.
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
    """Return the weights of the trained adapter, and A0 and B0. This is the inverse of `join`."""
    weights, initial = dict(joined), {}
    # The first half of the rank contains the trained matrices, the second half contains A0 and -B0.
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
    """Return the entries of a config that `joined_config` changes. A resumed run reads them from the checkpoint."""
    return {name: getattr(config, name) for name in SCALED_FIELDS}


def joined_config(trained: Mapping[str, Any], use_rslora: bool) -> dict[str, Any]:
    """Return the config entries of the joined adapter: twice the rank, but the same scale.

    Args:
        trained: The result of `scaled_fields`.
        use_rslora: Whether the adapter is scaled as in rsLoRA.
    """
    # The scale is alpha / r, or alpha / sqrt(r) with rsLoRA. As r doubles, alpha must grow by this factor.
    factor = math.sqrt(2) if use_rslora else 2
    return {
        "r": 2 * trained["r"],
        "lora_alpha": factor * trained["lora_alpha"],
        "rank_pattern": {name: 2 * rank for name, rank in trained["rank_pattern"].items()},
        "alpha_pattern": {name: factor * alpha for name, alpha in trained["alpha_pattern"].items()},
    }


def _adapted_layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    """Yield the adapted layers, with their names in checkpoints."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _store_initial_weights(model: Any, initial: Weights) -> None:
    """Store A0 and B0, for `initial_weights`."""
    model.pissa_initial_weights = initial

"""The projector: patch features of the vision tower -> image tokens of the language model."""

from __future__ import annotations

import re

import torch
from torch import nn


def build_projector(kind: str, vision_hidden_size: int, text_hidden_size: int) -> nn.Module:
    """Build a projector with PyTorch's default initialization.

    Args:
        kind: `linear` (LLaVA), `mlp2x_gelu` (LLaVA-1.5), `mlp3x_gelu` and so on, or `identity`.
        vision_hidden_size: Size of the patch features.
        text_hidden_size: Size of the token embeddings.

    Returns:
        A module (..., vision_hidden_size) -> (..., text_hidden_size).

    Raises:
        ValueError: `kind` is unknown, or it is `identity` and the hidden sizes differ.
    """
    if kind == "linear":
        return nn.Linear(vision_hidden_size, text_hidden_size)
    if kind == "identity":
        if vision_hidden_size != text_hidden_size:
            raise ValueError(
                "--mm_projector_type identity requires equal hidden sizes, but the vision tower has "
                f"{vision_hidden_size} and the language model {text_hidden_size}; pass "
                "--mm_projector_type linear"
            )
        return nn.Identity()
    match = re.fullmatch(r"mlp([1-9]\d?)x_gelu", kind)
    if match is None:
        raise ValueError(
            "--mm_projector_type must be linear, mlp2x_gelu (or another depth) or identity, not "
            f"{kind!r}"
        )
    depth = int(match[1])
    layers: list[nn.Module] = [nn.Linear(vision_hidden_size, text_hidden_size)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(text_hidden_size, text_hidden_size)]
    return nn.Sequential(*layers)


@torch.no_grad()
def init_projector_scale(
    projector: nn.Module, features: torch.Tensor, embeddings: torch.Tensor
) -> None:
    """Rescale a new projector, so that its outputs have the same scale as the token embeddings.

    The features of some towers are a hundred times as large as those of others, and token embeddings are small
    (standard deviation 0.1 in SmolLM2). With PyTorch's default initialization, training would spend hundreds of
    steps on correcting the scale.

    The first layer is changed as if its input were standardized per channel. The last layer is rescaled so that
    the output has the standard deviation of the embeddings. No parameter is added.

    Args:
        projector: Modified in place.
        features: (images, tokens, vision hidden size), features of some training images.
        embeddings: (tokens, text hidden size), some or all token embeddings of the language model.
    """
    linears = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    if not linears:
        return  # an identity projector
    first, last = linears[0], linears[-1]
    features = features.flatten(0, -2).float()

    # Fold (x - mean) / std = x / std - mean / std into the weight and the bias of the first layer.
    std = features.std(0)
    # Clamp the standard deviation. Otherwise, a channel that is nearly constant in these images would be
    # amplified strongly in other images. If the median is 0, use the mean: after a ReLU, most channels may be
    # constant.
    typical_std = float(std.median()) or float(std.mean())
    first.weight.div_(std.clamp_min(0.1 * typical_std))
    first.bias.sub_(first.weight @ features.mean(0))

    scale = embeddings.float().std() / projector(features).std()
    last.weight.mul_(scale)
    last.bias.mul_(scale)

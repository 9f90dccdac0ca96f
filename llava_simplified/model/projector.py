"""The projector: from the vision tower's width to the language model's."""

from __future__ import annotations

import re

import torch
from torch import nn


def build_projector(kind: str, vision_width: int, text_width: int) -> nn.Module:
    """`linear` (LLaVA), `mlp2x_gelu` (LLaVA-1.5; any depth: `mlp3x_gelu`) or `identity`.

    Maps (..., vision_width) to (..., text_width).

    Raises:
        ValueError: an unknown kind, or `identity` between different widths.
    """
    if kind == "linear":
        return nn.Linear(vision_width, text_width)
    if kind == "identity":
        if vision_width != text_width:
            raise ValueError(
                f"mm_projector_type identity needs equal widths, not {vision_width} and {text_width}"
            )
        return nn.Identity()
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if match is None:
        raise ValueError(
            f"mm_projector_type is linear, mlp2x_gelu (any depth) or identity, not {kind!r}"
        )
    layers: list[nn.Module] = [nn.Linear(vision_width, text_width)]
    for _ in range(int(match[1]) - 1):
        layers += [nn.GELU(), nn.Linear(text_width, text_width)]
    return nn.Sequential(*layers)


@torch.no_grad()
def init_projector_scale(
    projector: nn.Module, features: torch.Tensor, embeddings: torch.Tensor
) -> None:
    """Start a fresh projector where training is easy: on the scale of what it reads and of what it feeds.

    Feature channels differ a hundredfold in scale between towers, and token embeddings are small (SmolLM2's have a
    standard deviation of 0.1): at PyTorch's default initialisation the first hundreds of steps only mend that. The
    first layer is rescaled as if its input were standardised per channel, the last as if its output had the
    embeddings' standard deviation. No parameter is added; the architecture stays the stock one.

    Args:
        features: (images, tokens, vision width), some real ones.
        embeddings: (vocabulary, text width) of the language model.
    """
    linears = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    if not linears:
        return
    features = features.flatten(0, -2).float()
    first, last = linears[0], linears[-1]
    # A channel that is silent in all of these pictures is not in all others: a floor keeps it from being shouted.
    deviation = features.std(0)
    # And most may be silent, behind a ReLU.
    first.weight.div_(
        deviation.clamp_min(0.1 * (float(deviation.median()) or float(deviation.mean())))
    )
    first.bias.sub_(first.weight @ features.mean(0))
    scale = embeddings.float().std() / projector(features).std()
    last.weight.mul_(scale)
    last.bias.mul_(scale)

"""The layers of the projector, and its initial scale."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llava_simplified.model.projector import build_projector, init_projector_scale


def test_build_projector_has_the_layers_of_its_kind() -> None:
    assert isinstance(build_projector("linear", 4, 8), nn.Linear)
    mlp = build_projector("mlp3x_gelu", 4, 8)
    assert [type(layer).__name__ for layer in mlp] == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    assert mlp(torch.zeros(2, 3, 4)).shape == (2, 3, 8)
    assert isinstance(build_projector("identity", 8, 8), nn.Identity)


@pytest.mark.parametrize("kind", ["mlp0x_gelu", "mlp2x_relu", "resampler", ""])
def test_build_projector_refuses_unknown_kinds(kind: str) -> None:
    with pytest.raises(ValueError, match="mm_projector_type"):
        build_projector(kind, 4, 8)


def test_build_projector_identity_requires_equal_widths() -> None:
    with pytest.raises(ValueError, match=r"identity .*4 .*8"):
        build_projector("identity", 4, 8)


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_init_projector_scale_matches_the_embeddings(kind: str) -> None:
    torch.manual_seed(0)
    # Channels whose scales differ by a factor of 1000, with an offset that all tokens share.
    scales = torch.logspace(-1, 2, 16)
    features = torch.randn(8, 5, 16) * scales + 30
    features.requires_grad_()
    embeddings = torch.randn(100, 32) * 0.1
    projector = build_projector(kind, 16, 32)
    init_projector_scale(projector, features, embeddings)
    output = projector(features)
    assert 0.05 < output.std() < 0.2
    # The tokens differ from each other: the output is not only an offset that all tokens share.
    std_over_tokens = output.flatten(0, 1).std(0).mean()
    assert 0.03 < std_over_tokens < 0.2

    # Every input channel contributes about equally: gradient norm times standard deviation.
    random_loss = (output * torch.randn_like(output)).sum()
    random_loss.backward()
    sensitivity = features.grad.pow(2).mean((0, 1)).sqrt()
    std = features.flatten(0, 1).std(0)
    contribution = (sensitivity * std).tolist()
    assert max(contribution) / min(contribution) < 8


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_init_projector_scale_does_not_amplify_a_constant_channel(kind: str) -> None:
    torch.manual_seed(0)
    features = torch.randn(8, 5, 16)
    # A constant channel, such as a rectified channel of a convolutional tower in most images.
    features[..., 3] = 0
    embeddings = torch.randn(100, 32) * 0.1
    projector = build_projector(kind, 16, 32)
    init_projector_scale(projector, features, embeddings)
    assert projector(torch.randn(8, 5, 16)).std() < 1


def test_init_projector_scale_works_if_most_channels_are_constant() -> None:
    features = torch.randn(8, 5, 16)
    features[..., 3:] = 0  # The median of the standard deviations is 0.
    projector = build_projector("mlp2x_gelu", 16, 32)
    init_projector_scale(projector, features, torch.randn(100, 32) * 0.1)
    assert 0.05 < projector(features).std() < 0.2

from __future__ import annotations

import pytest
import torch
from torch import nn

from llava_simplified.model.projector import build_projector, init_projector_scale


def test_each_kind_has_the_layers_that_its_name_says() -> None:
    assert isinstance(build_projector("linear", 4, 8), nn.Linear)
    mlp = build_projector("mlp3x_gelu", 4, 8)
    assert [type(layer).__name__ for layer in mlp] == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    assert mlp(torch.zeros(2, 3, 4)).shape == (2, 3, 8)
    assert isinstance(build_projector("identity", 8, 8), nn.Identity)


@pytest.mark.parametrize("kind", ["mlp0x_gelu", "mlp2x_relu", "resampler", ""])
def test_unknown_kinds_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="mm_projector_type"):
        build_projector(kind, 4, 8)


def test_identity_needs_equal_widths() -> None:
    with pytest.raises(ValueError, match="4 and 8"):
        build_projector("identity", 4, 8)


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_a_fresh_projector_starts_on_the_embeddings_scale(kind: str) -> None:
    torch.manual_seed(0)
    features = (torch.randn(8, 5, 16) * torch.logspace(-1, 2, 16) + 30).requires_grad_()
    embeddings = torch.randn(100, 32) * 0.1
    projector = build_projector(kind, 16, 32)
    init_projector_scale(projector, features, embeddings)
    out = projector(features)
    places = (
        out.flatten(0, 1).std(0).mean()
    )  # what differs from place to place, not an offset that all have
    assert 0.03 < places < 0.2 and 0.05 < out.std() < 0.2
    # every input channel is heard, small ones as well as loud ones: none dominates
    (out * torch.randn_like(out)).sum().backward()
    share = (features.grad.pow(2).mean((0, 1)).sqrt() * features.flatten(0, 1).std(0)).tolist()
    assert max(share) / min(share) < 8


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_a_channel_that_was_silent_at_the_start_does_not_drown_the_others_later(kind: str) -> None:
    torch.manual_seed(0)
    features = torch.randn(8, 5, 16)
    features[..., 3] = 0  # as the rectified channels of a convolutional tower are in most pictures
    embeddings = torch.randn(100, 32) * 0.1
    projector = build_projector(kind, 16, 32)
    init_projector_scale(projector, features, embeddings)
    assert projector(torch.randn(8, 5, 16)).std() < 1


def test_a_tower_most_of_whose_channels_are_silent_is_scaled_by_the_others() -> None:
    features = torch.randn(8, 5, 16)
    features[..., 3:] = 0  # their median deviation is none
    projector = build_projector("mlp2x_gelu", 16, 32)
    init_projector_scale(projector, features, torch.randn(100, 32) * 0.1)
    assert 0.05 < projector(features).std() < 0.2

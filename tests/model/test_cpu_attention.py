"""The attention kernel for CPUs, compared with PyTorch's."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from llava_simplified.model import cpu_attention
from llava_simplified.model.cpu_attention import CPU_ATTENTION_MAX_LENGTH, cpu_matmul_attention


@pytest.mark.parametrize("masked", [True, False])
def test_cpu_matmul_attention_equals_scaled_dot_product_attention(masked: bool) -> None:
    """Outputs and gradients in float64, with grouped-query attention.

    With a mask, the last two tokens are padding that attends to nothing: it must not spread NaN.
    """
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, 7, 4, dtype=torch.float64).requires_grad_() for heads in (6, 2, 2)
    )
    mask = None
    length = 7
    options = {"is_causal": True}
    if masked:
        length = 5
        mask = (torch.rand(2, 1, 7, 7) > 0.4) | torch.eye(7, dtype=torch.bool)
        mask[..., length:, :] = False
        mask[..., length:] = False
        options = {"attn_mask": mask[:, :, :length]}
    output, _ = cpu_matmul_attention(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    expected = scaled_dot_product_attention(
        query[:, :, :length], key, value, scale=0.3, enable_gqa=True, **options
    )
    torch.testing.assert_close(output[:, :length], expected.transpose(1, 2), rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(output[:, :length].cos().sum(), (query, key, value))
    expected_gradients = torch.autograd.grad(expected.cos().sum(), (query, key, value))
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


def test_cpu_matmul_attention_leaves_everything_else_to_sdpa(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths: list[int] = []
    monkeypatch.setattr(
        cpu_attention, "sdpa_attention_forward", lambda *args, **_: lengths.append(args[1].shape[2])
    )
    layer = torch.nn.Module()
    short = torch.randn(1, 2, 5, 4)
    long = torch.randn(1, 2, CPU_ATTENTION_MAX_LENGTH + 1, 4)
    with torch.no_grad():
        cpu_matmul_attention(layer, short, short, short, None)
    cpu_matmul_attention(layer, long, long, long, None)
    cpu_matmul_attention(layer, short, short, short, None, dropout=0.1)
    cpu_matmul_attention(layer, short, short, short, None, softcap=50.0)
    assert lengths == [5, CPU_ATTENTION_MAX_LENGTH + 1, 5, 5]

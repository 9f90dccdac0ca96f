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

    With a mask, the last two tokens are padding that attends to nothing. Their NaN must not spread.
    """
    torch.manual_seed(0)
    # (batch, heads, length, head_dim), with three query heads per key head.
    query = torch.randn(2, 6, 7, 4, dtype=torch.float64, requires_grad=True)
    key = torch.randn(2, 2, 7, 4, dtype=torch.float64, requires_grad=True)
    value = torch.randn(2, 2, 7, 4, dtype=torch.float64, requires_grad=True)
    mask = None
    length = 7
    options = {"is_causal": True}
    if masked:
        # A random mask. Every token attends to itself, except for two padding tokens at the end.
        length = 5
        mask = (torch.rand(2, 1, 7, 7) > 0.4) | torch.eye(7, dtype=torch.bool)
        mask[..., length:, :] = False
        mask[..., length:] = False
        options = {"attn_mask": mask[:, :, :length]}
    output, _ = cpu_matmul_attention(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    expected = scaled_dot_product_attention(
        query[:, :, :length], key, value, scale=0.3, enable_gqa=True, **options
    )
    # Compare without padding. `expected` is (batch, heads, length, head_dim).
    output = output[:, :length]
    tolerance = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(output, expected.transpose(1, 2), **tolerance)

    # Use a nonlinear loss, so that every element of the output has a different gradient.
    inputs = (query, key, value)
    gradients = torch.autograd.grad(output.cos().sum(), inputs)
    expected_gradients = torch.autograd.grad(expected.cos().sum(), inputs)
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        torch.testing.assert_close(gradient, expected_gradient, **tolerance)


def test_cpu_matmul_attention_leaves_everything_else_to_sdpa(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Record the length of every call that is delegated to sdpa.
    lengths: list[int] = []

    def record_length(_: torch.nn.Module, query: torch.Tensor, *__: object, **___: object) -> None:
        lengths.append(query.shape[2])

    monkeypatch.setattr(cpu_attention, "sdpa_attention_forward", record_length)
    layer = torch.nn.Module()
    short = torch.randn(1, 2, 5, 4)
    long = torch.randn(1, 2, CPU_ATTENTION_MAX_LENGTH + 1, 4)
    with torch.no_grad():
        cpu_matmul_attention(layer, short, short, short, None)
    cpu_matmul_attention(layer, long, long, long, None)
    cpu_matmul_attention(layer, short, short, short, None, dropout=0.1)
    cpu_matmul_attention(layer, short, short, short, None, softcap=50.0)
    assert lengths == [5, CPU_ATTENTION_MAX_LENGTH + 1, 5, 5]

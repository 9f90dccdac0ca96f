"""An attention kernel for training on CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

CPU_ATTENTION_MAX_LENGTH = 512  # tokens; the probabilities of longer texts take too much memory, and torch's own kernel less time


class _MatmulAttention(torch.autograd.Function):
    """Attention in plain matrix products, the heads that share keys in one; probabilities are kept for the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        shape, length, groups = query.shape, query.shape[2], key.shape[0] * key.shape[1]
        query, key, value = (x.reshape(groups, -1, x.shape[-1]) for x in (query, key, value))
        scores = torch.bmm(query, key.mT).mul_(scale).view(*shape[:3], length)
        # the least number, not -inf: where padding sees nothing it would make NaN
        attn_weights = (
            scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
            .softmax(-1)
            .view(groups, -1, length)
        )
        ctx.save_for_backward(query, key, value, attn_weights)
        ctx.scale, ctx.shape = scale, shape
        return torch.bmm(attn_weights, value).view(*shape[:3], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, attn_weights = ctx.saved_tensors
        batch, _, length, _ = ctx.shape
        gradient = gradient.reshape(len(attn_weights), -1, value.shape[-1])
        grad_weights = torch.bmm(gradient, value.mT)
        grad_scores = torch._softmax_backward_data(
            grad_weights, attn_weights, -1, attn_weights.dtype
        ).mul_(ctx.scale)
        grad_query = torch.bmm(grad_scores, key).view(ctx.shape)
        grad_key, grad_value = (
            torch.bmm(grad_scores.mT, query),
            torch.bmm(attn_weights.mT, gradient),
        )
        return (
            grad_query,
            *(x.view(batch, -1, length, x.shape[-1]) for x in (grad_key, grad_value)),
            None,
            None,
        )


def cpu_matmul_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """sdpa, but for short texts that train on a CPU: there torch's kernel spends most of its time on the way back.

    An attention kernel as transformers calls them, by the name "cpu_matmul". In bfloat16 a step of 250 tokens takes half as
    long, one of 50 a sixth (of the attention alone).

    Args:
        query: (batch, heads, length, width); key, value: (batch, key heads, length, width).
        attention_mask: bool (batch, 1, length, length), row sees column; None: what came before.

    Returns:
        (batch, length, heads, width), and None for the probabilities.
    """
    length = query.shape[2]
    short = (
        query.device.type == "cpu"
        and torch.is_grad_enabled()
        and 1 < length == key.shape[2] <= CPU_ATTENTION_MAX_LENGTH
    )
    plain = not dropout and options.get("softcap") is None and options.get("position_bias") is None
    if not (short and plain and (attention_mask is not None or getattr(module, "is_causal", True))):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **options
        )
    if attention_mask is None:
        attention_mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out: torch.Tensor = _MatmulAttention.apply(query, key, value, attention_mask, scale)
    return out.transpose(1, 2).contiguous(), None

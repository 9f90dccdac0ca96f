"""An attention kernel for training on CPUs, for sequences of up to 512 tokens.

PyTorch's fused CPU kernel does not store the attention weights but recomputes them in the backward
pass, which takes most of the time of a short training step. For short sequences, it is faster to store
them and to use plain matrix products. In bfloat16, this takes half the time for 250 tokens, and a sixth
of the time for 50 tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Maximum number of tokens of a sequence. For longer ones, the stored attention weights take too much memory,
# and the fused kernel is faster.
CPU_ATTENTION_MAX_LENGTH = 512


class _MatmulAttention(torch.autograd.Function):
    """Scaled dot-product attention in plain matrix products. Attention weights are saved for backward.

    Query heads that share a key head (grouped-query attention) are stacked along the length. Then a
    single batched product computes all of their scores, without a copy of the keys for each query head:

        query  (batch, heads, length, head_dim)      -> (groups, heads per group x length, head_dim)
        key    (batch, key heads, length, head_dim)  -> (groups, length, head_dim)
                                                        with groups = batch x key heads
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        # Stack the query heads of a group; see the docstring of the class.
        shape = query.shape
        length = shape[2]
        groups = key.shape[0] * key.shape[1]
        query = query.reshape(groups, -1, query.shape[-1])
        key = key.reshape(groups, -1, key.shape[-1])
        value = value.reshape(groups, -1, value.shape[-1])

        # Scale in place, since the scores are the largest tensor here.
        scores = torch.bmm(query, key.mT).mul_(scale)
        scores = scores.view(*shape[:3], length)  # (batch, heads, length, length), like the mask
        # Mask with the smallest number instead of -inf: for a padding token, all scores may be masked, and
        # the softmax of a row of -inf is NaN.
        scores = scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
        attn_weights = scores.softmax(-1).view(groups, -1, length)
        # Save the attention weights (groups, heads per group x length, length). This is the difference from
        # the fused kernel, which computes them a second time in the backward pass.
        ctx.save_for_backward(query, key, value, attn_weights)
        ctx.scale = scale
        ctx.shape = shape
        output = torch.bmm(attn_weights, value)
        return output.view(*shape[:3], -1)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, attn_weights = ctx.saved_tensors
        batch, _, length, _ = ctx.shape
        grad_output = grad_output.reshape(len(attn_weights), -1, value.shape[-1])
        grad_weights = torch.bmm(grad_output, value.mT)
        # The backward of softmax is weights * (gradient - sum(weights * gradient)). A masked score has the
        # weight 0 and therefore the gradient 0, so the mask is not needed here.
        grad_scores = torch._softmax_backward_data(
            grad_weights, attn_weights, -1, attn_weights.dtype
        ).mul_(ctx.scale)
        grad_query = torch.bmm(grad_scores, key).view(ctx.shape)
        grad_key = torch.bmm(grad_scores.mT, query)
        grad_key = grad_key.view(batch, -1, length, key.shape[-1])
        grad_value = torch.bmm(attn_weights.mT, grad_output)
        grad_value = grad_value.view(batch, -1, length, value.shape[-1])
        return grad_query, grad_key, grad_value, None, None


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
    """Compute the same attention as sdpa, but faster for training with short sequences on a CPU.

    This is an attention function for Transformers, registered as "cpu_matmul". It calls sdpa in all other
    cases: long sequences, decoding with a KV cache, other devices, dropout, soft caps.

    Args:
        module: The attention layer.
        query: (batch, heads, length, head_dim).
        key: (batch, key heads, length, head_dim).
        value: (batch, key heads, length, head_dim).
        attention_mask: bool (batch, 1, length, length), True where the token of the row attends to the token
            of the column; None: causal attention.
        dropout: Dropout probability of the attention weights.
        scaling: Factor of the scores; None: 1 / sqrt(head_dim).
        **options: Other keyword arguments that Transformers passes to attention functions.

    Returns:
        The output (batch, length, heads, head_dim), and None in place of the attention weights.
    """
    length = query.shape[2]
    is_training = query.device.type == "cpu" and torch.is_grad_enabled()
    # With a KV cache, there are more keys than queries.
    is_short = 1 < length == key.shape[2] <= CPU_ATTENTION_MAX_LENGTH
    is_plain = (
        not dropout and options.get("softcap") is None and options.get("position_bias") is None
    )
    is_supported = attention_mask is not None or getattr(module, "is_causal", True)
    if not (is_training and is_short and is_plain and is_supported):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **options
        )
    if attention_mask is None:
        all_pairs = torch.ones(length, length, dtype=torch.bool, device=query.device)
        attention_mask = all_pairs.tril()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output: torch.Tensor = _MatmulAttention.apply(query, key, value, attention_mask, scale)
    return output.transpose(1, 2).contiguous(), None

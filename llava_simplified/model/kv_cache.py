"""Change the length and the rows of a `DynamicCache`, so that sequences can join a batch in flight."""

from __future__ import annotations

import torch
from torch.nn.functional import pad as pad_tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

# In a `DynamicCache` all sequences of a batch have the same length. Sequences that have generated
# different numbers of tokens, or have different prompts, are aligned at their newest token (left
# padding); the attention mask hides the padding. In this example, sequence 3 joins three others:
#
#     columns     0 1 2 3 4 5 6 7                 0 1 2 3 4 5 6 7
#     sequence 0  . . a a a a a a                 . . a a a a a a
#     sequence 1  . . . b b b b b    + d d d      . . . b b b b b
#     sequence 2  c c c c c c c c                 c c c c c c c c
#     sequence 3                                  . . . . . d d d       "." is hidden by the mask
#
# This takes two steps. First, bring both caches to the same length, by adding or removing hidden columns on
# the left (`set_cache_length`). Then concatenate them along the batch (`append_cache_rows`). Removing columns
# is as important as adding them: after the longest sequence has left, the next join removes the columns that
# only this sequence needed. Otherwise, the cache of a batch that never becomes empty would grow forever.
#
# Shifting columns does not change the positions of tokens: rotary embeddings are applied to keys before
# they are cached, using `position_ids` that count each sequence's own tokens, not columns.
#
# There are three kinds of layers:
#
#     DynamicLayer                 keys and values of all tokens
#     DynamicSlidingWindowLayer    keys and values of the last `sliding_window - 1` tokens, and the
#                                  number of all tokens
#     linear attention (Mamba)     a state of fixed size per sequence, without columns


def set_cache_length(cache: DynamicCache, length: int) -> None:
    """Add or remove columns on the left, so that the cache has `length` columns.

    The caller must hide added columns with the attention mask, and remove only hidden ones.
    """
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer):
            continue
        layer_length = length
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer_length = min(length, layer.sliding_window - 1)
            # A sliding layer stores one column fewer than its window, since the next token is added
            # before it attends. Transformers derives from `cumulative_length` which columns of the mask
            # the window covers.
            layer.cumulative_length = length
        for name in ("keys", "values"):
            tensor: torch.Tensor = getattr(layer, name)  # (batch, heads, columns, head_dim)
            # A negative number of added columns removes them.
            added = layer_length - tensor.shape[-2]
            padded = pad_tensor(tensor, (0, 0, added, 0))
            setattr(layer, name, padded)


def append_cache_rows(cache: DynamicCache, other: DynamicCache) -> None:
    """Append the sequences of another cache of the same length."""
    for layer, other_layer in zip(cache.layers, other.layers):
        # Use two separate ifs, because a hybrid layer is of both kinds.
        if isinstance(layer, DynamicLayer):
            for name in ("keys", "values"):
                tensors = [getattr(layer, name), getattr(other_layer, name)]
                setattr(layer, name, torch.cat(tensors))
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            for name in ("conv_states", "recurrent_states"):
                states: dict[int, torch.Tensor | None] = getattr(layer, name)
                other_states: dict[int, torch.Tensor] = getattr(other_layer, name)
                for index, state in states.items():
                    if state is not None:
                        states[index] = torch.cat([state, other_states[index]])


def has_key_value_columns(cache: DynamicCache) -> bool:
    """Return whether any layer caches keys and values. Only those need an attention mask."""
    return any(isinstance(layer, DynamicLayer) for layer in cache.layers)

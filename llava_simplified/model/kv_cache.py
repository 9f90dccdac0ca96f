"""Surgery on a Transformers `DynamicCache`: what lets sequences join a batch that is being decoded."""

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
# padding); the attention mask hides the padding in front. Four sequences, the last of which joins:
#
#     columns     0 1 2 3 4 5 6 7                 0 1 2 3 4 5 6 7
#     sequence 0  . . a a a a a a                 . . a a a a a a
#     sequence 1  . . . b b b b b    + d d d      . . . b b b b b
#     sequence 2  c c c c c c c c                 c c c c c c c c
#     sequence 3                                  . . . . . d d d       "." is hidden by the mask
#
# Two operations suffice: bring both caches to the same length, by adding hidden columns in front or by
# removing some (`set_cache_length`); then concatenate along the batch (`append_cache_rows`). Removing
# is as important as adding: when the longest sequence has left, its columns are cut off at the next
# join, so that a batch that never empties does not grow for ever.
#
# Positions survive this. Rotary embeddings are applied to keys before they are cached, from
# `position_ids` that count each sequence's own tokens, not columns.
#
# Layers of three kinds occur:
#
#     DynamicLayer                 keys and values of all tokens
#     DynamicSlidingWindowLayer    of the last `sliding_window - 1` tokens, and a count of all
#     linear attention (Mamba)     a state of fixed size per sequence: there are no columns to hide


def set_cache_length(cache: DynamicCache, length: int) -> None:
    """Add or remove columns in front, so that the cache holds `length` of them.

    The caller must hide added columns with the attention mask, and remove only hidden ones.
    """
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer):
            continue
        layer_length = length
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer_length = min(length, layer.sliding_window - 1)
            # A sliding layer stores one column less than its window, since the newest token is always
            # added to it. From this count Transformers derives which columns of the mask the window covers.
            layer.cumulative_length = length
        for name in ("keys", "values"):
            tensor: torch.Tensor = getattr(layer, name)  # (batch, heads, columns, width)
            # A negative number of added columns removes them.
            added = layer_length - tensor.shape[-2]
            padded = pad_tensor(tensor, (0, 0, added, 0))
            setattr(layer, name, padded)


def append_cache_rows(cache: DynamicCache, other: DynamicCache) -> None:
    """Append the sequences of another cache of the same length."""
    for layer, other_layer in zip(cache.layers, other.layers):
        # Not elif: a hybrid layer is of both kinds.
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
    """Return whether some layer has keys and values, so that an attention mask has a meaning."""
    return any(isinstance(layer, DynamicLayer) for layer in cache.layers)

"""Two additions to the forward pass of a causal language model.

1. Logits at the trained positions only (`lm_head_at_positions`).
2. Attention masks for packed rows and for shared prompts (`shared_prefix_mask`, `attention_kwargs`).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import pad as pad_tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from llava_simplified.model.cpu_attention import cpu_matmul_attention
from llava_simplified.model.protocols import CausalLM

# Silence a warning about something that users cannot change: whenever PEFT loads an adapter, it reads this
# deprecated attribute of Transformers.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

# Register our kernel, so that `set_attn_implementation("cpu_matmul")` works. It uses the same boolean masks as sdpa.
AttentionInterface.register("cpu_matmul", cpu_matmul_attention)
AttentionMaskInterface.register("cpu_matmul", sdpa_mask)


# The types of layers that support attention masks. The layers of state-space models, for example, do not.
MASKED_LAYER_TYPES = {"full_attention", "sliding_attention"}


def forward_parameters(language_model: CausalLM) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a language model's `forward`, by name.

    Most models silently ignore unknown keyword arguments, so check here before you pass one.
    """
    return inspect.signature(without_peft(language_model).forward).parameters


def without_peft(language_model: CausalLM) -> Any:
    """Return the language model without the wrapper of PEFT, if it has one."""
    # Look for PEFT's method instead of its class, so that models without adapters do not need PEFT.
    get_base_model = getattr(language_model, "get_base_model", None)
    return language_model if get_base_model is None else get_base_model()


def cache_kwarg_name(language_model: CausalLM) -> str:
    """Return the name of the `forward` parameter that accepts a `DynamicCache`.

    The name is `past_key_values` in most models, `cache_params` in state-space models, and `cache` in
    newer versions of Transformers.

    Raises:
        ValueError: No parameter accepts a `DynamicCache`: there is no cache parameter, or its annotation names
            a cache class of the model's own module (xLSTM).
    """
    for name, parameter in forward_parameters(language_model).items():
        is_cache = name in ("cache", "past_key_values", "cache_params")
        if is_cache and "transformers.models" not in str(parameter.annotation):
            return name
    raise ValueError(
        f"{language_model.config.model_type} does not support DynamicCache. Training works; generation "
        "does not."
    )


@contextmanager
def lm_head_at_positions(language_model: CausalLM, positions: torch.Tensor) -> Iterator[None]:
    """Within a `with` block, compute logits at the given positions only.

        hidden states (batch, length, hidden size) --gather--> (1, trained, hidden size) --lm_head--> logits

    The positions are gathered in a forward pre-hook of the lm_head, because every causal language model calls
    that module. If a model family changes the logits afterward (Gemma's soft cap, Granite's scale), its own code
    still does so.

    Args:
        language_model: The model, whose `outputs.logits` become (1, trained, vocabulary).
        positions: int64 (trained,), flat indices into batch x length.
    """

    def gather(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        hidden_states = inputs[0].flatten(0, 1)  # (batch x length, hidden size)
        return hidden_states[positions][None]

    handle = language_model.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


# ---- Shared prompts ----
#
# Data sets such as COCO have several captions per image. If these are trained as separate sequences, the
# 196 image tokens and the instruction are computed again for every caption. With a shared prompt they
# are computed once, and each caption is a branch that continues the same prefix:
#
#     tokens         img  img  What  ?  |  a  red  car  |  a  car   |  padding
#     segment_ids     1    1    1    1     1   1    1      1   1       0
#     branch_ids      0    0    0    0     1   1    1      2   2       0
#     position_ids    0    1    2    3     4   5    6      4   5       0
#
#     mask            img  img  What  ?    a  red  car     a  car      (row attends to column)
#        img           x
#        img           x    x
#        What          x    x    x
#        ?             x    x    x    x
#        a             x    x    x    x    x
#        red           x    x    x    x    x   x
#        car           x    x    x    x    x   x    x
#        a             x    x    x    x                    x
#        car           x    x    x    x                    x   x
#
# A token attends to the prefix and to its own branch, and the positions of a branch continue after the
# prefix. Each caption therefore gets exactly the result that it would get in a separate sequence.
# Packing uses the same mask, with several segments in a row.
#
# The technique is not new. Molmo trains on "message trees" (Deitke et al., Dec 2024; also Molmo 2);
# PrefixGrouper, flash-preference, unsloth's GRPO and NeMo Automodel share the prompts of several
# responses. Three things are special here. The loss and every gradient equal those of separate sequences
# (tested in float64 to 1e-10). The first token of every branch is trained; with labels that are shifted by
# one, as usual, it would be predicted from the last token of the previous branch. And the shared prefix
# contains images.


def shared_prefix_mask(
    segment_ids: torch.Tensor,
    branch_ids: torch.Tensor,
    position_ids: torch.Tensor,
    window: int | None = None,
) -> torch.Tensor:
    """Build the attention mask of packed rows and shared prompts; see the diagram above.

    Args:
        segment_ids: (batch, length), see `Llava.forward`.
        branch_ids: (batch, length).
        position_ids: (batch, length).
        window: Size of the sliding attention window in positions; None: no window.

    Returns:
        bool (batch, 1, length, length), True where the token of the row attends to the token of the column.
    """
    batch_size, length = segment_ids.shape
    batch = torch.arange(batch_size, device=segment_ids.device)[:, None, None, None]
    index = torch.arange(length, device=segment_ids.device)
    mask_mod = _mask_mod(segment_ids, branch_ids, position_ids, window)
    # Evaluate the function for all pairs of tokens at once. The mask is the same for all heads.
    return mask_mod(batch, head=0, query=index[:, None], key=index)


def _mask_mod(
    segment_ids: torch.Tensor,
    branch_ids: torch.Tensor,
    position_ids: torch.Tensor,
    window: int | None,
) -> Callable[..., torch.Tensor]:
    """Return a function that computes elements of `shared_prefix_mask` from indices, for flex_attention."""

    def mask_mod(
        batch: torch.Tensor, head: torch.Tensor | int, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        causal = query >= key
        same_segment = segment_ids[batch, query] == segment_ids[batch, key]
        key_in_prefix = branch_ids[batch, key] == 0
        same_branch = branch_ids[batch, query] == branch_ids[batch, key]
        attends = causal & same_segment & (key_in_prefix | same_branch)
        if window is None:
            return attends
        # Measure distances in positions, not in indices, because there may be other branches between a branch
        # and its prefix.
        distance = position_ids[batch, query] - position_ids[batch, key]
        return attends & (distance < window)

    return mask_mod


def attention_kwargs(
    language_model: CausalLM,
    segment_ids: torch.Tensor,
    branch_ids: torch.Tensor,
    position_ids: torch.Tensor,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Return `shared_prefix_mask` in the form that the layers and the attention kernel of the model accept.

    Args:
        language_model: The model whose `forward` is called with the result.
        segment_ids: (batch, length), see `Llava.forward`.
        branch_ids: (batch, length).
        position_ids: (batch, length).
        dtype: Data type of the hidden states.

    Returns:
        Keyword arguments for `forward`.

    Raises:
        ValueError: The kernel or a layer type does not support such a mask, or the model does not
            accept `position_ids`.
    """
    _check_position_ids(language_model)
    config = language_model.config
    kernel = config._attn_implementation
    if kernel == "flash_attention_2":
        if branch_ids.any():
            raise ValueError(
                "flash_attention_2 does not support shared prompts; pass --share_prefix False"
            )
        return _sequence_lengths(segment_ids)

    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if not layer_types:
        layer_types = ["sliding_attention" if window else "full_attention"]
    unsupported = set(layer_types) - MASKED_LAYER_TYPES
    if unsupported:
        raise ValueError(
            f"{config.model_type} has layers of the types {', '.join(sorted(unsupported))}, which do not support the "
            "attention masks of packed examples and shared prompts; turn off --packing and --share_prefix."
        )
    masks = {}
    for layer_type in sorted(set(layer_types)):
        layer_window = window if layer_type == "sliding_attention" else None
        masks[layer_type] = _kernel_mask(
            kernel, segment_ids, branch_ids, position_ids, layer_window, dtype
        )
    if len(masks) == 1:
        return {"attention_mask": masks.popitem()[1]}
    return {"attention_mask": masks}


def supports_shared_prompts(language_model: CausalLM) -> bool:
    """Return whether this model and its attention kernel support shared prompts (see `attention_kwargs`)."""
    config = language_model.config
    if not accepts_positions(language_model):
        return False
    if config._attn_implementation == "flash_attention_2":
        return False
    layer_types = set(getattr(config, "layer_types", None) or ())
    return layer_types <= MASKED_LAYER_TYPES


# Devices whose tensors the host can read without waiting for queued work.
HOST_DEVICES = ("cpu", "meta")


def padding_kwargs(
    language_model: CausalLM, attention_mask: torch.Tensor | None, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the arguments of `forward` for rows that are padded on the right.

    In every forward pass, Transformers reads a 2D mask on the host to find out whether it masks anything. On a
    GPU, the host would have to wait for all queued work. So, on a GPU, pass a 4D mask instead, which Transformers
    uses without looking at it: the mask of packed rows with only one segment.

    Args:
        language_model: The model whose `forward` is called with the result.
        attention_mask: int64 (batch, length), 0 on padding.
        dtype: Data type of the hidden states.
    """
    plain: dict[str, Any] = {"attention_mask": attention_mask}
    if attention_mask is None or attention_mask.device.type in HOST_DEVICES:
        return plain
    layer_types = set(getattr(language_model.config, "layer_types", None) or ())
    if not accepts_positions(language_model) or layer_types - MASKED_LAYER_TYPES:
        return plain
    if language_model.config._attn_implementation == "flash_attention_2":
        return plain
    index = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    position_ids = index.expand_as(attention_mask)
    branch_ids = torch.zeros_like(attention_mask)
    masks = attention_kwargs(language_model, attention_mask, branch_ids, position_ids, dtype)
    return {"position_ids": position_ids, **masks}


def _check_position_ids(language_model: CausalLM) -> None:
    """Raise ValueError if a model computes positions itself, from the index of a token in its row.

    Without this check, it would silently be trained with wrong positions and masks.
    """
    if not accepts_positions(language_model):
        raise ValueError(
            f"{language_model.config.model_type} does not accept `position_ids`; turn off --packing and "
            "--share_prefix."
        )


def accepts_positions(language_model: CausalLM) -> bool:
    """Return whether the caller can set the positions of the tokens.

    Some models compute them from the index of a token in its row: models with ALiBi (MPT, Bloom, some Falcons),
    GPT-Neo with its local layers, and some old decoders.
    """
    config = language_model.config
    uses_alibi = getattr(config, "alibi", False)
    has_local_layers = "local" in getattr(config, "attention_layers", ())
    accepts_positions = "position_ids" in forward_parameters(language_model)
    return accepts_positions and not uses_alibi and not has_local_layers


def _sequence_lengths(segment_ids: torch.Tensor) -> dict[str, Any]:
    """Return the arguments of a variable-length flash kernel, which uses lengths instead of a mask.

    The kernel treats the batch as one long row, in which a new sequence begins wherever the segment id changes.
    The padding of a row is a separate sequence.
    """
    # Prepend -1, which is not a segment id, to every row, so that its first token always begins a sequence.
    before = segment_ids.new_full((len(segment_ids), 1), -1)
    starts = segment_ids.diff(dim=1, prepend=before).flatten().nonzero().flatten()
    boundaries = pad_tensor(starts, (0, 1), value=segment_ids.numel()).int()
    longest = int(boundaries.diff().max())
    return {
        "attention_mask": None,
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _kernel_mask(
    kernel: str,
    segment_ids: torch.Tensor,
    branch_ids: torch.Tensor,
    position_ids: torch.Tensor,
    window: int | None,
    dtype: torch.dtype,
) -> torch.Tensor | BlockMask:
    """Return the mask of one type of layer, in the form that the attention kernel accepts."""
    if kernel == "flex_attention":
        batch_size, length = segment_ids.shape
        return create_block_mask(
            _mask_mod(segment_ids, branch_ids, position_ids, window),
            B=batch_size,
            H=None,  # the same for all heads
            Q_LEN=length,
            KV_LEN=length,
            device=str(segment_ids.device),
        )
    mask = shared_prefix_mask(segment_ids, branch_ids, position_ids, window)
    if kernel in ("sdpa", "cpu_matmul"):
        return mask
    # The eager kernel adds the mask to the scores. With a boolean mask it would add 0 or 1, without an
    # error, and every token would attend to every other.
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

"""What LLaVA asks of a causal language model beyond its usual forward: logits at some positions only, and who sees whom."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from llava_simplified.model.cpu_attention import cpu_matmul_attention
from llava_simplified.model.protocols import CausalLM

# PEFT asks for it whenever it loads an adapter, under a name that transformers has given up
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def forward_parameters(language_model: Any) -> Mapping[str, inspect.Parameter]:
    """The arguments of its forward: what is not among them, it would swallow without a word."""
    own = (
        language_model.get_base_model() if isinstance(language_model, PeftModel) else language_model
    )
    return inspect.signature(own.forward).parameters


def cache_kwarg_name(language_model: Any) -> str:
    """What its forward calls the keys and values, or states, that it goes on from; transformers is about to give them one.

    Raises:
        ValueError: it goes on from nothing, or from something of its own (xLSTM).
    """
    # a class of a model's own module (xLSTM's) is none that a DynamicCache can stand in for
    for name, its in forward_parameters(language_model).items():
        if name in (
            "cache",
            "past_key_values",
            "cache_params",
        ) and "transformers.models" not in str(its.annotation):
            return name
    raise ValueError(
        f"{language_model.config.model_type} takes no DynamicCache: it can be trained, but not be asked"
    )


@contextmanager
def lm_head_at_positions(language_model: CausalLM, positions: torch.Tensor) -> Iterator[None]:
    """Within this, the language model computes logits only at the given flat positions (trained,).

    Done where every causal language model must pass, at the input of its output layer, so that what a family does
    to its logits afterwards (Gemma's soft cap, Granite's scale) is still done by its own code.
    """

    def gather(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return inputs[0].flatten(0, 1)[positions][None]

    handle = language_model.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


def shared_prefix_mask(
    segment_ids: torch.Tensor,
    branch_ids: torch.Tensor,
    position_ids: torch.Tensor,
    window: int | None = None,
) -> torch.Tensor:
    """Every token sees what came before it in its own example: of the prompt all, of the answers only its own.

        image and prompt   x                 Image and prompt are computed once, however many captions the image
        first caption      x  x              has; no caption sees another. As if each stood alone behind its own
        second caption     x  .  x           copy of the prompt, to the last bit that rounding leaves.

    Args:
        segment_ids, branch_ids, position_ids: (batch, length), see `Llava.forward`.
        window: of sliding-window attention: how far back a token sees.

    Returns:
        bool (batch, 1, length, length): row sees column.
    """
    batch, place = (torch.arange(size, device=segment_ids.device) for size in segment_ids.shape)
    sees = _mask_mod(segment_ids, branch_ids, position_ids, window)
    return sees(batch[:, None, None, None], 0, place[:, None], place)


def _mask_mod(
    segments: torch.Tensor, branches: torch.Tensor, positions: torch.Tensor, window: int | None
) -> Callable[[Any, Any, Any, Any], torch.Tensor]:
    """`shared_prefix_mask` of single indices, or of index tensors that broadcast: what flex_attention asks for."""

    def sees(batch: Any, head: Any, row: Any, column: Any) -> torch.Tensor:
        seen = (row >= column) & (segments[batch, row] == segments[batch, column])
        seen = seen & (
            (branches[batch, column] == 0) | (branches[batch, row] == branches[batch, column])
        )
        return (
            seen
            if window is None
            else seen & (positions[batch, row] - positions[batch, column] < window)
        )

    return sees


def attention_kwargs(
    language_model: Any,
    segment_ids: torch.Tensor,
    branch_ids: torch.Tensor,
    position_ids: torch.Tensor,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """`shared_prefix_mask` as the arguments that a language model's layers and its attention kernel take.

    Raises:
        ValueError: the kernel, or a kind of layer, can't be told who sees whom; or the model counts places by itself.
    """
    config = language_model.config
    # ALiBi (MPT, Bloom), GPT-Neo's local layers and decoders of the past go by the distance in the row
    by_distance = getattr(config, "alibi", False) or "local" in getattr(
        config, "attention_layers", ()
    )
    if by_distance or "position_ids" not in forward_parameters(language_model):
        raise ValueError(
            f"{config.model_type} can't be told its tokens' places: neither --packing nor --share_prefix"
        )
    kernel = config._attn_implementation
    if kernel == "flash_attention_2":
        if branch_ids.any():
            raise ValueError(
                "flash_attention_2 can't be told that answers share a prompt: --share_prefix False"
            )
        # All rows are one, text behind text; a row's padding counts as a text.
        begins = (
            segment_ids.diff(dim=1, prepend=segment_ids.new_full((len(segment_ids), 1), -1))
            .flatten()
            .nonzero()
        )
        ends = nn.functional.pad(begins.flatten(), (0, 1), value=segment_ids.numel()).int()
        longest = int(ends.diff().max())
        lengths = {
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
        }
        return {"attention_mask": None, **lengths}

    def mask(window: int | None) -> Any:
        if kernel == "flex_attention":
            rule = _mask_mod(segment_ids, branch_ids, position_ids, window)
            batch, length = segment_ids.shape
            return create_block_mask(
                rule, batch, None, length, length, device=str(segment_ids.device)
            )
        seen = shared_prefix_mask(segment_ids, branch_ids, position_ids, window)
        if kernel in ("sdpa", "cpu_matmul"):
            return seen
        # the eager kernel adds its mask; a bool one would silently let everybody see everybody
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)

    window = getattr(config, "sliding_window", None)
    kinds = set(
        getattr(config, "layer_types", None)
        or ["sliding_attention" if window else "full_attention"]
    )
    if kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"{config.model_type} has layers of the kinds {sorted(kinds)}: neither --packing nor --share_prefix"
        )
    masks = {kind: mask(window if kind == "sliding_attention" else None) for kind in sorted(kinds)}
    return {"attention_mask": masks if len(masks) > 1 else masks.popitem()[1]}


AttentionInterface.register("cpu_matmul", cpu_matmul_attention)
AttentionMaskInterface.register("cpu_matmul", sdpa_mask)

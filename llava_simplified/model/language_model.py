"""What LLaVA asks of a causal language model beyond its usual forward: logits at some positions only, and who sees whom."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask


@contextmanager
def head_at(language_model: nn.Module, positions: torch.Tensor) -> Iterator[None]:
    """Within this, the language model computes logits only at the given flat positions (trained,).

    Done where every causal language model must pass, at the input of its output layer, so that what a family does
    to its logits afterwards (Gemma's soft cap, Granite's scale) is still done by its own code.
    """

    def gather(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return inputs[0].flatten(0, 1)[positions][None]

    handle = language_model.get_output_embeddings().register_forward_pre_hook(gather)  # type: ignore[operator]
    try:
        yield
    finally:
        handle.remove()


def who_sees_whom(
    segment_ids: torch.Tensor, branch_ids: torch.Tensor, position_ids: torch.Tensor, window: int | None = None
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
    sees = _rule(segment_ids, branch_ids, position_ids, window)
    return sees(batch[:, None, None, None], 0, place[:, None], place)


def _rule(
    segments: torch.Tensor, branches: torch.Tensor, positions: torch.Tensor, window: int | None
) -> Callable[[Any, Any, Any, Any], torch.Tensor]:
    """`who_sees_whom` of single indices, or of index tensors that broadcast: what flex_attention asks for."""

    def sees(batch: Any, head: Any, row: Any, column: Any) -> torch.Tensor:
        seen = (row >= column) & (segments[batch, row] == segments[batch, column])
        seen = seen & ((branches[batch, column] == 0) | (branches[batch, row] == branches[batch, column]))
        return seen if window is None else seen & (positions[batch, row] - positions[batch, column] < window)

    return sees


def attention_of(
    config: Any, segment_ids: torch.Tensor, branch_ids: torch.Tensor, position_ids: torch.Tensor, dtype: torch.dtype
) -> dict[str, Any]:
    """`who_sees_whom` as the arguments that a language model's layers and its attention kernel take.

    Raises:
        ValueError: the kernel, or a kind of layer, can't be told who sees whom.
    """
    kernel = config._attn_implementation
    if kernel == "flash_attention_2":
        if branch_ids.any():
            raise ValueError("flash_attention_2 can't be told that answers share a prompt: --share_prefix False")
        # All rows are one, text behind text; a row's padding counts as a text.
        begins = segment_ids.diff(dim=1, prepend=segment_ids.new_full((len(segment_ids), 1), -1)).flatten().nonzero()
        ends = nn.functional.pad(begins.flatten(), (0, 1), value=segment_ids.numel()).int()
        longest = int(ends.diff().max())
        lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        return {"attention_mask": None, **lengths}

    def mask(window: int | None) -> Any:
        if kernel == "flex_attention":
            rule = _rule(segment_ids, branch_ids, position_ids, window)
            batch, length = segment_ids.shape
            return create_block_mask(rule, batch, None, length, length, device=str(segment_ids.device))
        seen = who_sees_whom(segment_ids, branch_ids, position_ids, window)
        # the eager kernel adds its mask; a bool one would silently let everybody see everybody
        return (
            seen if kernel == "sdpa" else torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        )

    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    if kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"{config.model_type} has layers of the kinds {sorted(kinds)}: neither --packing nor --share_prefix"
        )
    masks = {kind: mask(window if kind == "sliding_attention" else None) for kind in sorted(kinds)}
    return {"attention_mask": masks if len(masks) > 1 else masks.popitem()[1]}

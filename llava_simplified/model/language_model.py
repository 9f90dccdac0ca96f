"""What LLaVA asks of a causal language model beyond its usual forward: logits at some positions only, and who sees whom."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


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
    mask = segment_ids[:, :, None] == segment_ids[:, None, :]
    mask &= (branch_ids[:, None, :] == 0) | (branch_ids[:, :, None] == branch_ids[:, None, :])
    if window is not None:
        mask &= position_ids[:, :, None] - position_ids[:, None, :] < window
    return mask.tril()[:, None]


def attention_of(
    config: Any, segment_ids: torch.Tensor, branch_ids: torch.Tensor, position_ids: torch.Tensor, dtype: torch.dtype
) -> Any:
    """`who_sees_whom` in the form that a language model's layers and its attention kernel take.

    Raises:
        ValueError: the kernel, or a kind of layer, can't be told who sees whom.
    """
    kernel = config._attn_implementation
    if kernel == "flash_attention_2" and not branch_ids.any() and len(segment_ids) == 1:
        return None  # it finds the packed texts by their restarting positions, in a batch of one row
    if kernel not in ("sdpa", "eager"):
        raise ValueError(
            f"--attn_implementation {kernel} takes no mask of packed or shared texts (flash_attention_2: packs, with "
            "--per_device_train_batch_size 1 and --share_prefix False): use sdpa"
        )

    def mask(window: int | None) -> torch.Tensor:
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
    return masks if len(masks) > 1 else masks.popitem()[1]

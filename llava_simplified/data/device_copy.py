"""Copy tensors to a GPU without waiting for the work that is queued there."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the host to a device; on CUDA, the copy is queued and this returns immediately.

    A plain `.to("cuda")` of ordinary memory waits until the GPU has finished everything that was queued
    before: the GPU then idles until the host has queued more. From page-locked ("pinned") memory, the
    GPU copies by itself. PyTorch keeps that memory until the copy is done.

    Args:
        tensor: A tensor in the host's memory, or one that is on `device` already.
        device: Target device.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)

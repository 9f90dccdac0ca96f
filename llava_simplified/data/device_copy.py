"""Copy tensors to a GPU without waiting for the work that is queued there."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor from host memory to a device. For CUDA, queue the copy and return immediately.

    A plain `.to("cuda")` from ordinary memory waits until the GPU has finished all work that was queued before, and
    the GPU is then idle until the host has queued more. From page-locked ("pinned") memory, the copy runs on the GPU
    without the host. PyTorch does not reuse the pinned memory before the copy is done.

    Args:
        tensor: A tensor in the host's memory, or one that is on `device` already.
        device: Target device.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)

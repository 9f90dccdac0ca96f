"""Measure memory and FLOPs of operations without data, for `llava plan`."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


def _cpu_attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _cpu_attention_backward_flops(
    grad_out: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad_out.shape, query.shape, key.shape, value.shape)


_aten: Any = torch.ops.aten
# torch's registry has formulas for the attention kernels of accelerators only. Add the kernel for CPUs.
FLOP_FORMULAS: dict[Any, Any] = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward_flops,
}


# `MemoryTracker` is a dispatch mode: torch calls its `__torch_dispatch__` for every operation below
# autograd, forward and backward. Together with fake tensors, which have shapes and dtypes but no
# data, it measures a training step of a 7B model in seconds on a laptop:
#
#     model code -> autograd -> MemoryTracker -> fake kernel (computes shapes only)
#                                   |
#                                   +-- FLOPs of the operation, from the shapes
#                                   +-- bytes of each new storage, until it is garbage-collected
#
# Tensors that autograd saves for backward stay alive, so they are counted for every architecture,
# precision, adapter and attention kernel. There is no formula that could become outdated.


class MemoryTracker(TorchDispatchMode):
    """Count FLOPs, and the bytes of all live storages, of operations on real or fake tensors.

    torch's own `FlopCounterMode` cannot be used here: it keeps activations alive that gradient
    checkpointing discards.

    Attributes:
        live: Bytes of the storages that are alive now.
        peak: Largest value of `live`.
        at_peak: (bytes, shape) of each storage that was alive at the peak.
        flops: Floating-point operations; a multiplication and an addition count as two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.flops = 0
        self.at_peak: list[tuple[int, tuple[int, ...]]] = []
        # Live storages: address -> (bytes, shape of the first tensor in it).
        self._storages: dict[int, tuple[int, tuple[int, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count its FLOPs and the storages of its results."""
        # `func` is an overload such as aten.mm.default; the formulas are registered for all overloads
        # of an operator together.
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        flop_formula = FLOP_FORMULAS.get(func._overloadpacket)
        if flop_formula:
            self.flops += flop_formula(*args, **kwargs, out_val=out)
        # An operation can return tensors in nested tuples and lists.
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        # Update the peak here, since memory grows only when an operation returns.
        if self.live > self.peak:
            self.peak = self.live
            self.at_peak = list(self._storages.values())
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        """Count the memory of a tensor until it is freed."""
        # Count a storage once; views share the storage of their base.
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        self._storages[key] = (storage.nbytes(), tuple(tensor.shape))
        self.live += storage.nbytes()
        # Subtract the storage when it is freed, which happens at the same point as in a real run.
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        size, _ = self._storages.pop(key)
        self.live -= size

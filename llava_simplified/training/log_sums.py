"""Sums of logged values between two log entries, over all micro-batches and processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator

from llava_simplified.data.device_copy import to_device


class LogSums:
    """Add up values by name until they are read for a log entry.

    Args:
        names: All names. They are the same in all processes, which add up their sums in this order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._sums: dict[str, torch.Tensor] = {}

    def __bool__(self) -> bool:
        """Return whether anything was added since the sums were last read."""
        return bool(self._sums)

    def add(self, name: str, value: torch.Tensor | float) -> None:
        """Add a value; a scalar tensor stays on its device, since reading it would wait for the device."""
        total = self._sums.get(name, torch.zeros(()))
        if isinstance(value, torch.Tensor):
            value = value.detach().float()
            total = total.to(value.device)
        self._sums[name] = total + value

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the sums over all processes, and reset them. All processes must call it."""
        sums: list[torch.Tensor] = []
        for name in self._names:
            total = self._sums.get(name, torch.zeros(()))
            sums.append(to_device(total, accelerator.device))
        self._sums.clear()
        totals = accelerator.reduce(torch.stack(sums), "sum").tolist()
        return dict(zip(self._names, totals))

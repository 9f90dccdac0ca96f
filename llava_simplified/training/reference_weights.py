"""The reference model of a run, for KL and preference pairs: the model as it was when the run began."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class ReferenceWeights:
    """A copy of the trained weights, which can replace the current ones during a forward pass.

    A second model would need the memory of the frozen weights again. Only the trained weights change, so
    a copy of them is sufficient: an adapter and a projector, a hundredth of the model. If the adapter is
    new, as after `llava merge`, the reference equals the model with its adapter disabled.

    Args:
        model: The model, with the weights of the reference.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights: dict[str, torch.Tensor] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._weights[name] = parameter.detach().clone()

    @contextmanager
    def in_place_of_current(self, model: nn.Module) -> Iterator[None]:
        """Within a `with` block, the model computes as the reference does, without gradients.

        Args:
            model: The unwrapped model. Its weights must not be sharded.
        """
        self._swap(model)
        try:
            with torch.no_grad():
                yield
        finally:
            self._swap(model)

    def _swap(self, model: nn.Module) -> None:
        """Exchange the trained weights of the model with the stored ones."""
        for name, parameter in model.named_parameters():
            if name not in self._weights:
                continue
            # The trainer may have moved or converted the model since the copy was made.
            other = self._weights[name].to(parameter.device, parameter.dtype)
            self._weights[name] = parameter.data
            parameter.data = other

"""The reference of a run: the model as it was when the run began, for KL and preference pairs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class ReferenceWeights:
    """A copy of the trained weights, which can take the place of the current ones for a forward.

    A second model would need the memory of the frozen weights again. Only the trained weights change, so
    a copy of them is the whole reference: an adapter and a projector, a hundredth of the model. If the
    adapter is new, as after `llava merge`, this reference is the model with its adapter disabled.

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
        """Within a `with` block, let the model compute as the reference, without gradients.

        Args:
            model: The unwrapped model, whose weights are whole in this process.
        """
        self._swap(model)
        try:
            with torch.no_grad():
                yield
        finally:
            self._swap(model)

    def _swap(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if name not in self._weights:
                continue
            # Move the copy where the trainer has moved the model since, and to its data type.
            other = self._weights[name].to(parameter.device, parameter.dtype)
            self._weights[name] = parameter.data
            parameter.data = other

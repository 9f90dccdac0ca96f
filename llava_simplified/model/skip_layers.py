"""Skip the layers of a vision model that the selected features do not depend on.

LLaVA uses the output of the layer before the last one (`select_layer=-2`), but the models of Transformers always
compute all layers. In ViT-B/16, one layer takes a twelfth of the time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def record_layers(model: nn.Module) -> Iterator[set[str]]:
    """Record the layers that return a tensor of the shape of their input while the model runs in this context.

    If such a layer is skipped, the layers after it still get a valid input. Layers that change the shape, or return
    several values, as in Swin, are not recorded.

    Args:
        model: The model. Its layers are the members of each `nn.ModuleList`.

    Yields:
        The names of the recorded layers; empty until the model runs.
    """
    names: set[str] = set()

    def add_hook(name: str, layer: nn.Module) -> None:
        def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not inputs or not isinstance(output, torch.Tensor):
                return
            if isinstance(inputs[0], torch.Tensor) and inputs[0].shape == output.shape:
                names.add(name)

        hooks.callback(layer.register_forward_hook(record).remove)

    with ExitStack() as hooks:
        for list_name, module in model.named_modules():
            if isinstance(module, nn.ModuleList):
                for layer_name, layer in module.named_children():
                    add_hook(f"{list_name}.{layer_name}", layer)
        yield names


def unused_layers(
    model: nn.Module, recorded: Collection[str], used_parameters: Collection[str]
) -> tuple[str, ...]:
    """Return the names of the recorded layers whose parameters are all unused.

    Args:
        model: The model.
        recorded: Names of its layers, from `record_layers`.
        used_parameters: Names of the parameters that the features depend on.
    """
    unused = []
    for name in sorted(recorded):
        names = [f"{name}.{key}" for key, _ in model.get_submodule(name).named_parameters()]
        # The features may depend on the output of a layer without parameters, such as an activation.
        if names and not any(key in used_parameters for key in names):
            unused.append(name)
    return tuple(unused)


@contextmanager
def skip_layers(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Let layers return their input in this context.

    Args:
        layers: Layers that return a tensor of the shape of their first argument.
    """
    with ExitStack() as stack:
        for layer in layers:
            # Some libraries replace the `forward` of an instance. Restore it after this context.
            if "forward" in vars(layer):
                stack.callback(setattr, layer, "forward", vars(layer)["forward"])
            else:
                stack.callback(delattr, layer, "forward")
            layer.forward = _return_input
        yield


def _return_input(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states

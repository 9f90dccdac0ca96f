"""The methods and attributes that this package requires of language models and vision models.

The models come from Transformers, and PEFT may wrap them. `nn.Module` is the only common base class of
`PreTrainedModel` and `PeftModel`, and lacks most of the methods. So these Protocols list what is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn

from llava_simplified.prompt import Prompt


class Module(Protocol):
    """The methods of `torch.nn.Module` that are used here."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...
    def get_submodule(self, target: str) -> nn.Module: ...
    def state_dict(self) -> dict[str, torch.Tensor]: ...
    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> Any: ...
    def requires_grad_(self, requires_grad: bool = True) -> Any: ...
    def float(self) -> Any: ...


class PretrainedModule(Module, Protocol):
    """A model of Transformers, or a PEFT model around one."""

    config: Any
    """The Transformers config. Its attributes depend on the model family."""
    _no_split_modules: Any
    """Class names of the layers that must stay on one device (None for some models)."""

    @property
    def dtype(self) -> torch.dtype: ...
    def save_pretrained(self, save_directory: str, **kwargs: Any) -> Any: ...
    def gradient_checkpointing_enable(self, **kwargs: Any) -> None: ...


class CausalLM(PretrainedModule, Protocol):
    """A causal language model. Its outputs contain `logits` (batch, length, vocabulary)."""

    def get_input_embeddings(self) -> nn.Embedding: ...
    def get_output_embeddings(self) -> nn.Linear: ...
    def set_attn_implementation(self, attn_implementation: str) -> None: ...
    def generate(self, **kwargs: Any) -> torch.Tensor: ...


class VisionModel(PretrainedModule, Protocol):
    """A vision model. Its outputs contain `last_hidden_state` and `hidden_states`."""


class VisionEncoder(Protocol):
    """A callable: pixels, uint8 (images, 3, height, width) -> features (images, num_tokens, hidden size)."""

    num_tokens: int

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor: ...


class CaptionModel(Protocol):
    """The part of `llava_simplified.model.llava.Llava` that decoding uses."""

    training: bool

    @property
    def vision_tower(self) -> VisionEncoder: ...
    @property
    def language_model(self) -> CausalLM: ...
    @property
    def prompt(self) -> Prompt: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def config(self) -> Any: ...
    def splice(
        self,
        input_ids: torch.Tensor,
        image_features: torch.Tensor | None,
        image_positions: torch.Tensor | None = None,
    ) -> torch.Tensor: ...
    def train(self, mode: bool = True) -> Any: ...

"""The device and the sizes of all models, for `bench_gpu.py`. Importing this module does not import Transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# The fields of a model's config that determine its size.
Shape = dict[str, Any]

CLIP_B16: Shape = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}
MISTRAL_7B: Shape = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}
LLAMA_1B: Shape = {
    **MISTRAL_7B,
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "tie_word_embeddings": True,
}
# For comparisons in float64, which are slow: the architecture of the 7B model, but smaller.
SMALL: Shape = {
    **MISTRAL_7B,
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    # With the default, which is smaller, the model would generate the same text for all images.
    "initializer_range": 0.1,
}
# For tests on a CPU.
TINY: Shape = {
    **SMALL,
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TINY_CLIP: Shape = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


@dataclass(frozen=True)
class Workload:
    """The device and the sizes of all models.

    Attributes:
        device: "cuda", or "cpu" for the tiny shapes.
        is_tiny: Use tiny shapes, for a test, instead of real ones.
    """

    device: torch.device
    is_tiny: bool

    @property
    def large(self) -> Shape:
        """Shape of the language model for measurements."""
        return self.pick(MISTRAL_7B, TINY)

    @property
    def medium(self) -> Shape:
        """Shape of the language model for full fine-tuning, where all weights need optimizer states."""
        return self.pick(LLAMA_1B, TINY)

    @property
    def small(self) -> Shape:
        """Shape of the language model for comparisons in float64, which are slow."""
        return self.pick(SMALL, TINY)

    @property
    def vision(self) -> Shape:
        """Shape of the vision tower."""
        return self.pick(CLIP_B16, TINY_CLIP)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of frozen weights."""
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    def pick(self, real: Any, tiny: Any) -> Any:
        """Return a value for the real shapes or for the tiny ones."""
        return tiny if self.is_tiny else real

    def synchronize(self) -> None:
        """Wait until the device has finished its work. Call this before reading the clock."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_memory(self) -> int | None:
        """Return the peak number of bytes of all tensors on the GPU; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated()

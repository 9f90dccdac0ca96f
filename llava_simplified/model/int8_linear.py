"""Linear layers with 8-bit weights, for generation on a CPU (`--quantize int8`).

A decoding step reads every weight of the language model once. For models with a billion parameters or more,
reading takes longer than the arithmetic, and reading 8 bits takes half as long as reading bfloat16.

    x (rows, in) --divide by maximum of row--> [-1, 1] --round--> 8 bits --+
                                                                           +--> integer product --> y
    W (out, in)  --divide by maximum of row--> [-1, 1] --round--> 8 bits --+

    output = y * maximum of the row of x * maximum of the row of W

PyTorch computes the integer product (with FBGEMM). Both matrices have a separate scale for each row. A single
scale for all rows of x would have two disadvantages. A few activations in transformers are a hundred times as
large as all others, and would reduce the precision of every row. And the answer to one request would depend on
the other requests in the batch. The output of a layer differs from that of the original weights by about 1 %.

The lm_head, the embeddings, the vision tower and the projector keep their data type, and so do weights that are not in
linear layers, such as the experts of most mixtures of experts. Models without linear layers (GPT-2), or whose code reads
the weights of a linear layer (Mamba), are refused.
"""

from __future__ import annotations

import logging
import warnings
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from llava_simplified.model.language_model import cache_kwarg_name
from llava_simplified.model.protocols import CausalLM
from llava_simplified.process_memory import release_pages, return_freed_blocks

logger = logging.getLogger(__name__)

# Subclasses of `nn.Linear` that have a `forward` of their own, which computes the same.
_PLAIN_SUBCLASSES = ("FalconLinear",)
# Warn if at least this share of the weights of the layers is not quantized.
_WARN_SHARE = 0.1
# During quantization, freed blocks of at least this size are returned to the operating system.
_RETURNED_BLOCK_BYTES = 1 << 20


class Int8Linear(nn.Module):
    """A linear layer whose weights are stored in 8 bits, with one scale per output channel.

    It has no parameters, so it can neither be trained nor saved.

    Args:
        linear: The layer to replace.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        self.packed = _quantize_and_pack(weight, scales)
        # The bias is added in float32 after the scaling, so it is not quantized.
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply by the weights.

        Args:
            x: (..., in_features)

        Returns:
            (..., out_features), in the data type of `x`.
        """
        rows = x.reshape(-1, self.in_features).float()
        maxima = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        output = _multiply(rows / maxima, self.packed, activation_levels()).mul_(maxima)
        if self.bias is not None:
            output.add_(self.bias)
        return output.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Describe the layer as `nn.Linear` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _quantize_and_pack(weight: torch.Tensor, scales: torch.Tensor) -> Any:
    """Round weights to 8 bits, and store them in the order in which the integer product reads them.

    Args:
        weight: float32 (out_features, in_features)
        scales: float32 (out_features,), the difference between two neighboring 8-bit values.
    """
    zero_points = torch.zeros(len(scales), dtype=torch.long)
    with warnings.catch_warnings():
        # PyTorch deprecates quantized tensors, but their replacement does not have an equally fast integer product yet.
        warnings.filterwarnings("ignore", ".*quantized tensor creation functions", UserWarning)
        quantized = torch.quantize_per_channel(
            weight, scales.double(), zero_points, axis=0, dtype=torch.qint8
        )
    return torch.ops.quantized.linear_prepack(quantized, None)


def _multiply(x: torch.Tensor, packed: Any, levels: int) -> torch.Tensor:
    """Round `x` to multiples of 1 / `levels`, and multiply it by the packed weights.

    Args:
        x: float32 (rows, in_features), values from -1 to 1.
        packed: The result of `_quantize_and_pack`.
        levels: Number of positive values that a rounded element of `x` can have.

    Returns:
        float32 (rows, out_features)
    """
    product: torch.Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        x, 1 / levels, zero_point(levels), packed
    )
    return product


def zero_point(levels: int) -> int:
    """Return the unsigned byte that means 0 in activations. The bytes from 1 to `2 * levels + 1` mean -1 to 1."""
    return levels + 1


@cache
def activation_levels() -> int:
    """Return how many positive values a rounded activation may have: 127, or 63 on older CPUs.

    Without instructions for neural networks (VNNI), the CPU adds two products in 16 bits, and silently limits the
    sum to 32,767. The largest byte of an activation is then 2 * 63 + 1 = 127, and 2 * 127 * 127 = 32,258.
    """
    # Detect the limit: multiply vectors of the largest values, and check the result.
    width = 64
    ones = torch.ones(1, width)
    packed = _quantize_and_pack(ones, torch.tensor([1 / 127]))
    product = _multiply(ones, packed, 127)
    return 127 if abs(product.item() / width - 1) < 0.01 else 63


def supported_engines() -> list[str]:
    """Return the names of the libraries for integer products that PyTorch supports on this machine."""
    engines: list[str] = torch.backends.quantized.supported_engines
    return engines


def check_int8_support(device: torch.device) -> None:
    """Raise ValueError unless the model is on a CPU for which PyTorch has a fast integer product."""
    if device.type != "cpu":
        raise ValueError(
            f"--quantize int8 works only on the CPU, but the model would run on the device {device.type}. "
            "Use --bits 8 instead, or hide the device (CUDA_VISIBLE_DEVICES=)."
        )
    if "fbgemm" not in supported_engines():
        raise ValueError(
            "--quantize int8 requires FBGEMM, which PyTorch does not support on this machine (usually because it "
            "has no x86 CPU). Leave out --quantize."
        )


def quantize_linear_layers(language_model: CausalLM) -> int:
    """Replace the linear layers of a language model, except the lm_head, by `Int8Linear`.

    Call this only after adapters have been merged into the weights. A warning says if a large share of the weights is
    in other kinds of layers, and keeps its data type.

    Returns:
        The number of replaced layers.

    Raises:
        ValueError: The model has no linear layers, or does not work with `Int8Linear`. In the second case, its layers
            have been replaced already.
    """
    model_type = language_model.config.model_type
    torch.backends.quantized.engine = "fbgemm"
    # Return the memory of the float32 copy of each weight to the operating system at once. Otherwise, it would remain as
    # a gap between the packed weights.
    return_freed_blocks(_RETURNED_BLOCK_BYTES)
    lm_head: Any = language_model.get_output_embeddings()
    # Collect all layers first, because the loop below changes the tree of modules.
    found: list[tuple[nn.Module, str, nn.Linear]] = []
    for parent in language_model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and child is not lm_head and _is_plain(child):
                found.append((parent, name, child))
    count = len(found)
    if not found:
        raise ValueError(
            f"--quantize int8: {model_type} has no linear layers (torch.nn.Linear) except the lm_head, so no weight would "
            "be quantized. Leave out --quantize."
        )
    num_before = _count_layer_weights(language_model)
    while found:
        # Remove the layer from the list, so that the memory of its weights is freed before the next layer is quantized.
        parent, name, linear = found.pop()
        setattr(parent, name, Int8Linear(linear))
        # The weights are mapped from a file. Without this call, its pages would stay in memory until no weight of the
        # file is used any more.
        release_pages(linear.weight.data_ptr(), linear.weight.nbytes)
    # The first call has turned off glibc's automatic adjustment of the threshold. Set the largest value that glibc would
    # choose.
    return_freed_blocks()
    num_left = _count_layer_weights(language_model)
    if num_left >= _WARN_SHARE * num_before:
        logger.warning(
            "--quantize int8 leaves %.0f %% of the weights of %s as they are, because they are not in linear layers "
            "(the experts of a mixture, for example).",
            100 * num_left / num_before,
            model_type,
        )
    _check_steps(language_model)
    return count


def _is_plain(linear: nn.Linear) -> bool:
    """Return whether a layer computes the same as `nn.Linear`. The router of Llama 4, for example, does not."""
    layer_class = type(linear)
    return layer_class.forward is nn.Linear.forward or layer_class.__name__ in _PLAIN_SUBCLASSES


def _count_layer_weights(language_model: CausalLM) -> int:
    """Return the number of parameters outside of the embeddings and the lm_head."""
    outside: set[int] = set()
    for module in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
        outside.update(id(parameter) for parameter in module.parameters())
    return sum(p.numel() for p in language_model.parameters() if id(p) not in outside)


@torch.inference_mode()
def _check_steps(language_model: CausalLM) -> None:
    """Run a prefill and a decoding step.

    Raises:
        ValueError: The code of the model uses more of a linear layer than its `forward`. Mamba, for example, multiplies
            by `dt_proj.weight` itself.
    """
    cache = DynamicCache(config=language_model.config)
    cache_kwargs = {cache_kwarg_name(language_model): cache}
    try:
        for length in (2, 1):
            input_ids = torch.zeros(1, length, dtype=torch.long)
            language_model(input_ids=input_ids, use_cache=True, **cache_kwargs)
    except AttributeError as error:
        raise ValueError(
            f"--quantize int8 does not support {language_model.config.model_type}, because its code reads the weights of "
            f"linear layers ({error}). Leave out --quantize."
        ) from error

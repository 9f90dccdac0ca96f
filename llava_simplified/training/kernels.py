"""What makes a step cheaper where the machine has it: attention kernels, Liger, compiled layers, quantised weights.

Each is refused at the start, with a reason, where it isn't installed, not for this machine, or would not be exact.
"""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec
from typing import Any

import torch
import torch._functorch.config
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_flash_attn_2_available

from llava_simplified.arguments import DataArguments, ModelArguments, TrainingArguments
from llava_simplified.model.build import quantization
from llava_simplified.model.protocols import CausalLM


def check_kernels(model: ModelArguments, data: DataArguments, args: TrainingArguments) -> None:
    """Raise ValueError for what this machine lacks, or what would change the result."""
    device, kernel = args.device.type, model.attn_implementation
    if kernel == "flash_attention_2":
        if not is_flash_attn_2_available():
            raise ValueError(
                f"--attn_implementation {kernel}: needs an NVIDIA GPU, `pip install flash-attn`; or sdpa"
            )
        if not (args.bf16 or args.fp16):
            raise ValueError(
                f"--attn_implementation {kernel} knows 16-bit numbers only: --bf16 True, or sdpa"
            )
        if data.share_prefix:
            raise ValueError(
                f"--attn_implementation {kernel} can't be told that captions share a prompt: --share_prefix False, or "
                "flex_attention"
            )
    elif kernel == "flex_attention":
        if device != "cuda":
            raise ValueError(
                f"--attn_implementation {kernel} has no backward pass on this {device}: sdpa"
            )
    elif kernel not in (None, "sdpa", "eager", "cpu_matmul", "short"):
        raise ValueError(
            f"--attn_implementation is sdpa, eager, flash_attention_2 or flex_attention, not {kernel}: of another it isn't "
            "known whether it keeps packed texts apart"
        )
    if model.bits != 16:
        quantization(model.bits, torch.float32)
        if not (model.lora_enable or model.freeze_backbone):
            raise ValueError(
                f"--bits {model.bits}: quantised weights can't train; --lora_enable True, or --bits 16"
            )
        if args.fsdp or is_deepspeed_zero3_enabled():
            raise ValueError(
                f"--bits {model.bits}: quantised weights can't be sharded; ZeRO-2, or --bits 16"
            )
    if args.use_liger_kernel and (device != "cuda" or not find_spec("liger_kernel")):
        lacks = "pip install 'llava-simplified[liger]'"
        raise ValueError(
            f"--use_liger_kernel: {lacks if device == 'cuda' else f'Triton kernels for CUDA, this is a {device}'}"
        )
    if args.torch_compile:  # its backend or mode was given
        raise ValueError(
            "--torch_compile_...: the layers are compiled one by one, by --compile_layers True alone"
        )
    if args.compile_layers and not can_compile(device):
        what = f"the C++ compiler {_cpp_compiler()} (or set CXX)" if device == "cpu" else "Triton"
        raise ValueError(
            f"--compile_layers: needs {what}, which is not there; install it or leave the option away"
        )


def can_compile(device_type: str) -> bool:
    """Is there what torch.compile writes its kernels with: a C++ compiler for the CPU, Triton for a GPU?"""
    return (
        bool(shutil.which(_cpp_compiler())) if device_type == "cpu" else bool(find_spec("triton"))
    )


def _cpp_compiler() -> str:
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def compile_layers(language_model: CausalLM) -> None:
    """Compile each decoder layer, in place: all are alike, so the compiler works for seconds, not minutes.

    What is cheap to compute again on the way back is not kept: a tenth less memory for no time.

    Raises:
        ValueError: a model that does not say what its layers are.
    """
    kinds = set(language_model._no_split_modules or ())
    layers = [module for module in language_model.modules() if type(module).__name__ in kinds]
    if not layers:
        raise ValueError(
            f"--compile_layers: {type(language_model).__name__} does not say which modules are layers"
        )
    torch._functorch.config.activation_memory_budget = (
        0.9  # read when a layer is compiled, at its first call
    )
    for layer in layers:
        layer.compile(dynamic=True)


def choose_attention(language_model: CausalLM, chosen: str | None, device_type: str) -> None:
    """On a CPU, where no kernel is asked for and sdpa would run: `cpu_matmul_attention`."""
    if (
        chosen is None
        and device_type == "cpu"
        and language_model.config._attn_implementation == "sdpa"
    ):
        language_model.set_attn_implementation("cpu_matmul")


def use_liger_kernels(language_model: CausalLM) -> None:
    """Liger's norms, rotary positions and gated products in the layers (Hsu et al., 2024), before LoRA wraps them.

    Not its loss, which would take the logits of all positions: only the trained ones are computed.

    Raises:
        ValueError: a family that Liger has no kernels for.
    """
    from liger_kernel.transformers.monkey_patch import (
        MODEL_TYPE_TO_APPLY_LIGER_FN,
        _apply_liger_kernel_to_instance,
    )

    text: Any = language_model
    if text.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(
            f"--use_liger_kernel: Liger has no kernels for {text.config.model_type} models"
        )
    _apply_liger_kernel_to_instance(
        model=text, cross_entropy=False, fused_linear_cross_entropy=False
    )

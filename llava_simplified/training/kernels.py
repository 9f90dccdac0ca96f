"""Options that make a step cheaper: attention kernels, Liger, compiled layers, quantization.

`check_kernels` rejects an option at the start of a run if a package is missing, if the machine does
not support it, or if the result would not be exact.
"""

from __future__ import annotations

import logging
import shutil
from importlib.util import find_spec

import torch
import torch._functorch.config
import torch.fx.experimental._config
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_flash_attn_2_available

from llava_simplified.arguments import DataArguments, ModelArguments, TrainingArguments
from llava_simplified.extras import cpp_compiler, install_command
from llava_simplified.model.build import quantization
from llava_simplified.model.cpu_dtype import trains_fast_in
from llava_simplified.model.protocols import CausalLM

logger = logging.getLogger(__name__)

# Fraction of its activations that a compiled layer may save for backward; the rest is recomputed. 0.9
# saves a tenth of the memory at no measurable cost, since only very cheap operations are recomputed.
ACTIVATION_MEMORY_BUDGET = 0.9


def check_kernels(
    model: ModelArguments, data: DataArguments, args: TrainingArguments, check_machine: bool = True
) -> None:
    """Check the options for kernels, quantization and compilation.

    Args:
        model: Model options.
        data: Data options.
        args: Training options.
        check_machine: Also check whether this machine supports the options.

    Raises:
        ValueError: This machine does not support an option, or the option would change the result.
    """
    _check_attention(model, data, args)
    if model.bits != 16:
        _check_quantization(model, args)
    # The command line reads --torch_compile as --compile_layers. `args.torch_compile` is True only if a
    # backend or a mode was passed, because Transformers then sets it.
    if args.torch_compile:
        raise ValueError(
            "--torch_compile_backend and --torch_compile_mode have no effect: layers are compiled one by one. Pass "
            "--compile_layers True alone."
        )
    if check_machine:
        _check_machine(model, args)


def _check_machine(model: ModelArguments, args: TrainingArguments) -> None:
    """Raise ValueError if this machine or its packages do not support an option."""
    name = model.attn_implementation
    option = f"--attn_implementation {name}"
    if name == "flex_attention" and args.device.type != "cuda":
        raise ValueError(
            f"{option} has no backward pass on {args.device.type}. Pass --attn_implementation sdpa."
        )
    if name == "flash_attention_2" and not is_flash_attn_2_available():
        raise ValueError(
            f"{option} needs an NVIDIA GPU and the package flash-attn (pip install flash-attn). Install it, or pass "
            "--attn_implementation sdpa."
        )
    if model.bits != 16:
        # Ignore the result: the call raises an error if bitsandbytes is missing.
        quantization(model.bits, torch.float32)
    if args.use_liger_kernel:
        _check_liger(args)
    if args.bf16 and args.device.type == "cpu" and not trains_fast_in(torch.bfloat16):
        logger.warning(
            "--bf16 True: bfloat16 is slow on this CPU. Pass --bf16 False, which needs twice the memory for the frozen weights."
        )
    _check_compilation(args)


def _check_attention(model: ModelArguments, data: DataArguments, args: TrainingArguments) -> None:
    """Raise ValueError if the attention kernel is unknown, or would not be exact with the other options."""
    name = model.attn_implementation
    option = f"--attn_implementation {name}"
    # Version 0.1.0 called cpu_matmul "short".
    if name in (None, "sdpa", "eager", "cpu_matmul", "short", "flex_attention"):
        return
    if name != "flash_attention_2":
        # Reject any other kernel, which may not support the masks that separate packed samples.
        raise ValueError(
            f"{option}: expected sdpa, eager, flash_attention_2 or flex_attention. Pass --attn_implementation sdpa."
        )
    if not (args.bf16 or args.fp16):
        raise ValueError(
            f"{option} supports 16-bit activations only. Pass --bf16 True, or --attn_implementation sdpa."
        )
    if data.share_prefix:
        raise ValueError(
            f"{option} does not support captions that share a prompt. Pass --share_prefix False, or "
            "--attn_implementation flex_attention."
        )


def _check_quantization(model: ModelArguments, args: TrainingArguments) -> None:
    """Raise ValueError if quantization contradicts other options."""
    option = f"--bits {model.bits}"
    if model.bits not in (4, 8):
        raise ValueError(f"{option}: expected 4, 8 or 16.")
    if not (model.lora_enable or model.freeze_backbone):
        raise ValueError(
            f"{option}: quantized weights cannot be trained. Pass --lora_enable True, or --bits 16."
        )
    if args.fsdp or is_deepspeed_zero3_enabled():
        raise ValueError(
            f"{option}: FSDP and ZeRO stage 3 cannot shard quantized weights. Use ZeRO stage 2, or pass --bits 16."
        )


def _check_liger(args: TrainingArguments) -> None:
    """Raise ValueError if Liger's kernels cannot run here."""
    if args.device.type != "cuda":
        raise ValueError(
            f"--use_liger_kernel: Liger's Triton kernels require CUDA, but the device is {args.device.type}. Pass "
            "--use_liger_kernel False."
        )
    if not find_spec("liger_kernel"):
        raise ValueError(
            f"--use_liger_kernel requires liger-kernel: run {install_command('liger')}, or pass --use_liger_kernel False."
        )


def _check_compilation(args: TrainingArguments) -> None:
    """Raise ValueError if layers cannot be compiled here."""
    device = args.device.type
    if not args.compile_layers or can_compile(device):
        return
    if device == "mps":
        reason = "Apple GPUs (mps) are not supported. Pass"
    elif device == "cpu":
        reason = (
            f"the C++ compiler {cpp_compiler()} was not found. Install it, name another one in the environment variable "
            "CXX, or pass"
        )
    else:
        reason = "Triton was not found. Install it, or pass"
    raise ValueError(f"--compile_layers: {reason} --compile_layers False.")


def can_compile(device_type: str) -> bool:
    """Return True if torch.compile finds a code generator: a C++ compiler for CPUs, else Triton.

    Apple GPUs ("mps") have neither.
    """
    if device_type == "mps":
        return False
    if device_type == "cpu":
        return shutil.which(cpp_compiler()) is not None
    return find_spec("triton") is not None


def compile_layers(language_model: CausalLM) -> None:
    """Compile each decoder layer in place.

    All layers share one compiled graph, so compilation takes seconds. Compiling the full model would take
    minutes.

    Raises:
        ValueError: The model class does not declare its layers.
    """
    layer_names = set(language_model._no_split_modules or ())
    layers = [module for module in language_model.modules() if type(module).__name__ in layer_names]
    if not layers:
        raise ValueError(
            f"--compile_layers: {type(language_model).__name__} does not declare its layers (_no_split_modules). "
            "Pass --compile_layers False."
        )
    # Set both globally: torch reads them when a layer is compiled, at its first call.
    torch._functorch.config.activation_memory_budget = ACTIVATION_MEMORY_BUDGET
    # By default, torch assumes that dimensions of the same size are always equal. If the sequences of the first batch
    # happen to be as long as an attention head is wide, their length is taken for a constant, and the first batch of
    # another length compiles everything again.
    torch.fx.experimental._config.use_duck_shape = False
    for layer in layers:
        layer.compile(dynamic=True)


def choose_attention(language_model: CausalLM, requested: str | None, device_type: str) -> None:
    """Use `cpu_matmul` attention on a CPU, in place of sdpa, unless a kernel was requested.

    Args:
        language_model: The model, changed in place.
        requested: `--attn_implementation`.
        device_type: "cpu", "cuda", ...
    """
    if requested is not None or device_type != "cpu":
        return
    if language_model.config._attn_implementation == "sdpa":
        language_model.set_attn_implementation("cpu_matmul")


def use_liger_kernels(language_model: CausalLM) -> None:
    """Replace norms, rotary embeddings and gated MLPs with Liger's kernels (Hsu et al., 2024).

    Call it before LoRA wraps the layers.

    Liger's fused loss is not used: it would compute logits at all positions, instead of the trained
    positions only.

    Raises:
        ValueError: Liger has no kernels for this model type.
    """
    from liger_kernel.transformers.monkey_patch import (
        MODEL_TYPE_TO_APPLY_LIGER_FN,
        _apply_liger_kernel_to_instance,
    )

    model_type = language_model.config.model_type
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(
            f"--use_liger_kernel: Liger has no kernels for {model_type} models. Pass --use_liger_kernel False."
        )
    _apply_liger_kernel_to_instance(
        model=language_model,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
    )

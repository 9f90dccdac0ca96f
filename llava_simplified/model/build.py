"""Build a model from its config and its pretrained parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)
from transformers.integrations import validate_bnb_backend_availability
from transformers.utils import is_bitsandbytes_available

from llava_simplified.model.config import LlavaConfig
from llava_simplified.model.llava import Llava
from llava_simplified.model.projector import build_projector
from llava_simplified.model.vision import VisionTower, check_missing_keys


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer, with a pad token (the end token where it has none: padding is masked, never trained).

    Raises:
        ValueError: there is no tokenizer, or it has no end token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        if Path(name_or_path).is_dir() and not (Path(name_or_path) / "tokenizer.json").is_file():
            raise ValueError(
                f"the tokenizer's tokenizer.json is missing: put it into {name_or_path}"
            ) from error
        raise ValueError(f"{name_or_path}: no tokenizer to load: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{name_or_path}: the tokenizer has no end-of-sequence token (tokenizer_config.json names it): a caption "
            "could never end"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_model(
    architecture: LlavaConfig,
    *,
    language_model: str | Path | None = None,
    vision_tower: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **model_options: Any,
) -> Llava:
    """Load the pretrained parts and join them by a fresh projector (float32, as all that is trained).

    Args:
        language_model, vision_tower: load them from here instead of where `architecture` says.
        model_options: go to `AutoModelForCausalLM.from_pretrained` (attn_implementation).

    Raises:
        ValueError: a part can't be loaded, or not whole.
    """
    dtype = getattr(torch, architecture.dtype)
    if architecture.bits != 16:
        model_options["quantization_config"] = quantization(architecture.bits, dtype)
    tower = VisionTower.from_pretrained(
        str(vision_tower or architecture.vision_tower),
        dtype=dtype,
        select_layer=architecture.mm_vision_select_layer,
        select_feature=architecture.mm_vision_select_feature,
        token_pool=architecture.mm_token_pool,
    )
    source = str(language_model or architecture.language_model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, output_loading_info=True, **model_options
    )
    text, report = loaded
    check_missing_keys(source, report["missing_keys"])
    for module in text.modules():
        if hasattr(
            module, "support_avx512bf16_for_cpu"
        ):  # rounds the 4-bit weights' scales, in evaluation mode alone
            module.support_avx512bf16_for_cpu = False
    width = text.get_input_embeddings().weight.shape[1]
    projector = build_projector(architecture.mm_projector_type, tower.width, width)
    tokenizer = tokenizer or load_tokenizer(source)
    return Llava(tower, projector, text, tokenizer, architecture.template, architecture.instruction)


def quantization(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    """How a frozen language model is kept in 4 bits (NF4: Dettmers et al., QLoRA, 2023) or 8; its head and norms stay in `dtype`.

    Raises:
        ValueError: other bits; or bitsandbytes is not there, or not for this machine.
    """
    if bits not in (4, 8):
        raise ValueError(f"--bits is 4, 8 or 16, not {bits}")
    if not is_bitsandbytes_available():
        raise ValueError(
            f"--bits {bits} needs bitsandbytes: pip install 'llava-simplified[quant]'; or --bits 16"
        )
    if not validate_bnb_backend_availability():
        raise ValueError(
            f"--bits {bits}: bitsandbytes does not know this machine's devices: --bits 16"
        )
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )

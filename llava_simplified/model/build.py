"""Build a model from its config: with pretrained, random or no weights.

LlavaConfig --- build_vision_tower ---> VisionTower    pixels -> patch features
            --- build_projector ------> Linear, MLP    patch features -> image tokens
            --- AutoModelForCausalLM -> CausalLM       image and text tokens -> logits
            --- load_tokenizer -------> tokenizer
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    integrations,
)
from transformers.utils import is_bitsandbytes_available

from llava_simplified.data.transforms import ImageTransform
from llava_simplified.extras import install_command
from llava_simplified.foreign_files import blame_file, error_reason
from llava_simplified.hub import check_model_config, check_model_name
from llava_simplified.model.config import CONFIG_NAME, LlavaConfig, read_checkpoint_config
from llava_simplified.model.llava import Llava
from llava_simplified.model.projector import build_projector
from llava_simplified.model.protocols import CausalLM
from llava_simplified.model.vision import VisionTower, check_missing_keys
from llava_simplified.prompt import Prompt

# Old names of attention kernels, which checkpoints and scripts may contain: LLaVA Simplified 0.1.0 called its kernel
# for CPUs "short".
_ATTENTION_ALIASES = {"short": "cpu_matmul"}


def build_model(
    config: LlavaConfig,
    *,
    language_model: str | Path | PreTrainedConfig | None = None,
    vision_tower: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> Llava:
    """Build a model from pretrained parts, joined by a projector with new (random) weights.

    Args:
        config: Names of the parts and how they are joined.
        language_model: Folder or hub name of the language model; overrides `config`. A Transformers
            config builds it with random weights, which the caller may replace.
        vision_tower: Folder or hub name of the vision tower; overrides `config`.
        tokenizer: The tokenizer; by default the one in the language model's folder.
        device: Device of the model. On "meta", the model is built from the configs and the tokenizer alone,
            without reading or allocating weights.
        attn_implementation: Attention kernel of the language model, as Transformers names it.
        trust_remote_code: Run the Python code that the language model or its tokenizer comes with.
            Vision towers are always models of Transformers.

    Returns:
        The model. The vision tower and the language model have the dtype of `config`. The projector is
        float32, like all trained weights.

    Raises:
        ValueError: A part cannot be loaded, or some of its weights are missing.
    """
    dtype = getattr(torch, config.dtype)
    # "meta" tensors have a shape and a dtype, but no data. Even a 7B model then needs no memory and is built quickly.
    on_meta = device is not None and torch.device(device).type == "meta"
    source = language_model or config.language_model
    if on_meta and not isinstance(source, PreTrainedConfig):
        source = load_transformers_config(str(source), trust_remote_code)
    attn_implementation = _ATTENTION_ALIASES.get(attn_implementation or "", attn_implementation)

    tower = build_vision_tower(config, source=vision_tower, device="meta" if on_meta else None)
    # Keep this order: the tower, the language model and the projector draw random numbers one after the other
    # (even for weights that are overwritten later), and a seed must always result in the same projector.
    with torch.device("meta") if on_meta else nullcontext():
        if isinstance(source, PreTrainedConfig):
            check_text_only(source, source.name_or_path or source.model_type)
            text_model: CausalLM = AutoModelForCausalLM.from_config(
                source,
                dtype=dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
            )
        else:
            text_model = load_language_model(
                str(source),
                dtype,
                bits=config.bits,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
            )
        # Do not use `config.hidden_size`: in some families (OPT), token embeddings have another width.
        text_width = text_model.get_input_embeddings().weight.shape[1]
        projector = build_projector(config.mm_projector_type, tower.width, text_width)
    if tokenizer is None:
        tokenizer = load_tokenizer(
            str(language_model or config.language_model), trust_remote_code=trust_remote_code
        )
    model = Llava(tower, projector, text_model, tokenizer, config.template, config.instruction)
    name = tokenizer.name_or_path or str(language_model or config.language_model)
    check_vocabulary(model.prompt, text_model.config, name)
    # Create the model on the CPU and then move it, so that the random weights are the same on every device.
    if device is None or on_meta:
        return model
    return model.to(device)


def build_vision_tower(
    config: LlavaConfig,
    *,
    source: str | Path | None = None,
    device: str | torch.device | None = None,
) -> VisionTower:
    """Build only the vision tower of a model.

    Args:
        config: Contains the name of the vision tower, how images are preprocessed, and which features are used.
        source: Folder or hub name of the vision tower; overrides `config`.
        device: Device of the tower. On "meta", it is built without reading or allocating weights.

    Raises:
        ValueError: `source` cannot be loaded, is not a vision model, or lacks some weights.
    """
    name = str(source or config.vision_tower)
    dtype = getattr(torch, config.dtype)
    selection: dict[str, Any] = {
        "select_layer": config.mm_vision_select_layer,
        "select_feature": config.mm_vision_select_feature,
        "token_pool": config.mm_token_pool,
    }
    aspect_ratio = config.image_aspect_ratio
    if device is None or torch.device(device).type != "meta":
        tower = VisionTower.from_pretrained(
            name, dtype=dtype, image_aspect_ratio=aspect_ratio, **selection
        )
        return tower if device is None else tower.to(device)
    # On "meta", the config and the preprocessor are enough: no weights are read.
    transformers_config = load_transformers_config(name)
    transform = ImageTransform.from_pretrained(name, aspect_ratio)
    return VisionTower.from_config(transformers_config, transform, **selection).to(dtype)


def load_language_model(
    name_or_path: str,
    dtype: torch.dtype,
    bits: int = 16,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> CausalLM:
    """Load a pretrained language model.

    Args:
        name_or_path: Folder or hub name.
        dtype: Data type of the weights.
        bits: Bits per weight: 16 (for `dtype`), or 8 or 4 to quantize the weights while loading.
        attn_implementation: Attention kernel, as Transformers names it.
        trust_remote_code: Run the Python code that the model comes with.

    Raises:
        ValueError: The model cannot be loaded, some of its weights are missing, or it is multimodal.
    """
    options: dict[str, Any] = {"attn_implementation": attn_implementation}
    if bits != 16:
        options["quantization_config"] = quantization(bits, dtype)
    # Check the config before the weights are downloaded.
    check_text_only(load_transformers_config(name_or_path, trust_remote_code), name_or_path)
    with blame_file(name_or_path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            **options,
        )
    # Transformers initializes missing weights at random and only warns. Raise an error instead.
    language_model, loading_info = loaded
    check_missing_keys(name_or_path, loading_info["missing_keys"])
    for module in language_model.modules():
        # Disable a CPU kernel that bitsandbytes uses only in evaluation mode. It rounds the scales of 4-bit
        # weights, so the model would compute other values than in training.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return cast(CausalLM, language_model)


def check_text_only(config: PreTrainedConfig, name: str) -> None:
    """Refuse a language model that is only a part of a multimodal model, such as Gemma 3 with 4B parameters.

    The layers of such a model have a config of their own inside the config of the model. The attention masks, the length
    of the context and the layers with an adapter would silently be wrong, because they depend on the outer config.

    Args:
        config: Config of the model.
        name: Name of the model, for the message.

    Raises:
        ValueError: `AutoModelForCausalLM` would build a multimodal model.
    """
    text_config = config.get_text_config()
    if text_config is config:
        return
    # For some multimodal configs (Llama 4), Transformers builds the language model alone, from its own config.
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is not None and model_class.config_class is type(text_config):
        return
    raise ValueError(
        f"{name}: {config.model_type} is a multimodal model, whose language model cannot be used "
        "alone. Use a text-only model instead, for example google/gemma-3-1b-it in place of the larger Gemma 3 models."
    )


def load_tokenizer(
    name_or_path: str, *, trust_remote_code: bool = False, **options: Any
) -> PreTrainedTokenizerBase:
    """Load a tokenizer, and make sure that it has a pad token.

    If the tokenizer has no pad token, its end-of-sequence token is used. This is safe, since padding is
    masked and excluded from the loss.

    Args:
        name_or_path: Folder or hub name.
        trust_remote_code: Run the Python code that the tokenizer comes with.
        **options: Attributes of the tokenizer that differ from the folder's, such as `image_token`.

    Raises:
        ValueError: No tokenizer can be loaded, or it has no end-of-sequence token.
    """
    check_model_name(name_or_path)
    try:
        # Always pass a value for `trust_remote_code`: without one, Transformers asks the user on the terminal.
        with blame_file(name_or_path):
            tokenizer = AutoTokenizer.from_pretrained(
                name_or_path, trust_remote_code=trust_remote_code, **options
            )
    except (OSError, ValueError) as error:
        # The most frequent cause, a missing file, gets a message of its own.
        folder = Path(name_or_path)
        if folder.is_dir() and not (folder / "tokenizer.json").is_file():
            raise ValueError(
                f"{name_or_path}: tokenizer.json is missing; copy it into this folder"
            ) from error
        raise ValueError(
            f"{name_or_path}: cannot load a tokenizer: {error_reason(error)}. Pass the folder of a language model."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{name_or_path}: the tokenizer has no end-of-sequence token, so captions would never "
            "end; set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_vocabulary(prompt: Prompt, config: PreTrainedConfig | None, name: str) -> None:
    """Check that every token that a prompt or an answer can contain has a row in the embedding table.

    Args:
        prompt: The prompt renderer, which contains the tokenizer.
        config: Config of the language model; None if it is not known.
        name: Name of the model, for the message.

    Raises:
        ValueError: A token has no row. The message names the first one.
    """
    # The config of a multimodal model contains the config of its language model, which has the vocabulary size.
    rows = None if config is None else getattr(config.get_text_config(), "vocab_size", None)
    if rows is None:
        return
    outside = {index: token for index, token in prompt.usable_tokens().items() if index >= rows}
    if outside:
        index = min(outside)
        raise ValueError(
            f"{name}: the token {outside[index]!r} of the tokenizer has the id {index}, but the embedding table has only "
            f"{rows} rows ({len(outside)} token(s) have no row). Use the tokenizer that belongs to this model, or resize "
            "the table with model.resize_token_embeddings(len(tokenizer)) and save model and tokenizer."
        )


def find_language_model_config(name_or_path: str) -> PreTrainedConfig | None:
    """Return the config of a language model, or of the language model of a LLaVA checkpoint.

    Return None if no config can be loaded, for example from a folder that contains only a tokenizer.
    """
    folder = Path(name_or_path)
    if (folder / CONFIG_NAME).is_file():
        # A checkpoint contains its language model only if all of its weights were trained. Otherwise, llava.json names
        # the base model.
        own_weights = folder / "language_model"
        name_or_path = str(own_weights)
        if not own_weights.is_dir():
            name_or_path = read_checkpoint_config(folder)["architecture"]["language_model"]
    try:
        return load_transformers_config(name_or_path)
    except ValueError:
        return None


def quantization(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the bitsandbytes config that loads a frozen language model in 4 or 8 bits.

    4 bits means NF4 with double quantization (Dettmers et al., QLoRA, 2023). The output layer and the
    norms are not quantized.

    Args:
        bits: 4 or 8.
        dtype: Data type of the matrix products (4 bits only).

    Raises:
        ValueError: `bits` is neither 4 nor 8, or bitsandbytes is not installed or does not support
            the devices of this machine.
    """
    if bits not in (4, 8):
        raise ValueError(f"--bits must be 4, 8 or 16, not {bits}")
    if not is_bitsandbytes_available():
        raise ValueError(
            f"--bits {bits} requires bitsandbytes: run {install_command('quant')}, or pass --bits 16."
        )
    # Check this last, because it imports bitsandbytes, which takes seconds.
    if not integrations.validate_bnb_backend_availability():
        raise ValueError(
            f"--bits {bits}: bitsandbytes does not support the devices of this machine; "
            "pass --bits 16"
        )
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def load_transformers_config(
    name_or_path: str, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Load a model's config.json; raise ValueError if it cannot be read."""
    check_model_name(name_or_path)
    check_model_config(name_or_path)
    try:
        with blame_file(name_or_path):
            return AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise ValueError(
            f"{name_or_path}: cannot read the model's config.json: {error_reason(error)}. Check the path or name of the model."
        ) from error

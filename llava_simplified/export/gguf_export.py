"""Export a checkpoint for llama.cpp and Ollama: two GGUF files and a `Modelfile`.

| file          | contents                                                  | written by                    |
|---------------|-----------------------------------------------------------|-------------------------------|
| `model.gguf`  | language model, tokenizer, chat template                  | this file, `gguf_tokenizer.py`|
| `mmproj.gguf` | vision tower and projector ("multimodal projector")       | `gguf_vision.py`              |
| `Modelfile`   | `ollama create NAME -f Modelfile`                         | `ollama.py`                   |

The metadata keys are defined by llama.cpp: in `src/llama-arch.cpp` and `src/llama-vocab.cpp` for the
language model, in `tools/mtmd/clip-impl.h` for the tower. The `gguf` package defines the tensor names.

Data types: llama.cpp supports matrix products with any data type, but additions in float32 only.
Therefore only matrices are stored in the data type of the model. Biases, the weights of norms, position
embeddings (which are added, although they have two dimensions) and the patch filter (four dimensions)
are stored as float32.

llama.cpp differs from training in two ways that no entry of the files can change: it always uses the tanh
approximation of gelu, and it adds borders to an image that is not square. These borders are the same as in
training if the model was trained with `--image_aspect_ratio pad` and a CLIP tower; otherwise, a warning
describes the difference.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava_simplified.export.chat_template import FLATTEN_CONTENT_WITH_MARKERS, get_chat_template
from llava_simplified.export.gguf_tokenizer import vocabulary_settings
from llava_simplified.export.gguf_vision import (
    describe_padding_difference,
    vision_settings,
    vision_weights,
)
from llava_simplified.export.ollama import modelfile
from llava_simplified.export.stock import describe_for_stock
from llava_simplified.extras import require_extra
from llava_simplified.jobs import atomic_directory
from llava_simplified.model.llava import Llava
from llava_simplified.model.protocols import CausalLM
from llava_simplified.prompt import IMAGE_PLACEHOLDER, Message

logger = logging.getLogger(__name__)

Weights = dict[str, torch.Tensor]
Metadata = dict[str, Any]  # GGUF key -> string, number, boolean, or a list of these

# Hugging Face's model_type -> llama.cpp's architecture. Mistral is a Llama for llama.cpp.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
# llama.cpp's enum llama_ftype, the value of `general.file_type`.
FILE_TYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 32,
}


def export_gguf(
    checkpoint: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    model_base: str | None = None,
    vision_tower: str | None = None,
) -> int:
    """Write `model.gguf`, `mmproj.gguf` and `Modelfile`; read both GGUF files back and compare every tensor.

    Args:
        checkpoint: Folder written by `llava train`.
        output: Folder to create. It is created only if the export succeeds.
        dtype: Data type of the matrices: float32, bfloat16 or float16; None: as trained.
        model_base: Path of the base language model, if it has moved since training.
        vision_tower: Path of the vision tower, if it has moved since training.

    Returns:
        The number of tensors that were compared.

    Raises:
        ValueError: llama.cpp does not support the model (the message says what to use instead), or a file
            does not contain the tensors that were written.
        FileExistsError: `output` exists already.
    """
    require_extra("gguf", "gguf", purpose="--format gguf")
    with atomic_directory(Path(output)) as folder:
        model = Llava.from_pretrained(
            checkpoint,
            device="cpu",
            dtype=dtype or "stored",
            merge=True,
            model_base=model_base,
            vision_tower=vision_tower,
        )
        # Call this only for its checks. llama.cpp has the same limits as the LLaVA classes of
        # Transformers (two projector layers, no pooling, no bias in lm_head), and more that are checked
        # below.
        describe_for_stock(model)
        _check_template(model)
        language_model = model.language_model
        architecture = _architecture(language_model)
        file_type = {"general.file_type": FILE_TYPES[language_model.dtype]}

        # Convert everything before writing, because unsupported models are detected here.
        text_metadata = file_type | _text_metadata(model, architecture)
        text_weights = _text_weights(language_model, architecture)
        tower_metadata = file_type | vision_settings(model)
        tower_weights = vector_weights_to_float32(vision_weights(model))
        _check_finite(text_weights | tower_weights, language_model.dtype)

        _write(folder / "model.gguf", architecture, text_metadata, text_weights)
        _compare(folder / "model.gguf", text_weights)
        _write(folder / "mmproj.gguf", "clip", tower_metadata, tower_weights)
        _compare(folder / "mmproj.gguf", tower_weights)
        (folder / "Modelfile").write_text(modelfile(model), encoding="utf-8")
        padding_difference = describe_padding_difference(model.vision_tower.transform)
    if padding_difference:
        logger.warning("%s", padding_difference)
    return len(text_weights) + len(tower_weights)


def _check_template(model: Llava) -> None:
    """Raise ValueError if llama.cpp would not render the prompt of training.

    llama.cpp inserts an image into the text of a message, and does not recognize an image token that the
    template writes.
    """
    token = model.prompt.image_token
    if token is not None:
        raise ValueError(
            f"--format gguf: llama.cpp places images in the text of a message, but the chat template of this "
            f"model writes {token} itself. Use --format hf. If the model was trained with the prompts of the template "
            "plain, as LLaVA 1.5 was, import it again with --template plain."
        )
    tokenizer: Any = model.tokenizer
    instruction = model.instruction.replace(IMAGE_PLACEHOLDER, "").strip()
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": instruction}],
        chat_template=FLATTEN_CONTENT_WITH_MARKERS + get_chat_template(model),
        add_generation_prompt=True,
        tokenize=False,
    )
    expected = model.prompt.render([Message("user", instruction)], None).input_ids
    input_ids = tokenizer.encode(text, add_special_tokens=False)
    if input_ids != expected:
        raise ValueError(
            f"--format gguf: llama.cpp would render a prompt with the token ids {input_ids}, but the model was trained with "
            f"{expected}. Use --format hf."
        )


def vector_weights_to_float32(weights: Mapping[str, torch.Tensor]) -> Weights:
    """Convert all weights to float32 except those that llama.cpp uses in matrix products."""
    converted = {}
    for name, weight in weights.items():
        is_matrix = weight.dim() == 2 and "position" not in name
        converted[name] = weight.detach() if is_matrix else weight.detach().float()
    return converted


def _check_finite(weights: Weights, dtype: torch.dtype) -> None:
    """Raise ValueError if a weight is not finite, for example because its value was too large for float16.

    Args:
        weights: The weights to write.
        dtype: Data type of the model, from which some of the weights were converted to float32.
    """
    for name, weight in weights.items():
        if not weight.isfinite().all():
            name_of_type = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"--format gguf: {name} has values that are not finite in {name_of_type}: they are damaged, or too large "
                "for this data type. Pass --dtype bfloat16 or float32."
            )


# ---- language model ----


def _architecture(language_model: CausalLM) -> str:
    """Return llama.cpp's name of the language model's architecture.

    Raises:
        ValueError: The architecture is not supported.
    """
    model_type = language_model.config.model_type
    if model_type not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise ValueError(
            f"--format gguf supports {supported} language models, not {model_type}. Use --format hf, and "
            "convert the result with llama.cpp's convert_hf_to_gguf.py."
        )
    return ARCHITECTURES[model_type]


def _text_metadata(model: Llava, architecture: str) -> Metadata:
    """Return the metadata of `model.gguf`."""
    config = model.language_model.config
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None:
        head_dim = config.hidden_size // config.num_attention_heads
    # llama.cpp does not support sliding windows for these architectures: every token attends to all previous
    # tokens. Within one window, there is no difference, so limit the context to one window.
    context_length = config.max_position_embeddings
    sliding_window = getattr(config, "sliding_window", None)
    if sliding_window:
        context_length = min(context_length, sliding_window)
    values = {
        "vocab_size": config.vocab_size,
        "context_length": context_length,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    metadata: Metadata = {"general.type": "model"}
    for key, value in values.items():
        metadata[f"{architecture}.{key}"] = value
    return metadata | vocabulary_settings(model)


def _text_weights(language_model: CausalLM, architecture: str) -> Weights:
    """Return the tensors of `model.gguf` by llama.cpp's names.

    The query and key projections of a Llama are permuted in place, so the model must not be used
    afterward.

    Raises:
        ValueError: llama.cpp does not support a weight, or the rotary scaling.
    """
    import gguf

    config = language_model.config
    model_arch = getattr(gguf.MODEL_ARCH, architecture.upper())
    names = gguf.get_tensor_name_map(model_arch, config.num_hidden_layers)
    weights = _rope_factors(language_model, architecture)
    for name, weight in language_model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # without lm_head, llama.cpp uses the embedding table
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise ValueError(
                f"--format gguf: llama.cpp does not support the weight {name} of the architecture "
                f"{architecture}. Use --format hf."
            )
        # Permute for "llama" only, which pairs neighboring channels in llama.cpp; qwen2 and qwen3 pair
        # halves, as Hugging Face does.
        match = re.search(r"\.([qk])_proj\.", name)
        if architecture == "llama" and match:
            num_heads = config.num_attention_heads
            if match[1] == "k":
                num_heads = config.num_key_value_heads
            _permute_for_rope(weight, num_heads)
        weights[gguf_name] = weight
    return vector_weights_to_float32(weights)


def _permute_for_rope(weight: torch.Tensor, num_heads: int) -> None:
    """Reorder the rows of a query or key projection for llama.cpp's rotary embedding, in place.

    Hugging Face and llama.cpp both rotate pairs of a head's n channels, but they pair different channels:

        Hugging Face, halves:       (0, n/2), (1, n/2 + 1), ...
        llama.cpp, neighbors:       (0, 1),   (2, 3), ...

    Args:
        weight: (heads * n, in), or (heads * n,) for a bias.
        num_heads: Number of heads.
    """
    halves = weight.unflatten(0, (num_heads, 2, -1))  # (heads, 2, n / 2, ...)
    weight.copy_(halves.transpose(1, 2).flatten(0, 2))


def _rope_factors(language_model: CausalLM, architecture: str) -> Weights:
    """Return the divisors of the rotary frequencies: `rope_freqs.weight`, or nothing if all are 1.

    Llama 3.1 divides low frequencies by up to 8, for a longer context. llama.cpp reads the divisors, one
    for each pair of channels, from this tensor.
    """
    transformer: Any = language_model
    rope = transformer.model.rotary_emb
    parameters = language_model.config.rope_parameters
    count = len(rope.inv_freq)
    unscaled = 1 / parameters["rope_theta"] ** (torch.arange(count) / count)
    factors = unscaled / rope.inv_freq.float()
    if torch.allclose(factors, torch.ones(())) and rope.attention_scaling == 1:
        return {}
    if architecture != "llama" or rope.attention_scaling != 1:
        raise ValueError(
            f"--format gguf does not support the rotary scaling {parameters} of the architecture {architecture}. "
            "Use --format hf."
        )
    return {"rope_freqs.weight": factors}


# ---- files ----


def _write(path: Path, architecture: str, metadata: Metadata, weights: Weights) -> None:
    """Write one GGUF file."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        # Write integers as unsigned, as llama.cpp expects; `get_type` would make them signed.
        value_type = gguf.GGUFValueType.get_type(value)
        if type(value) is int:
            value_type = gguf.GGUFValueType.UINT32
        writer.add_key_value(key, value, value_type)
    for name, weight in weights.items():
        # `_to_numpy` returns bytes for bfloat16, so tell the writer their type.
        raw_dtype = None
        if weight.dtype == torch.bfloat16:
            raw_dtype = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, _to_numpy(weight), raw_dtype=raw_dtype)
    # Write in the order of the file format: header, metadata, tensors.
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _to_numpy(weight: torch.Tensor) -> np.ndarray:
    """Return a tensor as an array; for bfloat16, which numpy does not support, an array of bytes."""
    weight = weight.contiguous()
    if weight.dtype == torch.bfloat16:
        weight = weight.view(torch.uint8)
    return weight.numpy()


def _compare(path: Path, weights: Weights) -> None:
    """Raise ValueError if a GGUF file does not contain exactly these tensors."""
    import gguf

    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    if stored.keys() != weights.keys():
        different = sorted(stored.keys() ^ weights.keys())[:5]
        raise ValueError(f"{path.name}: missing or unexpected tensors after writing: {different}.")
    for name, weight in weights.items():
        if not np.array_equal(stored[name], _to_numpy(weight)):
            raise ValueError(
                f"{path.name}: the values of {name} differ from those that were written."
            )

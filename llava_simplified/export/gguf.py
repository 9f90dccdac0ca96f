"""A checkpoint as llama.cpp and Ollama load it: the language model and, beside it, the tower with its projector, as GGUF.

The keys are those that llama.cpp's `tools/mtmd/clip-impl.h` and `src/llama-vocab.cpp` look up. Two things it does in its own
way, whatever the file says: gelu by its tanh form, and a picture that is no square is padded, not cropped.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from llava_simplified.export.stock import (
    FLATTEN_CONTENT,
    atomic_output_dir,
    chat_template_of,
    describe,
    two_layers,
)
from llava_simplified.model.llava import Llava
from llava_simplified.model.vision import VisionTower
from llava_simplified.prompt import Message

Weights = dict[str, torch.Tensor]
Settings = dict[str, Any]

# By Hugging Face's model_type.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# How a byte-level tokenizer cuts a text into words before it merges -> the name that llama.cpp knows it by.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    "words": "gpt-2",
    "digits words": "smollm",
    _WORDS.format(r"\p{N}"): "qwen2",
    _WORDS.format(r"\p{N}{1,3}"): "llama-bpe",
}


def export_gguf(
    checkpoint: str | Path, output: str | Path, dtype: str | None = None, **where: Any
) -> dict[str, float]:
    """Write `model.gguf`, `mmproj.gguf` and an Ollama `Modelfile`; read both files back and compare every tensor.

    Args:
        dtype: of the matrices: float32, bfloat16 or float16; as trained where not given. Vectors stay float32.
        where: `model_base`, `vision_tower`: where the base weights are now.

    Returns:
        What was compared: how many tensors.

    Raises:
        ValueError: llama.cpp has no form for this model (and what to do), or a tensor reads back otherwise.
    """
    with atomic_output_dir(Path(output)) as folder:
        model = Llava.from_pretrained(checkpoint, device="cpu", dtype=dtype, merge=True, **where)
        describe(model)  # refuses what it can't say
        text: Any = model.language_model
        if text.config.model_type not in ARCHITECTURES:
            raise ValueError(
                f"no GGUF for {text.config.model_type} here, only for {', '.join(ARCHITECTURES)}: use --format hf, and "
                "llama.cpp's own converter for the language model"
            )
        architecture = ARCHITECTURES[text.config.model_type]
        kind = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}[
            text.dtype
        ]  # gguf.LlamaFileType
        files: dict[str, tuple[str, Settings, Weights]] = {
            "model.gguf": (
                architecture,
                _text_settings(model, architecture),
                _text_weights(text, architecture),
            ),
            "mmproj.gguf": ("clip", *_tower(model)),
        }
        for name, (kind_of_model, settings, weights) in files.items():
            _write(folder / name, kind_of_model, {"general.file_type": kind, **settings}, weights)
            _compare(folder / name, weights)
        (folder / "Modelfile").write_text(modelfile(model), encoding="utf-8")
        return {"equal tensors": sum(len(weights) for _, _, weights in files.values())}


def _text_settings(model: Llava, architecture: str) -> Settings:
    config: Any = model.language_model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # llama.cpp has no window for these: it sees all, so it must not go beyond
    window = getattr(config, "sliding_window", None)
    values = {
        "vocab_size": config.vocab_size,
        "context_length": min(
            config.max_position_embeddings, window or config.max_position_embeddings
        ),
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    return {
        "general.type": "model",
        **{f"{architecture}.{k}": v for k, v in values.items()},
        **vocabulary(model),
    }


def _text_weights(text: Any, architecture: str) -> Weights:
    names = gguf.get_tensor_name_map(
        getattr(gguf.MODEL_ARCH, architecture.upper()), text.config.num_hidden_layers
    )
    weights = _rope_factors(text, architecture)
    for name, weight in text.state_dict().items():
        if name == "lm_head.weight" and text.config.tie_word_embeddings:
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"GGUF has no name for {name} in a {architecture} model")
        if architecture == "llama" and (match := re.search(r"\.([qk])_proj\.", name)):
            # llama.cpp turns neighbours (0, 1), Hugging Face halves (0, n / 2): rows change places, in place to save memory
            heads = (
                text.config.num_attention_heads
                if match[1] == "q"
                else text.config.num_key_value_heads
            )
            weight.copy_(weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2))
        weights[found] = weight
    return _in_float32(weights)


def _rope_factors(text: Any, architecture: str) -> Weights:
    """What the model's rotary frequencies are divided by (Llama 3.1 stretches the slow ones); nothing where that is 1."""
    rope = text.model.rotary_emb
    plain = 1 / text.config.rope_parameters["rope_theta"] ** (
        torch.arange(len(rope.inv_freq)) / len(rope.inv_freq)
    )
    factors = plain / rope.inv_freq.float()
    if torch.allclose(factors, torch.ones(())) and rope.attention_scaling == 1:
        return {}
    if architecture != "llama" or rope.attention_scaling != 1:
        raise ValueError(
            f"no GGUF for the rotary scaling {text.config.rope_parameters} of {architecture}: use hf"
        )
    return {"rope_freqs.weight": factors}


def _tower(model: Llava) -> tuple[Settings, Weights]:
    tower: VisionTower = model.vision_tower
    config: Any = tower.model.config
    if config.model_type not in ("clip_vision_model", "siglip_vision_model"):
        raise ValueError(
            f"llama.cpp reads CLIP and SigLIP towers, not {config.model_type}: use --format hf"
        )
    if tower.select_feature != "patch" or tower.transform.crop[0] != tower.transform.crop[1]:
        raise ValueError(
            "llama.cpp shows the patches of a square picture alone: no cls_patch, no other shapes"
        )
    count = config.num_hidden_layers
    layers = [
        layer % (count + 1) for layer in tower.select_layers
    ]  # -2 of 12 layers is the input of the last: 11
    blocks = min(
        max(layers) + 1, count
    )  # one more than needed: that is how llama.cpp finds -2 by itself
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, blocks)
    weights: Weights = {}
    for name, weight in tower.model.state_dict().items():
        full = f"vision_tower.vision_model.{name.removeprefix('vision_model.')}"
        if not re.search(
            r"post_layernorm|\.head\.|position_ids", full
        ):  # these stand behind every hidden state
            if found := names.get_name(full, try_suffixes=(".weight", ".bias")):
                weights[found] = weight
            elif int((re.findall(r"layers\.(\d+)\.", full) or [0])[0]) < blocks:
                raise ValueError(f"GGUF has no name for {name} of a {config.model_type}")
    projector = two_layers(model.projector, 2 * tower.width)["layers"]
    order = sorted(
        range(len(layers)), key=layers.__getitem__
    )  # llama.cpp joins the layers from the lowest up
    first = projector[0][0].detach().unflatten(1, (len(layers), -1))[:, order].flatten(1)
    for place, (matrix, bias) in zip((0, 2), ((first, projector[0][1]), projector[1])):
        weights[f"mm.{place}.weight"], weights[f"mm.{place}.bias"] = (
            matrix.detach().to(tower.dtype),
            bias.detach(),
        )
    values = {
        "image_size": tower.transform.crop[0],
        "patch_size": config.patch_size,
        "image_mean": list(tower.transform.mean),
        "image_std": list(tower.transform.std),
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": blocks,
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_epsilon": float(config.layer_norm_eps),
        "projection_dim": int(model.language_model.config.hidden_size),
        "feature_layer": sorted(layers),
    }
    settings = {
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": config.hidden_act != "quick_gelu",
        **{f"clip.vision.{key}": value for key, value in values.items()},
    }
    return settings, _in_float32(weights)


def _in_float32(weights: Weights) -> Weights:
    """llama.cpp multiplies with matrices of any kind, and adds only float32: vectors, positions, the patch filter."""
    return {
        name: weight.detach()
        if weight.dim() == 2 and "position" not in name
        else weight.detach().float()
        for name, weight in weights.items()
    }


def vocabulary(model: Llava) -> Settings:
    """The tokenizer: byte-level BPE (GPT-2, SmolLM2, Llama 3, Qwen) or sentencepiece's (Llama 2, Mistral).

    Raises:
        ValueError: another kind, or one that cuts words in a way that llama.cpp has no name for.
    """
    tokenizer: Any = model.tokenizer
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe, added = spec["model"], {token["id"]: token for token in spec["added_tokens"]}
    if bpe["type"] != "BPE":
        raise ValueError(f"no GGUF for a {bpe['type']} tokenizer, only for BPE: use --format hf")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in bpe["merges"]]
    text: Any = model.language_model
    rows = len(text.get_input_embeddings().weight)
    pieces = {i: piece for piece, i in tokenizer.get_vocab().items()}
    kinds = gguf.TokenType

    def kind(i: int) -> int:
        if i not in pieces:
            return kinds.UNUSED
        if pieces[i] == bpe["unk_token"]:
            return kinds.UNKNOWN
        if i in added:
            return kinds.CONTROL if added[i]["special"] else kinds.USER_DEFINED
        return (
            kinds.BYTE
            if bpe["byte_fallback"] and re.fullmatch(r"<0x..>", pieces[i])
            else kinds.NORMAL
        )

    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "eot": model.prompt.end_id,
           "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}  # fmt: skip
    settings: Settings = {
        "tokens": [pieces.get(i, f"[PAD{i}]") for i in range(rows)],
        "token_type": [int(kind(i)) for i in range(rows)],
        **{f"{name}_token_id": i for name, i in ids.items() if i is not None and i < rows},
        "add_bos_token": model.prompt.render([Message("user", "a")], None).input_ids[0]
        == tokenizer.bos_token_id,
        "add_eos_token": False,
    }
    if bpe["byte_fallback"]:
        # sentencepiece gives scores: of two pieces, the one with the higher score is joined first
        rank = {"".join(merge): -float(i) for i, merge in reversed(list(enumerate(merges)))}
        steps = _steps(spec["normalizer"], "normalizers") + _steps(
            spec["pre_tokenizer"], "pretokenizers"
        )
        settings |= {
            "model": "llama",
            "pre": "default",
            "scores": [rank.get(pieces.get(i, ""), -1e6) for i in range(rows)],
            "add_space_prefix": any(
                s["type"] == "Prepend" or s.get("prepend_scheme") == "always" for s in steps
            ),
        }
    else:
        settings |= {
            "model": "gpt2",
            "pre": _pre_tokenizer(spec),
            "merges": [" ".join(merge) for merge in merges],
        }
    chat = {"tokenizer.chat_template": template_of(model)}
    return {**{f"tokenizer.ggml.{key}": value for key, value in settings.items()}, **chat}


def _pre_tokenizer(spec: dict[str, Any]) -> str:
    steps = _steps(spec["pre_tokenizer"], "pretokenizers")
    signature = []
    for step in steps:
        if step["type"] == "Split":
            signature.append(step["pattern"].get("Regex", ""))
        elif step["type"] == "Digits" and step["individual_digits"]:
            signature.append("digits")
        elif step["type"] != "ByteLevel" or step["add_prefix_space"]:
            signature.append(json.dumps(step))
        elif step["use_regex"]:
            signature.append("words")
    if (known := PRE_TOKENIZERS.get(" ".join(signature))) is None:
        raise ValueError(
            f"llama.cpp's name for this tokenizer's way of cutting words is not known here: {steps}"
        )
    return known


def _steps(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    return [] if step is None else step[key] if step["type"] == "Sequence" else [step]


def template_of(model: Llava) -> str:
    """The chat template, for servers that put a marker where the picture goes, without the line break behind it."""
    once = "one.text | replace('__>\\n', '__>') | replace('__>', '__>\\n')"  # markers: <__media__>, <__media_ab12__>
    return FLATTEN_CONTENT.replace("'content': one.text", f"'content': {once}") + chat_template_of(
        model
    )


def modelfile(model: Llava) -> str:
    """For `ollama create NAME -f Modelfile`. Ollama writes [img-0] before the words, and adds the first token itself."""
    tokenizer: Any = model.tokenizer
    before, after = tokenizer.apply_chat_template(
        [{"role": "user", "content": "⟦"}],
        chat_template=chat_template_of(model),
        add_generation_prompt=True,
        tokenize=False,
    ).split("⟦")
    if tokenizer.bos_token:
        before = before.removeprefix(tokenizer.bos_token)
    prompt = (
        '{{ if and (ge (len .Prompt) 7) (eq (slice .Prompt 0 5) "[img-") }}{{ slice .Prompt 0 7 }}\n'
        "{{ slice .Prompt 7 }}{{ else }}{{ .Prompt }}{{ end }}"
    )
    end = tokenizer.convert_ids_to_tokens(model.prompt.end_id)
    return (
        f'FROM ./model.gguf\nFROM ./mmproj.gguf\nTEMPLATE """{before}{prompt}{after}{{{{ .Response }}}}"""\n'
        f'PARAMETER stop "{end}"\nPARAMETER temperature 0\n'
    )


def _write(path: Path, architecture: str, settings: Settings, weights: Weights) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in settings.items():
        # counts are unsigned there; a list's kind is that of its first number
        kind = (
            gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
        )
        writer.add_key_value(key, value, kind)
    for name, weight in weights.items():
        writer.add_tensor(
            name, _array(weight), raw_dtype=_BF16 if weight.dtype == torch.bfloat16 else None
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_BF16 = gguf.GGMLQuantizationType.BF16


def _array(weight: torch.Tensor) -> np.ndarray:
    """numpy has no bfloat16: its bytes."""
    return (
        weight.contiguous().view(torch.uint8)
        if weight.dtype == torch.bfloat16
        else weight.contiguous()
    ).numpy()


def _compare(path: Path, weights: Weights) -> None:
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    if found.keys() != weights.keys():
        raise ValueError(
            f"{path.name}: reads back with other tensors: {sorted(found.keys() ^ weights.keys())[:5]}"
        )
    for name, weight in weights.items():
        if not np.array_equal(found[name], _array(weight)):
            raise ValueError(f"{path.name}: {name} reads back otherwise than it was written")

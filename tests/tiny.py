"""Tiny random models of the true classes, written to disk as a hub folder would be."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CAPTIONS = [
    "a bedroom with a double bed",
    "party in the park under cherry blossoms",
    "illustration of a little girl taking a bath",
    "a red car parked on the street",
    "two dogs run over a green field",
    "a man reads a book on a bench",
]
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def make_tokenizer(template: str | None = MISTRAL_TEMPLATE) -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer trained on the captions."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(
        [*CAPTIONS, "Generate a caption of this image: [INST] [/INST]"] * 4, trainer
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


def make_language_model(kind: str, vocabulary: int):
    """A random model of 2 layers; grouped heads, and a sliding window in Mistral."""
    import transformers as t

    common = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.3,  # wild enough that pictures and positions change what is said
    }
    torch.manual_seed(0)
    if kind == "mistral":
        return t.MistralForCausalLM(t.MistralConfig(**common, sliding_window=24))
    if kind == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**common))
    if kind == "qwen2":
        return t.Qwen2ForCausalLM(t.Qwen2Config(**common, tie_word_embeddings=True))
    if kind == "gemma2":
        return t.Gemma2ForCausalLM(
            t.Gemma2Config(**common, head_dim=8, final_logit_softcapping=5.0)
        )
    if kind == "phi":
        return t.PhiForCausalLM(t.PhiConfig(**common))
    if kind == "opt":
        return t.OPTForCausalLM(
            t.OPTConfig(vocab_size=vocabulary, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
                        num_attention_heads=4, bos_token_id=0, eos_token_id=1, pad_token_id=1)
        )  # fmt: skip
    raise ValueError(kind)


def save_language_model(kind: str, folder: Path, template: str | None = MISTRAL_TEMPLATE) -> str:
    tokenizer = make_tokenizer(template)
    make_language_model(kind, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_vision_model(kind: str):
    """A random vision model for 32 x 32 pictures."""
    import transformers as t

    torch.manual_seed(1)
    common = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    if kind == "clip":
        return t.CLIPVisionModel(t.CLIPVisionConfig(**common))
    if kind == "siglip":
        return t.SiglipVisionModel(t.SiglipVisionConfig(**common))
    if kind == "dinov2":
        common.pop("intermediate_size")
        return t.Dinov2Model(t.Dinov2Config(**common))
    if kind == "vit":
        return t.ViTModel(t.ViTConfig(**common))
    if kind == "swin":
        heads = {"embed_dim": 12, "depths": [1, 1, 1], "num_heads": [2, 2, 2], "window_size": 4}
        return t.SwinModel(t.SwinConfig(image_size=32, patch_size=2, **heads))
    if kind == "convnext":
        return t.ConvNextModel(
            t.ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], patch_size=2)
        )
    if kind == "efficientnet":
        size = {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320}
        config = t.EfficientNetConfig(image_size=64, initializer_range=0.3, **size)
        model = t.EfficientNetModel(config).train()
        model(
            torch.randn(8, 3, 64, 64)
        )  # gives the batch norms their statistics: without, the features are 0
        return model.eval()
    raise ValueError(kind)


def save_vision_model(kind: str, folder: Path) -> str:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    make_vision_model(kind).save_pretrained(folder)
    size = 64 if kind == "efficientnet" else 32
    CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    ).save_pretrained(folder)
    return str(folder)

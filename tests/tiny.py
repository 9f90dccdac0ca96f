"""Tiny random models of the real classes, written to disk in the layout of models on the hub."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

if TYPE_CHECKING:
    from llava_simplified.model.config import LlavaConfig
    from llava_simplified.model.llava import Llava

CAPTIONS = [
    "a bedroom with a double bed",
    "party in the park under cherry blossoms",
    "illustration of a little girl taking a bath",
    "a red car parked on the street",
    "two dogs run over a green field",
    "a man reads a book on a bench",
]
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def make_tokenizer(template: str | None = MISTRAL_TEMPLATE) -> PreTrainedTokenizerFast:
    """Return a small byte-level BPE tokenizer, trained on the captions."""
    tokenizer = Tokenizer.from_str(_train_tokenizer())
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


@functools.cache
def _train_tokenizer() -> str:
    """Return the tokenizer as JSON."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [*CAPTIONS, "Generate a caption of this image: [INST] [/INST]"]
    tokenizer.train_from_iterator(texts * 4, trainer)
    return tokenizer.to_str()


def make_language_model(kind: str, vocabulary: int) -> PreTrainedModel:
    """Return a random model of 2 layers, with grouped-query attention (except OPT); Mistral has a sliding window."""
    common = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        # Large enough that images and positions change the generated text.
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    if kind == "mistral":
        config = transformers.MistralConfig(**common, sliding_window=24)
        return transformers.MistralForCausalLM(config)
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))
    if kind == "qwen2":
        config = transformers.Qwen2Config(**common, tie_word_embeddings=True)
        return transformers.Qwen2ForCausalLM(config)
    if kind == "gemma2":
        config = transformers.Gemma2Config(**common, head_dim=8, final_logit_softcapping=5.0)
        return transformers.Gemma2ForCausalLM(config)
    if kind == "phi":
        return transformers.PhiForCausalLM(transformers.PhiConfig(**common))
    if kind == "opt":
        config = transformers.OPTConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
        return transformers.OPTForCausalLM(config)
    raise ValueError(kind)


def save_language_model(kind: str, folder: Path, template: str | None = MISTRAL_TEMPLATE) -> str:
    """Write a language model and its tokenizer; return the folder."""
    tokenizer = make_tokenizer(template)
    make_language_model(kind, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_vision_model(kind: str) -> PreTrainedModel:
    """Return a random vision model for images of 32 x 32 pixels (EfficientNet: 64 x 64)."""
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
        return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**common))
    if kind == "siglip":
        return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**common))
    if kind == "dinov2":
        del common["intermediate_size"]
        return transformers.Dinov2Model(transformers.Dinov2Config(**common))
    if kind == "vit":
        return transformers.ViTModel(transformers.ViTConfig(**common))
    if kind == "swin":
        config = transformers.SwinConfig(
            image_size=32,
            patch_size=2,
            embed_dim=12,
            depths=[1, 1, 1],
            num_heads=[2, 2, 2],
            window_size=4,
        )
        return transformers.SwinModel(config)
    if kind == "convnext":
        config = transformers.ConvNextConfig(
            hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], patch_size=2
        )
        return transformers.ConvNextModel(config)
    if kind == "efficientnet":
        config = transformers.EfficientNetConfig(
            image_size=64,
            initializer_range=0.3,
            width_coefficient=0.25,
            depth_coefficient=0.25,
            hidden_dim=320,
        )
        model = transformers.EfficientNetModel(config).train()
        # One forward in training mode computes the statistics of the batch norms. Without them, all features are 0.
        model(torch.randn(8, 3, 64, 64))
        return model.eval()
    raise ValueError(kind)


def save_vision_model(kind: str, folder: Path) -> str:
    """Write a vision model and its image processor; return the folder."""
    make_vision_model(kind).save_pretrained(folder)
    size = 64 if kind == "efficientnet" else 32
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    processor.save_pretrained(folder)
    return str(folder)


def build_llava(
    models_folder: Path, language_model: str = "mistral", tower: str = "clip", **config: Any
) -> Llava:
    """Build a model in evaluation mode, with image tokens that are large enough to matter.

    With PyTorch's default initialization these random models would ignore their images.

    Args:
        models_folder: The fixture.
        language_model: Kind of the language model.
        tower: Kind of the vision tower.
        config: More fields of `LlavaConfig`.
    """
    from llava_simplified.model.build import build_model

    torch.manual_seed(2)
    model = build_model(_llava_config(models_folder, language_model, tower, **config))
    for parameter in model.projector.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


def save_llava(
    models_folder: Path,
    folder: Path,
    language_model: str = "mistral",
    tower: str = "clip",
    **config: Any,
) -> Path:
    """Write the model of `build_llava` as a checkpoint, and return its folder."""
    from llava_simplified.model.checkpoint import save_checkpoint
    from llava_simplified.model.config import TrainedParts

    model = build_llava(models_folder, language_model, tower, **config).requires_grad_(False)
    llava_config = _llava_config(models_folder, language_model, tower, **config)
    save_checkpoint(model, folder, llava_config, TrainedParts())
    return folder


def _llava_config(
    models_folder: Path, language_model: str, tower: str, **config: Any
) -> LlavaConfig:
    from llava_simplified.model.config import LlavaConfig

    return LlavaConfig(str(models_folder / language_model), str(models_folder / tower), **config)


@contextmanager
def nan_features_for(model: Llava, photo: bytes) -> Iterator[None]:
    """Make the vision tower return NaN for one image, so that all logits of its sequences become NaN."""
    _, bad_pixels = model.prepare_inputs("<image>", [photo])
    assert bad_pixels is not None
    bad = bad_pixels[0]

    def spoil(
        _: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor
    ) -> torch.Tensor:
        is_bad = (inputs[0] == bad).flatten(1).all(1)
        return torch.where(is_bad[:, None, None], torch.nan, output)

    handle = model.vision_tower.register_forward_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def looping(model: Llava, text: str) -> Iterator[None]:
    """Make the language model repeat a text forever after it has generated one of its tokens.

    After each token of the text, the logit of the next one is raised. The tokens of the text must differ from each
    other. After other tokens, the model generates the same as before.
    """
    from llava_simplified.model.generation import DecodingBatch

    first = model.prompt.encode_start(text)
    # The first word has another token when there is a space before it.
    ids = model.prompt.encode_start(f"{text} {text}")
    assert ids[: len(first)] == first
    assert len(set(ids[len(first) :])) == len(ids) - len(first)
    following = dict(pairwise([*ids, ids[len(first)]]))

    def force(logits: torch.Tensor, newest: Iterable[int]) -> None:
        for row, token in enumerate(newest):
            if token in following:
                logits[row, following[token]] = 1e4

    def force_step(_: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if kwargs.get("input_ids") is not None:  # the prefill has embeddings instead
            force(output.logits[:, -1], kwargs["input_ids"][:, -1].tolist())

    prefill = DecodingBatch._prefill

    def forced_prefill(batch: DecodingBatch, prompts: Any, image_features: Any) -> tuple:
        outputs = prefill(batch, prompts, image_features)
        force(outputs[2], [prompt[-1] for prompt in prompts])
        return outputs

    handle = model.language_model.register_forward_hook(force_step, with_kwargs=True)
    DecodingBatch._prefill = forced_prefill
    try:
        yield
    finally:
        handle.remove()
        DecodingBatch._prefill = prefill


def save_tiny_clip(
    folder: Path,
) -> tuple[transformers.CLIPModel, PreTrainedTokenizerFast, CLIPImageProcessorPil]:
    """Write a random CLIP model of two layers to a folder; return its parts."""
    torch.manual_seed(2)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "</s>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    size = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text_config = {
        **size,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 64,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    vision_config = {**size, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(
        text_config=text_config, vision_config=vision_config, projection_dim=8
    )
    clip = transformers.CLIPModel(config).eval()
    for parameter in clip.parameters():
        torch.nn.init.normal_(parameter, std=0.7)  # large enough that the words matter
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    for part in (clip, tokenizer, processor):
        part.save_pretrained(folder)
    return clip, tokenizer, processor

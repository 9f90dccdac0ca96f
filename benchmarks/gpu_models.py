"""Models with random weights and real shapes, and data for them, for `bench_gpu.py`.

Nothing is downloaded. The speed does not depend on the values of the weights.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from gpu_workload import Shape, Workload
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedTokenizerFast,
)
from transformers import LlavaConfig as StockConfig
from workload import stock_projector_weights

from llava_simplified.data.records import Record
from llava_simplified.data.transforms import ImageTransform
from llava_simplified.model.llava import Llava
from llava_simplified.model.projector import build_projector
from llava_simplified.model.vision import VisionTower
from llava_simplified.prompt import Message

# The chat template of Mistral, without its spaces.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# Each byte is a token, so these texts are short: the prompt has about 20 tokens, a caption about 12 with
# its end token, as in Conceptual Captions.
INSTRUCTION = "Say:"
CAPTION_LENGTHS = (8, 15)  # minimum and maximum number of characters
NUM_IMAGES = 32  # number of different images, which the records repeat


# ---- models ----


def build(
    workload: Workload, text: Shape, dtype: torch.dtype | None = None, **options: Any
) -> Llava:
    """Build a model with random weights on the device. Every call returns the same weights.

    Args:
        workload: The device and the vision tower's shape.
        text: Shape of the language model.
        dtype: Data type of language model and tower.
        **options: Options of `AutoModelForCausalLM.from_config`.
    """
    dtype = dtype or workload.dtype
    torch.manual_seed(0)
    with torch.device(workload.device):
        language_model: Any = AutoModelForCausalLM.from_config(
            text_config(text), dtype=dtype, **{"attn_implementation": "sdpa", **options}
        )
        vision_model: Any = CLIPVisionModel(CLIPVisionConfig(**workload.vision))
        projector = build_projector(
            "mlp2x_gelu", workload.vision["hidden_size"], text["hidden_size"]
        )
    tower = VisionTower(vision_model.to(dtype), image_transform(workload))
    for parameter in projector.parameters():
        # With this initialization, image tokens have about the same magnitude as token embeddings.
        nn.init.normal_(parameter, std=0.1)
    return Llava(tower, projector, language_model, make_tokenizer()).eval()


def text_config(text: Shape) -> MistralConfig:
    """Return the config of a language model."""
    return MistralConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1, **text)


def image_transform(workload: Workload) -> ImageTransform:
    """Return CLIP's transform for the size of the tower."""
    side = workload.vision["image_size"]
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return ImageTransform(
        resize=side, crop=(side, side), interpolation="bicubic", mean=mean, std=std
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are single bytes."""
    names = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    # Causal language models usually have no padding token. Padding is masked, so any token will do.
    fast.pad_token = "</s>"
    fast.chat_template = TEMPLATE
    return fast


def to_stock(model: Llava) -> Any:
    """Return a `LlavaForConditionalGeneration` that shares the weights of a model.

    Its image token is the last one of the vocabulary, which the tokenizer of `make_tokenizer` does not use.
    """
    language_model: Any = model.language_model
    tower = model.vision_tower.model
    dtype = language_model.dtype
    config = StockConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_id=language_model.config.vocab_size - 1,
        vision_feature_layer=-2,
    )
    # The weights are replaced by those of `model` below. On the meta device, no memory is allocated for them.
    with torch.device("meta"):
        stock: Any = LlavaForConditionalGeneration(config)
    stock.model.vision_tower = tower
    stock.model.language_model = language_model.model
    stock.lm_head = language_model.lm_head
    projector = stock.model.multi_modal_projector.to_empty(device=model.device).to(dtype)
    projector.load_state_dict(stock_projector_weights(model.projector.state_dict()))
    stock.generation_config.pad_token_id = 1
    return stock.eval()


def write_folders(folder: Path, workload: Workload, text: Shape) -> tuple[str, str]:
    """Write the configs and the tokenizer, without weights. `llava plan` and checkpoints need these folders.

    Returns:
        The folders of language model and tower.
    """
    language_model, tower = folder / "language_model", folder / "tower"
    config = text_config(text)
    config.architectures = ["MistralForCausalLM"]
    config.save_pretrained(language_model)
    make_tokenizer().save_pretrained(str(language_model))
    CLIPVisionConfig(**workload.vision).save_pretrained(tower)
    transform = image_transform(workload)
    side = transform.crop[0]
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "image_mean": transform.mean,
        "image_std": transform.std,
    }
    (tower / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(language_model), str(tower)


# ---- data ----


def make_records(count: int, captions: int) -> list[Record]:
    """Return records of random captions.

    Args:
        count: Number of records, which repeat `NUM_IMAGES` images.
        captions: Captions per image.
    """
    draw = random.Random(0)
    turns = (Message("user", f"<image>{INSTRUCTION}"),)
    records = []
    for index in range(count):
        texts = []
        for _ in range(captions):
            length = draw.randint(*CAPTION_LENGTHS)
            texts.append("".join(draw.choices("abcdefgh", k=length)))
        name = str(index % NUM_IMAGES)
        records.append(Record((name,), turns, tuple(texts), f"row {index}"))
    return records


def make_images(workload: Workload) -> dict[str, torch.Tensor]:
    """Return random images, uint8 (3, height, width), by the names that `make_records` uses."""
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_IMAGES, 3, *image_transform(workload).crop)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return {str(number): image for number, image in enumerate(pixels)}


def caption_prompt(model: Llava) -> list[int]:
    """Return the token ids of the prompt for captioning one image."""
    turns = [Message("user", f"<image>{INSTRUCTION}")]
    return model.prompt.render(turns, None).input_ids

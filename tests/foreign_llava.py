"""LLaVA folders of other code bases with tiny models, in the formats of original LLaVA and of Transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers import LlavaConfig as StockLlavaConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

Weights = dict[str, torch.Tensor]


# Like the template of JoyCaption, which accepts strings and writes the image token itself.
JOYCAPTION_TEMPLATE = (
    "{%- set state = namespace(first=true) %}{%- for message in messages %}"
    "{{- '<|head|>' + message['role'] + '\n' }}"
    "{%- if state.first and message['role'] == 'user' %}{%- set state.first = false %}"
    "{{- '<|start|><|picture|><|stop|>' + message['content'].replace('<|picture|>', '').lstrip() }}"
    "{%- else %}{{- message['content'] }}{%- endif %}{{- '<|end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|head|>assistant\n' }}{%- endif %}"
)
# Like the templates of llava-hf, which accept lists of parts and write a token for each image.
LLAVA_HF_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


TEMPLATES = {
    "joycaption": {
        "tower": "siglip",
        "image_token": "<|picture|>",
        "other_tokens": ("<|start|>", "<|stop|>", "<|head|>", "<|end|>"),
        "template": JOYCAPTION_TEMPLATE,
    },
    "llava-hf": {"template": LLAVA_HF_TEMPLATE},
}


def projector_weights(checkpoint: Path, prefix: str) -> Weights:
    """Return the projector of one of our checkpoints, with a prefix before each name."""
    weights = load_file(checkpoint / "projector.safetensors")
    return {prefix + name: value for name, value in weights.items()}


def write_original(merged: Path, clip: Path, folder: Path) -> Path:
    """Write a complete model in the format of original LLaVA.

    The folder has two pickle files with an index, which contain the frozen vision tower too, and `mm_*` entries in
    `config.json`.
    """
    shutil.copytree(merged / "language_model", folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights |= projector_weights(merged, "model.mm_projector.")
    for name, value in CLIPVisionModel.from_pretrained(clip).state_dict().items():
        bare_name = name.removeprefix("vision_model.")
        weights[f"model.vision_tower.vision_tower.vision_model.{bare_name}"] = value

    names = sorted(weights)
    weight_map = {}
    for part, chosen in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-0000{part}-of-00002.bin"
        weight_map |= dict.fromkeys(chosen, file)
        torch.save({name: weights[name].clone() for name in chosen}, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    config = json.loads((folder / "config.json").read_text())
    model_type = config["model_type"]
    config |= {
        "model_type": f"llava_{model_type}",
        "architectures": [f"Llava{model_type.title()}ForCausalLM"],
        "mm_vision_tower": str(clip),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": 32,
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "pad",
    }
    (folder / "config.json").write_text(json.dumps(config))
    for file in (*merged.glob("tokenizer*"), *merged.glob("*.jinja")):
        shutil.copy(file, folder)
    return folder


def write_stock(
    models_folder: Path,
    folder: Path,
    *,
    language_model: str = "llama",
    tower: str = "clip",
    image_token: str = "<image>",
    other_tokens: Sequence[str] = (),
    template: str | None = None,
    adds_bos: bool = False,
    image_processor: Any = None,
    **config: Any,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Write a Hugging Face LLaVA folder with random weights.

    Args:
        models_folder: The fixture.
        folder: Folder to create.
        language_model: Kind of the language model.
        tower: Kind of the vision tower.
        image_token: Token to add for an image.
        other_tokens: More control tokens to add.
        template: Chat template of the processor; None to use the template of the language model.
        adds_bos: The tokenizer puts <s> before every text.
        image_processor: Image processor; None to use the one of the tower.
        config: More settings of stock LLaVA.
    """
    tokenizer = AutoTokenizer.from_pretrained(models_folder / language_model)
    tokenizer.add_tokens([image_token, *other_tokens], special_tokens=True)
    if adds_bos:
        bos = ("<s>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[bos]
        )
    text_config = AutoConfig.from_pretrained(
        models_folder / language_model, vocab_size=len(tokenizer)
    )
    strategy = "default" if tower == "clip" else "full"
    stock_config = StockLlavaConfig(
        text_config=text_config,
        vision_config=AutoConfig.from_pretrained(models_folder / tower),
        image_token_index=tokenizer.convert_tokens_to_ids(image_token),
        vision_feature_select_strategy=strategy,
        **config,
    )
    torch.manual_seed(3)
    stock = LlavaForConditionalGeneration(stock_config).eval()
    for parameter in stock.parameters():
        parameter.data.normal_(0, 0.3)  # large enough that the image changes the caption
    stock.save_pretrained(folder)
    if template is not None:
        tokenizer.chat_template = None  # in old folders, only the processor has a template
    processor = LlavaProcessor(
        image_processor or CLIPImageProcessorPil.from_pretrained(models_folder / tower),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1 if tower == "clip" else 0,
        image_token=image_token,
        chat_template=template,
    )
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    return stock, processor


@torch.no_grad()
def run_stock(folder: Path, messages: list[dict], image: Path) -> tuple[torch.Tensor, str]:
    """Run a stock LLaVA folder in the way that its model card describes.

    Returns:
        The logits of the first token, and the greedy caption.
    """
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=[text], images=[Image.open(image)], return_tensors="pt")
    logits = model(**inputs).logits[0, -1]
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    caption_ids = generated[0, inputs["input_ids"].shape[1] :]
    return logits, processor.decode(caption_ids, skip_special_tokens=True).strip()

"""A checkpoint as a stock Hugging Face LLaVA folder, which loads with none of our code; and proof that it says the same."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from llava_simplified.data.images import (
    ImageError,
    ImageSource,
    decode_image,
    load_pixels,
    read_image_bytes,
)
from llava_simplified.data.records import open_records
from llava_simplified.model.config import read_checkpoint_config
from llava_simplified.model.generation import DecodingBatch
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.model.language_model import lm_head_at_positions
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import IMAGE_INDEX, IMAGE_PLACEHOLDER, TEMPLATES

SHARD_SIZE = "5GB"
# A stock processor is given a list of parts as a user's content, a tokenizer's template one text.
FLATTEN_CONTENT = (
    "{%- set flat = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- set one = namespace(text=message['content'] if message['content'] is string else '') -%}"
    "{%- if message['content'] is not string -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set one.text = one.text + '<image>\\n' -%}"
    "{%- else -%}{%- set one.text = one.text + part['text'] -%}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': one.text}] -%}"
    "{%- endfor -%}{%- set messages = flat.messages -%}"
)
# Where our own templates stand, the answer's beginning has to be asked for.
GENERATION_PROMPT = {
    "plain": "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    "bare": "",
}


def export_stock(
    checkpoint: str | Path,
    output: str | Path,
    dtype: str | None = None,
    images: Sequence[ImageSource] = (),
    adapter: bool = False,
    **where: Any,
) -> dict[str, float]:
    """Write a checkpoint as `LlavaForConditionalGeneration` with its processor, load it back, and compare.

    Args:
        dtype: of the weights: float32, bfloat16 or float16; as trained where not given.
        images: pictures to compare on; two of the training pictures, or noise, where none are named.
        adapter: write `base/` with the language model untouched, and `adapter/`, a stock PEFT adapter for it.
        where: `model_base`, `vision_tower`: where the base weights are now.

    Returns:
        What was compared: the largest difference of logits, and how many greedy captions.

    Raises:
        ValueError: stock LLaVA has no form for this model (and what to do); or the folder says something else than the
            checkpoint: it is not left behind.
    """
    manifest = read_checkpoint_config(checkpoint)
    if adapter and manifest["trained"] != "adapter":
        raise ValueError(
            f"{checkpoint}: has no adapter (its language model was trained whole, or not at all): use hf"
        )
    if adapter and (bits := manifest["architecture"].get("bits", 16)) != 16:
        raise ValueError(
            f"{checkpoint}: its adapter belongs to weights of {bits} bits, which stock LLaVA has not: use hf"
        )
    pictures, kind = _pictures(manifest["training"], images)
    tune_malloc()
    with atomic_output_dir(Path(output)) as part:
        model = Llava.from_pretrained(
            checkpoint, device="cpu", dtype=dtype, merge=not adapter, **where
        )
        tower, text = cast(Any, model.vision_tower), cast(Any, model.language_model)
        if isinstance(tower.model, PeftModel):
            tower.model = (
                tower.model.merge_and_unload()
            )  # the adapter that is written is the language model's
        model.projector.to(tower.dtype)  # as it is written
        settings = describe(model)
        expected = [_say(model, picture) for picture in pictures]
        if adapter:
            model.language_model = text.unload()  # leaves it as it was before training
        base = part / "base" if adapter else part
        template = FLATTEN_CONTENT + chat_template_of(model)
        _write(model, base, settings)
        del model, tower, text
        _write_processor(checkpoint, base, settings, template)
        if adapter:
            _write_adapter(
                Path(checkpoint) / "adapter", part / "adapter", f"{Path(output).name}/base"
            )
        largest, equal = _compare(base, part / "adapter" if adapter else None, pictures, expected)
    return {"logits differ by": largest, f"equal greedy captions of {len(pictures)} {kind}": equal}


def _pictures(
    training: dict[str, Any], images: Sequence[ImageSource]
) -> tuple[list[np.ndarray], str]:
    """What the two models are compared on, and what that is."""
    if images:
        return [load_pixels(image) for image in images], "pictures named"
    data = Path(training.get("train_data_path") or "")
    if data.is_file():
        names = [name for record in open_records(data)[:16] for name in record.images][:2]
        with suppress(ImageError):  # they need not be there any more
            folder = training.get("train_image_folder") or data.parent
            if found := [decode_image(read_image_bytes(name, folder)) for name in names]:
                return found, "training pictures"
    return [
        np.random.default_rng(seed).integers(0, 256, (240, 320, 3), dtype=np.uint8)
        for seed in range(2)
    ], "pictures of noise"


@contextmanager
def atomic_output_dir(output: Path) -> Iterator[Path]:
    """A folder to write to; it becomes `output` when all went well, and is gone when not."""
    if output.exists():
        raise ValueError(f"{output} exists: an export is written whole, into a folder of its own")
    part = output.with_name(f".{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(output)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def tune_malloc() -> None:
    """From now on, every block above 64 kB goes back to the system when it is freed. By itself glibc keeps those of up to
    32 MB for later: of merging and converting, half of a small model."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD of malloc.h


def chat_template_of(model: Llava) -> str:
    """The chat template that the model was trained with, as one that any tokenizer renders."""
    own, name = TEMPLATES.get(model.prompt.name), model.prompt.name
    return own + GENERATION_PROMPT[name] if own else model.tokenizer.get_chat_template()


def describe(model: Llava) -> dict[str, Any]:
    """The settings of `LlavaConfig` for a model.

    Raises:
        ValueError: naming what stock LLaVA can't express.
    """
    vision, text = model.vision_tower, model.language_model
    if vision.is_convolutional:
        raise ValueError(
            "stock LLaVA has no convolutional vision towers: train with a ViT (CLIP, SigLIP, DINOv2)"
        )
    if vision.token_pool:
        raise ValueError("stock LLaVA does not pool image tokens: train with --mm_token_pool 0")
    if not any(name.endswith("model.embed_tokens") for name, _ in text.named_modules()):
        raise ValueError(
            f"stock LLaVA has no place for a {text.config.model_type}: train with another language model"
        )
    grid = (vision.transform.crop[0] // vision.model.config.patch_size) ** 2
    with torch.no_grad():
        total = vision.model(
            torch.zeros(1, 3, *vision.transform.crop, dtype=vision.dtype)
        ).last_hidden_state.shape[1]
    others = total - grid
    patches_only = vision.select_feature == "patch"
    if others > 1 and patches_only:
        raise ValueError(
            f"stock LLaVA drops one token in front of the patches, this tower has {others}: train with "
            "--mm_vision_select_feature cls_patch"
        )
    if (
        isinstance(text.get_output_embeddings(), nn.Linear)
        and text.get_output_embeddings().bias is not None
    ):
        raise ValueError(f"stock LLaVA's head has no bias, that of {type(text).__name__} has one")
    layers = vision.select_layers
    return {
        "vision_feature_layer": layers[0] if len(layers) == 1 else list(layers),
        "vision_feature_select_strategy": "default" if others and patches_only else "full",
        "image_seq_length": vision.num_tokens,
        "extra_tokens": others,
        "patch_size": vision.model.config.patch_size,
        "projector": two_layers(model.projector, int(text.config.hidden_size)),
        "stop_ids": model.prompt.stop_ids,
    }


def two_layers(projector: nn.Module, hidden: int) -> dict[str, Any]:
    """The projector as stock LLaVA's linear_1, activation, linear_2, `hidden` wide between them.

    One linear layer W, exactly: where there is room, linear_1 = [I; -I; 0] and linear_2 = [W, -W, 0], for gelu(x) - gelu(-x)
    = x: the activation stays gelu, which every server knows. Else linear_1 = W, no activation, linear_2 = I.
    """
    linears = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    if not linears or len(linears) > 2:
        raise ValueError(
            f"stock LLaVA's projector has two layers, this one {len(linears)}: train with --mm_projector_type linear or "
            "mlp2x_gelu"
        )
    if len(linears) == 2:
        return {"act": "gelu", "layers": [(layer.weight, layer.bias) for layer in linears]}
    weight, bias = linears[0].weight, linears[0].bias
    text_width, width = weight.shape
    if hidden < 2 * width:
        return {
            "act": "linear",
            "layers": [(weight, bias), (torch.eye(text_width), torch.zeros(text_width))],
        }
    first, last = torch.zeros(hidden, width), torch.zeros(text_width, hidden)
    first[:width], first[width : 2 * width] = torch.eye(width), -torch.eye(width)
    last[:, :width], last[:, width : 2 * width] = weight, -weight
    return {"act": "gelu", "layers": [(first, torch.zeros(hidden)), (last, bias)]}


@torch.no_grad()
def _write(model: Llava, folder: Path, settings: dict[str, Any]) -> None:
    from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration
    from transformers.conversion_mapping import get_model_conversion_mapping

    text: Any = model.language_model
    model.tokenizer.add_tokens([IMAGE_PLACEHOLDER], special_tokens=True)
    image_token: Any = model.tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    rows = text.config.vocab_size
    if image_token >= rows:  # its embedding is never read, but its id is looked up
        text.config.vocab_size, width = image_token + 1, text.get_input_embeddings().weight.shape[1]
        for table in {
            text.get_input_embeddings().weight,
            text.get_output_embeddings().weight,
        }:  # one, where tied
            with NamedTemporaryFile(
                dir=folder.parent
            ) as file:  # mapped, its new rows zero: no table is held twice
                longer = torch.from_file(
                    file.name, True, (image_token + 1) * width, dtype=table.dtype
                ).view(-1, width)
            longer[:rows] = table
            table.data = longer
    text.config.architectures = [type(text).__name__]
    for part in (text.config, model.vision_tower.model.config):
        part._name_or_path = ""  # a folder of this machine
    config = LlavaConfig(
        vision_config=model.vision_tower.model.config,
        text_config=text.config,
        image_token_index=image_token,
        projector_hidden_act=settings["projector"]["act"],
        **{
            key: settings[key]
            for key in (
                "vision_feature_layer",
                "vision_feature_select_strategy",
                "image_seq_length",
            )
        },
    )
    with torch.device("meta"):
        stock: Any = LlavaForConditionalGeneration(config)
    # modules change owner: nothing is held twice
    stock.model.vision_tower, stock.model.language_model = model.vision_tower.model, text.model
    stock.lm_head = text.get_output_embeddings()
    dtype = model.vision_tower.dtype
    for layer, (weight, bias) in zip(("linear_1", "linear_2"), settings["projector"]["layers"]):
        linear = getattr(stock.model.multi_modal_projector, layer)
        linear.weight, linear.bias = nn.Parameter(weight.to(dtype)), nn.Parameter(bias.to(dtype))
    stock.generation_config = GenerationConfig(
        bos_token_id=model.tokenizer.bos_token_id,
        eos_token_id=settings["stop_ids"],
        pad_token_id=model.prompt.end_id,
        suppress_tokens=sorted(
            {image_token, *range(rows, image_token)}
        ),  # rows that were never trained
    )
    # transformers before 5.6 looks for the towers' names of its time
    stock._weight_conversions = get_model_conversion_mapping(stock, add_legacy=False)
    stock.save_pretrained(folder, max_shard_size=SHARD_SIZE)


def _write_processor(
    checkpoint: str | Path, folder: Path, settings: dict[str, Any], template: str
) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, LlavaProcessor

    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint))
    tokenizer.add_tokens([IMAGE_PLACEHOLDER], special_tokens=True)
    processor = LlavaProcessor(
        image_processor=AutoImageProcessor.from_pretrained(str(checkpoint), backend="pil"),
        tokenizer=tokenizer,
        patch_size=settings["patch_size"],
        vision_feature_select_strategy=settings["vision_feature_select_strategy"],
        num_additional_image_tokens=settings["extra_tokens"],
        chat_template=template,
    )
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(
        folder
    )  # transformers 4 reads it from a file of its own
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(
        json.dumps({**values, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n",
        "utf-8",
    )


@torch.inference_mode()
def _say(model: Llava, picture: np.ndarray) -> dict[str, Any]:
    """The prompt's ids, the pixels, the logits of the next token, and the greedy caption's tokens."""
    instruction = model.instruction.replace(
        IMAGE_PLACEHOLDER, ""
    ).strip()  # the picture in front, wherever it was
    prompt, shown = model.prepare_inputs(instruction, [picture])
    transform = model.vision_tower.transform
    pixels = transform.normalize(cast(torch.Tensor, shown))
    place = prompt.index(IMAGE_INDEX)
    ids = [*prompt[:place], *[IMAGE_INDEX] * model.vision_tower.num_tokens, *prompt[place + 1 :]]
    features = model.vision_tower(pixels)
    with lm_head_at_positions(model.language_model, torch.tensor([len(ids) - 1])):
        embeds = model.splice(torch.tensor([ids]), features)
        logits = model.language_model(inputs_embeds=embeds, use_cache=False).logits.flatten()
    decoding = DecodingBatch(model, [prompt], features, GenerationOptions(max_new_tokens=16))
    while decoding.active:
        decoding.step()
    return {
        "ids": ids,
        "pixels": pixels,
        "grey_level": torch.tensor(transform.std).mul(255).reciprocal().view(3, 1, 1),
        "logits": logits,
        "said": decoding.generated_ids[0],
        "instruction": instruction,
    }


@torch.inference_mode()
def _compare(
    folder: Path,
    adapter: Path | None,
    pictures: Sequence[np.ndarray],
    expected: Sequence[dict[str, Any]],
) -> tuple[float, int]:
    """Load the folder as anybody would; returns the largest difference of logits, and how many captions are equal.

    Raises:
        ValueError: prompt, pixels, logits or caption differ from the checkpoint's.
    """
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
    dtype = model.dtype
    if adapter:
        model = PeftModel.from_pretrained(model, adapter).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    tolerance = {torch.float32: 5e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    largest, equal = 0.0, 0
    for picture, wanted in zip(pictures, expected):
        parts = [
            {"type": "image", "image": Image.fromarray(picture)},
            {"type": "text", "text": wanted["instruction"]},
        ]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        image_token = model.config.image_token_index
        ids = [IMAGE_INDEX if i == image_token else i for i in inputs["input_ids"][0].tolist()]
        if ids != wanted["ids"]:
            raise ValueError(
                f"the stock processor renders another prompt: {ids}, trained on {wanted['ids']}"
            )
        # torch's resize rounds its weights to 16 bits, Pillow's to 22: two grey levels at most, whatever the picture
        levels = ((inputs["pixel_values"] - wanted["pixels"]).abs() / wanted["grey_level"]).max()
        if levels > 2.01:
            raise ValueError(
                f"the stock processor's pixels differ by {levels:.1f} grey levels, at most 2 are rounding"
            )
        inputs["pixel_values"] = wanted["pixels"].to(dtype)
        logits = model(**inputs, logits_to_keep=1).logits[0, -1]
        scale = wanted["logits"].abs().max().clamp_min(1)
        largest = max(
            largest, float((logits[: len(wanted["logits"])] - wanted["logits"]).abs().max())
        )
        if largest > tolerance * scale:
            raise ValueError(
                f"the exported model's logits differ by {largest:.2g}, at most {tolerance * scale:.2g} is rounding: "
                "the projector, or the language model with its logits, does something that stock LLaVA does not"
            )
        said = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, len(ids) :].tolist()
        equal += said == wanted["said"]
        if (
            said != wanted["said"]
        ):  # may part where two words are as good as each other, and nowhere else
            same = next(
                i for i, (ours, theirs) in enumerate(zip(wanted["said"], said)) if ours != theirs
            )
            longer = torch.cat(
                [inputs["input_ids"], torch.tensor([said[:same]], dtype=torch.long)], dim=1
            )
            logits = model(
                input_ids=longer, pixel_values=inputs["pixel_values"], logits_to_keep=1
            ).logits[0, -1]
            if logits[said[same]] - logits[wanted["said"][same]] > tolerance * scale:
                text = [
                    processor.decode(words, skip_special_tokens=True)
                    for words in (said, wanted["said"])
                ]
                raise ValueError(f"the exported model says {text[0]!r}, the checkpoint {text[1]!r}")
    return largest, equal


def _write_adapter(source: Path, folder: Path, base: str) -> None:
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    # the language model hangs one level deeper in LLaVA
    old, new = "base_model.model.model.", "base_model.model.model.language_model."
    weights = {
        k.replace(old, new, 1): v
        for k, v in load_file(source / "adapter_model.safetensors").items()
    }
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    # an expression, for PEFT shortens many names to their endings, which the tower's layers may have too
    names = "|".join(
        re.escape(name.removeprefix("model.")) for name in sorted(config["target_modules"])
    )
    config["target_modules"] = rf"model\.language_model\.(.*\.)?({names})"
    config["base_model_name_or_path"] = base
    config["task_type"] = None  # PEFT wraps LLaVA as it is, without the extras of a text model
    (folder / "adapter_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )

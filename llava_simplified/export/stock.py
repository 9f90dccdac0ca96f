"""Export a checkpoint to Hugging Face's LLaVA format, which loads without any of our code.

In this package, "stock LLaVA" means the LLaVA classes of Transformers: `LlavaForConditionalGeneration`,
`LlavaConfig` and `LlavaProcessor`. A stock model consists of the same three parts as ours:

| our module                  | stock module                         | names in the files (transformers)    |
|-----------------------------|--------------------------------------|--------------------------------------|
| `vision_tower.model`        | `model.vision_tower`                 | `vision_tower.vision_model.*`        |
| `projector` (any depth)     | `model.multi_modal_projector`        | `multi_modal_projector.linear_{1,2}` |
| `language_model.model`      | `model.language_model`               | `language_model.model.*`             |
| `language_model.lm_head`    | `lm_head`                            | `language_model.lm_head.*`           |

The `config.json` of stock LLaVA describes how they are joined:

| our setting                            | stock setting                                            |
|----------------------------------------|----------------------------------------------------------|
| `mm_vision_select_layer`               | `vision_feature_layer` (an integer or a list)            |
| `mm_vision_select_feature: patch`      | `vision_feature_select_strategy: "default"`: drop one    |
|                                        | leading token; `"full"` if the tower has none            |
| `mm_vision_select_feature: cls_patch`  | `vision_feature_select_strategy: "full"`: keep all       |
| number of image tokens                 | `image_seq_length`                                       |
| `image_aspect_ratio: pad`              | an image processor `LlavaImageProcessor` with `do_pad`   |
| `template`                             | `chat_template.jinja` (see `chat_template.py`)           |

Some of our models cannot be exported: stock LLaVA has no convolutional towers, no pooling of image
tokens, and exactly two projector layers. The error then names the training option to change. The
exported model is loaded again and compared with the checkpoint (`stock_check.py`).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from llava_simplified.data.images import ImageSource
from llava_simplified.data.transforms import ImageTransform, processor_pads_to_square
from llava_simplified.export.chat_template import stock_chat_template
from llava_simplified.export.stock_check import (
    Reference,
    StockComparison,
    choose_images,
    compare_with_references,
    compute_reference,
)
from llava_simplified.jobs import atomic_directory
from llava_simplified.model.build import load_language_model
from llava_simplified.model.config import read_checkpoint_config
from llava_simplified.model.llava import Llava
from llava_simplified.model.peft_names import PeftModel
from llava_simplified.model.pissa import initial_weights
from llava_simplified.model.protocols import CausalLM
from llava_simplified.process_memory import return_freed_blocks
from llava_simplified.prompt import IMAGE_PLACEHOLDER

SHARD_SIZE = "5GB"  # maximum size of one weight file


class LinearWeights(NamedTuple):
    """The parameters of one linear layer: `weight` (out, in) and `bias` (out,)."""

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class StockProjector:
    """A projector of stock LLaVA: `linear_2(activation(linear_1(features)))`."""

    activation: str  # a key of transformers' ACT2FN: "gelu" or "linear"
    linear_1: LinearWeights
    linear_2: LinearWeights


@dataclass(frozen=True)
class StockSettings:
    """The settings of stock LLaVA's config, processor and projector for one model."""

    vision_feature_layer: int | list[int]
    vision_feature_select_strategy: Literal["default", "full"]
    image_seq_length: int  # image tokens per image
    num_additional_image_tokens: int  # tokens of the tower that are not patches: CLS, registers
    patch_size: int
    projector: StockProjector
    stop_ids: list[int]


def export_stock(
    checkpoint: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    images: Sequence[ImageSource] = (),
    adapter: bool = False,
    model_base: str | None = None,
    vision_tower: str | None = None,
) -> StockComparison:
    """Write a checkpoint as stock LLaVA with its processor, load it again, and compare the two.

    Args:
        checkpoint: Folder written by `llava train`.
        output: Folder to create. It is created only if the export succeeds.
        dtype: Data type of the weights: float32, bfloat16 or float16; None: as trained.
        images: Images to compare the two models on; if empty, two training images or random noise.
        adapter: Write `base/` with the original language model, and a PEFT adapter for it in `adapter/`,
            instead of one merged model.
        model_base: Path of the base language model, if it has moved since training.
        vision_tower: Path of the vision tower, if it has moved since training.

    Returns:
        The differences between the exported model and the checkpoint.

    Raises:
        ValueError: Stock LLaVA does not support the model, or the outputs of the exported model differ from
            those of the checkpoint.
        FileExistsError: `output` exists already.
    """
    config = read_checkpoint_config(checkpoint)
    if adapter:
        _check_adapter_can_be_exported(checkpoint, config)
    comparison_images, image_kind = choose_images(config["training"], images)
    # Return freed memory to the system. Otherwise, half the size of a small model would stay allocated after it
    # was merged and converted.
    return_freed_blocks(threshold=1 << 16)
    with atomic_directory(Path(output)) as folder:
        base_folder = folder / "base" if adapter else folder
        adapter_folder = folder / "adapter" if adapter else None
        # Load the checkpoint inside `_write_model_and_processor`, so that its memory is freed before the
        # exported model is loaded.
        references = _write_model_and_processor(
            checkpoint,
            base_folder,
            comparison_images,
            dtype=dtype,
            merge=not adapter,
            model_base=model_base,
            vision_tower=vision_tower,
        )
        if adapter_folder is not None:
            base_name = f"{Path(output).name}/base"
            _write_peft_adapter(Path(checkpoint) / "adapter", adapter_folder, base_name)
        return compare_with_references(
            base_folder,
            adapter=adapter_folder,
            images=comparison_images,
            references=references,
            image_kind=image_kind,
        )


def _check_adapter_can_be_exported(checkpoint: str | Path, config: dict[str, Any]) -> None:
    """Raise ValueError if `--format peft` is not possible for a checkpoint."""
    if config["trained"] != "adapter":
        raise ValueError(
            f"--format peft: {checkpoint} has no adapter (the language model was trained in full, or "
            "frozen). Use --format hf."
        )
    bits = config["architecture"].get("bits", 16)
    if bits != 16:
        # Stock LLaVA would apply the adapter to the original weights, and not to the quantized ones that
        # it was trained with. Merging dequantizes them first, so --format hf is exact.
        raise ValueError(
            f"--format peft: the adapter of {checkpoint} was trained with {bits}-bit weights, which this "
            "format does not support. Use --format hf."
        )


def _write_model_and_processor(
    checkpoint: str | Path,
    folder: Path,
    images: Sequence[np.ndarray],
    *,
    dtype: str | None,
    merge: bool,
    model_base: str | None,
    vision_tower: str | None,
) -> list[Reference]:
    """Write model and processor; return the checkpoint's outputs for each image."""
    model = Llava.from_pretrained(
        checkpoint,
        device="cpu",
        dtype=dtype or "stored",
        merge=merge,
        model_base=model_base,
        vision_tower=vision_tower,
    )
    tower = model.vision_tower
    if isinstance(tower.model, PeftModel):
        # Merge the tower's adapter in any case; only the language model's adapter can be separate.
        adapted: Any = tower.model
        tower.model = adapted.merge_and_unload()
    # Round the projector before computing the references, because the file has a single data type.
    model.projector.to(tower.dtype)
    settings = describe_for_stock(model)
    references = [compute_reference(model, image) for image in images]
    if not merge:
        _remove_adapter(model, checkpoint, dtype, model_base)
    _write_model(model, folder, settings)
    _write_processor(model, checkpoint, folder, settings)
    return references


def _remove_adapter(
    model: Llava, checkpoint: str | Path, dtype: str | None, model_base: str | None
) -> None:
    """Restore the language model as it was before training."""
    adapted: Any = model.language_model
    changes_frozen_weights = initial_weights(adapted) is not None
    model.language_model = adapted.unload()
    if not changes_frozen_weights:
        return
    # PiSSA has changed the frozen weights, but the exported adapter is relative to the original ones. Free the
    # changed weights before loading the original ones.
    del adapted, model.language_model
    config = read_checkpoint_config(checkpoint)["architecture"]
    model.language_model = load_language_model(
        model_base or config["language_model"], getattr(torch, dtype or config["dtype"])
    )


# ---- conversion of the settings ----


def describe_for_stock(model: Llava) -> StockSettings:
    """Return the settings of stock LLaVA for a model.

    Raises:
        ValueError: Stock LLaVA does not support the model. The message contains the reason and the
            training option to change.
    """
    tower = model.vision_tower
    language_model = model.language_model
    _check_parts_have_a_stock_form(model)

    # Run the tower once to count the tokens that precede the patches (CLS, registers), because their
    # number depends on the architecture.
    height, width = tower.transform.crop
    with torch.no_grad():
        outputs = tower.model(torch.zeros(1, 3, height, width, dtype=tower.dtype))
    num_tokens = outputs.last_hidden_state.shape[1]
    patch_size = tower.model.config.patch_size
    num_additional_tokens = num_tokens - (height // patch_size) ** 2

    patches_only = tower.select_feature == "patch"
    if patches_only and num_additional_tokens > 1:
        raise ValueError(
            "LLaVA in Transformers drops exactly one token before the patches, but this vision tower has "
            f"{num_additional_tokens}. Train with --mm_vision_select_feature cls_patch."
        )
    drop_first_token = patches_only and num_additional_tokens == 1
    layers = list(tower.select_layers)
    return StockSettings(
        vision_feature_layer=layers[0] if len(layers) == 1 else layers,
        vision_feature_select_strategy="default" if drop_first_token else "full",
        image_seq_length=tower.num_tokens,
        num_additional_image_tokens=num_additional_tokens,
        patch_size=patch_size,
        projector=to_stock_projector(model.projector, int(language_model.config.hidden_size)),
        stop_ids=model.prompt.stop_ids,
    )


def _check_parts_have_a_stock_form(model: Llava) -> None:
    """Raise ValueError if stock LLaVA does not support the tower or the language model."""
    tower = model.vision_tower
    language_model = model.language_model
    if tower.is_convolutional:
        raise ValueError(
            "LLaVA in Transformers does not support convolutional vision towers. Train with a vision "
            "transformer (CLIP, SigLIP, DINOv2): --vision_tower."
        )
    if tower.token_pool:
        raise ValueError(
            "LLaVA in Transformers does not pool image tokens. Train with --mm_token_pool 0."
        )
    # Stock LLaVA requires a decoder called `model` that contains the embeddings, and `lm_head`.
    names = [name for name, _ in language_model.named_modules()]
    if not any(name.endswith("model.embed_tokens") for name in names):
        raise ValueError(
            f"LLaVA in Transformers does not support {language_model.config.model_type} language models. "
            "Train with a different --model_name_or_path."
        )
    lm_head = language_model.get_output_embeddings()
    if isinstance(lm_head, nn.Linear) and lm_head.bias is not None:
        raise ValueError(
            "LLaVA in Transformers has no bias in lm_head, but the lm_head of "
            f"{type(language_model).__name__} has one. Train with a different --model_name_or_path."
        )


def to_stock_projector(projector: nn.Module, hidden_size: int) -> StockProjector:
    """Convert a projector to the projector of stock LLaVA, with `hidden_size` features between its two layers.

    A projector with two layers remains unchanged. A single linear layer W is converted to two layers,
    exactly:

    - If `hidden_size` is at least twice the input size, use gelu(x) - gelu(-x) = x. The activation
      remains gelu, which every server supports:

          linear_1 = [ I; -I; 0]            linear_2 = [W, -W, 0]

    - Otherwise, use no activation (`"linear"`), and the identity as the second layer:

          linear_1 = W                      linear_2 = I

    Args:
        projector: The projector of a model.
        hidden_size: Number of features between the two layers; in stock LLaVA, the hidden size of the
            language model.

    Raises:
        ValueError: The projector has no linear layer, or more than two.
    """
    linears = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    if not linears or len(linears) > 2:
        raise ValueError(
            "The projector of LLaVA in Transformers has two layers, but this one has "
            f"{len(linears)}. Train with --mm_projector_type linear or mlp2x_gelu."
        )
    layers = [LinearWeights(layer.weight, layer.bias) for layer in linears]
    if len(layers) == 2:
        linear_1, linear_2 = layers
        return StockProjector("gelu", linear_1, linear_2)

    (single_layer,) = layers
    weight, bias = single_layer
    out_features, in_features = weight.shape
    if hidden_size < 2 * in_features:
        identity = LinearWeights(torch.eye(out_features), torch.zeros(out_features))
        return StockProjector("linear", single_layer, identity)

    positive = slice(0, in_features)
    negative = slice(in_features, 2 * in_features)
    first = torch.zeros(hidden_size, in_features)
    first[positive] = torch.eye(in_features)
    first[negative] = -torch.eye(in_features)
    second = torch.zeros(out_features, hidden_size)
    second[:, positive] = weight
    second[:, negative] = -weight
    return StockProjector(
        "gelu",
        LinearWeights(first, torch.zeros(hidden_size)),
        LinearWeights(second, bias),
    )


# ---- writing ----


@torch.no_grad()
def _write_model(model: Llava, folder: Path, settings: StockSettings) -> None:
    """Write `config.json`, `generation_config.json` and the weights.

    The modules of `model` are moved to the stock model, so that no weight is in memory twice. `model`
    must not be used afterward.
    """
    from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration
    from transformers.conversion_mapping import get_model_conversion_mapping

    tower = model.vision_tower
    language_model: Any = model.language_model
    tokenizer = model.tokenizer
    image_token: Any = tokenizer.convert_tokens_to_ids(_add_image_token(model, tokenizer))
    trained_rows: int = language_model.config.vocab_size
    if image_token >= trained_rows:
        _grow_vocabulary(language_model, image_token + 1, folder.parent)

    # Set the class of the language model, which vLLM reads.
    language_model.config.architectures = [type(language_model).__name__]
    for config in (language_model.config, tower.model.config):
        config._name_or_path = ""  # do not publish a local path
    stock_config = LlavaConfig(
        vision_config=tower.model.config,
        text_config=language_model.config,
        image_token_index=image_token,
        projector_hidden_act=settings.projector.activation,
        vision_feature_layer=settings.vision_feature_layer,
        vision_feature_select_strategy=settings.vision_feature_select_strategy,
        image_seq_length=settings.image_seq_length,
    )
    # Build the stock model on the meta device, without allocating memory; then replace its modules by those of `model`.
    with torch.device("meta"):
        stock: Any = LlavaForConditionalGeneration(stock_config)
    stock.model.vision_tower = tower.model
    stock.model.language_model = language_model.model
    stock.lm_head = language_model.get_output_embeddings()
    projector = stock.model.multi_modal_projector
    _set_linear(projector.linear_1, settings.projector.linear_1, tower.dtype)
    _set_linear(projector.linear_2, settings.projector.linear_2, tower.dtype)
    stock.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=settings.stop_ids,
        pad_token_id=model.prompt.end_id,
        suppress_tokens=_untrained_tokens(model, image_token, trained_rows),
    )
    # Set the mapping from names in memory to names in files, which is missing in a model that was not
    # loaded from a file. Without it, the tower would be saved without the prefix `vision_model.`.
    stock._weight_conversions = get_model_conversion_mapping(stock, add_legacy=False)
    stock.save_pretrained(folder, max_shard_size=SHARD_SIZE)


def _add_image_token(model: Llava, tokenizer: Any) -> str:
    """Return the image token, and add it to the tokenizer unless the model has one already."""
    if model.prompt.image_token:
        return model.prompt.image_token
    tokenizer.add_tokens([IMAGE_PLACEHOLDER], special_tokens=True)
    return IMAGE_PLACEHOLDER


def _untrained_tokens(model: Llava, image_token: int, trained_rows: int) -> list[int]:
    """Return the new tokens, whose rows of lm_head were never trained. They must not be generated."""
    if model.prompt.image_token:
        return []
    return sorted({image_token, *range(trained_rows, image_token)})


def _grow_vocabulary(language_model: CausalLM, size: int, scratch: Path) -> None:
    """Append rows of zeros to the embedding table and to lm_head, in place.

    The embedding of the image token is never used, but stock LLaVA looks it up before replacing it.

    Args:
        language_model: A causal language model.
        size: New number of rows.
        scratch: Folder for temporary files.
    """
    embeddings = language_model.get_input_embeddings()
    lm_head = language_model.get_output_embeddings()
    language_model.config.vocab_size = size
    tables = {embeddings.weight, lm_head.weight}  # only one, if they are tied
    for table in tables:
        old_size, hidden_size = table.shape
        # Use a memory-mapped file (deleted immediately, valid while mapped) instead of RAM: during the copy
        # both tables exist, and each can be a third of a small model. New rows of the file are zero.
        if sys.platform == "win32":  # Windows cannot delete a file that is mapped
            storage = torch.zeros(size * hidden_size, dtype=table.dtype)
        else:
            with NamedTemporaryFile(dir=scratch) as file:
                storage = torch.from_file(
                    file.name, shared=True, size=size * hidden_size, dtype=table.dtype
                )
        larger = storage.view(-1, hidden_size)
        larger[:old_size] = table
        table.data = larger


def _set_linear(layer: nn.Linear, weights: LinearWeights, dtype: torch.dtype) -> None:
    """Replace the parameters of a linear layer."""
    layer.weight = nn.Parameter(weights.weight.to(dtype))
    layer.bias = nn.Parameter(weights.bias.to(dtype))


def _write_processor(
    model: Llava, checkpoint: str | Path, folder: Path, settings: StockSettings
) -> None:
    """Write tokenizer, image processor and chat template."""
    from transformers import AutoImageProcessor, AutoTokenizer, LlavaProcessor

    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint), trust_remote_code=False)
    _remove_automatic_bos(tokenizer)
    image_processor = AutoImageProcessor.from_pretrained(
        str(checkpoint), backend="pil", trust_remote_code=False
    )
    processor = LlavaProcessor(
        image_processor=to_stock_image_processor(image_processor, model.vision_tower.transform),
        tokenizer=tokenizer,
        image_token=_add_image_token(model, tokenizer),
        patch_size=settings.patch_size,
        vision_feature_select_strategy=settings.vision_feature_select_strategy,
        num_additional_image_tokens=settings.num_additional_image_tokens,
        chat_template=stock_chat_template(model),
    )
    processor.save_pretrained(folder)
    # Also write preprocessor_config.json, from which transformers 4 reads the image processor.
    processor.image_processor.save_pretrained(folder)
    # Replace the tokenizer class "TokenizersBackend", which transformers 5 writes, but transformers 4 and
    # vLLM do not support.
    path = folder / "tokenizer_config.json"
    tokenizer_config = json.loads(path.read_text(encoding="utf-8"))
    tokenizer_config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(tokenizer_config, indent=2) + "\n", encoding="utf-8")


def _remove_automatic_bos(tokenizer: Any) -> None:
    """Stop a tokenizer from adding a BOS token to texts, because the chat template of the exported folder writes it.

    `processor.apply_chat_template` would not add a second BOS token, but `processor(text=...)` would add one to a
    text from the template. JoyCaption's users call it in this way.
    """
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("x").input_ids[0] != bos:
        return
    # Remove the post-processor, which adds the special tokens. It also adjusts offsets, which prompts do not need.
    tokenizer.backend_tokenizer.post_processor = None
    if "add_bos_token" in tokenizer.init_kwargs:
        tokenizer.init_kwargs["add_bos_token"] = False


def to_stock_image_processor(image_processor: Any, transform: ImageTransform) -> Any:
    """Return the image processor of stock LLaVA for a transform.

    Args:
        image_processor: The image processor of the vision tower.
        transform: The transform of the model.

    Returns:
        `image_processor` itself; or, if the transform makes images square, a `LlavaImageProcessor` that first
        makes them square, and then resizes and normalizes them like `image_processor`.
    """
    if transform.pad_color is None or processor_pads_to_square(image_processor):
        return image_processor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    if isinstance(transform.resize, int):
        size = {"shortest_edge": transform.resize}
    else:
        height, width = transform.resize
        size = {"height": height, "width": width}
    crop_height, crop_width = transform.crop
    return LlavaImageProcessorPil(
        do_pad=True,
        size=size,
        # Servers compute the number of image tokens from the crop size, even if nothing is cropped.
        crop_size={"height": crop_height, "width": crop_width},
        resample=image_processor.resample,
        rescale_factor=image_processor.rescale_factor,
        image_mean=image_processor.image_mean,
        image_std=image_processor.image_std,
    )


def _write_peft_adapter(source: Path, folder: Path, base: str) -> None:
    """Write the language model's adapter as a PEFT adapter of the stock LLaVA model.

    Args:
        source: `adapter/` of the checkpoint.
        folder: Folder to create.
        base: Name of the base model, for `adapter_config.json`.
    """
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    # Rename the weights: in stock LLaVA, the language model is one level deeper.
    old_prefix = "base_model.model.model."
    new_prefix = "base_model.model.model.language_model."
    weights = {}
    for name, weight in load_file(source / "adapter_model.safetensors").items():
        weights[name.replace(old_prefix, new_prefix, 1)] = weight
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    # Restrict the target modules to the language model with a regular expression. PEFT shortens module
    # names to their endings ("q_proj"), which layers of the vision tower can have too.
    endings = sorted(name.removeprefix("model.") for name in config["target_modules"])
    alternatives = "|".join(re.escape(ending) for ending in endings)
    config["target_modules"] = rf"model\.language_model\.(.*\.)?({alternatives})"
    # PEFT compares the keys of these patterns with the ends of layer names. Remove the `model.` at their
    # beginning: in stock LLaVA, it is not directly before the rest of the name.
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        config[name] = {layer.removeprefix("model."): value for layer, value in pattern.items()}
    config["base_model_name_or_path"] = base
    config["task_type"] = None  # "CAUSAL_LM" would add methods that stock LLaVA does not have
    text = json.dumps(config, indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")

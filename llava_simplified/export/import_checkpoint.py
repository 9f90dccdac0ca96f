"""Convert LLaVA checkpoints of other code bases to checkpoints of this package.

| source                         | files                                                               |
|--------------------------------|---------------------------------------------------------------------|
| original LLaVA, all trained    | `config.json` with `mm_*` entries (`LlavaLlamaForCausalLM`,          |
|                                | `LlavaMistralForCausalLM`), `pytorch_model*.bin` or safetensors      |
| original LLaVA, LoRA           | `adapter_config.json`, `adapter_model.*`, `non_lora_trainables.bin`  |
| original LLaVA, first stage    | `mm_projector.bin`                                                   |
| Hugging Face LLaVA (`llava-hf`)| `config.json` with `text_config` and `vision_config`, safetensors    |

The names of the weights are mapped as follows; `(x.)` is a prefix that only some versions write:

| part           | original LLaVA                                  | Hugging Face LLaVA                     |
|----------------|-------------------------------------------------|----------------------------------------|
| projector      | `(model.)mm_projector.{0,2}.weight`             | `(model.)multi_modal_projector.`       |
|                |                                                 | `linear_{1,2}.weight`                  |
| vision tower   | `(model.)vision_tower.vision_tower.*`           | `(model.)vision_tower.*`               |
| language model | `model.layers.*`, `lm_head.*`                   | `language_model.model.layers.*`, or    |
|                |                                                 | `model.language_model.layers.*`        |
| LoRA run       | the same names, prefixed by `base_model.model.` |                                        |

Loading is strict: an unexpected or missing weight raises an error that names it. Files are read as
tensors only: a pickle file that would run code is rejected.

A Hugging Face LLaVA folder is then loaded with the classes of Transformers, and compared with the new
checkpoint (`import_check.py`). The checkpoint gets its final name only if both produce the same outputs.
Folders of original LLaVA are not compared, because its code is not installed here. The tests of this
package compare such folders with a forward pass written in plain torch.

The vision tower of original LLaVA is stored in the new checkpoint only if it was fine-tuned. Otherwise, the
checkpoint refers to the published one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal
from zipfile import is_zipfile

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from llava_simplified.data.transforms import load_image_processor, processor_pads_to_square
from llava_simplified.export.import_check import choose_check_images, compare_with_source
from llava_simplified.export.stock_check import load_stock_processor
from llava_simplified.foreign_files import blame_file, read_json_object, shorten
from llava_simplified.hub import check_module_counts
from llava_simplified.jobs import atomic_directory
from llava_simplified.model.build import build_model, load_tokenizer, load_transformers_config
from llava_simplified.model.checkpoint import read_adapter_config, save_checkpoint
from llava_simplified.model.config import (
    CONFIG_NAME,
    DEFAULT_INSTRUCTION,
    LlavaConfig,
    TrainedParts,
    read_checkpoint_config,
    resolve_path,
)
from llava_simplified.model.llava import Llava
from llava_simplified.model.protocols import Module
from llava_simplified.model.vision import VisionTower, check_missing_keys
from llava_simplified.model.weights import check_state_dict, weights_digest
from llava_simplified.prompt import Message, Prompt

Weights = dict[str, torch.Tensor]

# Weight files, single or split ("pytorch_model-00001-of-00002.bin"). Other files with the same suffixes
# (training_args.bin, optimizer.pt) do not contain weights, and are not read.
_WEIGHT_FILE = re.compile(
    r"(pytorch_model|model|adapter_model|non_lora_trainables|mm_projector)\b.*\.(safetensors|bin)"
)


_LFS_POINTER = b"version https://git-lfs"  # a clone without Git LFS contains such text files instead of weights


@dataclass
class SourceCheckpoint:
    """The contents of a checkpoint of another code base.

    Attributes:
        path: The folder or file that the user passed.
        folder: The folder with the other files of the checkpoint.
        config: `config.json`; empty if there is none.
        language_model: Weights of the language model, or of its adapter.
        projector: Weights of the projector, named as in `torch.nn.Sequential`: "0.weight".
        vision_tower: Weights of the vision tower; empty if it was not saved.
    """

    path: Path
    folder: Path
    config: dict[str, Any]
    language_model: Weights
    projector: Weights
    vision_tower: Weights

    @property
    def is_stock(self) -> bool:
        """Whether the checkpoint was written by Hugging Face Transformers."""
        return "text_config" in self.config

    @property
    def adapter_config(self) -> Path | None:
        """The file `adapter_config.json` of a LoRA run."""
        path = self.folder / "adapter_config.json"
        return path if path.is_file() else None

    @property
    def has_language_model(self) -> bool:
        """Whether the checkpoint contains all weights of the language model, and not only an adapter."""
        return bool(self.language_model) and self.adapter_config is None

    def trained_parts(self, has_own_tower: bool) -> TrainedParts:
        """Return the parts to store in our checkpoint, which stores only parts that are declared as trained.

        Args:
            has_own_tower: Whether the checkpoint has its own vision tower, and not an unchanged copy of a published one.
        """
        vision_tower: Literal["none", "full"] = "full" if has_own_tower else "none"
        if self.adapter_config is not None:
            return TrainedParts(language_model="adapter", vision_tower=vision_tower)
        return TrainedParts(
            language_model="full" if self.has_language_model else "none", vision_tower=vision_tower
        )


@dataclass(frozen=True)
class ImportOptions:
    """Settings that the user chooses. The source does not contain them, or they override the source.

    Attributes:
        model_base: Base language model of an adapter or a single projector.
        vision_tower: Path of the vision tower that the source was trained from; None for the one that it names.
        template: Prompt template used in training: auto, chat, plain or bare.
        instruction: Default instruction of the model.
        image_aspect_ratio: "crop" or "pad"; None for the setting of the source.
    """

    model_base: str | None = None
    vision_tower: str | None = None
    template: str = "auto"
    instruction: str = DEFAULT_INSTRUCTION
    image_aspect_ratio: str | None = None


def import_checkpoint(
    source: Path, output: Path, *, check_images: Path | None = None, **options: Any
) -> list[str]:
    """Convert a LLaVA checkpoint of another code base. If it is a Hugging Face LLaVA folder, compare the two.

    Args:
        source: A folder, or a file `mm_projector.bin`.
        output: Folder to create. It is created only if the conversion and the comparison succeed.
        check_images: Folder of images for the comparison; None for two generated images.
        options: Fields of `ImportOptions`.

    Returns:
        A description of the source and the result of the comparison, one entry per line.

    Raises:
        ValueError: The format of the source is unknown, weights are missing or unexpected, a required
            option is missing, or the outputs of the checkpoint differ from those of the source.
        FileExistsError: `output` exists already.
    """
    if output.exists():
        raise FileExistsError(f"--output: {output} exists already; choose another folder")
    images, image_kind = choose_check_images(check_images)
    with atomic_directory(output) as folder:
        # Load the source inside `_convert`, so that its memory is freed before the comparison.
        report, is_stock = _convert(source, folder, ImportOptions(**options))
        _set_final_paths(folder, output)
        if is_stock:
            comparison = compare_with_source(folder, source, images, image_kind)
            report.append(f"compared with LLaVA in Transformers: {comparison}")
        else:
            report.append("not compared: Transformers has no classes for original LLaVA")
    return report


def _convert(source_path: Path, output: Path, options: ImportOptions) -> tuple[list[str], bool]:
    """Write the checkpoint; return the description of the source, and whether it is a stock folder."""
    source = read_source(source_path)
    report = _describe(source)
    _check_supported(source)
    _check_options(source, options)

    # Find the three parts. Vision tower and language model are in the source, or they are published
    # models that the user or the source names; the projector is always in the source.
    own_tower = output / "vision_tower"
    if source.vision_tower and source.is_stock:
        _write_stock_tower(source, own_tower)
        has_own_tower = True
    else:
        published = _published_tower(source, options)
        has_own_tower = _write_tower_if_tuned(source, published, own_tower)
        if has_own_tower:
            report.append(f"the vision tower in the source is a fine-tuned {published}")
        elif source.vision_tower:
            report.append(f"the vision tower in the source has the same weights as {published}")
    vision_tower = str(own_tower.resolve()) if has_own_tower else published
    model_base = options.model_base
    if source.has_language_model:
        model_base = str(output.resolve() / "language_model")
    if model_base is None:
        raise ValueError(
            f"{source_path} does not contain a language model. Pass the one that it was trained on: "
            "--model-base."
        )
    config = _make_config(source, model_base, vision_tower, has_own_tower, options)
    report.append(f"image_aspect_ratio: {config.image_aspect_ratio}")
    if source.has_language_model:
        model = _build_with_language_model(config, source)
    else:
        model = build_model(config)
    if model.prompt.image_token:
        report.append(f"the chat template writes the image token {model.prompt.image_token}")
    _load_projector(model.projector, source.projector)
    if source.adapter_config is not None:
        _add_adapter(model, source.adapter_config, source.language_model)
    training = {"imported_from": source_path.name}
    save_checkpoint(model, output, config, source.trained_parts(has_own_tower), training)
    return report, source.is_stock


def _published_tower(source: SourceCheckpoint, options: ImportOptions) -> str:
    """Return the path or name of the vision tower that a source was trained with.

    Raises:
        ValueError: Neither the user nor the source names it.
    """
    name = options.vision_tower or source.config.get("mm_vision_tower")
    if name is None:
        raise ValueError(
            f"{source.path} does not name the vision tower that it was trained with. Pass --vision-tower."
        )
    return name


def _set_final_paths(folder: Path, output: Path) -> None:
    """Replace the temporary folder by the final one in the paths of `llava.json`."""
    checkpoint_config = read_checkpoint_config(folder)
    config = LlavaConfig.from_dict(checkpoint_config["architecture"])
    temporary = folder.resolve()
    paths: dict[str, Any] = {}
    for name in ("language_model", "vision_tower"):
        path = Path(getattr(config, name))
        if path.is_relative_to(temporary):
            paths[name] = str(output.resolve() / path.relative_to(temporary))
    checkpoint_config["architecture"] = asdict(replace(config, **paths))
    text = json.dumps(checkpoint_config, indent=2)
    (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


# ---- reading ----

# The entries of a `config.json` that are used here; Transformers checks the others.
_CONFIG_TYPES: dict[str, tuple[type, ...]] = {
    "image_aspect_ratio": (str,),
    "mm_vision_select_feature": (str,),
    "mm_vision_select_layer": (int, list),
    "mm_vision_tower": (str,),
    "model_type": (str,),
    "projector_hidden_act": (str,),
    "text_config": (dict,),
    "vision_config": (dict,),
    "vision_feature_layer": (int, list),
    "vision_feature_select_strategy": (str,),
}


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError if an entry of a `config.json`, or of a config within it, has an unexpected type."""
    check_module_counts(config, path)
    for part in (config, config.get("text_config"), config.get("vision_config")):
        for name, types in _CONFIG_TYPES.items():
            value = part.get(name) if isinstance(part, dict) else None
            if value is not None and not isinstance(value, types):
                expected = " or ".join(kind.__name__ for kind in types)
                raise ValueError(
                    f"{path}: {name}: expected {expected}, found {shorten(value)}. Copy or download the checkpoint again."
                )


def read_source(path: Path) -> SourceCheckpoint:
    """Read all files of a checkpoint of another code base.

    Args:
        path: A folder, or a file of weights.

    Raises:
        ValueError: No weights were found, a file contains anything but tensors, or the activation of the
            projector is not supported.
    """
    # For a single file, read the config.json in the same folder too. Without one, the options of the command
    # and the defaults of LLaVA apply.
    folder = path if path.is_dir() else path.parent
    config_path = folder / "config.json"
    config: dict[str, Any] = {}
    if config_path.is_file():
        config = read_json_object(config_path)
        _check_config(config, config_path)
    language_model, projector, vision_tower = split_weights(read_weights(path))
    # Only Hugging Face checkpoints name the activation; in the others it is GELU.
    activation = config.get("projector_hidden_act", "gelu")
    if activation == "linear":
        with blame_file(path):
            projector = fold_linear_projector(projector)
    elif activation != "gelu":
        raise ValueError(
            f"{config_path}: the projector has the activation {activation!r} (projector_hidden_act). "
            "Only gelu and linear can be imported."
        )
    return SourceCheckpoint(
        path=path,
        folder=folder,
        config=config,
        language_model=language_model,
        projector=projector,
        vision_tower=vision_tower,
    )


def read_weights(path: Path) -> Weights:
    """Return all tensors of a folder's weight files, or of one file.

    Raises:
        ValueError: No weight files were found, a pickle file contains more than tensors, or two files contain different
            values of the same weight.
    """
    files = [path]
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if _WEIGHT_FILE.fullmatch(file.name)]
    weights: Weights = {}
    file_of_weight: dict[str, str] = {}
    for file in files:
        for name, weight in _read_weight_file(file).items():
            other = file_of_weight.get(name, "")
            # Complete models often come with the projector of the first stage, which was trained further. The files
            # are sorted, so the weights of the model replace it.
            is_replaced = not other or other.startswith("mm_projector")
            if not is_replaced and not _are_equal(weights[name], weight):
                raise ValueError(
                    f"{path}: {other} and {file.name} contain different values of {name}. Move the file (and its other "
                    "parts) that does not belong to this checkpoint into another folder."
                )
            weights[name] = weight
            file_of_weight[name] = file.name
    if not weights:
        raise ValueError(
            f"{path}: no weights found. Expected files such as model.safetensors or pytorch_model.bin."
        )
    return weights


def _are_equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


def _read_weight_file(path: Path) -> Weights:
    """Read a file of tensors: safetensors, or a pickle without code.

    Raises:
        ValueError: The file contains anything else, or is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with path.open("rb") as stream:
            start = stream.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            raise ValueError(
                f"{path} is a Git LFS pointer, and not the file itself. Run `git lfs pull` in its folder."
            )
        if path.suffix == ".safetensors":
            return load_file(path)
        # Pass weights_only, because a pickle file can run any code. Map the file only if it is a zip
        # archive: files from before PyTorch 1.6 are not, and cannot be mapped.
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except (UnpicklingError, SafetensorError, EOFError, RuntimeError, OSError) as error:
        # Quote the first line only: the others advise to run the code in the file.
        reason = str(error).partition("\n")[0] or "the file is empty"
        raise ValueError(f"{path}: not a file of tensors: {reason}") from error
    if not isinstance(weights, dict):
        raise ValueError(
            f"{path}: expected tensors by name, found {type(weights).__name__}. Copy or download the checkpoint again."
        )
    for name, weight in weights.items():
        if not isinstance(name, str) or not isinstance(weight, torch.Tensor):
            raise ValueError(
                f"{path}: {shorten(name)}: expected a tensor, found {type(weight).__name__}. The file must contain the "
                "weights alone, by name."
            )
    return weights


def split_weights(weights: Mapping[str, torch.Tensor]) -> tuple[Weights, Weights, Weights]:
    """Split weights into language model, projector and vision tower, and rename them as in our parts.

    See the table in the module's docstring. The names of adapter weights do not change.
    """
    language_model: Weights = {}
    projector: Weights = {}
    vision_tower: Weights = {}
    for name, tensor in weights.items():
        if "rotary_emb.inv_freq" in name or name.endswith("position_ids"):
            continue  # computed buffers, which old versions saved
        # All weights of a LoRA run have PEFT's prefix. Keep it in the names of the adapter's weights, because
        # PEFT expects it when it loads them, and remove it from all other names.
        is_adapter = "lora_" in name
        plain = name if is_adapter else name.removeprefix("base_model.model.")
        # model.mm_projector.0.weight, multi_modal_projector.linear_1.weight -> 0.weight
        match = re.match(r"(?:model\.)?(?:mm_projector|multi_modal_projector)\.(.+)$", plain)
        if match:
            projector[_sequential_name(match[1])] = tensor
            continue
        # model.vision_tower.vision_tower.vision_model.x, vision_tower.x -> vision_model.x, x
        match = re.match(r"(?:model\.)?vision_tower\.(?:vision_tower\.)?(.+)$", plain)
        if match:
            vision_tower[match[1]] = tensor
            continue
        # Everything else belongs to the language model:
        #     language_model.model.layers.0.x   (transformers 4) -> model.layers.0.x
        #     language_model.lm_head.weight     (transformers 4) -> lm_head.weight
        #     model.language_model.layers.0.x   (transformers 5) -> model.layers.0.x
        #     model.layers.0.x, lm_head.weight  (original LLaVA) -> as they are
        renamed = plain.removeprefix("language_model.")
        renamed = re.sub(r"^model\.language_model\.", "model.", renamed)
        language_model[renamed] = tensor
    return language_model, projector, vision_tower


def _sequential_name(name: str) -> str:
    """Return the name of a projector weight in a `Sequential`: linear_2.bias -> 2.bias.

    Hugging Face counts the linear layers from 1. In the `Sequential`, there is an activation between two
    linear layers.
    """
    match = re.match(r"linear_(\d)\.(.+)$", name)
    if match is None:
        return name
    return f"{2 * (int(match[1]) - 1)}.{match[2]}"


def fold_linear_projector(projector: Weights) -> Weights:
    """Return the single linear layer that equals two linear layers without an activation between them.

    W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2). It is computed in float64 and rounded once.

    Args:
        projector: Weights and, optionally, biases of both layers, named as in a `Sequential`.
    """
    first, second = projector["0.weight"].double(), projector["2.weight"].double()
    bias = torch.zeros(second.shape[0], dtype=torch.float64)
    if "0.bias" in projector:
        bias = bias + second @ projector["0.bias"].double()
    if "2.bias" in projector:
        bias = bias + projector["2.bias"].double()
    dtype = projector["0.weight"].dtype
    return {"0.weight": (second @ first).to(dtype), "0.bias": bias.to(dtype)}


# ---- checks and configuration ----


def _describe(source: SourceCheckpoint) -> list[str]:
    """Return a description of a source, one entry per line."""
    lines = []
    groups = {
        "language model": source.language_model,
        "projector": source.projector,
        "vision tower": source.vision_tower,
    }
    for name, weights in groups.items():
        if weights:
            lines.append(f"{len(weights):,} weights of the {name}")
    return lines


def _check_supported(source: SourceCheckpoint) -> None:
    """Raise ValueError if a source has no projector, or marks images with special tokens."""
    # These tokens have trained embeddings, and occur in every prompt. LLaVA 1.5 does not use them.
    if source.config.get("mm_use_im_start_end") or source.config.get("mm_use_im_patch_token"):
        raise ValueError(
            f"{source.path} marks images with special tokens (mm_use_im_start_end or "
            "mm_use_im_patch_token), which is not supported."
        )
    if not source.projector:
        found = sorted(source.language_model | source.vision_tower)[:5]
        raise ValueError(f"{source.path} contains no projector. Its first weights: {found}.")


def _check_options(source: SourceCheckpoint, options: ImportOptions) -> None:
    """Raise ValueError if an option names a part that the source contains, since the option would have no effect."""
    if options.vision_tower and source.is_stock and source.vision_tower:
        raise ValueError(
            f"--vision-tower {options.vision_tower}: {source.path} contains its vision tower. Leave out the option."
        )
    if options.model_base and source.has_language_model:
        raise ValueError(
            f"--model-base {options.model_base}: {source.path} contains its language model. Leave out the option."
        )


def _make_config(
    source: SourceCheckpoint,
    language_model: str,
    vision_tower: str,
    has_own_tower: bool,
    options: ImportOptions,
) -> LlavaConfig:
    """Convert the `config.json` of a source to a checkpoint config."""
    # Count the layers of the projector, each of which has one matrix. Original LLaVA also stores
    # mm_projector_type, but a single mm_projector.bin has no config.
    num_layers = sum(weight.dim() == 2 for weight in source.projector.values())
    # Store the digests of parts that are loaded from published models, so that loading the checkpoint
    # can verify them. A part that is stored in the checkpoint needs no digest.
    digests = {}
    if not has_own_tower:
        digests["vision_tower"] = weights_digest(vision_tower)
    if source.has_language_model:
        first_weight = next(iter(source.language_model.values()))
        dtype = str(first_weight.dtype).removeprefix("torch.")
    else:
        digests["language_model"] = weights_digest(language_model)
        dtype = _stored_dtype(language_model)
        language_model = resolve_path(language_model)
    return LlavaConfig(
        language_model=language_model,
        vision_tower=resolve_path(vision_tower),
        mm_projector_type="linear" if num_layers == 1 else f"mlp{num_layers}x_gelu",
        mm_vision_select_layer=_select_layer(source),
        mm_vision_select_feature="cls_patch" if _keeps_cls(source) else "patch",
        image_aspect_ratio=options.image_aspect_ratio or _aspect_ratio(source, vision_tower),
        template=options.template,
        instruction=options.instruction,
        dtype=dtype,
        weights_digests=digests,
    )


def _select_layer(source: SourceCheckpoint) -> int | tuple[int, ...]:
    """Return the layers of the vision tower that a source selects."""
    layer = source.config.get("vision_feature_layer", source.config.get("mm_vision_select_layer"))
    if layer is None:
        return -2  # as LLaVA 1.5
    return tuple(layer) if isinstance(layer, list) else layer


def _stored_dtype(language_model: str) -> str:
    """Return the data type of a published language model, for example "float16"."""
    config = load_transformers_config(language_model)
    return str(config.dtype or torch.float32).removeprefix("torch.")


def _aspect_ratio(source: SourceCheckpoint, vision_tower: str) -> str:
    """Return `image_aspect_ratio` of a source.

    Raises:
        ValueError: The source has another setting, for example to cut images into tiles (LLaVA 1.6).
    """
    if processor_pads_to_square(load_image_processor(vision_tower)):
        return "pad"
    # Original LLaVA calls "square" what the image processor of the vision tower does.
    aspect_ratios = {"square": "crop", "pad": "pad"}
    aspect_ratio = str(source.config.get("image_aspect_ratio") or "square")
    if aspect_ratio not in aspect_ratios:
        raise ValueError(
            f"{source.path} was trained with image_aspect_ratio {aspect_ratio}, which is not supported. To "
            "use one image of fixed size instead of tiles, pass --image-aspect-ratio pad or crop."
        )
    return aspect_ratios[aspect_ratio]


def _keeps_cls(source: SourceCheckpoint) -> bool:
    """Return whether the source keeps the tokens that precede the patches (CLS)."""
    config = source.config
    if config.get("mm_vision_select_feature") == "cls_patch":  # original LLaVA
        return True
    if config.get("vision_feature_select_strategy") != "full":  # Hugging Face LLaVA
        return False
    # SigLIP towers have no such token; "full" only means that no token is dropped.
    tower_type = config.get("vision_config", {}).get("model_type", "")
    return not tower_type.startswith("siglip")


# ---- building the model ----


def _build_with_language_model(config: LlavaConfig, source: SourceCheckpoint) -> Llava:
    """Build the model of a source that contains its language model."""
    from transformers import AutoConfig

    tokenizer = _load_tokenizer(source)
    with blame_file(source.path):
        settings = dict(source.config.get("text_config", source.config))
        # Original LLaVA calls its language models "llava_mistral", "llava_llama" or just "llava".
        model_type = settings.pop("model_type").replace("llava_", "").replace("llava", "llama")
        settings.pop("architectures", None)
        own_settings = {key: settings[key] for key in settings if not key.startswith("mm_")}
        # Build a plain language model from the remaining settings, and load the weights.
        text_config = AutoConfig.for_model(model_type, **own_settings)
        model = build_model(config, language_model=text_config, tokenizer=tokenizer)
    weights = dict(source.language_model)
    if text_config.tie_word_embeddings and "lm_head.weight" not in weights:
        # Add the tied weight, which a file contains once, but a state dict under both names.
        table = model.language_model.get_input_embeddings().weight
        for name, weight in model.language_model.named_parameters():
            if weight is table and name in weights:
                weights["lm_head.weight"] = weights[name]
    _load_strictly(model.language_model, weights, "language model")
    return model


def _load_tokenizer(source: SourceCheckpoint) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a source, with the chat template of its processor and its image token."""
    if not source.is_stock:
        return load_tokenizer(str(source.folder))
    processor = load_stock_processor(source.folder)
    tokenizer = load_tokenizer(str(source.folder), image_token=processor.image_token)
    # Old folders have the template in chat_template.json, which only processors read.
    template = processor.chat_template
    if template:
        tokenizer.chat_template = template
        ids = Prompt(tokenizer).render([Message("user", "x")], None).input_ids
        # Processors add a BOS token if the template does not write one. Our prompts contain only what the
        # template writes, so add the token to the template.
        bos = tokenizer.bos_token_id
        if bos is not None and ids[0] != bos and tokenizer("x").input_ids[0] == bos:
            tokenizer.chat_template = "{{ bos_token }}" + template
    return tokenizer


def _load_projector(projector: nn.Module, weights: Weights) -> None:
    """Load the projector's weights."""
    # Remove the index of a linear projector that was saved as a `Sequential` with one layer.
    if set(projector.state_dict()) == {"weight", "bias"}:
        weights = {name.removeprefix("0."): weight for name, weight in weights.items()}
    _load_strictly(projector, weights, "projector")


def _load_strictly(module: nn.Module | Module, weights: Weights, name: str) -> None:
    """Load weights; raise ValueError if a weight is missing, unexpected, or has the wrong shape."""
    check_state_dict(weights, module.state_dict(), name)
    module.load_state_dict(weights)


def _add_adapter(model: Llava, config: Path, weights: Weights) -> None:
    """Add the LoRA adapter of a source to the language model."""
    from llava_simplified.model.peft_names import (
        get_peft_model,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )

    peft_config = read_adapter_config(config.parent, accept_pattern=True)
    language_model: Any = model.language_model
    adapted: Any = get_peft_model(language_model, peft_config)
    check_state_dict(weights, get_peft_model_state_dict(adapted), "adapter")
    set_peft_model_state_dict(adapted, weights)
    # Store the names of the adapted modules instead of the pattern that found them, as our checkpoints do.
    peft_config.target_modules = sorted(adapted.targeted_module_names)
    model.language_model = adapted


# ---- the vision tower ----


def _write_stock_tower(source: SourceCheckpoint, target: Path) -> None:
    """Write the vision tower of a Hugging Face LLaVA folder to a separate model folder."""
    from transformers import AutoConfig, AutoModel

    with blame_file(source.path):
        settings = dict(source.config["vision_config"])
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        tower = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
    _load_strictly(tower, _rename_like(source.vision_tower, tower.state_dict()), "vision tower")
    tower.save_pretrained(target)
    image_processor: Any = load_image_processor(source.folder)
    image_processor.save_pretrained(target)


def _write_tower_if_tuned(source: SourceCheckpoint, published: str, target: Path) -> bool:
    """Write the vision tower of original LLaVA to a separate model folder if it differs from the published one.

    Original LLaVA saves its vision tower with everything else, frozen or not.

    Args:
        source: The checkpoint.
        published: The vision tower that was fine-tuned.
        target: Folder to create.

    Returns:
        Whether the tower was written.

    Raises:
        ValueError: The weights do not fit the published vision tower.
    """
    if not source.vision_tower:
        return False
    tower = VisionTower.from_pretrained(published, select_layer=_select_layer(source))
    model: Any = tower.model
    expected = model.state_dict()
    weights = _rename_like(source.vision_tower, expected)
    where = (
        f"{source.path}: its vision tower is not {published}; pass the right one as --vision-tower"
    )
    if source.adapter_config is None:
        check_missing_keys(where, tower.used_parameters - weights.keys())
    # Add weights that a LoRA run did not train, and those that the features do not depend on, such as a pooling head.
    completed = {**expected, **weights}
    check_state_dict(completed, expected, where)
    if all(_equals_published(weight, expected[name]) for name, weight in weights.items()):
        return False
    model.load_state_dict(completed)
    model.save_pretrained(target)
    image_processor: Any = load_image_processor(published)
    image_processor.save_pretrained(target)
    return True


def _rename_like(weights: Weights, expected: Weights) -> Weights:
    """Rename weights as in a state dict that differs in the prefix `vision_model.`, which only some versions write."""
    expected_names = {_without_prefix(name): name for name in expected}
    renamed = {}
    for name, weight in weights.items():
        bare_name = _without_prefix(name)
        renamed[expected_names.get(bare_name, bare_name)] = weight
    return renamed


def _equals_published(weight: torch.Tensor, published: torch.Tensor) -> bool:
    """Return whether a weight is the published one, up to rounding to the data type of the checkpoint.

    Towers are loaded in 16 bits for training, so a weight may have been rounded twice.
    """
    loaded_dtypes = (torch.float32, torch.float16, torch.bfloat16)
    return any(torch.equal(weight, published.to(dtype).to(weight.dtype)) for dtype in loaded_dtypes)


def _without_prefix(name: str) -> str:
    return name.removeprefix("vision_model.")

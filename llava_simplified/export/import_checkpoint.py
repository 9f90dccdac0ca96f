"""Convert LLaVA checkpoints of other code bases into ours.

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
| LoRA run       | the same names behind `base_model.model.`       |                                        |

Loading is strict: a weight without a place, and a place without a weight, is an error that names it.
Files are read as tensors and nothing else: a pickle that would run code is refused.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal
from zipfile import is_zipfile

import torch
from torch import nn

from llava_simplified.jobs import use_default_permissions
from llava_simplified.model.build import build_model, load_tokenizer
from llava_simplified.model.checkpoint import read_adapter_config, save_checkpoint
from llava_simplified.model.config import (
    DEFAULT_INSTRUCTION,
    LlavaConfig,
    TrainedParts,
    resolve_path,
)
from llava_simplified.model.llava import Llava
from llava_simplified.model.protocols import Module
from llava_simplified.model.vision import VisionTower
from llava_simplified.model.weights import check_state_dict, weights_digest

Weights = dict[str, torch.Tensor]

# The files of a folder that contain weights, one or several ("pytorch_model-00001-of-00002.bin").
# Others of the same types (training_args.bin, optimizer.pt) are no tensors, and not read.
_WEIGHT_FILE = re.compile(
    r"(pytorch_model|model|adapter_model|non_lora_trainables|mm_projector)\b.*\.(safetensors|bin)"
)


@dataclass
class SourceCheckpoint:
    """A checkpoint of another code base, as it was read.

    Attributes:
        path: The folder, or the file, that the user named.
        folder: The folder in which the other files are.
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
        """Whether Hugging Face transformers wrote it."""
        return "text_config" in self.config

    @property
    def adapter_config(self) -> Path | None:
        """The file `adapter_config.json` of a LoRA run."""
        path = self.folder / "adapter_config.json"
        return path if path.is_file() else None

    @property
    def has_language_model(self) -> bool:
        """Whether it contains all weights of the language model, and not only an adapter."""
        return bool(self.language_model) and self.adapter_config is None

    @property
    def has_own_tower(self) -> bool:
        """Whether its vision tower is part of the model, and not a copy of a published one."""
        return self.is_stock and bool(self.vision_tower)

    @property
    def trained_parts(self) -> TrainedParts:
        """The parts that it has weights of. They count as trained: our checkpoint stores them."""
        vision_tower: Literal["none", "full"] = "full" if self.has_own_tower else "none"
        if self.adapter_config is not None:
            return TrainedParts("adapter", vision_tower)
        return TrainedParts("full" if self.has_language_model else "none", vision_tower)


def import_checkpoint(
    source: Path,
    output: Path,
    *,
    model_base: str | None = None,
    vision_tower: str | None = None,
    template: str = "auto",
    instruction: str = DEFAULT_INSTRUCTION,
) -> list[str]:
    """Convert a LLaVA checkpoint of another code base.

    Args:
        source: A folder, or a file `mm_projector.bin`.
        output: Folder to create. It is removed again if the conversion fails.
        model_base: Language model below an adapter or a single projector.
        vision_tower: Vision tower, if it is not where the source says.
        template: Prompt template of the training: auto, chat, plain or bare.
        instruction: Instruction for captions where the user gives none.

    Returns:
        What was found, a line each.

    Raises:
        ValueError: The form of the source is unknown, weights are missing or unexpected, or an option
            has to be given.
        FileExistsError: `output` exists already.
    """
    if output.exists():
        raise FileExistsError(f"--output: {output} exists already; choose another folder")
    # `save_checkpoint` writes `llava.json` last, so that an import that is killed leaves no checkpoint.
    # It cannot be renamed at the end: the config contains the path of the folder.
    try:
        return _convert(source, output, model_base, vision_tower, template, instruction)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise


def _convert(
    source_path: Path,
    output: Path,
    model_base: str | None,
    vision_tower: str | None,
    template: str,
    instruction: str,
) -> list[str]:
    source = read_source(source_path)
    report = _describe(source)
    _check_supported(source)

    # Where the three parts come from: the vision tower and the language model are in the source, or
    # published models that the user or the source names; the projector is always in the source.
    if source.has_own_tower:
        vision_tower = _write_vision_tower(source, output / "vision_tower")
    vision_tower = vision_tower or source.config.get("mm_vision_tower")
    if vision_tower is None:
        raise ValueError(
            f"{source_path} does not name the vision tower that it was trained with. Pass "
            "--vision-tower."
        )
    if source.has_language_model:
        model_base = str(output.resolve() / "language_model")
    if model_base is None:
        raise ValueError(
            f"{source_path} does not contain a language model. Pass the one that it was trained on: "
            "--model-base."
        )
    config = _make_config(source, model_base, vision_tower, template, instruction)
    if source.has_language_model:
        model = _build_with_language_model(config, source)
    else:
        model = build_model(config)
    if source.vision_tower and not source.has_own_tower:
        _check_vision_tower(model.vision_tower, source.vision_tower)
        report.append("the weights of the vision tower are those of the given vision tower")
    _load_projector(model.projector, source.projector)
    if source.adapter_config is not None:
        _add_adapter(model, source.adapter_config, source.language_model)
    training = {"imported_from": source_path.name}
    save_checkpoint(model, output, config, source.trained_parts, training)
    return report


# ---- reading ----


def read_source(path: Path) -> SourceCheckpoint:
    """Read all files of a checkpoint of another code base.

    Args:
        path: A folder, or a file of weights.

    Raises:
        ValueError: There are no weights, or a file contains something else than tensors.
    """
    folder = path if path.is_dir() else path.parent
    config_path = folder / "config.json"
    config = {}
    if config_path.is_file():
        config = json.loads(config_path.read_text(encoding="utf-8"))
    # For a single file, config.json beside it is read as well. Without one, the options of the command
    # and the defaults of LLaVA apply.
    language_model, projector, vision_tower = split_weights(read_weights(path))
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
        ValueError: There are no weight files, or a pickle contains more than tensors.
    """
    files = [path]
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if _WEIGHT_FILE.fullmatch(file.name)]
    weights: Weights = {}
    for file in files:
        weights |= _read_weight_file(file)
    if not weights:
        raise ValueError(f"{path}: no weights found (.safetensors or .bin files)")
    return weights


def _read_weight_file(path: Path) -> Weights:
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # `weights_only`: a pickle is a program, and this refuses to run any but one that builds
        # tensors. Files of the time before PyTorch 1.6 are no zip archives and cannot be mapped.
        return torch.load(path, "cpu", weights_only=True, mmap=is_zipfile(path))
    except (UnpicklingError, RuntimeError, OSError) as error:
        raise ValueError(f"{path}: not a file of tensors: {error}") from error


def split_weights(weights: Mapping[str, torch.Tensor]) -> tuple[Weights, Weights, Weights]:
    """Sort weights into language model, projector and vision tower, under the names of each part.

    See the table in the module's docstring. The weights of an adapter keep their names.
    """
    language_model: Weights = {}
    projector: Weights = {}
    vision_tower: Weights = {}
    for name, tensor in weights.items():
        if "rotary_emb.inv_freq" in name or name.endswith("position_ids"):
            continue  # buffers that old versions saved; they are computed
        # A LoRA run saves everything below PEFT's prefix. The names of adapter weights keep it, because
        # PEFT expects it when it loads them.
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
    """Return a projector's weight by its place in a `Sequential`: linear_2.bias -> 2.bias.

    Hugging Face counts the linear layers from 1. In a `Sequential`, an activation is between each two.
    """
    match = re.match(r"linear_(\d)\.(.+)$", name)
    if match is None:
        return name
    return f"{2 * (int(match[1]) - 1)}.{match[2]}"


# ---- checks and configuration ----


def _describe(source: SourceCheckpoint) -> list[str]:
    """Return what was found in a source, a line each."""
    lines = []
    groups = {
        "language model": source.language_model,
        "projector": source.projector,
        "vision tower": source.vision_tower,
    }
    for name, weights in groups.items():
        if weights:
            lines.append(f"{len(weights):,} weights of the {name}")
    aspect_ratio = source.config.get("image_aspect_ratio", "square")
    # "pad" makes a square with borders, "anyres" adds crops. Neither is done here, so captions can differ
    # from those of the original code, although the weights are the same.
    if aspect_ratio != "square":
        lines.append(
            f"warning: trained with image_aspect_ratio {aspect_ratio}; here the preprocessor of the "
            "vision tower crops the images"
        )
    return lines


def _check_supported(source: SourceCheckpoint) -> None:
    """Raise ValueError if a source has no projector, or a kind of prompt that we do not have."""
    # Such tokens have trained embeddings, and change every prompt. LLaVA 1.5 does not use them.
    if source.config.get("mm_use_im_start_end") or source.config.get("mm_use_im_patch_token"):
        raise ValueError(
            f"{source.path} marks images with special tokens (mm_use_im_start_end or "
            "mm_use_im_patch_token), which is not supported."
        )
    if not source.projector:
        found = sorted(source.language_model | source.vision_tower)[:5]
        raise ValueError(f"{source.path} contains no projector. Its first weights: {found}.")


def _make_config(
    source: SourceCheckpoint,
    language_model: str,
    vision_tower: str,
    template: str,
    instruction: str,
) -> LlavaConfig:
    """Return the checkpoint config that a source's `config.json` amounts to."""
    # The matrices of the projector tell its depth. Original LLaVA also stores it as mm_projector_type,
    # but a lone mm_projector.bin has no config.
    num_layers = sum(weight.dim() == 2 for weight in source.projector.values())
    layer = source.config.get(
        "vision_feature_layer", source.config.get("mm_vision_select_layer", -2)
    )
    # A part that is loaded from a published model is checked by its digest whenever the checkpoint is
    # loaded. One that is stored in the checkpoint needs no digest.
    digests = {"vision_tower": weights_digest(vision_tower)}
    dtype = "float32"
    if source.has_language_model:
        first_weight = next(iter(source.language_model.values()))
        dtype = str(first_weight.dtype).removeprefix("torch.")
    else:
        digests["language_model"] = weights_digest(language_model)
        language_model = resolve_path(language_model)
    return LlavaConfig(
        language_model=language_model,
        vision_tower=resolve_path(vision_tower),
        mm_projector_type="linear" if num_layers == 1 else f"mlp{num_layers}x_gelu",
        mm_vision_select_layer=tuple(layer) if isinstance(layer, list) else layer,
        mm_vision_select_feature="cls_patch" if _keeps_cls(source) else "patch",
        template=template,
        instruction=instruction,
        dtype=dtype,
        weights_digests=digests,
    )


def _keeps_cls(source: SourceCheckpoint) -> bool:
    """Return whether the source keeps the tokens in front of the patches."""
    config = source.config
    if config.get("mm_vision_select_feature") == "cls_patch":  # original LLaVA
        return True
    if config.get("vision_feature_select_strategy") != "full":  # Hugging Face LLaVA
        return False
    # A SigLIP tower has no such token: "full" only says that nothing is dropped.
    tower_type = config.get("vision_config", {}).get("model_type", "")
    return not tower_type.startswith("siglip")


# ---- building the model ----


def _build_with_language_model(config: LlavaConfig, source: SourceCheckpoint) -> Llava:
    """Build the model of a source that contains its language model."""
    from transformers import AutoConfig

    settings = dict(source.config.get("text_config", source.config))
    # Original LLaVA calls its language models "llava_mistral", "llava_llama" or just "llava".
    model_type = settings.pop("model_type").replace("llava_", "").replace("llava", "llama")
    settings.pop("architectures", None)
    own_settings = {key: value for key, value in settings.items() if not key.startswith("mm_")}
    # The rest of the settings are those of a stock language model: build one, and load the weights.
    text_config = AutoConfig.for_model(model_type, **own_settings)
    tokenizer = load_tokenizer(str(source.folder))
    model = build_model(config, language_model=text_config, tokenizer=tokenizer)
    weights = dict(source.language_model)
    if text_config.tie_word_embeddings and "lm_head.weight" not in weights:
        # Files contain tied weights once, a state dict contains them twice.
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    _load_strictly(model.language_model, weights, "language model")
    return model


def _load_projector(projector: nn.Module, weights: Weights) -> None:
    """Load the projector's weights."""
    # Original LLaVA saves a linear projector as "weight" and "bias"; others as a `Sequential` of one.
    if set(projector.state_dict()) == {"weight", "bias"}:
        weights = {name.removeprefix("0."): weight for name, weight in weights.items()}
    _load_strictly(projector, weights, "projector")


def _load_strictly(module: nn.Module | Module, weights: Weights, name: str) -> None:
    """Load weights; raise ValueError if some are missing, unexpected, or have another shape."""
    check_state_dict(weights, module.state_dict(), name)
    module.load_state_dict(weights)


def _add_adapter(model: Llava, config: Path, weights: Weights) -> None:
    """Add the LoRA adapter of a source to the language model."""
    from peft import (
        get_peft_model,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )

    peft_config = read_adapter_config(config.parent, accept_pattern=True)
    language_model: Any = model.language_model
    adapted: Any = get_peft_model(language_model, peft_config)
    check_state_dict(weights, get_peft_model_state_dict(adapted), "adapter")
    set_peft_model_state_dict(adapted, weights)
    # A checkpoint names the modules, whatever pattern has found them.
    peft_config.target_modules = sorted(adapted.targeted_module_names)
    model.language_model = adapted


# ---- the vision tower ----


def _write_vision_tower(source: SourceCheckpoint, target: Path) -> str:
    """Write the vision tower of a Hugging Face LLaVA folder as a model folder of its own.

    Returns:
        The folder.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    settings = dict(source.config["vision_config"])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    tower = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
    # Only some versions of transformers write the prefix, and only some classes have it.
    expected_names = {_without_prefix(name): name for name in tower.state_dict()}
    weights = {}
    for name, weight in source.vision_tower.items():
        bare_name = _without_prefix(name)
        weights[expected_names.get(bare_name, bare_name)] = weight
    _load_strictly(tower, weights, "vision tower")
    tower.save_pretrained(target)
    image_processor = AutoImageProcessor.from_pretrained(
        str(source.folder), backend="pil", trust_remote_code=False
    )
    image_processor.save_pretrained(target)
    use_default_permissions(target)
    return str(target)


def _check_vision_tower(tower: VisionTower, weights: Weights) -> None:
    """Check that the tower in a source is the tower that is used here.

    Original LLaVA saves its frozen vision tower with everything else. We store only its name, so the
    weights must be the same.

    Raises:
        ValueError: A weight is another one.
    """
    expected = {_without_prefix(name): weight for name, weight in tower.model.state_dict().items()}
    for name, weight in weights.items():
        other = expected.get(_without_prefix(name))
        if other is None or other.shape != weight.shape or not _almost_equal(other, weight):
            raise ValueError(
                f"vision tower: {name} differs from the weight of the given vision tower. It was "
                "trained, or another tower was used. Pass a folder of the right one: --vision-tower."
            )


def _almost_equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether two weights are equal, if either may have been rounded to bfloat16."""
    bfloat16_rounding = 2**-8
    return torch.allclose(first.float(), second.float(), rtol=bfloat16_rounding, atol=1e-3)


def _without_prefix(name: str) -> str:
    return name.removeprefix("vision_model.")

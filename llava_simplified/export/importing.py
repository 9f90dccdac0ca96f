"""LLaVA checkpoints of other codebases -> ours, key by key: a weight that has no place, or a place without one, is an error.

Read: the original's whole models (`LlavaLlamaForCausalLM`, `LlavaMistralForCausalLM`), its LoRA folders (adapter and
`non_lora_trainables.bin`), a lone `mm_projector.bin`, and stock Hugging Face LLaVA folders.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal
from zipfile import is_zipfile

import torch
from torch import nn

from llava_simplified.model.build import build_model, load_tokenizer
from llava_simplified.model.checkpoint import save_checkpoint
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


def import_main(argv: list[str] | None = None) -> int:
    """The command line of `llava import`."""
    parser = argparse.ArgumentParser(
        "llava import", description="Read a LLaVA checkpoint of another codebase."
    )
    parser.add_argument("source", type=Path, help="a folder, or mm_projector.bin")
    parser.add_argument(
        "--output", required=True, type=Path, help="a folder that does not exist yet"
    )
    parser.add_argument(
        "--model-base", help="the language model under a LoRA adapter or a lone projector"
    )
    parser.add_argument(
        "--vision-tower", help="the vision tower, if it is not where the source says"
    )
    parser.add_argument(
        "--template", default="auto", help="auto, chat, plain or bare: what it was trained with"
    )
    parser.add_argument(
        "--instruction", default=DEFAULT_INSTRUCTION, help="what to ask where nothing is asked"
    )
    args = parser.parse_args(argv)
    print("\n".join([*import_checkpoint(**vars(args)), f"-> {args.output}"]))
    return 0


def import_checkpoint(
    source: Path,
    output: Path,
    model_base: str | None = None,
    vision_tower: str | None = None,
    template: str = "auto",
    instruction: str = DEFAULT_INSTRUCTION,
) -> list[str]:
    """Convert, and say in a line each what was found.

    Raises:
        ValueError: an unknown form; weights missing or left over; a base model or vision tower that has to be named.
    """
    if output.exists():
        raise ValueError(f"{output} exists: choose another --output")
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, output, ignore_errors=True)
        report = _convert(source, output, model_base, vision_tower, template, instruction)
        undo.pop_all()
    return report


def _convert(
    source: Path,
    output: Path,
    model_base: str | None,
    vision_tower: str | None,
    template: str,
    instruction: str,
) -> list[str]:
    folder = source if source.is_dir() else source.parent
    config = (
        json.loads((folder / "config.json").read_text("utf-8"))
        if (folder / "config.json").is_file()
        else {}
    )
    weights = read_weights(source)
    text, projector, vision = split_weights(weights)
    report = [f"{len(group):,} weights of the {name}" for name, group in
              (("language model", text), ("projector", projector), ("vision tower", vision)) if group]  # fmt: skip
    if config.get("mm_use_im_start_end") or config.get("mm_use_im_patch_token"):
        raise ValueError(
            f"{source}: marks its pictures with tokens of their own (mm_use_im_start_end), which is not done here"
        )
    if (ratio := config.get("image_aspect_ratio", "square")) != "square":
        report.append(
            f"beware: trained with image_aspect_ratio {ratio}; here the tower's own preprocessor crops"
        )
    if not projector:
        raise ValueError(
            f"{source}: no projector among its {len(weights)} weights: {sorted(weights)[:5]}"
        )

    stock = "text_config" in config
    tower_name = vision_tower or config.get("mm_vision_tower")
    if stock and vision:
        tower_name = _write_tower(config["vision_config"], vision, folder, output / "vision_tower")
    if tower_name is None:
        raise ValueError(
            f"{source}: does not say which vision tower it was trained with: name it with --vision-tower"
        )
    lora = folder / "adapter_config.json"
    whole = bool(text) and not lora.is_file()
    base = str(folder) if whole else model_base
    if base is None:
        raise ValueError(
            f"{source}: holds no language model: name the one it was trained on with --model-base"
        )
    depth = sum(weight.dim() == 2 for weight in projector.values())
    layer = config.get("vision_feature_layer", config.get("mm_vision_select_layer", -2))
    full = (
        config.get("vision_feature_select_strategy") == "full"
        or config.get("mm_vision_select_feature") == "cls_patch"
    )
    # a tower without a CLS token has nothing to drop: its patches are all there is
    if full and stock and config["vision_config"].get("model_type", "").startswith("siglip"):
        full = False
    architecture = LlavaConfig(
        language_model=resolve_path(base)
        if not whole
        else str(output.resolve() / "language_model"),
        vision_tower=resolve_path(tower_name),
        mm_projector_type="linear" if depth == 1 else f"mlp{depth}x_gelu",
        mm_vision_select_layer=tuple(layer) if isinstance(layer, list) else layer,
        mm_vision_select_feature="cls_patch" if full else "patch",
        template=template,
        instruction=instruction,
        dtype=str(next(iter(text.values())).dtype).removeprefix("torch.") if whole else "float32",
        weights_digests={
            "vision_tower": weights_digest(tower_name),
            **({} if whole else {"language_model": weights_digest(base)}),
        },
    )
    model = _whole_model(architecture, config, text, folder) if whole else build_model(architecture)
    if vision and not stock:
        report.append(_check_tower(model.vision_tower, vision))
    _fill(model.projector, projector, "projector")
    if lora.is_file():
        _add_adapter(model, lora, text)
    # Trained is what the source brings weights of: they are stored in the checkpoint.
    language_model: Literal["none", "adapter", "full"] = "full" if whole else "none"
    if lora.is_file():
        language_model = "adapter"
    parts = TrainedParts(language_model, "full" if stock and vision else "none")
    save_checkpoint(model, output, architecture, parts, {"imported_from": source.name})
    return report


def read_weights(source: Path) -> Weights:
    """All tensors of a folder's weight files, or of one file. Pickles are read as tensors and nothing else.

    Raises:
        ValueError: no weight files, or a pickle that holds more than tensors.
    """
    from pickle import UnpicklingError

    from safetensors.torch import load_file

    names = r"(pytorch_model|model|adapter_model|non_lora_trainables|mm_projector)\b.*\.(safetensors|bin)"
    files = (
        [p for p in sorted(source.iterdir()) if re.fullmatch(names, p.name)]
        if source.is_dir()
        else [source]
    )
    weights: Weights = {}
    for path in files:
        try:
            if path.suffix == ".safetensors":
                weights |= load_file(path)
            else:
                weights |= torch.load(path, "cpu", weights_only=True, mmap=is_zipfile(path))
        except (UnpicklingError, RuntimeError, OSError) as error:
            raise ValueError(f"{path}: not a file of tensors: {error}") from error
    if not weights:
        raise ValueError(f"{source}: no weights (.safetensors or .bin) there")
    return weights


def split_weights(weights: Weights) -> tuple[Weights, Weights, Weights]:
    """(language model, projector, vision tower), each under the names of its own model, whoever wrote them."""
    text: Weights = {}
    projector: Weights = {}
    vision: Weights = {}
    for name, tensor in weights.items():
        if "rotary_emb.inv_freq" in name or name.endswith("position_ids"):
            continue  # buffers that old versions saved; they are computed
        plain = re.sub(r"^(base_model\.model\.)", "", name) if "lora_" not in name else name
        if match := re.match(r"(?:model\.)?(?:mm_projector|multi_modal_projector)\.(.+)$", plain):
            # stock LLaVA counts layers, the original their places in a Sequential
            place = re.sub(r"^linear_(\d)\.", lambda m: f"{2 * int(m[1]) - 2}.", match[1])
            projector[place] = tensor
        elif match := re.match(r"(?:model\.)?vision_tower\.(?:vision_tower\.)?(.+)$", plain):
            vision[match[1]] = tensor
        else:
            # stock: language_model.model.layers..., or since transformers 5 model.language_model.layers...
            renamed = re.sub(
                r"^model\.language_model\.", "model.", re.sub(r"^language_model\.", "", plain)
            )
            text[renamed] = tensor
    return text, projector, vision


def _whole_model(
    architecture: LlavaConfig, config: dict[str, Any], text: Weights, folder: Path
) -> Llava:
    """A model whose language model's weights come with it."""
    from transformers import AutoConfig

    settings = dict(config.get("text_config", config))
    kind = settings.pop("model_type").replace("llava_", "").replace("llava", "llama")
    own = {
        key: value
        for key, value in settings.items()
        if not key.startswith("mm_") and key != "architectures"
    }
    text_config = AutoConfig.for_model(kind, **own)
    model = build_model(
        architecture, language_model=text_config, tokenizer=load_tokenizer(str(folder))
    )
    if text_config.tie_word_embeddings and "lm_head.weight" not in text:
        text = {**text, "lm_head.weight": text["model.embed_tokens.weight"]}
    _fill(model.language_model, text, "language model")
    return model


def _fill(module: nn.Module | Module, weights: Weights, name: str) -> None:
    expected = module.state_dict()
    if (
        set(weights) != set(expected)
        and len(expected) == 2
        and {"0.weight", "0.bias"} == set(weights)
    ):
        weights = {
            key.removeprefix("0."): value for key, value in weights.items()
        }  # a Sequential of one layer
    check_state_dict(weights, expected, name)
    module.load_state_dict(weights)


def _write_tower(config: dict[str, Any], vision: Weights, folder: Path, target: Path) -> str:
    """A stock folder carries its tower: it becomes a model folder of its own."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    settings = dict(config)
    tower = AutoModel.from_config(
        AutoConfig.for_model(settings.pop("model_type"), **settings), dtype=torch.float32
    )
    own = {
        name.removeprefix("vision_model."): name for name in tower.state_dict()
    }  # a prefix of some versions only
    bare = {name.removeprefix("vision_model."): value for name, value in vision.items()}
    _fill(tower, {own.get(name, name): value for name, value in bare.items()}, "vision tower")
    tower.save_pretrained(target)
    AutoImageProcessor.from_pretrained(str(folder), backend="pil").save_pretrained(target)
    return str(target)


def _check_tower(tower: VisionTower, vision: Weights) -> str:
    """The original writes its frozen tower along: it must be the one that is used here."""
    ours = {
        name.removeprefix("vision_model."): value
        for name, value in tower.model.state_dict().items()
    }
    for name, value in vision.items():
        own = ours.get(name.removeprefix("vision_model."))
        rounding = 2**-8  # of bfloat16, in which either may have been kept
        if (
            own is None
            or own.shape != value.shape
            or not torch.allclose(own.float(), value.float(), rounding, 1e-3)
        ):
            raise ValueError(
                f"vision tower: {name} is not the weight of the tower named: it was trained too, or another one was used; "
                "name a folder of the right one with --vision-tower"
            )
    return "the vision tower's weights are those of the tower named"


def _add_adapter(model: Llava, config: Path, weights: Weights) -> None:
    from peft import (
        PeftConfig,
        get_peft_model,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )

    text: Any = model.language_model
    adapted: Any = get_peft_model(text, PeftConfig.from_pretrained(str(config.parent)))
    check_state_dict(weights, get_peft_model_state_dict(adapted), "adapter")
    set_peft_model_state_dict(adapted, weights)
    model.language_model = adapted

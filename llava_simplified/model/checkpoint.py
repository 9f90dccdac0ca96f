"""Build a model from its parts; save what was trained; load it again with nothing but the folder."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import cached_file

from llava_simplified.model.build import build_model, load_tokenizer
from llava_simplified.model.config import (
    CONFIG_NAME,
    FORMAT_VERSION,
    LlavaConfig,
    read_checkpoint_config,
)
from llava_simplified.model.llava import Llava
from llava_simplified.model.vision import check_missing_keys
from llava_simplified.model.weights import check_state_dict, check_weights_digest, filter_prefix

_LIBRARIES = ("llava-simplified", "torch", "transformers", "peft", "safetensors")


def save_checkpoint(
    model: Llava,
    folder: str | Path,
    architecture: LlavaConfig,
    training: Mapping[str, Any] | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write all that was trained, and the names of what was not.

    The folder appears whole or not at all: it is written under a temporary name and renamed. Where it exists (an
    output folder with logs in it), the files are moved in, `llava.json` last.

    Args:
        training: what a reader wants to know of the run (data, steps, settings): kept in `llava.json`.
        state_dict: what was trained, where an engine has had to gather it.
    """
    folder = Path(folder)
    part = folder.with_name(f".{folder.name}.part{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    weights = dict(state_dict if state_dict is not None else model.state_dict())
    save_file(
        filter_prefix(weights, "projector."),
        part / "projector.safetensors",
        metadata={"format": "pt"},
    )
    text: Any = model.language_model
    trained = kind_of(model)
    if trained == "adapter":
        text.save_pretrained(
            str(part / "adapter"),
            state_dict=filter_prefix(weights, "language_model."),
            save_embedding_layers=False,  # they are never trained here; "auto" would ask the hub
        )
    elif trained == "language_model":
        text.save_pretrained(
            str(part / "language_model"), state_dict=filter_prefix(weights, "language_model.")
        )
        model.tokenizer.save_pretrained(str(part / "language_model"))  # a model folder like others
    model.tokenizer.save_pretrained(str(part))
    processor = str(cached_file(architecture.vision_tower, "preprocessor_config.json"))
    shutil.copyfile(processor, part / "preprocessor_config.json")
    vision: Any = model.vision_tower.model
    trained_tower = tower_of(model)
    if trained_tower == "lora":
        state = filter_prefix(weights, "vision_tower.model.")
        vision.save_pretrained(
            str(part / "vision_adapter"), state_dict=state, save_embedding_layers=False
        )
    elif (
        trained_tower == "full"
    ):  # a model folder like others: `--vision_tower CHECKPOINT/vision_tower`
        vision.save_pretrained(
            str(part / "vision_tower"), state_dict=filter_prefix(weights, "vision_tower.model.")
        )
        shutil.copyfile(processor, part / "vision_tower" / "preprocessor_config.json")
    manifest = {
        "format_version": FORMAT_VERSION,
        "architecture": asdict(architecture),
        "trained": trained,
        "trained_tower": trained_tower,
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "training": dict(training or {}),
    }
    (part / CONFIG_NAME).write_text(
        json.dumps(manifest, indent=2, default=str) + "\n", encoding="utf-8"
    )
    _move_into_place(part, folder)


def kind_of(model: Llava) -> str:
    """What is trained beside the projector: "adapter", "language_model", or "projector": nothing."""
    if isinstance(model.language_model, PeftModel):
        return "adapter"
    return (
        "language_model"
        if any(p.requires_grad for p in model.language_model.parameters())
        else "projector"
    )


def tower_of(model: Llava) -> str:
    """What of the vision tower is trained: "off", "full" or "lora"."""
    if isinstance(model.vision_tower.model, PeftModel):
        return "lora"
    return "off" if model.vision_tower.frozen else "full"


def _move_into_place(part: Path, folder: Path) -> None:
    if not folder.exists():
        part.rename(folder)
        return
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    for entry in sorted(part.iterdir(), key=lambda path: path.name == CONFIG_NAME):
        target = folder / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        entry.replace(target)
    part.rmdir()


def copy_checkpoint(source: str | Path, folder: str | Path) -> None:
    """A checkpoint into another folder, without its trainer's state; whole or not at all, as `save_checkpoint`."""
    folder = Path(folder)
    part = folder.with_name(f".{folder.name}.part{os.getpid()}")
    shutil.copytree(source, part, ignore=shutil.ignore_patterns("trainer_state"))
    _move_into_place(part, folder)


def load_checkpoint(
    folder: str | Path,
    *,
    model_base: str | None = None,
    vision_tower: str | None = None,
    dtype: str | None = None,
    bits: int | None = None,
    device: str | torch.device | None = None,
    trainable: bool = False,
    merge: bool = False,
    **model_options: Any,
) -> Llava:
    """Load a checkpoint, strictly: a missing or unexpected weight is an error that names it.

    Args:
        model_base, vision_tower: where the base weights are now, if not where they were at training.
        dtype, bits: of the frozen weights; what training used, where not given.
        device: the accelerator where there is one, else the CPU.
        trainable: keep the adapter's gradients on, to train further.
        merge: put the adapters into the weights; quantised ones become whole before, with the values that were trained with.
    """
    folder = Path(folder)
    manifest = read_checkpoint_config(folder)
    changes = {
        "language_model": model_base,
        "vision_tower": vision_tower,
        "dtype": dtype,
        "bits": bits,
    }
    architecture = LlavaConfig(
        **{**manifest["architecture"], **{k: v for k, v in changes.items() if v}}
    )
    kind = manifest["trained"]
    tower_kind = manifest.get("trained_tower", "off")
    inside = {  # parts that were trained whole lie in the checkpoint
        "language_model": folder / "language_model" if kind == "language_model" else None,
        "vision_tower": folder / "vision_tower" if tower_kind == "full" else None,
    }
    for name, digest in architecture.fingerprints.items():
        if inside[name] is None:
            check_weights_digest(name, getattr(architecture, name), digest)
    tokenizer = load_tokenizer(str(folder))
    model = build_model(architecture, tokenizer=tokenizer, **inside, **model_options)
    load_projector(model.projector, folder)
    tower, text = model.vision_tower, cast(Any, model.language_model)
    if merge and architecture.bits != 16:
        text = text.dequantize()
    if kind == "adapter":
        text = _with_adapter(text, folder / "adapter", merge)
    if tower_kind == "lora":
        tower.model = _with_adapter(tower.model, folder / "vision_adapter", merge)
    model.language_model = text
    if tower_kind == "off":
        tower.requires_grad_(False)
    if not trainable:
        model.requires_grad_(False)
    return model.eval().to(
        device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    )


def load_trained_weights(model: Llava, folder: str | Path) -> None:
    """Fill a model of the same architecture with what a checkpoint trained, strictly."""
    folder, manifest = Path(folder), read_checkpoint_config(folder)
    load_projector(model.projector, folder)
    parts: list[tuple[Any, str, str]] = []
    if manifest["trained"] != "projector":
        parts.append((model.language_model, "adapter", "language_model"))
    if manifest.get("trained_tower", "off") != "off":
        parts.append((model.vision_tower.model, "vision_adapter", "vision_tower"))
    for part, adapter, whole in parts:
        if isinstance(part, PeftModel) and (folder / adapter).is_dir():
            _load_adapter(part, folder / adapter)
        elif not isinstance(
            part, PeftModel
        ):  # else a new adapter, on weights that were loaded from there
            stored, report = type(part).from_pretrained(
                folder / whole, dtype=part.dtype, output_loading_info=True
            )
            check_missing_keys(str(folder / whole), report["missing_keys"])
            part.load_state_dict(stored.state_dict())


def _with_adapter(model: Any, folder: Path, merge: bool) -> Any:
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = (
        False  # it is saved as True, and would freeze an adapter that is to be trained further
    )
    adapted = get_peft_model(model, config)
    _load_adapter(adapted, folder)
    return cast(Any, adapted).merge_and_unload() if merge else adapted


def _load_adapter(model: PeftModel, folder: Path) -> None:
    now, before = (
        cast(Any, model.peft_config["default"]),
        cast(Any, PeftConfig.from_pretrained(str(folder))),
    )
    if (now.r, now.lora_alpha) != (before.r, before.lora_alpha):
        raise ValueError(
            f"{folder}: --lora_r {before.r} --lora_alpha {before.lora_alpha:g}, as it was trained with"
        )
    stored = load_file(folder / "adapter_model.safetensors")
    check_state_dict(stored, get_peft_model_state_dict(model), str(folder))
    set_peft_model_state_dict(model, stored)


def load_projector(projector: nn.Module, folder: str | Path) -> None:
    """Fill a projector from a checkpoint folder.

    Raises:
        ValueError: names the weights that are missing, unexpected or of another shape.
    """
    path = Path(folder) / "projector.safetensors"
    if not path.is_file():
        raise ValueError(f"{folder}: no projector.safetensors: this is not a checkpoint")
    stored = load_file(path)
    check_state_dict(stored, projector.state_dict(), str(path))
    projector.load_state_dict(stored)

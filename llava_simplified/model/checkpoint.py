"""Build a model from its parts; save what was trained; load it again with nothing but the folder."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from llava_simplified.model.llava import DEFAULT_INSTRUCTION, Llava
from llava_simplified.model.projector import build_projector
from llava_simplified.model.vision import VisionTower

FORMAT_VERSION = 1
MANIFEST = "llava.json"
_LIBRARIES = ("llava-simplified", "torch", "transformers", "peft", "safetensors")


@dataclass(frozen=True)
class Architecture:
    """Everything that decides the shape and the wording of a model; the weights apart."""

    language_model: str
    vision_tower: str
    mm_projector_type: str = "linear"
    mm_vision_select_layer: int | tuple[int, ...] = -2
    mm_vision_select_feature: str = "patch"
    mm_token_pool: int = 0
    template: str = "auto"
    instruction: str = DEFAULT_INSTRUCTION
    dtype: str = "float32"
    fingerprints: dict[str, str] = field(default_factory=dict)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer, with a pad token (the end token where it has none: padding is masked, never trained).

    Raises:
        ValueError: there is no tokenizer, or it has no end token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except OSError as error:
        raise ValueError(f"{name_or_path}: no tokenizer to load: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{name_or_path}: the tokenizer has no end-of-sequence token: a caption could never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def assemble(
    architecture: Architecture,
    *,
    language_model: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **model_options: Any,
) -> Llava:
    """Load the pretrained parts and join them by a fresh projector (float32, as all that is trained).

    Args:
        language_model: load the language model from here instead of `architecture.language_model`.
        model_options: go to `AutoModelForCausalLM.from_pretrained` (attn_implementation, quantization_config).
    """
    dtype = getattr(torch, architecture.dtype)
    tower = VisionTower.from_pretrained(
        architecture.vision_tower,
        dtype=dtype,
        select_layer=architecture.mm_vision_select_layer,
        select_feature=architecture.mm_vision_select_feature,
        token_pool=architecture.mm_token_pool,
    )
    source = str(language_model or architecture.language_model)
    text: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **model_options)
    width = text.get_input_embeddings().weight.shape[1]
    projector = build_projector(architecture.mm_projector_type, tower.width, width)
    tokenizer = tokenizer or load_tokenizer(source)
    return Llava(tower, projector, text, tokenizer, architecture.template, architecture.instruction)


def save_checkpoint(
    model: Llava,
    folder: str | Path,
    architecture: Architecture,
    training: Mapping[str, Any] | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write all that was trained, and the names of what was not.

    The folder appears whole or not at all: it is written under a temporary name and renamed. Where it exists (an
    output folder with logs in it), the files are moved in, `llava.json` last.

    Args:
        training: what a reader wants to know of the run (data, steps, settings): kept in `llava.json`.
        state_dict: the whole model's weights, where an engine has had to gather them.
    """
    folder = Path(folder)
    part = folder.with_name(f".{folder.name}.part{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    weights = dict(state_dict if state_dict is not None else model.state_dict())
    save_file(_under(weights, "projector."), part / "projector.safetensors", metadata={"format": "pt"})
    text: Any = model.language_model
    trained = kind_of(model)
    if trained == "adapter":
        text.save_pretrained(
            str(part / "adapter"),
            state_dict=_under(weights, "language_model."),
            save_embedding_layers=False,  # they are never trained here; "auto" would ask the hub
        )
    elif trained == "language_model":
        text.save_pretrained(str(part / "language_model"), state_dict=_under(weights, "language_model."))
    model.tokenizer.save_pretrained(str(part))
    processor = cached_file(architecture.vision_tower, "preprocessor_config.json")
    shutil.copyfile(str(processor), part / "preprocessor_config.json")
    manifest = {
        "format_version": FORMAT_VERSION,
        "architecture": asdict(architecture),
        "trained": trained,
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "training": dict(training or {}),
    }
    (part / MANIFEST).write_text(json.dumps(manifest, indent=2, default=str) + "\n", encoding="utf-8")
    _move_into_place(part, folder)


def kind_of(model: Llava) -> str:
    """What is trained beside the projector: "adapter", "language_model", or "projector": nothing."""
    if isinstance(model.language_model, PeftModel):
        return "adapter"
    return "language_model" if any(p.requires_grad for p in model.language_model.parameters()) else "projector"


def _under(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v.contiguous() for k, v in weights.items() if k.startswith(prefix)}


def _move_into_place(part: Path, folder: Path) -> None:
    if not folder.exists():
        part.rename(folder)
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    for entry in sorted(part.iterdir(), key=lambda path: path.name == MANIFEST):
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


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """`llava.json` of a checkpoint.

    Raises:
        ValueError: the folder is none, is unfinished, or was written by a later format.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        found = sorted(str(p.parent) for p in Path(folder).glob(f"*/{MANIFEST}")) if Path(folder).is_dir() else []
        hint = f"; did you mean {found[-1]}?" if found else ""
        raise ValueError(f"{folder}: no checkpoint here ({MANIFEST} is missing){hint}")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: format {manifest.get('format_version')}, this version reads {FORMAT_VERSION}")
    return manifest


def _architecture(manifest: Mapping[str, Any]) -> Architecture:
    values = dict(manifest["architecture"])
    if isinstance(values["mm_vision_select_layer"], list):
        values["mm_vision_select_layer"] = tuple(values["mm_vision_select_layer"])
    return Architecture(**values)


def load_checkpoint(
    folder: str | Path,
    *,
    model_base: str | None = None,
    vision_tower: str | None = None,
    dtype: str | None = None,
    device: str | torch.device | None = None,
    trainable: bool = False,
    **model_options: Any,
) -> Llava:
    """Load a checkpoint, strictly: a missing or unexpected weight is an error that names it.

    Args:
        model_base, vision_tower: where the base weights are now, if not where they were at training.
        dtype: of the frozen weights; what training used, where not given.
        device: the accelerator where there is one, else the CPU.
        trainable: keep the adapter's gradients on, to train further.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    architecture = _architecture(manifest)
    changes = {"language_model": model_base, "vision_tower": vision_tower, "dtype": dtype}
    architecture = Architecture(**{**asdict(architecture), **{k: v for k, v in changes.items() if v}})
    kind = manifest["trained"]
    text_source = folder / "language_model" if kind == "language_model" else architecture.language_model
    for name, digest in architecture.fingerprints.items():
        if name == "language_model" and kind == "language_model":
            continue  # its weights lie in the checkpoint
        check_fingerprint(name, getattr(architecture, name), digest)
    tokenizer = load_tokenizer(str(folder))
    model = assemble(architecture, language_model=text_source, tokenizer=tokenizer, **model_options)
    if kind == "adapter":
        config = PeftConfig.from_pretrained(str(folder / "adapter"))
        model.language_model = get_peft_model(model.language_model, config)
    if kind != "language_model":  # that one has been read by `assemble`
        load_trained_weights(model, folder)
    else:
        load_projector(model.projector, folder)
    model.vision_tower.requires_grad_(False)
    if not trainable:
        model.requires_grad_(False)
    return model.eval().to(device or _default_device())


def load_trained_weights(model: Llava, folder: str | Path) -> None:
    """Fill a model of the same architecture with what a checkpoint trained, strictly."""
    folder = Path(folder)
    load_projector(model.projector, folder)
    text = model.language_model
    if isinstance(text, PeftModel):
        path = folder / "adapter" / "adapter_model.safetensors"
        stored = load_file(path)
        _same_keys(stored.keys(), get_peft_model_state_dict(text).keys(), path)
        set_peft_model_state_dict(text, stored)
    elif (folder / "language_model").is_dir():
        trained = type(text).from_pretrained(folder / "language_model", dtype=text.dtype)
        text.load_state_dict(trained.state_dict())


def load_projector(projector: nn.Module, folder: str | Path) -> None:
    """Fill a projector from a checkpoint folder.

    Raises:
        ValueError: names the weights that are missing, unexpected or of another shape.
    """
    path = Path(folder) / "projector.safetensors"
    if not path.is_file():
        raise ValueError(f"{folder}: no projector.safetensors: this is not a checkpoint")
    stored, expected = load_file(path), projector.state_dict()
    _same_keys(stored.keys(), expected.keys(), path)
    for name, tensor in stored.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{path}: {name} is {tuple(tensor.shape)}, this model needs {tuple(expected[name].shape)}")
    projector.load_state_dict(stored)


def _same_keys(stored: Any, expected: Any, where: Path) -> None:
    missing, unexpected = sorted(set(expected) - set(stored)), sorted(set(stored) - set(expected))
    if missing or unexpected:
        raise ValueError(f"{where}: missing {missing[:5] or 'none'}, unexpected {unexpected[:5] or 'none'}")


def fingerprint(name_or_path: str) -> str:
    """A digest that tells base weights apart: names, sizes, and samples of every weight file.

    Samples, since reading 14 GB to load an adapter of 100 MB would take longer than the loading.
    """
    config = cached_file(name_or_path, "config.json")
    files = sorted(p for p in Path(str(config)).parent.iterdir() if p.suffix in (".safetensors", ".bin", ".gguf"))
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as stream:
            for sample in range(256):
                stream.seek(size * sample // 256)
                digest.update(stream.read(4096))
    return digest.hexdigest()


def check_fingerprint(part: str, name_or_path: str, digest: str) -> None:
    """Raise ValueError where the base weights are not those that the checkpoint was trained with."""
    try:
        found = fingerprint(name_or_path)
    except OSError as error:
        option = "--model-base" if part == "language_model" else "--vision-tower"
        raise ValueError(
            f"the checkpoint's {part} {name_or_path} is not here; name it with {option}: {error}"
        ) from error
    if found != digest:
        raise ValueError(
            f"{part} {name_or_path}: other weights than those that this checkpoint was trained with; "
            "an adapter fits only the weights that it was trained on"
        )


def _default_device() -> torch.device:
    return torch.accelerator.current_accelerator() or torch.device("cpu")

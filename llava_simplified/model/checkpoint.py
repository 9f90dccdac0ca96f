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
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase
from transformers.integrations import validate_bnb_backend_availability
from transformers.utils import cached_file, is_bitsandbytes_available

from llava_simplified.model.llava import DEFAULT_INSTRUCTION, Llava
from llava_simplified.model.projector import build_projector
from llava_simplified.model.vision import VisionTower, refuse_random

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
    bits: int = 16
    fingerprints: dict[str, str] = field(default_factory=dict)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer, with a pad token (the end token where it has none: padding is masked, never trained).

    Raises:
        ValueError: there is no tokenizer, or it has no end token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        if Path(name_or_path).is_dir() and not (Path(name_or_path) / "tokenizer.json").is_file():
            raise ValueError(f"the tokenizer's tokenizer.json is missing: put it into {name_or_path}") from error
        raise ValueError(f"{name_or_path}: no tokenizer to load: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{name_or_path}: the tokenizer has no end-of-sequence token (tokenizer_config.json names it): a caption "
            "could never end"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def assemble(
    architecture: Architecture,
    *,
    language_model: str | Path | None = None,
    vision_tower: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **model_options: Any,
) -> Llava:
    """Load the pretrained parts and join them by a fresh projector (float32, as all that is trained).

    Args:
        language_model, vision_tower: load them from here instead of where `architecture` says.
        model_options: go to `AutoModelForCausalLM.from_pretrained` (attn_implementation).

    Raises:
        ValueError: a part can't be loaded, or not whole.
    """
    dtype = getattr(torch, architecture.dtype)
    if architecture.bits != 16:
        model_options["quantization_config"] = quantization(architecture.bits, dtype)
    tower = VisionTower.from_pretrained(
        str(vision_tower or architecture.vision_tower),
        dtype=dtype,
        select_layer=architecture.mm_vision_select_layer,
        select_feature=architecture.mm_vision_select_feature,
        token_pool=architecture.mm_token_pool,
    )
    source = str(language_model or architecture.language_model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **model_options)
    text, report = loaded
    refuse_random(source, report["missing_keys"])
    for module in text.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # rounds the 4-bit weights' scales, in evaluation mode alone
            module.support_avx512bf16_for_cpu = False
    width = text.get_input_embeddings().weight.shape[1]
    projector = build_projector(architecture.mm_projector_type, tower.width, width)
    tokenizer = tokenizer or load_tokenizer(source)
    return Llava(tower, projector, text, tokenizer, architecture.template, architecture.instruction)


def quantization(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    """How a frozen language model is kept in 4 bits (NF4: Dettmers et al., QLoRA, 2023) or 8; its head and norms stay in `dtype`.

    Raises:
        ValueError: other bits; or bitsandbytes is not there, or not for this machine.
    """
    if bits not in (4, 8):
        raise ValueError(f"--bits is 4, 8 or 16, not {bits}")
    if not is_bitsandbytes_available():
        raise ValueError(f"--bits {bits} needs bitsandbytes: pip install 'llava-simplified[quant]'; or --bits 16")
    if not validate_bnb_backend_availability():
        raise ValueError(f"--bits {bits}: bitsandbytes does not know this machine's devices: --bits 16")
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


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
        state_dict: what was trained, where an engine has had to gather it.
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
        model.tokenizer.save_pretrained(str(part / "language_model"))  # a model folder like others
    model.tokenizer.save_pretrained(str(part))
    processor = str(cached_file(architecture.vision_tower, "preprocessor_config.json"))
    shutil.copyfile(processor, part / "preprocessor_config.json")
    vision: Any = model.vision_tower.model
    trained_tower = tower_of(model)
    if trained_tower == "lora":
        state = _under(weights, "vision_tower.model.")
        vision.save_pretrained(str(part / "vision_adapter"), state_dict=state, save_embedding_layers=False)
    elif trained_tower == "full":  # a model folder like others: `--vision_tower CHECKPOINT/vision_tower`
        vision.save_pretrained(str(part / "vision_tower"), state_dict=_under(weights, "vision_tower.model."))
        shutil.copyfile(processor, part / "vision_tower" / "preprocessor_config.json")
    manifest = {
        "format_version": FORMAT_VERSION,
        "architecture": asdict(architecture),
        "trained": trained,
        "trained_tower": trained_tower,
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


def tower_of(model: Llava) -> str:
    """What of the vision tower is trained: "off", "full" or "lora"."""
    if isinstance(model.vision_tower.model, PeftModel):
        return "lora"
    return "off" if model.vision_tower.frozen else "full"


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
        found = sorted(Path(folder).glob(f"*/{MANIFEST}"), key=lambda path: path.stat().st_mtime)
        hint = f"; did you mean {found[-1].parent}?" if found else "; `llava import` makes one of mm_projector.bin"
        raise ValueError(f"{folder}: no checkpoint here ({MANIFEST} is missing){hint}")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: format {manifest.get('format_version')}, this version reads {FORMAT_VERSION}")
    return manifest


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
    manifest = read_manifest(folder)
    changes = {"language_model": model_base, "vision_tower": vision_tower, "dtype": dtype, "bits": bits}
    architecture = Architecture(**{**manifest["architecture"], **{k: v for k, v in changes.items() if v}})
    kind = manifest["trained"]
    tower_kind = manifest.get("trained_tower", "off")
    inside = {  # parts that were trained whole lie in the checkpoint
        "language_model": folder / "language_model" if kind == "language_model" else None,
        "vision_tower": folder / "vision_tower" if tower_kind == "full" else None,
    }
    for name, digest in architecture.fingerprints.items():
        if inside[name] is None:
            check_fingerprint(name, getattr(architecture, name), digest)
    tokenizer = load_tokenizer(str(folder))
    model = assemble(architecture, tokenizer=tokenizer, **inside, **model_options)
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
    return model.eval().to(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")


def load_trained_weights(model: Llava, folder: str | Path) -> None:
    """Fill a model of the same architecture with what a checkpoint trained, strictly."""
    folder, manifest = Path(folder), read_manifest(folder)
    load_projector(model.projector, folder)
    parts: list[tuple[Any, str, str]] = []
    if manifest["trained"] != "projector":
        parts.append((model.language_model, "adapter", "language_model"))
    if manifest.get("trained_tower", "off") != "off":
        parts.append((model.vision_tower.model, "vision_adapter", "vision_tower"))
    for part, adapter, whole in parts:
        if isinstance(part, PeftModel) and (folder / adapter).is_dir():
            _load_adapter(part, folder / adapter)
        elif not isinstance(part, PeftModel):  # else a new adapter, on weights that were loaded from there
            stored, report = type(part).from_pretrained(folder / whole, dtype=part.dtype, output_loading_info=True)
            refuse_random(str(folder / whole), report["missing_keys"])
            part.load_state_dict(stored.state_dict())


def _with_adapter(model: Any, folder: Path, merge: bool) -> Any:
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False  # it is saved as True, and would freeze an adapter that is to be trained further
    adapted = get_peft_model(model, config)
    _load_adapter(adapted, folder)
    return cast(Any, adapted).merge_and_unload() if merge else adapted


def _load_adapter(model: PeftModel, folder: Path) -> None:
    now, before = cast(Any, model.peft_config["default"]), cast(Any, PeftConfig.from_pretrained(str(folder)))
    if (now.r, now.lora_alpha) != (before.r, before.lora_alpha):
        raise ValueError(f"{folder}: --lora_r {before.r} --lora_alpha {before.lora_alpha:g}, as it was trained with")
    stored = load_file(folder / "adapter_model.safetensors")
    same_weights(stored, get_peft_model_state_dict(model), str(folder))
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
    same_weights(stored, projector.state_dict(), str(path))
    projector.load_state_dict(stored)


def same_weights(stored: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise ValueError, naming them, where weights are missing, have no place, or have another shape."""
    missing, unexpected = sorted(set(expected) - set(stored)), sorted(set(stored) - set(expected))
    if missing or unexpected:
        raise ValueError(f"{where}: missing {missing[:5] or 'none'}, unexpected {unexpected[:5] or 'none'}")
    for name, weight in stored.items():
        if weight.shape != expected[name].shape:
            raise ValueError(f"{where}: {name} is {tuple(weight.shape)}, the model needs {tuple(expected[name].shape)}")


def weight_files(name_or_path: str) -> list[Path]:
    """The files that a model's weights are read from, in the order in which transformers looks for them; a hub's are fetched.

    Raises:
        OSError: one is missing (the message says which, and where it belongs).
    """
    here = Path(name_or_path).is_dir()

    def has(name: str) -> bool:
        return cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False) is not None

    def find(name: str) -> Path:
        try:
            path = cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=not here)
        except OSError as error:
            raise OSError(f"no {name}; name a folder with all its files: {error}") from error
        if path is None:
            raise FileNotFoundError(f"{name} is missing: put it into {name_or_path}")
        return Path(path)

    find("config.json")
    for name in ("model.safetensors", "pytorch_model.bin"):
        if has(name):
            return [find(name)]
        if has(index := f"{name}.index.json"):
            shards = json.loads(find(index).read_text(encoding="utf-8"))["weight_map"].values()
            return [find(shard) for shard in sorted(set(shards))]
    in_shards = here and any(Path(name_or_path).glob("*-of-*"))
    return [find("model.safetensors.index.json" if in_shards else "model.safetensors")]


def fingerprint(name_or_path: str) -> str:
    """A digest that tells base weights apart: names, sizes, and samples of every weight file.

    Samples, since reading 14 GB to load an adapter of 100 MB would take longer than the loading.

    Raises:
        OSError: a file is missing.
    """
    digest = hashlib.sha256()
    for path in weight_files(name_or_path):
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
        raise ValueError(f"the checkpoint's {part} {name_or_path}: {error}. Where it is now: {option}") from error
    if found != digest:
        raise ValueError(
            f"{part} {name_or_path}: other weights than those that this checkpoint was trained with; "
            "what it trained fits only them"
        )


def absolute(name: str) -> str:
    """A local folder by its full path, so that a checkpoint finds it from anywhere; a hub name as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name

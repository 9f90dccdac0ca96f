"""Save the trained weights of a model to a folder, and load the model from that folder.

    my-checkpoint/
        llava.json                 checkpoint config: base models with digests, projector, what was trained
        projector.safetensors      always
        adapter/                   LoRA adapter of the language model, in PEFT's format
        language_model/            ... or the full language model, if its own weights were trained
        vision_adapter/            LoRA adapter of the vision tower
        vision_tower/              ... or the full vision tower, if its own weights were trained
        tokenizer.json, ...        the tokenizer
        preprocessor_config.json   how images are resized and normalized
        trainer_state/             what a resumed run needs (written by training)

A checkpoint does not contain the weights that were not trained. `llava.json` identifies them by name and by a
digest of their files. Loading fails if the digest differs, since adapters and projector fit only those weights.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import cached_file

from llava_simplified import __version__
from llava_simplified.foreign_files import blame_file, read_json_object, shorten
from llava_simplified.jobs import rename_folder, use_default_permissions
from llava_simplified.model.build import build_model, load_tokenizer
from llava_simplified.model.config import (
    CONFIG_NAME,
    DTYPES,
    FORMAT_VERSION,
    LlavaConfig,
    TrainedParts,
    read_checkpoint_config,
)
from llava_simplified.model.cpu_dtype import use_fast_dtype
from llava_simplified.model.int8_linear import check_int8_support, quantize_linear_layers
from llava_simplified.model.llava import Llava
from llava_simplified.model.lora import freeze
from llava_simplified.model.lora_options import CHANGES_FROZEN_WEIGHTS
from llava_simplified.model.peft_names import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from llava_simplified.model.pissa import (
    SCALED_FIELDS,
    initial_weights,
    join,
    joined_config,
    scaled_fields,
    split,
    subtract,
    uses_pissa,
)
from llava_simplified.model.protocols import CausalLM, PretrainedModule, VisionModel
from llava_simplified.model.vision import check_missing_keys
from llava_simplified.model.weights import check_state_dict, check_weights_digest, filter_prefix

# Folders of weights that a checkpoint contains only if the part was trained in this way.
_PART_FOLDERS = ("adapter", "language_model", "vision_adapter", "vision_tower")
_LIBRARIES = ("torch", "transformers", "peft", "safetensors")


def save_checkpoint(
    model: Llava,
    folder: str | Path,
    config: LlavaConfig,
    parts: TrainedParts,
    training: Mapping[str, Any] | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write the weights of all trained parts, and the names and digests of the frozen parts.

    The write is atomic: the checkpoint is written under a temporary name and renamed. If `folder` exists
    already (for example, an output folder with logs), the files are moved into it, `llava.json` last. A
    folder without that file is not a checkpoint, so an interrupted move leaves no incomplete checkpoint.

    Args:
        model: The model.
        folder: Output folder.
        config: Names of the base models, and how they are joined.
        parts: The parts that were trained. Exactly these are written.
        training: Options and progress of the run, stored in `llava.json`. A resumed run compares its options with
            them; they do not affect how the model is loaded.
        state_dict: The trained weights by name; by default the weights of `model`. Required if the weights of the
            model are sharded (ZeRO-3, FSDP): the caller must gather them.

    Raises:
        ValueError: `parts` contradicts the model: the model has an adapter that `parts` does not name,
            or lacks one that `parts` names.
    """
    _check_adapters(model, parts)
    folder = Path(folder)
    temporary = _temporary_folder(folder)
    temporary.mkdir(parents=True)
    # Names begin with the attribute of `Llava` that contains the part: "projector.", "language_model.", ...
    weights = dict(model.state_dict() if state_dict is None else state_dict)

    save_file(
        filter_prefix(weights, "projector."),
        temporary / "projector.safetensors",
        metadata={"format": "pt"},
    )
    model.tokenizer.save_pretrained(str(temporary))
    preprocessor = str(cached_file(config.vision_tower, "preprocessor_config.json"))
    shutil.copyfile(preprocessor, temporary / "preprocessor_config.json")

    text_weights = filter_prefix(weights, "language_model.")
    if parts.language_model == "adapter":
        _save_adapter(model.language_model, temporary / "adapter", text_weights)
    elif parts.language_model == "full":
        # Write a complete Transformers folder, so that any other tool can load it.
        target = temporary / "language_model"
        model.language_model.save_pretrained(str(target), state_dict=text_weights)
        model.tokenizer.save_pretrained(str(target))

    tower_weights = filter_prefix(weights, "vision_tower.model.")
    if parts.vision_tower == "lora":
        _save_adapter(model.vision_tower.model, temporary / "vision_adapter", tower_weights)
    elif parts.vision_tower == "full":
        # Write a complete Transformers folder here too, so that another run can start from it with
        # `--vision_tower CHECKPOINT/vision_tower`.
        target = temporary / "vision_tower"
        model.vision_tower.model.save_pretrained(str(target), state_dict=tower_weights)
        shutil.copyfile(preprocessor, target / "preprocessor_config.json")

    checkpoint_config = {
        "format_version": FORMAT_VERSION,
        "architecture": asdict(config),
        **parts.stored,
        "versions": _versions(),
        "training": dict(training or {}),
    }
    pissa = _pissa_entries(model.language_model)
    if pissa is not None:
        checkpoint_config["pissa"] = pissa
    text = json.dumps(checkpoint_config, indent=2, default=str)
    (temporary / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
    _move_into_place(temporary, folder, [config.language_model, config.vision_tower])


def copy_checkpoint(source: str | Path, folder: str | Path) -> None:
    """Copy a checkpoint into another folder without its trainer state, atomically."""
    folder = Path(folder)
    temporary = _temporary_folder(folder)
    shutil.copytree(source, temporary, ignore=shutil.ignore_patterns("trainer_state"))
    config = LlavaConfig.from_dict(read_checkpoint_config(source)["architecture"])
    _move_into_place(temporary, folder, [config.language_model, config.vision_tower])


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
    quantize: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> Llava:
    """Load a checkpoint. Missing and unexpected weights raise an error that names them.

    Args:
        folder: The checkpoint.
        model_base: Path of the language model's base weights, if they have moved since training.
        vision_tower: Path of the vision tower's base weights, if they have moved since training.
        dtype: Data type of the frozen weights ("float32", "bfloat16"), or "stored" for the one in the checkpoint,
            which is that of training. By default the one in the checkpoint, or float32 if the model generates
            on a CPU on which this is much faster.
        bits: Precision of the frozen language model (4, 8 or 16); by default as in training.
        device: Where to put the model; by default the accelerator if there is one, else the CPU.
        trainable: Enable gradients for the trained parts, to continue training them. Their weights are float32.
        merge: Merge the adapters into the weights. A quantized language model is dequantized first,
            so that the adapter is added to the values that it was trained with.
        quantize: "int8" merges the adapters and converts the language model's linear layers to 8 bits, for
            faster generation on a CPU; None keeps the weights as they are.
        attn_implementation: Attention kernel of the language model, as Transformers names it.
        trust_remote_code: Run the Python code that the language model or its tokenizer comes with.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: The folder is not a checkpoint; weights are missing or have an unexpected name or
            shape; or the base weights differ from those that were used in training. Or arguments contradict each
            other, or the language model does not support `quantize`.
    """
    folder = Path(folder)
    checkpoint_config = read_checkpoint_config(folder)
    parts = TrainedParts.from_stored(checkpoint_config)
    _check_dtype(dtype)
    config = LlavaConfig.from_dict(checkpoint_config["architecture"])
    config = replace(
        config,
        language_model=model_base or config.language_model,
        vision_tower=vision_tower or config.vision_tower,
        dtype=config.dtype if dtype in (None, "stored") else dtype,
        bits=bits or config.bits,
    )
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device = torch.device(device)
    if quantize:
        _check_quantize(quantize, device, config.bits, trainable)
        merge = True
    if merge and trainable:
        raise ValueError(
            "merged adapters cannot be trained; pass either merge or trainable, not both"
        )

    # If all weights of a part were trained, load it from the checkpoint. Otherwise, load its base model.
    trained_lm = folder / "language_model" if parts.language_model == "full" else None
    trained_tower = folder / "vision_tower" if parts.vision_tower == "full" else None
    tokenizer = load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
    # Values that the caller passed. An error that is caused by one of these is not the fault of llava.json.
    chosen = [name for name in (model_base, vision_tower, attn_implementation) if name]
    if bits:
        chosen.append(f"--bits {bits}")
    with _blame_config(folder, chosen):
        _verify_base_weights(config, trained_lm, trained_tower)
        model = build_model(
            config,
            language_model=trained_lm,
            vision_tower=trained_tower,
            tokenizer=tokenizer,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
    load_projector(model.projector, folder)
    if trainable:
        freeze(model, parts)
    # Add the adapters last, when the base weights are loaded and verified.
    language_model: Any = model.language_model
    if merge and config.bits != 16:
        language_model = language_model.dequantize()
    if parts.language_model == "adapter":
        pissa = _read_pissa_entries(checkpoint_config)
        language_model = _with_adapter(language_model, folder / "adapter", merge, pissa)
    model.language_model = cast(CausalLM, language_model)
    tower = model.vision_tower
    if parts.vision_tower == "lora":
        adapted: Any = _with_adapter(tower.model, folder / "vision_adapter", merge)
        tower.model = cast(VisionModel, adapted)

    if not trainable:
        model.requires_grad_(False)
    model.eval()
    if quantize:
        quantize_linear_layers(model.language_model)
    model.to(device)
    # Convert the weights at the end: they keep the precision of training, and those of quantized layers are gone.
    if dtype is None and device.type == "cpu" and config.bits == 16 and not trainable:
        use_fast_dtype(model)
    return model


def _verify_base_weights(
    config: LlavaConfig, trained_lm: Path | None, trained_tower: Path | None
) -> None:
    """Raise ValueError if base weights differ from those that were used in training.

    Call this before loading them: they may have 14 GB, and the check reads only samples of them.

    Args:
        config: The paths and digests of the base weights.
        trained_lm: Where the checkpoint has its own weights of the language model; None for base weights.
        trained_tower: The same for the vision tower.
    """
    digests = config.weights_digests
    if "language_model" in digests and trained_lm is None:
        check_weights_digest("language_model", config.language_model, digests["language_model"])
    if "vision_tower" in digests and trained_tower is None:
        check_weights_digest("vision_tower", config.vision_tower, digests["vision_tower"])


def _check_dtype(dtype: str | None) -> None:
    """Raise ValueError unless `dtype` is a value that `load_checkpoint` accepts."""
    if dtype not in (None, "stored", *DTYPES):
        raise ValueError(
            f'dtype must be "stored" or one of {", ".join(DTYPES)}, not {shorten(dtype)}'
        )


def _check_quantize(quantize: str, device: torch.device, bits: int, trainable: bool) -> None:
    """Raise ValueError if these arguments of `load_checkpoint` do not allow quantization."""
    if quantize != "int8":
        raise ValueError(f"quantize must be int8, not {shorten(quantize)}")
    if bits != 16:
        raise ValueError(
            f"--quantize int8: the weights have {bits} bits already; pass --bits 16, or leave out --quantize."
        )
    if trainable:
        raise ValueError(
            "a quantized model cannot be trained; pass either quantize or trainable, not both"
        )
    check_int8_support(device)


@contextmanager
def _blame_config(folder: Path, chosen: Sequence[str]) -> Iterator[None]:
    """Name `llava.json` in an error that one of its values causes, such as the path of a model that has moved.

    Args:
        folder: The checkpoint.
        chosen: Values that the caller passed instead of those in the file. An error is not changed if its
            message contains one of these values, or the folder of the checkpoint.

    Raises:
        ValueError: The same error, with the path of `llava.json` in its message.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        message = str(error)
        if str(folder) in message or any(name in message for name in chosen):
            raise
        raise ValueError(f"{folder / CONFIG_NAME}: {message}") from error


def load_trained_weights(model: Llava, folder: str | Path) -> None:
    """Load the trained weights of a checkpoint into a model that exists already.

    Args:
        model: A model with the same config. If the run trains adapters, they must have been added. An adapter
            that the checkpoint does not contain keeps its new weights. This happens if a run adds LoRA to a
            model whose own weights an earlier run trained; those were loaded as the base model.
        folder: The checkpoint.

    Raises:
        ValueError: Weights are missing, unexpected, or have another shape.
    """
    folder = Path(folder)
    checkpoint_config = read_checkpoint_config(folder)
    parts = TrainedParts.from_stored(checkpoint_config)
    # Every checkpoint contains the projector; the other parts only if they were trained.
    load_projector(model.projector, folder)
    if parts.language_model != "none":
        pissa = _read_pissa_entries(checkpoint_config)
        adapter = folder / "adapter" if parts.language_model == "adapter" else None
        _load_trained_part(model.language_model, adapter, folder / "language_model", pissa)
    if parts.vision_tower != "none":
        tower = model.vision_tower.model
        adapter = folder / "vision_adapter" if parts.vision_tower == "lora" else None
        _load_trained_part(tower, adapter, folder / "vision_tower")


def load_projector(projector: nn.Module, folder: str | Path) -> None:
    """Load a projector's weights from a checkpoint folder.

    Raises:
        ValueError: A weight is missing, unexpected, or has the wrong shape; the message names it.
    """
    path = Path(folder) / "projector.safetensors"
    if not path.is_file():
        raise ValueError(f"{folder}: not a checkpoint (projector.safetensors is missing)")
    with blame_file(path):
        stored = load_file(path)
    check_state_dict(stored, projector.state_dict(), str(path))
    projector.load_state_dict(stored)


# The entries of adapter_config.json that change what the adapter computes, with the types that are accepted.
_ADAPTER_TYPES: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "bias": (str,),
    "target_modules": (list,),
    "fan_in_fan_out": (bool,),
    "task_type": (str, type(None)),
    # `lora.py` sets the entries above. Those below differ from their defaults in imported adapters, and with
    # --lora_options.
    "use_rslora": (bool,),
    "use_dora": (bool,),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "modules_to_save": (list, type(None)),
}
# Maximum number of entries in `rank_pattern` and `alpha_pattern`. PEFT compares each entry with each module, so a
# malicious file could keep it busy.
_MAX_PATTERNS = 1000
# Entries that do not change what a trained adapter computes: where it comes from, and how it was initialized. They are
# ignored.
_IGNORED_ENTRIES = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "init_lora_weights",
)


def read_adapter_config(
    folder: Path, *, accept_pattern: bool = False, pissa: Mapping[str, Any] | None = None
) -> LoraConfig:
    """Read the `adapter_config.json` of a checkpoint.

    Only the entries that this package writes are used; all others must have their default values. PEFT supports
    many more entries and trusts them: "megatron_core", for example, names a Python module that PEFT imports.

    Args:
        folder: The folder of the adapter.
        accept_pattern: Accept a regular expression as `target_modules`. Matching a malicious expression may take
            forever.
        pissa: The entry "pissa" of `llava.json`: the values of the trained adapter. They replace the
            values in the file, which belong to the joined adapter (see pissa.py).

    Raises:
        ValueError: The file is missing or invalid, or requires something that this package does not write.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: {path.name} is missing. Copy the checkpoint again.")
    stored = read_json_object(path)
    if stored.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type must be LORA, not {shorten(stored.get('peft_type'))}")
    method = stored.get("init_lora_weights")
    if isinstance(method, str) and method.startswith(CHANGES_FROZEN_WEIGHTS):
        raise ValueError(
            f"{path}: init_lora_weights={shorten(method)} has changed the weights of the base model before training, so "
            "the adapter does not fit the original weights. Convert it to LoRA with the argument "
            "path_initial_model_for_weight_conversion of PEFT's save_pretrained."
        )
    if pissa is not None:
        stored = {**stored, **pissa}
    # Use the known entries. Ignore unknown entries that have their default value, and refuse all others.
    defaults = LoraConfig().to_dict()
    used: dict[str, Any] = {}
    for name, value in stored.items():
        if name in _ADAPTER_TYPES:
            types = _ADAPTER_TYPES[name]
            if name == "target_modules" and accept_pattern:
                types = (list, str)
            # Refuse a boolean where a number is expected: `isinstance(True, int)` is true in Python.
            is_wrong_bool = isinstance(value, bool) and bool not in types
            if is_wrong_bool or not isinstance(value, types):
                raise ValueError(f"{path}: {name} has an invalid value: {shorten(value)}")
            used[name] = value
        elif name not in _IGNORED_ENTRIES and value and value != defaults.get(name):
            raise ValueError(f"{path}: {name}={shorten(value)} is not supported")
    _check_adapter_entries(path, used)
    with blame_file(path):
        return LoraConfig(**used)


def _check_adapter_entries(path: Path, entries: Mapping[str, Any]) -> None:
    """Raise ValueError if an entry that LoRA needs is missing, or if a list or a mapping has wrong elements."""
    # If one of these is missing, PEFT would use its default, and the adapter would compute something else.
    missing = {"r", "lora_alpha", "target_modules"} - set(entries)
    if missing:
        raise ValueError(
            f"{path}: the entry {sorted(missing)[0]} is missing. Copy the checkpoint again."
        )
    for name in ("target_modules", "modules_to_save"):
        if not all(isinstance(module, str) for module in entries.get(name) or ()):
            raise ValueError(
                f"{path}: {name} must be a list of module names, got {shorten(entries[name])}"
            )
    for name in ("rank_pattern", "alpha_pattern"):
        if len(entries.get(name, {})) > _MAX_PATTERNS:
            raise ValueError(
                f"{path}: {name} has {len(entries[name])} entries; at most {_MAX_PATTERNS} are supported"
            )
        if not all(isinstance(value, (int, float)) for value in entries.get(name, {}).values()):
            raise ValueError(f"{path}: the values of {name} must be numbers")


def _check_adapters(model: Llava, parts: TrainedParts) -> None:
    """Raise ValueError if the model has an adapter that `parts` does not name, or the reverse."""
    for name, part, expected in (
        ("language model", model.language_model, parts.language_model == "adapter"),
        ("vision tower", model.vision_tower.model, parts.vision_tower == "lora"),
    ):
        if isinstance(part, PeftModel) != expected:
            problem = "has an adapter, but `parts` does not name it"
            if expected:
                problem = "has no adapter, but `parts` names one"
            raise ValueError(f"the {name} {problem} ({parts}); pass the parts that were trained")


def _save_adapter(
    model: PretrainedModule, folder: Path, weights: Mapping[str, torch.Tensor]
) -> None:
    """Write an adapter in PEFT's format. If PiSSA has initialized it, write the joined adapter (see pissa.py)."""
    # Pass save_embedding_layers=False: embeddings are never trained here, and PEFT's default "auto" makes a request
    # to the hub to find out whether they were resized.
    model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    pissa, initial = _pissa_entries(model), initial_weights(model)
    if pissa is None or initial is None:
        return
    # Replace the trained adapter by the joined adapter, which fits the original weights.
    path = folder / "adapter_model.safetensors"
    save_file(join(load_file(path), initial), path, metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored.update(joined_config(pissa, stored["use_rslora"]), init_lora_weights=True)
    path.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


def _pissa_entries(model: Any) -> dict[str, Any] | None:
    """Return the entry "pissa" of `llava.json`; None if the adapter was not initialized by PiSSA."""
    if initial_weights(model) is None:
        return None
    return scaled_fields(model.peft_config["default"])


def _read_pissa_entries(checkpoint_config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the entry "pissa" of a `llava.json`, or None.

    Its values are not checked here, but by `read_adapter_config`.

    Raises:
        ValueError: The entry is not a mapping with exactly the keys of `SCALED_FIELDS`.
    """
    entries = checkpoint_config.get("pissa")
    if entries is None:
        return None
    if not isinstance(entries, dict) or set(entries) != set(SCALED_FIELDS):
        raise ValueError(
            f"{CONFIG_NAME}: pissa must be a mapping with the keys {', '.join(SCALED_FIELDS)}, not {shorten(entries)}"
        )
    return entries


def _versions() -> dict[str, str]:
    """Return the versions of this package and of the libraries that affect the weights."""
    # Do not read the package's own version from metadata: a checkout that is not installed has none.
    versions = {"llava-simplified": __version__}
    for name in _LIBRARIES:
        versions[name] = importlib.metadata.version(name)
    return versions


def _temporary_folder(folder: Path) -> Path:
    """Return the path of the folder into which a checkpoint is written before it is moved. It does not exist."""
    # A move is atomic only within one file system. `folder` may be a mount point, so its parent is used only if there
    # is no such folder yet.
    if folder.is_dir():
        temporary = folder / ".saving-checkpoint"
    else:
        temporary = folder.with_name(f".{folder.name}.part{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    return temporary


def _move_into_place(temporary: Path, folder: Path, base_models: Sequence[str]) -> None:
    """Rename a complete temporary folder to `folder`. If `folder` exists, move the files into it instead.

    Args:
        temporary: The new checkpoint.
        folder: Its final folder. The weights of an older checkpoint are deleted.
        base_models: Folders that the new checkpoint refers to, which are not deleted.
    """
    use_default_permissions(temporary)
    if not folder.exists():
        rename_folder(temporary, folder)
        return
    # Delete the old llava.json first, and move the new one last. After a crash in between, the folder
    # contains old and new files, but without llava.json it does not count as a checkpoint.
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    written = {entry.name for entry in temporary.iterdir()}
    for entry in sorted(temporary.iterdir(), key=lambda path: path.name == CONFIG_NAME):
        target = folder / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        entry.replace(target)
    temporary.rmdir()
    kept = {Path(path).resolve() for path in base_models}
    for name in _PART_FOLDERS:
        part = folder / name
        if name not in written and part.resolve() not in kept:
            shutil.rmtree(part, ignore_errors=True)


def _load_trained_part(
    part: PretrainedModule, adapter: Path | None, full: Path, pissa: Mapping[str, Any] | None = None
) -> None:
    """Load the weights of one part from its adapter folder or from its folder of full weights."""
    if isinstance(part, PeftModel):
        # If the checkpoint has no adapter, the new one is kept; see `load_trained_weights`.
        if adapter is not None:
            _load_adapter(part, adapter, pissa)
        return
    model_class: Any = type(part)
    # Let Transformers load the file, because it knows how the names in the file differ from those in memory.
    with blame_file(full):
        stored, loading_info = model_class.from_pretrained(
            full, dtype=part.dtype, output_loading_info=True, trust_remote_code=False
        )
    check_missing_keys(str(full), loading_info["missing_keys"])
    part.load_state_dict(stored.state_dict())


def _with_adapter(
    model: Any, folder: Path, merge: bool, pissa: Mapping[str, Any] | None = None
) -> PeftModel | nn.Module:
    """Add a stored adapter to a model. With `merge`, merge it into the weights and return the plain model."""
    config = read_adapter_config(folder, pissa=pissa)
    # PEFT stores True, which would freeze the adapter. The caller decides whether it is trained.
    config.inference_mode = False
    with blame_file(folder / "adapter_config.json"):
        adapted = get_peft_model(model, config)
    if pissa is not None:
        # Set this only after PEFT has created the adapter. Otherwise, PEFT would decompose the weights again.
        current: Any = adapted.peft_config["default"]
        current.init_lora_weights = "pissa"
    _load_adapter(adapted, folder, pissa)
    if merge:
        return cast(Any, adapted).merge_and_unload()
    return adapted


def _load_adapter(model: PeftModel, folder: Path, pissa: Mapping[str, Any] | None = None) -> None:
    """Load an adapter's weights. A difference in names, shapes or settings raises ValueError.

    PEFT itself only warns about missing weights, and does not compare settings such as the scale.
    """
    current: Any = model.peft_config["default"]
    stored = read_adapter_config(folder, pissa=pissa)
    _check_same_adapter(folder, current, stored, is_pissa=pissa is not None)
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise ValueError(f"{folder}: {path.name} is missing. Copy the checkpoint again.")
    with blame_file(path):
        weights = load_file(path)
    expected = get_peft_model_state_dict(model)
    initial: dict[str, torch.Tensor] = {}
    if pissa is not None:
        # The file contains the joined adapter; `initial` are the matrices A0 and B0 before training.
        weights, initial = split(weights)
        matrices = {name: expected[name] for name in expected if name in initial}
        check_state_dict(initial, matrices, str(folder))
    check_state_dict(weights, expected, str(folder))
    set_peft_model_state_dict(model, weights)
    if pissa is not None:
        subtract(model, initial)


def _check_same_adapter(
    folder: Path, current: LoraConfig, stored: LoraConfig, *, is_pissa: bool
) -> None:
    """Raise ValueError if a stored adapter does not fit the settings of this run's adapter.

    Without this check, a different rank would raise an error about shapes, and a different scale no error at all.

    Args:
        folder: The folder of the stored adapter, for the message.
        current: Settings of this run's adapter.
        stored: Settings of the stored adapter.
        is_pissa: Whether PiSSA has initialized the stored adapter.
    """
    if (current.r, current.lora_alpha) != (stored.r, stored.lora_alpha):
        raise ValueError(
            f"{folder}: the adapter was trained with r={stored.r}, alpha={stored.lora_alpha:g}; pass "
            f"--lora_r {stored.r} --lora_alpha {stored.lora_alpha:g}"
        )
    for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        if getattr(current, name) != getattr(stored, name):
            raise ValueError(
                f"{folder}: the adapter was trained with {name}={shorten(getattr(stored, name))}; pass the same "
                f"{name} in --lora_options"
            )
    if uses_pissa(current) != is_pissa:
        method: str | bool = True
        was = "was not"
        if is_pissa:
            method, was = "pissa", "was"
        entry = json.dumps({"init_lora_weights": method})
        raise ValueError(
            f"{folder}: the adapter {was} initialized by PiSSA; pass --lora_options '{entry}'"
        )

"""The checkpoint config `llava.json`: the parts of a model, how they are joined, and what was trained.

This module does not import torch, so that commands can read a checkpoint's config without delay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llava_simplified.foreign_files import read_json_object, shorten

CONFIG_NAME = "llava.json"
# Increase it with every change that older versions of this package cannot read. Keep the old version
# in `READABLE_FORMAT_VERSIONS`, and convert its entries in `read_checkpoint_config`.
FORMAT_VERSION = 2
# Version 1 (LLaVA Simplified 0.1.0) calls `weights_digests` "fingerprints".
READABLE_FORMAT_VERSIONS = (1, 2)

DEFAULT_INSTRUCTION = "Generate a caption of this image:"


@dataclass(frozen=True)
class LlavaConfig:
    """The architecture and the prompt of a model: everything except the weights.

    Attributes:
        language_model: Folder or hub name of the causal language model.
        vision_tower: Folder or hub name of the vision model.
        mm_projector_type: `linear`, `mlp2x_gelu` (any depth) or `identity`.
        mm_vision_select_layer: Index of the vision tower's hidden state that is the projector's input;
            several are concatenated.
        mm_vision_select_feature: `patch`, or `cls_patch` to keep the CLS token.
        mm_token_pool: Average the patches to a grid of this many rows and columns; 0 keeps all patches.
        image_aspect_ratio: What is done with images that are not square: `crop` (what the vision tower's
            image processor does), or `pad` to a square first, as LLaVA-1.5.
        template: Prompt template, see `llava_simplified.prompt.Prompt`.
        instruction: Instruction of the training data, the default of `Llava.caption`.
        dtype: Data type of the frozen weights, as torch names it ("bfloat16").
        bits: Precision of the frozen language model: 16 for `dtype`, or 4 or 8 if quantized.
        weights_digests: "language_model" and "vision_tower" -> digest of the weight files that
            the checkpoint was trained on, see `llava_simplified.model.weights`.
    """

    language_model: str
    vision_tower: str
    mm_projector_type: str = "linear"
    mm_vision_select_layer: int | tuple[int, ...] = -2
    mm_vision_select_feature: str = "patch"
    mm_token_pool: int = 0
    image_aspect_ratio: str = "crop"
    template: str = "auto"
    instruction: str = DEFAULT_INSTRUCTION
    dtype: str = "float32"
    bits: int = 16
    weights_digests: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LlavaConfig:
        """Return the config that the "architecture" of a `llava.json` describes.

        Raises:
            ValueError: An entry is missing, is unknown, or has another type.
        """
        layer = fields.get("mm_vision_select_layer", cls.mm_vision_select_layer)
        if isinstance(layer, list):
            # JSON has no tuples.
            fields = {**fields, "mm_vision_select_layer": tuple(layer)}
        for name, value in fields.items():
            if name not in _FIELD_TYPES:
                raise ValueError(f'{CONFIG_NAME}: unknown entry {name!r} in "architecture"')
            _check_type(name, value, _FIELD_TYPES[name])
        for name in ("language_model", "vision_tower"):
            if not fields.get(name):
                raise ValueError(f'{CONFIG_NAME}: "architecture" has no {name}')
        if fields.get("dtype", cls.dtype) not in DTYPES:
            raise ValueError(
                f"{CONFIG_NAME}: dtype must be one of {DTYPES}, not {fields['dtype']!r}"
            )
        if not 0 <= fields.get("mm_token_pool", 0) <= _MAX_TOKEN_POOL:
            raise ValueError(
                f"{CONFIG_NAME}: mm_token_pool must be 0 to {_MAX_TOKEN_POOL}, not "
                f"{shorten(fields['mm_token_pool'])}"
            )
        for name, value in fields.get("weights_digests", {}).items():
            _check_type(f"weights_digests.{name}", value, (str,))
        if isinstance(layer, list):
            for value in layer:
                _check_type("mm_vision_select_layer", value, (int,))
        return cls(**fields)


_MAX_TOKEN_POOL = 256  # 65,536 tokens per image
DTYPES = ("float32", "bfloat16", "float16")

_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "language_model": (str,),
    "vision_tower": (str,),
    "mm_projector_type": (str,),
    "mm_vision_select_layer": (int, tuple),
    "mm_vision_select_feature": (str,),
    "mm_token_pool": (int,),
    "image_aspect_ratio": (str,),
    "template": (str,),
    "instruction": (str,),
    "dtype": (str,),
    "bits": (int,),
    "weights_digests": (dict,),
}


def _check_type(name: str, value: object, types: tuple[type, ...]) -> None:
    # In Python, True is an int.
    if not isinstance(value, types) or isinstance(value, bool):
        expected = " or ".join(type_.__name__ for type_ in types)
        raise ValueError(f"{CONFIG_NAME}: {name} must be of type {expected}, not {shorten(value)}")


@dataclass(frozen=True)
class TrainedParts:
    """The parts of a model that are trained, and therefore stored in its checkpoint.

    The projector is always trained.

    Attributes:
        language_model: "adapter": a LoRA adapter; "full": its own weights; "none": frozen.
        vision_tower: "lora": a LoRA adapter; "full": its own weights; "none": frozen.
    """

    language_model: Literal["none", "adapter", "full"] = "none"
    vision_tower: Literal["none", "lora", "full"] = "none"

    @property
    def stored(self) -> dict[str, str]:
        """The entries "trained" and "trained_tower" of `llava.json`."""
        return {
            "trained": _STORED_LANGUAGE_MODEL[self.language_model],
            "trained_tower": _STORED_VISION_TOWER[self.vision_tower],
        }

    @classmethod
    def from_stored(cls, checkpoint_config: Mapping[str, Any]) -> TrainedParts:
        """Read the entries "trained" and "trained_tower" of a `llava.json`.

        Raises:
            ValueError: An entry has an unknown value.
        """
        trained = checkpoint_config.get("trained")
        trained_tower = checkpoint_config.get("trained_tower", "off")
        language_model = {value: part for part, value in _STORED_LANGUAGE_MODEL.items()}
        vision_tower = {value: part for part, value in _STORED_VISION_TOWER.items()}
        # Check the type first: a list, for example, cannot be looked up in a dict.
        is_text = isinstance(trained, str) and isinstance(trained_tower, str)
        if not is_text or trained not in language_model or trained_tower not in vision_tower:
            raise ValueError(
                f"{CONFIG_NAME}: unknown values trained={shorten(trained)}, "
                f"trained_tower={shorten(trained_tower)}"
            )
        return cls(language_model[trained], vision_tower[trained_tower])


# The values in llava.json differ from the attributes, and cannot change without a new format version:
# "trained" is the name of the checkpoint folder (or file) with the weights, "trained_tower" is the
# value of the option --tune_vision_tower.
_STORED_LANGUAGE_MODEL: dict[Literal["none", "adapter", "full"], str] = {
    "none": "projector",
    "adapter": "adapter",
    "full": "language_model",
}
_STORED_VISION_TOWER: dict[Literal["none", "lora", "full"], str] = {
    "none": "off",
    "lora": "lora",
    "full": "full",
}


def read_checkpoint_config(folder: str | Path) -> dict[str, Any]:
    """Read the `llava.json` of a checkpoint. Entries of older versions get their current names.

    Returns:
        A dict with the keys "format_version", "architecture" (the fields of `LlavaConfig`), "trained"
        and "trained_tower" (see `TrainedParts`), "versions" (of libraries) and "training" (the
        options and the progress of the run).

    Raises:
        ValueError: The folder is not a checkpoint, is incomplete, or has a newer format version.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        if not Path(folder).is_dir():
            raise ValueError(
                f"{folder}: no such folder. Pass the folder of a checkpoint{_suggestion(Path(folder))}"
            )
        raise ValueError(
            f"{folder}: not a checkpoint, {CONFIG_NAME} is missing{_suggestion(Path(folder))}"
        )
    checkpoint_config = read_json_object(path)
    version = checkpoint_config.get("format_version")
    if version not in READABLE_FORMAT_VERSIONS or isinstance(version, bool):
        raise ValueError(
            f"{path}: unknown format version {shorten(version)}; this version of LLaVA Simplified reads "
            f"{READABLE_FORMAT_VERSIONS}. Install a newer version."
        )
    architecture = checkpoint_config.get("architecture")
    for name, value in (
        ("architecture", architecture),
        ("training", checkpoint_config.setdefault("training", {})),
        ("versions", checkpoint_config.setdefault("versions", {})),
    ):
        if not isinstance(value, dict):
            raise ValueError(f"{path}: {name!r} must be an object, not {shorten(value)}")
    assert isinstance(architecture, dict)
    if "fingerprints" in architecture:
        architecture["weights_digests"] = architecture.pop("fingerprints")
    # Missing in checkpoints from before vision towers could be trained.
    checkpoint_config.setdefault("trained_tower", "off")
    return checkpoint_config


def _suggestion(folder: Path) -> str:
    """Return the end of an error message, which suggests another path or command."""
    # The user may have passed an output folder, whose subfolders are checkpoints: suggest the newest.
    found = sorted(folder.glob(f"*/{CONFIG_NAME}"), key=lambda path: path.stat().st_mtime)
    if found:
        return f"; did you mean {found[-1].parent}?"
    return "; `llava import` converts a checkpoint of another code base (mm_projector.bin)"


def resolve_path(name: str) -> str:
    """Make the path of a local folder absolute; return the name of a hub repository unchanged."""
    if Path(name).is_dir():
        return str(Path(name).resolve())
    return name

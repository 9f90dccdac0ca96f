"""The checkpoint config `llava.json`: the parts of a model, how they are joined, and what was trained.

This module does not import torch, so that commands can read a checkpoint's config without delay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llava_simplified.foreign_files import read_json_object, shorten

CONFIG_NAME = "llava.json"
# Increase this number with every change that older versions of this package cannot read. Keep the old number in
# `READABLE_FORMAT_VERSIONS`, and convert the old entries in `read_checkpoint_config`.
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
        mm_vision_select_layer: Index of the hidden state of the vision tower that is the input of the projector.
            If there are several indices, the hidden states are concatenated.
        mm_vision_select_feature: `patch`, or `cls_patch` to keep the CLS token.
        mm_token_pool: Average the patches to a grid of this many rows and columns; 0 keeps all patches.
        image_aspect_ratio: What to do with images that are not square: `crop` (as the vision tower's image
            processor does), or `pad` to a square first, as LLaVA-1.5 does.
        template: Prompt template, see `llava_simplified.prompt.Prompt`.
        instruction: Instruction of the training data. It is the default instruction of `Llava.caption`.
        dtype: Data type of the frozen weights, as torch names it ("bfloat16").
        bits: Precision of the frozen language model: 16 for `dtype`, or 4 or 8 if quantized.
        weights_digests: Digest of the weight files that the checkpoint was trained on, by part
            ("language_model", "vision_tower"); see `llava_simplified.model.weights`.
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
            ValueError: An entry is missing or unknown, or has the wrong type.
        """
        layer = fields.get("mm_vision_select_layer", cls.mm_vision_select_layer)
        if isinstance(layer, list):
            # JSON has no tuples, so the layers are stored as a list.
            fields = {**fields, "mm_vision_select_layer": tuple(layer)}
        for name, value in fields.items():
            if name not in _FIELD_TYPES:
                raise ValueError(f'{CONFIG_NAME}: unknown entry {name!r} in "architecture"')
            _check_type(name, value, _FIELD_TYPES[name])
        for name in ("language_model", "vision_tower"):
            if not fields.get(name):
                raise ValueError(
                    f'{CONFIG_NAME}: the entry {name} of "architecture" is missing or empty'
                )
        if fields.get("dtype", cls.dtype) not in DTYPES:
            raise ValueError(
                f"{CONFIG_NAME}: dtype must be {_alternatives(DTYPES)}, not {fields['dtype']!r}"
            )
        if not 0 <= fields.get("mm_token_pool", 0) <= _MAX_TOKEN_POOL:
            raise ValueError(
                f"{CONFIG_NAME}: mm_token_pool must be from 0 to {_MAX_TOKEN_POOL}, not "
                f"{shorten(fields['mm_token_pool'])}"
            )
        for name, value in fields.get("weights_digests", {}).items():
            _check_type(f"weights_digests.{name}", value, (str,))
        if isinstance(layer, list):
            for value in layer:
                _check_type("mm_vision_select_layer", value, (int,))
        return cls(**fields)


_MAX_TOKEN_POOL = 256  # a grid of 256 x 256 has 65,536 tokens per image
DTYPES = ("float32", "bfloat16", "float16")

# The accepted types of the fields of `LlavaConfig`.
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
        language_model: "adapter" (a LoRA adapter is trained), "full" (all of its own weights are trained) or
            "none" (frozen).
        vision_tower: "lora" (a LoRA adapter is trained), "full" (its own weights are trained) or "none"
            (frozen).
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
        # Invert the mappings, from attributes to stored values.
        language_model = {value: part for part, value in _STORED_LANGUAGE_MODEL.items()}
        vision_tower = {value: part for part, value in _STORED_VISION_TOWER.items()}
        trained = checkpoint_config.get("trained")
        trained_tower = checkpoint_config.get("trained_tower", "off")
        return cls(
            language_model=_look_up("trained", trained, language_model),
            vision_tower=_look_up("trained_tower", trained_tower, vision_tower),
        )


# Value of the attribute of `TrainedParts` -> value in llava.json. The stored values are historical, and cannot
# change without a new format version: "trained" is the name of the folder (or file) of the checkpoint that
# contains the weights, and "trained_tower" is the value of the option --tune_vision_tower.
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


def _look_up(name: str, value: object, parts: Mapping[str, Any]) -> Any:
    """Convert the value of an entry of `llava.json` to the value of the attribute of `TrainedParts`.

    Args:
        name: Name of the entry, for the message.
        value: The value in the file.
        parts: Values of the attribute, by the allowed values in the file.

    Raises:
        ValueError: The value is not allowed.
    """
    # Check the type first: a list, for example, cannot be looked up in a dict.
    if not isinstance(value, str) or value not in parts:
        raise ValueError(
            f"{CONFIG_NAME}: {name} must be {_alternatives(parts)}, not {shorten(value)}. The file is damaged, or a newer "
            "version of LLaVA Simplified wrote it; copy the checkpoint again, or install the newest version."
        )
    return parts[value]


def _alternatives(values: Iterable[str]) -> str:
    """Return values as "a, b or c"."""
    *others, last = values
    return f"{', '.join(others)} or {last}"


def read_checkpoint_config(folder: str | Path) -> dict[str, Any]:
    """Read the `llava.json` of a checkpoint. Entries with names of older versions are renamed.

    Returns:
        A dict with the keys "format_version", "architecture" (the fields of `LlavaConfig`), "trained"
        and "trained_tower" (see `TrainedParts`), "versions" (of libraries) and "training" (the
        options and the progress of the run); and "pissa" if PiSSA has initialized the adapter.

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
            f"{folder}: not a checkpoint ({CONFIG_NAME} is missing){_suggestion(Path(folder))}"
        )
    checkpoint_config = read_json_object(path)
    version = checkpoint_config.get("format_version")
    if version not in READABLE_FORMAT_VERSIONS or isinstance(version, bool):
        raise ValueError(
            f"{path}: unknown format_version {shorten(version)}; this version of LLaVA Simplified reads "
            f"{_alternatives(map(str, READABLE_FORMAT_VERSIONS))}. The file is damaged, or a newer version wrote it; copy "
            "the checkpoint again, or install the newest version."
        )
    architecture = checkpoint_config.get("architecture")
    for name, value in (
        ("architecture", architecture),
        ("training", checkpoint_config.setdefault("training", {})),
        ("versions", checkpoint_config.setdefault("versions", {})),
    ):
        if not isinstance(value, dict):
            raise ValueError(f"{path}: {name} must be a JSON object, not {shorten(value)}")
    assert isinstance(architecture, dict)
    if "fingerprints" in architecture:
        architecture["weights_digests"] = architecture.pop("fingerprints")
    # Early checkpoints do not have this entry, because vision towers could not be trained then.
    checkpoint_config.setdefault("trained_tower", "off")
    return checkpoint_config


def _suggestion(folder: Path) -> str:
    """Return the end of an error message, which suggests another path or command."""
    # The user may have passed an output folder, whose subfolders are checkpoints. Suggest the newest one.
    found = sorted(folder.glob(f"*/{CONFIG_NAME}"), key=lambda path: path.stat().st_mtime)
    if found:
        return f"; did you mean {found[-1].parent}?"
    return "; for a checkpoint of another code base (with mm_projector.bin), use `llava import`"


def resolve_path(name: str) -> str:
    """Make the path of a local folder absolute; return the name of a hub repository unchanged."""
    if Path(name).is_dir():
        return str(Path(name).resolve())
    return name

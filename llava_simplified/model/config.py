"""The checkpoint config, `llava.json`: the parts of a model and how they are joined."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_simplified.model.llava import DEFAULT_INSTRUCTION

FORMAT_VERSION = 1


CONFIG_NAME = "llava.json"


@dataclass(frozen=True)
class LlavaConfig:
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


def read_checkpoint_config(folder: str | Path) -> dict[str, Any]:
    """`llava.json` of a checkpoint.

    Raises:
        ValueError: the folder is none, is unfinished, or was written by a later format.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        found = sorted(Path(folder).glob(f"*/{CONFIG_NAME}"), key=lambda path: path.stat().st_mtime)
        hint = (
            f"; did you mean {found[-1].parent}?"
            if found
            else "; `llava import` makes one of mm_projector.bin"
        )
        raise ValueError(f"{folder}: no checkpoint here ({CONFIG_NAME} is missing){hint}")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format {manifest.get('format_version')}, this version reads {FORMAT_VERSION}"
        )
    return manifest


def resolve_path(name: str) -> str:
    """A local folder by its full path, so that a checkpoint finds it from anywhere; a hub name as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name

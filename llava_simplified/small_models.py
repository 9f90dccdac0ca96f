"""Where `llava demo` keeps its small pretrained models, which `llava train --data` starts from by default."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

DEFAULT_CACHE = Path.home() / ".cache" / "llava-simplified"
# Part of the path of everything that is built. Increment it when the output of a builder changes.
LAYOUT = "demo-v1"


class SmallModels(NamedTuple):
    """Folders of a language model and a vision tower."""

    language_model: Path
    vision_tower: Path


def small_models(cache: Path | None = None) -> SmallModels:
    """Return the folders of the demo's models, which exist only after `llava demo` has built them.

    Args:
        cache: Folder for downloads and results (default: ~/.cache/llava-simplified).
    """
    root = (cache or DEFAULT_CACHE).expanduser() / LAYOUT
    return SmallModels(root / "language_model", root / "vision_tower")

"""The folders of the demo's small pretrained models, from which `llava train --data` starts by default."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

DEFAULT_CACHE = Path.home() / ".cache" / "llava-simplified"
# Name of the folder in which `llava demo` builds everything. Increment the version when the built files change, so
# that old files are not used.
LAYOUT = "demo-v1"


class SmallModels(NamedTuple):
    """The folders of a language model and a vision tower."""

    language_model: Path
    vision_tower: Path


def small_models(cache: Path | None = None) -> SmallModels:
    """Return the folders of the demo's models, which exist only after `llava demo` has built them.

    Args:
        cache: Folder for downloads and results (default: ~/.cache/llava-simplified).
    """
    root = (cache or DEFAULT_CACHE).expanduser() / LAYOUT
    return SmallModels(root / "language_model", root / "vision_tower")

"""Load `llava_in_one_file.py`, which is not part of a package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

PATH = Path(__file__).parents[1] / "llava_in_one_file.py"


def load_module(path: Path) -> ModuleType:
    """Import a Python file by its path, under the name of the file."""
    if path.stem in sys.modules:
        return sys.modules[path.stem]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


one_file = load_module(PATH)

"""LLaVA Simplified: train, evaluate, export and serve LLaVA captioning models.

    from llava_simplified import Llava

    model = Llava.from_pretrained("output/my-model")
    print(model.caption("photo.jpg"))

Public names are imported on first use (PEP 562), because torch and transformers take seconds to
import.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_simplified.data.dataset import CaptionDataset
    from llava_simplified.model.generation_options import GenerationOptions
    from llava_simplified.model.llava import Llava
    from llava_simplified.prompt import Message
    from llava_simplified.python_api import evaluate, train

# PEFT imports bitsandbytes if it is installed, and bitsandbytes logs a warning for every CPU kernel that
# it does not find. No command needs these kernels.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"  # pyproject.toml reads it from here

__all__ = [
    "CaptionDataset",
    "GenerationOptions",
    "Llava",
    "Message",
    "__version__",
    "evaluate",
    "train",
]

_MODULES = {
    "CaptionDataset": "llava_simplified.data.dataset",
    "GenerationOptions": "llava_simplified.model.generation_options",
    "Llava": "llava_simplified.model.llava",
    "Message": "llava_simplified.prompt",
    "evaluate": "llava_simplified.python_api",
    "train": "llava_simplified.python_api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Import the name on first use: Python calls this function only for names that are not yet defined.
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value  # for later uses, so that Python does not call this function again
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

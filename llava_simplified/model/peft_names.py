"""What the package uses of PEFT, which is imported without bitsandbytes.

PEFT imports bitsandbytes wherever it is installed, for one function of its own that nothing here calls.
That prepares torch's compiler, which takes 4 of the 6 seconds in which a command starts. Only --bits
needs bitsandbytes, and transformers imports it then.
"""

from __future__ import annotations

import importlib
import sys


def _import_without_bitsandbytes(name: str) -> None:
    """Import a module; it finds bitsandbytes only if that has been imported before."""
    if "bitsandbytes" in sys.modules:
        return
    # An import of a name with the value None raises ModuleNotFoundError.
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    try:
        importlib.import_module(name)
    finally:
        del sys.modules["bitsandbytes"]


_import_without_bitsandbytes("peft")

# Imported already, so that these lines bind names and nothing more.
from peft import (  # noqa: E402
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer  # noqa: E402
from peft.utils.other import transpose  # noqa: E402

__all__ = [
    "LoraConfig",
    "LoraLayer",
    "PeftModel",
    "get_peft_model",
    "get_peft_model_state_dict",
    "set_peft_model_state_dict",
    "transpose",
]

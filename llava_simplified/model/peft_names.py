"""The names that this package uses from PEFT. All modules import them from here, because it saves time.

If bitsandbytes is installed, PEFT imports it, for one function of PEFT that is never called here. This import
prepares torch's compiler, which takes 4 of the 6 seconds that a command needs to start. So this module imports
PEFT without bitsandbytes. Only --bits needs bitsandbytes, and transformers imports it then.
"""

from __future__ import annotations

import importlib
import sys


def _import_without_bitsandbytes(name: str) -> None:
    """Import a module in such a way that it does not find bitsandbytes."""
    # If bitsandbytes has been imported before, its time is spent already.
    if "bitsandbytes" in sys.modules:
        return
    # With None in sys.modules, an import of this name raises ModuleNotFoundError.
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    try:
        importlib.import_module(name)
    finally:
        del sys.modules["bitsandbytes"]


_import_without_bitsandbytes("peft")

# PEFT is imported already, so these lines only define the names.
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

"""The names that this package uses from PEFT. All modules import them from here, because it saves time.

If bitsandbytes is installed, PEFT imports it, for one function of PEFT that is never called here, and again when it
creates an adapter, to find quantized layers. This import prepares torch's compiler, which takes 4 of the 6 seconds that
a command needs to start. So this module imports PEFT without bitsandbytes, and lets it look for quantized layers only
if bitsandbytes has been imported. Only --bits needs bitsandbytes, and transformers imports it then.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable


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
from peft.tuners.lora import model as _lora_model  # noqa: E402
from peft.utils.other import transpose  # noqa: E402


def _only_if_imported(is_available: Callable[[], bool]) -> Callable[[], bool]:
    """Return a function that returns False, and imports nothing, as long as bitsandbytes has not been imported."""

    @functools.wraps(is_available)
    def is_imported_and_available() -> bool:
        return sys.modules.get("bitsandbytes") is not None and is_available()

    return is_imported_and_available


# While PEFT creates an adapter, it calls these functions for each layer. A quantized layer is an instance of a class of
# bitsandbytes, so there can be none if bitsandbytes has not been imported.
for _name in ("is_bnb_available", "is_bnb_4bit_available"):
    if hasattr(_lora_model, _name):
        setattr(_lora_model, _name, _only_if_imported(getattr(_lora_model, _name)))

__all__ = [
    "LoraConfig",
    "LoraLayer",
    "PeftModel",
    "get_peft_model",
    "get_peft_model_state_dict",
    "set_peft_model_state_dict",
    "transpose",
]

"""PEFT is imported without bitsandbytes, whose import takes seconds and is only needed for --bits."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
@pytest.mark.medium
def test_modules_that_use_peft_do_not_import_bitsandbytes() -> None:
    """PEFT and transformers still find bitsandbytes when a model is quantized."""
    code = """
import sys
from llava_simplified.arguments import parse_arguments
import llava_simplified.export.stock, llava_simplified.training.build_trainer
assert "bitsandbytes" not in sys.modules
import peft.import_utils, transformers.utils
assert peft.import_utils.is_bnb_available()
assert transformers.utils.is_bitsandbytes_available()
"""
    subprocess.run([sys.executable, "-c", code], check=True)

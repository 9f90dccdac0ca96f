"""PEFT is imported without bitsandbytes, which takes seconds and is needed for --bits alone."""

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
    """But it is found by PEFT and transformers, should a model be quantized."""
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

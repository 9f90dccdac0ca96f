"""PEFT is used without bitsandbytes, whose import takes seconds and is only needed for --bits."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from cli_process import run_command

# The process is forked from one that has imported the modules of `llava train`, and PEFT with them.
SCRIPT = """
import sys
import llava_simplified.export.stock, llava_simplified.training.build_trainer
assert "llava_simplified.model.peft_names" in sys.modules
assert "bitsandbytes" not in sys.modules, "imported"
from tiny import make_language_model
from llava_simplified.model.peft_names import LoraConfig, LoraLayer, get_peft_model
model = get_peft_model(make_language_model("llama", 10), LoraConfig(target_modules=["q_proj"]))
assert any(isinstance(module, LoraLayer) for module in model.modules())
assert "bitsandbytes" not in sys.modules, "imported for an adapter"
import peft.import_utils, transformers.utils
assert peft.import_utils.is_bnb_available()
assert transformers.utils.is_bitsandbytes_available()
"""


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
@pytest.mark.medium
def test_peft_is_used_without_bitsandbytes(tmp_path: Path) -> None:
    """PEFT and transformers still find bitsandbytes when a model is quantized."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run_command([script], tmp_path)

"""Caption an image with a tiny random model, with nothing but the core dependencies. Run by .ci/smoke_wheel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from tiny import save_language_model, save_vision_model

from llava_simplified import Llava
from llava_simplified.model.build import build_model
from llava_simplified.model.checkpoint import TrainedParts, save_checkpoint
from llava_simplified.model.config import LlavaConfig
from llava_simplified.options import escape_control_characters

folder = Path("smoke")
torch.manual_seed(0)
save_language_model("llama", folder / "language_model")
save_vision_model("clip", folder / "vision_tower")
config = LlavaConfig(str(folder / "language_model"), str(folder / "vision_tower"))
save_checkpoint(build_model(config), folder / "checkpoint", config, TrainedParts())
Image.new("RGB", (40, 30), "red").save(folder / "red.png")

caption = Llava.from_pretrained(folder / "checkpoint").caption(folder / "red.png", max_new_tokens=4)
command = ["llava", "caption", folder / "red.png", "--model-path", folder / "checkpoint"]
printed = subprocess.run(
    [*command, "--max-new-tokens", "4"], check=True, stdout=subprocess.PIPE, text=True
).stdout
if printed.strip() != escape_control_characters(caption):
    sys.exit(f"the command printed {printed!r}, the Python API returned {caption!r}")

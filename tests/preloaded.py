"""Import and compute in the fork server of `cli_process` what most forked processes need. They share its memory."""

from __future__ import annotations

import contextlib
import gc
import importlib
import tempfile
import threading
from pathlib import Path

# Modules that are not installed are ignored.
MODULES = [
    "aiohttp",
    "cli_process",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # every training with DeepSpeed imports it
    "llava_simplified.captioning.caption_command",
    "llava_simplified.captioning.runner",
    "llava_simplified.cli",
    "llava_simplified.model.checkpoint",
    "llava_simplified.prepare.clean",
    "llava_simplified.prepare.download",
    "llava_simplified.serve.api",
    "llava_simplified.training.build_trainer",
    "llava_simplified.training.preflight",
    "llava_simplified.training.train_command",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "peft.utils.transformers_weight_conversion",
    "transformers.integrations.mistral.tokenizer",
    "transformers.models.clip.image_processing_pil_clip",
    "transformers.models.clip.modeling_clip",
    "transformers.models.mistral.modeling_mistral",
]


def import_modules() -> None:
    """Import all modules, which creates a million objects and hardly any garbage."""
    gc.disable()
    for name in MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.enable()


def load_vision_tower() -> None:
    """Load a tiny model: the first one of a process takes a tenth of a second longer."""
    from tiny import save_vision_model
    from transformers.utils import logging

    from llava_simplified.model.vision import VisionTower

    logging.disable_progress_bar()  # tqdm starts a thread, which forked processes would not have
    with tempfile.TemporaryDirectory() as folder:
        VisionTower.from_pretrained(save_vision_model("clip", Path(folder)))
    logging.enable_progress_bar()
    for thread in threading.enumerate():  # those that have read the weights
        if thread is not threading.main_thread():
            thread.join(10)


import_modules()
load_vision_tower()
# Exclude everything from the garbage collection of the forked processes.
gc.collect()
gc.freeze()

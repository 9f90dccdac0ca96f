"""Import what processes need, before they are forked. Only the fork server of `cli_process` imports this module.

`PRINTED` is what importing the package has printed.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
import tempfile
from collections.abc import Iterable

# The package comes first, so that nothing else prints while it is imported. Modules that are not installed are ignored.
PACKAGE = [
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
]
LIBRARIES = [
    "aiohttp",
    "deepspeed.ops.op_builder.all_ops",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "peft.utils.transformers_weight_conversion",
    "transformers.integrations.mistral.tokenizer",
    "transformers.models.clip.image_processing_pil_clip",
    "transformers.models.clip.modeling_clip",
    "transformers.models.mistral.modeling_mistral",
    # Every forked process imports this one, and pytest with it.
    "cli_process",
]


def import_modules(names: Iterable[str]) -> None:
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def import_package() -> str:
    """Import the package, with the warnings that users get, and return what this prints."""
    verbosity = os.environ.pop("TRANSFORMERS_VERBOSITY", "warning")
    with tempfile.TemporaryFile() as file:
        streams = {number: os.dup(number) for number in (1, 2)}
        for number in streams:
            os.dup2(file.fileno(), number)
        import_modules(PACKAGE)
        sys.stdout.flush()
        for number, stream in streams.items():
            os.dup2(stream, number)
            os.close(stream)
        file.seek(0)
        printed = file.read().decode(errors="replace")
    os.environ["TRANSFORMERS_VERBOSITY"] = verbosity
    from transformers.utils import logging

    logging.set_verbosity(logging.log_levels[verbosity])
    return printed


def compute_shared_results() -> None:
    """Compute what processes would compute again, because their libraries keep it until they end."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("mistral")


gc.disable()  # imports create a million objects, and hardly any garbage
PRINTED = import_package()
import_modules(LIBRARIES)
compute_shared_results()
gc.enable()
# Exclude everything from the garbage collection of the forked processes.
gc.collect()
gc.freeze()

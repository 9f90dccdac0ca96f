"""The entry point by which lmms-eval finds the model `llava_simplified`.

lmms-eval loads the entry points of all installed packages whenever it starts. This module therefore imports
nothing large. The model's class is in `lmms_eval_model`, which lmms-eval imports only if the model is used.
"""

from __future__ import annotations

from typing import Any

MODEL_CLASS = "llava_simplified.evaluation.lmms_eval_model.LlavaSimplified"


def model_manifest() -> Any:
    """Return the `ModelManifest` of the entry point group `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="llava_simplified", simple_class_path=MODEL_CLASS)

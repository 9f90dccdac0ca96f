"""Name the model `llava_simplified` to lmms-eval, which finds this entry point by itself.

lmms-eval loads the entry points of all packages whenever it starts, so that this module is light: the model's
class is in `lmms_eval_model`, which lmms-eval imports if the model is asked for.
"""

from __future__ import annotations

from typing import Any

MODEL_CLASS = "llava_simplified.evaluation.lmms_eval_model.LlavaSimplified"


def model_manifest() -> Any:
    """Return the `ModelManifest` of the entry point group `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="llava_simplified", simple_class_path=MODEL_CLASS)

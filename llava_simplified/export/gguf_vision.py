"""Vision tower and projector for llama.cpp: the metadata and tensors of `mmproj.gguf`.

llama.cpp's `clip_graph_llava` computes:

    patches -> patch filter -> [CLS; patches] + positions -> (pre-norm) -> blocks
            -> concatenate the inputs of the blocks in `feature_layer` -> drop CLS -> mm.0 -> gelu -> mm.2

Four of its conventions differ from those of this package:

- Hidden states have non-negative indices: 0 is the input of the first block. In a tower of 12 layers,
  `mm_vision_select_layer: -2` (the input of the last layer) is 11.
- Several hidden states are always concatenated from the lowest to the highest, regardless of the order
  of selection. The columns of the first projector matrix are reordered accordingly.
- The norm after the last block (`post_layernorm`) is not part of any hidden state, and is not written.
- An image that is not square is resized to fit, and gets borders of one fixed color: CLIP's mean. No key
  of the file changes that. Training with `--image_aspect_ratio pad` and a CLIP tower does the same, except
  that llama.cpp resizes without antialiasing.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from llava_simplified.data.transforms import ImageTransform
from llava_simplified.export.stock import to_stock_projector
from llava_simplified.model.llava import Llava
from llava_simplified.model.vision import VisionTower

SUPPORTED_TOWERS = ("clip_vision_model", "siglip_vision_model")
# The color of llama.cpp's borders: `hparams.image_pad_color` of its LLaVA models in `tools/mtmd/clip.cpp`.
LLAMA_CPP_PAD_COLOR = (122, 116, 104)
# Weights that no hidden state depends on: the final norm, SigLIP's pooling head, and a computed buffer.
_UNUSED_WEIGHTS = re.compile(r"post_layernorm|\.head\.|position_ids")


def vision_settings(model: Llava) -> dict[str, Any]:
    """Return the metadata of `mmproj.gguf`.

    Raises:
        ValueError: llama.cpp does not support the tower, or its selection of features.
    """
    tower = model.vision_tower
    config = tower.model.config
    _check_tower(tower)
    # These keys are prefixed with "clip.vision." below.
    values = {
        "image_size": tower.transform.crop[0],
        "patch_size": config.patch_size,
        "image_mean": list(tower.transform.mean),
        "image_std": list(tower.transform.std),
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": _num_blocks(tower),
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_epsilon": float(config.layer_norm_eps),
        "projection_dim": int(model.language_model.config.hidden_size),
        "feature_layer": sorted(_hidden_state_indices(tower)),
    }
    # "mlp" is LLaVA's projector of two layers. llama.cpp uses one activation in all blocks of the tower: gelu
    # (SigLIP) or quick_gelu (CLIP), which is x * sigmoid(1.702 x).
    metadata = {
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": config.hidden_act != "quick_gelu",
    }
    for key, value in values.items():
        metadata[f"clip.vision.{key}"] = value
    return metadata


def describe_padding_difference(transform: ImageTransform) -> str:
    """Return how the borders of llama.cpp differ from those of a transform; "" if they do not."""
    if transform.pad_color is None:
        return (
            "llama.cpp makes images square with borders, but this model crops them. Pass square images, or "
            "train with --image_aspect_ratio pad."
        )
    if transform.pad_color != LLAMA_CPP_PAD_COLOR:
        return (
            f"llama.cpp makes images square with borders of the color {LLAMA_CPP_PAD_COLOR}, but the borders of "
            f"this model have the mean color of its vision tower, {transform.pad_color}."
        )
    return ""


def vision_weights(model: Llava) -> dict[str, torch.Tensor]:
    """Return the tensors of `mmproj.gguf` by llama.cpp's names.

    Raises:
        ValueError: llama.cpp does not support the tower, its selection of features, or the projector.
    """
    tower = model.vision_tower
    _check_tower(tower)
    return _tower_weights(tower) | _projector_weights(model)


def _check_tower(tower: VisionTower) -> None:
    """Raise ValueError if llama.cpp does not support the tower or its selection of features."""
    model_type = tower.model.config.model_type
    if model_type not in SUPPORTED_TOWERS:
        raise ValueError(
            f"--format gguf: llama.cpp supports CLIP and SigLIP towers, not {model_type}. Use "
            "--format hf."
        )
    height, width = tower.transform.crop
    if tower.select_feature != "patch":
        raise ValueError(
            "--format gguf: llama.cpp uses only the patches of an image, but this model was trained "
            "with --mm_vision_select_feature cls_patch. Use --format hf."
        )
    if height != width:
        raise ValueError(
            f"--format gguf: llama.cpp supports square images only, not {height} x {width}. Use "
            "--format hf."
        )


def _hidden_state_indices(tower: VisionTower) -> list[int]:
    """Return the selected hidden states as non-negative indices, in the order of the selection."""
    num_hidden_states = tower.model.config.num_hidden_layers + 1
    return [layer % num_hidden_states for layer in tower.select_layers]


def _num_blocks(tower: VisionTower) -> int:
    """Return the number of blocks to write: those before the deepest selected hidden state, and one more if it exists.

    The additional block is for programs that ignore `feature_layer`. Like llama.cpp with a file without this key, they
    use the output of the second-to-last block, which is then the selected hidden state.
    """
    deepest = max(_hidden_state_indices(tower))
    return min(deepest + 1, tower.model.config.num_hidden_layers)


def _tower_weights(tower: VisionTower) -> dict[str, torch.Tensor]:
    """Return the weights of the tower's embeddings and of the first `_num_blocks` blocks."""
    import gguf

    num_blocks = _num_blocks(tower)
    # The map has names for the first `num_blocks` blocks only. The weights of the other blocks are skipped below.
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, num_blocks)
    weights: dict[str, torch.Tensor] = {}
    for name, weight in tower.model.state_dict().items():
        # The map expects the names of Hugging Face's LlavaForConditionalGeneration.
        full_name = f"vision_tower.vision_model.{name.removeprefix('vision_model.')}"
        if _UNUSED_WEIGHTS.search(full_name):
            continue
        gguf_name = names.get_name(full_name, try_suffixes=(".weight", ".bias"))
        if gguf_name is not None:
            weights[gguf_name] = weight
            continue
        block = re.search(r"layers\.(\d+)\.", full_name)
        if block is None or int(block[1]) < num_blocks:
            raise ValueError(
                f"--format gguf: llama.cpp does not support the weight {name} of a "
                f"{tower.model.config.model_type}. Use --format hf."
            )
    return weights


def _projector_weights(model: Llava) -> dict[str, torch.Tensor]:
    """Return the tensors of the two projector layers, with the input columns in llama.cpp's order of hidden states."""
    tower = model.vision_tower
    # llama.cpp always applies an activation in the projector. With twice the input size between its
    # layers, every linear projector can be written as two layers with gelu.
    projector = to_stock_projector(model.projector, hidden_size=2 * tower.width)
    indices = _hidden_state_indices(tower)
    # linear_1.weight is (hidden, features of the first selected layer | of the second | ...). Reorder
    # these groups of columns from the lowest to the highest layer.
    ascending = sorted(range(len(indices)), key=indices.__getitem__)
    by_hidden_state = projector.linear_1.weight.detach().unflatten(1, (len(indices), -1))
    first_weight = by_hidden_state[:, ascending].flatten(1)
    weights = {
        "mm.0.weight": first_weight.to(tower.dtype),
        "mm.0.bias": projector.linear_1.bias,
        "mm.2.weight": projector.linear_2.weight.to(tower.dtype),
        "mm.2.bias": projector.linear_2.bias,
    }
    return {name: weight.detach() for name, weight in weights.items()}

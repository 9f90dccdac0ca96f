"""The vision tower: features of several architectures, their shape, and which weights they depend on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d
from transformers import AutoModel, ViTMAEConfig, ViTMAEModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_simplified.model.skip_layers import skip_layers
from llava_simplified.model.vision import VisionTower

# Height and width of the images, in pixels.
IMAGE_SIZE = {
    "clip": 32,
    "siglip": 32,
    "dinov2": 32,
    "vit": 32,
    "swin": 32,
    "convnext": 32,
    "efficientnet": 64,
}


def load_tower(folder: Path, kind: str, **choices: Any) -> VisionTower:
    return VisionTower.from_pretrained(str(folder / kind), **choices).eval()


@pytest.mark.medium
@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        ("clip", 16),
        ("siglip", 16),
        ("dinov2", 16),
        ("vit", 16),
        ("swin", 16),
        ("convnext", 4),
        ("efficientnet", 4),
    ],
)
def test_num_tokens_and_grid_equal_the_shape_of_the_features(
    models_folder: Path, kind: str, tokens: int
) -> None:
    tower = load_tower(models_folder, kind, select_layer=-1)
    pixels = torch.zeros(2, 3, IMAGE_SIZE[kind], IMAGE_SIZE[kind], dtype=torch.uint8)
    assert tower(pixels).shape == (2, tower.num_tokens, tower.width)
    assert tower.num_tokens == tokens == tower.grid[0] * tower.grid[1]


def test_select_feature_patch_drops_the_cls_token_and_cls_patch_keeps_it(
    models_folder: Path,
) -> None:
    pixels = torch.rand(1, 3, 32, 32)
    patch = load_tower(models_folder, "clip", select_layer=-2)
    cls_patch = load_tower(models_folder, "clip", select_layer=-2, select_feature="cls_patch")
    hidden_states = patch.model(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(patch(pixels), hidden_states[-2][:, 1:])
    torch.testing.assert_close(cls_patch(pixels), hidden_states[-2])


def test_siglip_has_no_cls_token_to_drop_or_to_keep(models_folder: Path) -> None:
    pixels = torch.rand(1, 3, 32, 32)
    tower = load_tower(models_folder, "siglip", select_layer=-1)
    hidden_states = tower.model(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(tower(pixels), hidden_states[-1])
    with pytest.raises(ValueError, match="no CLS token"):
        load_tower(models_folder, "siglip", select_feature="cls_patch")


@pytest.mark.parametrize("kind", ["convnext", "efficientnet"])
def test_feature_map_is_read_row_by_row(models_folder: Path, kind: str) -> None:
    tower = load_tower(models_folder, kind, select_layer=-1)
    pixels = torch.rand(1, 3, IMAGE_SIZE[kind], IMAGE_SIZE[kind])
    last_hidden_state = tower.model(pixels).last_hidden_state
    torch.testing.assert_close(tower(pixels)[0, 1], last_hidden_state[0, :, 0, 1])


def test_several_layers_are_concatenated_along_the_channels(models_folder: Path) -> None:
    tower = load_tower(models_folder, "clip", select_layer=(-2, -1))
    pixels = torch.rand(1, 3, 32, 32)
    hidden_states = tower.model(pixels, output_hidden_states=True).hidden_states
    expected = torch.cat([hidden_states[-2], hidden_states[-1]], -1)
    expected = expected[:, 1:]  # without the CLS token
    torch.testing.assert_close(tower(pixels), expected)
    assert tower.width == 48


def test_feature_maps_of_several_sizes_are_pooled_to_the_smallest(models_folder: Path) -> None:
    tower = load_tower(models_folder, "convnext", select_layer=(-1, 1))
    pixels = torch.rand(1, 3, 32, 32)
    outputs = tower.model(pixels, output_hidden_states=True)
    # The early map, (1, channels, rows, columns), is pooled to 2 x 2, the size of the last one.
    early = adaptive_avg_pool2d(outputs.hidden_states[1], 2)
    early = early.flatten(2).transpose(1, 2)
    features = tower(pixels)
    torch.testing.assert_close(features[..., 24:], early)


def test_token_pool_averages_neighboring_patches(models_folder: Path) -> None:
    pixels = torch.rand(1, 3, 32, 32)
    features = load_tower(models_folder, "clip")(pixels)
    pooled = load_tower(models_folder, "clip", token_pool=2)
    # The first pooled token is the mean of the top left 2 x 2 patches.
    grid = features.view(1, 4, 4, -1)
    top_left = grid[0, :2, :2]
    torch.testing.assert_close(pooled(pixels)[0, 0], top_left.mean((0, 1)))
    assert pooled.num_tokens == 4
    with pytest.raises(ValueError, match="cls_patch .*--mm_token_pool"):
        load_tower(models_folder, "clip", token_pool=2, select_feature="cls_patch")


def test_layer_out_of_range_is_refused(models_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"mm_vision_select_layer \(-9,\) .* 4 hidden states"):
        load_tower(models_folder, "clip", select_layer=-9)


def test_model_without_a_grid_of_features_is_refused(tmp_path: Path) -> None:
    """A masked autoencoder drops most patches, and different ones at every call."""
    config = ViTMAEConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    ViTMAEModel(config).save_pretrained(tmp_path)
    CLIPImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vit_mae cannot be used as a vision tower"):
        VisionTower.from_pretrained(str(tmp_path))


def test_language_model_is_refused_as_a_tower(models_folder: Path) -> None:
    with pytest.raises(ValueError):
        load_tower(models_folder, "mistral")


def test_frozen_tower_stays_in_evaluation_mode(models_folder: Path) -> None:
    """In training mode, batch norms would update their statistics, and dropout would change the features."""
    tower = load_tower(models_folder, "efficientnet", select_layer=-1).requires_grad_(False)
    tower.train()
    assert not tower.training
    assert not any(module.training for module in tower.modules())
    assert not tower(torch.zeros(1, 3, 64, 64)).requires_grad
    tower.requires_grad_(True).train()
    assert tower.model.training


def test_uint8_pixels_are_normalized_as_the_image_processor_does(models_folder: Path) -> None:
    tower = load_tower(models_folder, "clip")
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    mean = torch.tensor(tower.transform.mean).view(3, 1, 1)
    std = torch.tensor(tower.transform.std).view(3, 1, 1)
    normalized = (pixels / 255 - mean) / std
    torch.testing.assert_close(tower(pixels), tower(normalized))


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("kind", IMAGE_SIZE)
def test_used_parameters_are_those_that_get_a_gradient(
    models_folder: Path, kind: str, layer: int
) -> None:
    """The layers above the selected one do not contribute: training would not change them."""
    tower = load_tower(models_folder, kind, select_layer=layer)
    size = IMAGE_SIZE[kind]
    features = tower(torch.rand(2, 3, size, size))
    features.sum().backward()
    with_gradient = set()
    for name, parameter in tower.model.named_parameters():
        if parameter.grad is not None:
            with_gradient.add(name)
    assert with_gradient
    assert tower.used_parameters == with_gradient
    if kind == "clip" and layer == -2:
        assert not any("layers.2." in name for name in tower.used_parameters)


@pytest.mark.parametrize("layer", [-1, -2, -3])
@pytest.mark.parametrize("kind", IMAGE_SIZE)
def test_skipping_unused_layers_does_not_change_the_features(
    models_folder: Path, kind: str, layer: int
) -> None:
    tower = load_tower(models_folder, kind, select_layer=layer)
    pixels = torch.rand(2, 3, IMAGE_SIZE[kind], IMAGE_SIZE[kind])
    with torch.no_grad():
        features = tower(pixels)
        expected, _ = tower._select(tower.model, pixels)
        torch.testing.assert_close(features, expected)
        # The model itself still computes all layers, for users who call it.
        output = tower.model(pixels).last_hidden_state
        stock = AutoModel.from_pretrained(models_folder / kind).eval()
        if hasattr(stock, "vision_model"):
            stock = stock.vision_model
        torch.testing.assert_close(output, stock(pixels).last_hidden_state)


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "vit"])
def test_layers_above_the_selected_one_are_not_computed(models_folder: Path, kind: str) -> None:
    tower = load_tower(models_folder, kind, select_layer=-2)
    last = tower.model.get_submodule(tower.unused_layers[-1])
    computed: list[nn.Module] = []
    for module in last.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: computed.append(module))
    tower(torch.rand(1, 3, 32, 32))
    assert not computed
    tower.model(torch.rand(1, 3, 32, 32))
    assert computed
    assert len(tower.unused_layers) == 1
    assert load_tower(models_folder, kind, select_layer=-1).unused_layers == ()


def test_skipped_layers_get_back_their_own_forward() -> None:
    """Also if a library has replaced the `forward` of the instance, and if the model fails."""
    plain = nn.Linear(2, 2)
    wrapped = nn.Linear(2, 2)
    wrapped.forward = lambda inputs: inputs + 1
    forward = wrapped.forward
    inputs = torch.rand(1, 2)
    with pytest.raises(KeyError), skip_layers([plain, wrapped]):
        assert plain(inputs) is inputs
        assert wrapped(inputs) is inputs
        raise KeyError
    assert wrapped.forward is forward
    assert "forward" not in vars(plain)
    assert torch.equal(plain(inputs), nn.functional.linear(inputs, plain.weight, plain.bias))


def test_tower_in_training_keeps_the_statistics_of_its_batch_norms(models_folder: Path) -> None:
    tower = load_tower(models_folder, "efficientnet").train()
    before = {name: buffer.clone() for name, buffer in tower.named_buffers()}
    tower(torch.rand(2, 3, 64, 64))
    assert tower.model.training
    for name, buffer in tower.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_missing_weights_are_refused_if_the_features_depend_on_them(
    models_folder: Path, tmp_path: Path
) -> None:
    """Transformers would only warn, and use random weights."""
    shutil.copytree(models_folder / "clip", tmp_path / "clip")
    path = tmp_path / "clip" / "model.safetensors"
    weights = load_file(path)

    def save_without(layer: int) -> None:
        missing = next(name for name in weights if f"layers.{layer}." in name)
        kept = {name: weight for name, weight in weights.items() if name != missing}
        save_file(kept, path, {"format": "pt"})

    # Layer 2 is above the selected one, so its weights may be missing.
    save_without(layer=2)
    load_tower(tmp_path, "clip", select_layer=-2)
    # The features depend on layer 0.
    save_without(layer=0)
    with pytest.raises(ValueError, match=r"weights are missing: .*layers\.0\."):
        load_tower(tmp_path, "clip", select_layer=-2)

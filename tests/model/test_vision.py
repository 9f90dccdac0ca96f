"""Any Hugging Face vision model is a tower; the count of its tokens is known before it runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import adaptive_avg_pool2d
from transformers import ViTMAEConfig, ViTMAEModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_simplified.model.vision import VisionTower

PIXELS = {
    kind: (64 if kind == "efficientnet" else 32)
    for kind in ("clip", "siglip", "dinov2", "vit", "swin", "convnext", "efficientnet")
}


HIDING = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def tower(folder: Path, kind: str, **choices) -> VisionTower:
    return VisionTower.from_pretrained(str(folder / kind), **choices).eval()


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
def test_the_count_from_the_config_is_the_count_of_the_features(
    models_folder: Path, kind: str, tokens: int
) -> None:
    vision = tower(models_folder, kind, select_layer=-1)
    features = vision(torch.zeros(2, 3, PIXELS[kind], PIXELS[kind], dtype=torch.uint8))
    assert features.shape == (2, vision.num_tokens, vision.width)
    assert vision.num_tokens == tokens == vision.grid[0] * vision.grid[1]


def test_patch_drops_the_cls_token_and_cls_patch_keeps_it(models_folder: Path) -> None:
    pixels = torch.rand(1, 3, 32, 32)
    plain = tower(models_folder, "clip", select_layer=-2)
    kept = tower(models_folder, "clip", select_layer=-2, select_feature="cls_patch")
    hidden = plain.model(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(plain(pixels), hidden[-2][:, 1:])
    torch.testing.assert_close(kept(pixels), hidden[-2])


def test_siglip_has_no_cls_token_to_drop_and_none_to_keep(models_folder: Path) -> None:
    pixels = torch.rand(1, 3, 32, 32)
    vision = tower(models_folder, "siglip", select_layer=-1)
    torch.testing.assert_close(
        vision(pixels), vision.model(pixels, output_hidden_states=True).hidden_states[-1]
    )
    with pytest.raises(ValueError, match="no CLS token"):
        tower(models_folder, "siglip", select_feature="cls_patch")


@pytest.mark.parametrize("kind", ["convnext", "efficientnet"])
def test_a_feature_map_is_read_row_by_row(models_folder: Path, kind: str) -> None:
    vision = tower(models_folder, kind, select_layer=-1)
    pixels = torch.rand(1, 3, PIXELS[kind], PIXELS[kind])
    last = vision.model(pixels).last_hidden_state
    torch.testing.assert_close(vision(pixels)[0, 1], last[0, :, 0, 1])


def test_several_layers_stand_side_by_side(models_folder: Path) -> None:
    vision = tower(models_folder, "clip", select_layer=(-2, -1))
    pixels = torch.rand(1, 3, 32, 32)
    hidden = vision.model(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(vision(pixels), torch.cat([hidden[-2], hidden[-1]], -1)[:, 1:])
    assert vision.width == 48


def test_maps_of_several_sizes_meet_on_the_smallest_grid(models_folder: Path) -> None:
    vision = tower(models_folder, "convnext", select_layer=(-1, 1))
    pixels = torch.rand(1, 3, 32, 32)
    outputs = vision.model(pixels, output_hidden_states=True)
    early = adaptive_avg_pool2d(outputs.hidden_states[1], 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(vision(pixels)[..., 24:], early)


def test_token_pool_averages_neighbouring_patches(models_folder: Path) -> None:
    pixels = torch.rand(1, 3, 32, 32)
    full = tower(models_folder, "clip")(pixels)
    pooled = tower(models_folder, "clip", token_pool=2)
    grid = full.view(1, 4, 4, -1)
    torch.testing.assert_close(pooled(pixels)[0, 0], grid[0, :2, :2].mean((0, 1)))
    assert pooled.num_tokens == 4
    with pytest.raises(ValueError, match="pooled"):
        tower(models_folder, "clip", token_pool=2, select_feature="cls_patch")


def test_a_layer_out_of_range_is_named(models_folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"mm_vision_select_layer \(-9,\) is out of range: the tower has 4"
    ):
        tower(models_folder, "clip", select_layer=-9)


def test_a_model_that_gives_no_grid_of_features_is_named(tmp_path: Path) -> None:
    """It hides most patches, others at every call."""
    ViTMAEModel(ViTMAEConfig(**HIDING)).save_pretrained(tmp_path)
    CLIPImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a vit_mae can't be the vision tower"):
        VisionTower.from_pretrained(str(tmp_path))


def test_a_language_model_is_no_tower(models_folder: Path) -> None:
    with pytest.raises(ValueError):
        tower(models_folder, "mistral")


def test_a_frozen_tower_stays_in_evaluation_mode(models_folder: Path) -> None:
    """Batch norm in training mode would drift its statistics, and dropout would change the features."""
    vision = tower(models_folder, "efficientnet", select_layer=-1).requires_grad_(False)
    vision.train()
    assert not vision.training
    assert not any(module.training for module in vision.modules())
    assert not vision(torch.zeros(1, 3, 64, 64)).requires_grad
    vision.requires_grad_(True).train()
    assert vision.model.training


def test_uint8_pixels_are_normalised_as_the_processor_does(models_folder: Path) -> None:
    vision = tower(models_folder, "clip")
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    mean = torch.tensor(vision.transform.mean).view(3, 1, 1)
    std = torch.tensor(vision.transform.std).view(3, 1, 1)
    torch.testing.assert_close(vision(pixels), vision((pixels / 255 - mean) / std))


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("kind", PIXELS)
def test_what_the_features_depend_on_is_what_gets_a_gradient(
    models_folder: Path, kind: str, layer: int
) -> None:
    """The layers above the selected one have no part in the features: trained, they would never move."""
    vision = tower(models_folder, kind, select_layer=layer)
    vision(torch.rand(2, 3, PIXELS[kind], PIXELS[kind])).sum().backward()
    moved = {
        name for name, parameter in vision.model.named_parameters() if parameter.grad is not None
    }
    assert vision.used_parameters == moved and moved
    assert (
        kind != "clip"
        or layer != -2
        or not any("layers.2." in name for name in vision.used_parameters)
    )


def test_a_tower_in_training_keeps_the_statistics_of_its_batch_norms(models_folder: Path) -> None:
    vision = tower(models_folder, "efficientnet").train()
    before = {name: buffer.clone() for name, buffer in vision.named_buffers()}
    vision(torch.rand(2, 3, 64, 64))
    assert vision.model.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in vision.named_buffers())


def test_missing_weights_are_refused_where_they_matter(models_folder: Path, tmp_path: Path) -> None:
    """transformers would warn, draw them at random, and go on."""
    shutil.copytree(models_folder / "clip", tmp_path / "clip")
    path = tmp_path / "clip" / "model.safetensors"
    whole = load_file(path)
    above, below = (next(name for name in whole if f"layers.{n}." in name) for n in (2, 0))
    save_file({name: w for name, w in whole.items() if name != above}, path, {"format": "pt"})
    tower(tmp_path, "clip", select_layer=-2)
    save_file({name: w for name, w in whole.items() if name != below}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"weights are missing: .*layers\.0\."):
        tower(tmp_path, "clip", select_layer=-2)

"""Exactly the intended parameters are trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from llava_simplified.model.build import build_model
from llava_simplified.model.config import LlavaConfig, TrainedParts
from llava_simplified.model.llava import Llava
from llava_simplified.model.lora import (
    add_lora,
    add_tower_lora,
    check_trainable,
    find_linear_modules,
    freeze,
)


def build(folder: Path, text: str = "mistral", dtype: str = "float32") -> Llava:
    return build_model(LlavaConfig(str(folder / text), str(folder / "clip"), dtype=dtype))


def trained_names(model: Llava) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained_dtypes(model: Llava) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}


def frozen_dtypes(model: Llava) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}


@pytest.mark.parametrize("text", ["mistral", "llama", "qwen2", "phi"])
def test_find_linear_modules_returns_all_but_the_output_layer(
    models_folder: Path, text: str
) -> None:
    model = build(models_folder, text)
    layers = find_linear_modules(model.language_model)
    linears = set()
    for name, module in model.language_model.named_modules():
        if isinstance(module, nn.Linear):
            linears.add(name)
    assert linears - set(layers) == {"lm_head"}

    # Each of these layers gets an adapter.
    add_lora(model, 2, 4)
    adapted = set()
    for name, _ in model.language_model.named_parameters():
        if "lora_A" in name:
            adapted.add(name.split(".lora_A")[0])
    assert len(adapted) == len(layers)


def test_add_lora_trains_adapter_and_projector_and_not_the_tower(models_folder: Path) -> None:
    """The tower also has layers called q_proj and k_proj, which must not be selected by their names."""
    model = build(models_folder, dtype="bfloat16")
    freeze(model, TrainedParts())
    add_lora(model, 2, 4)
    trained = trained_names(model)
    assert all("lora_" in name or name.startswith("projector.") for name in trained)
    assert not any("lora_" in name for name, _ in model.vision_tower.named_parameters())
    assert trained_dtypes(model) == {torch.float32}
    assert frozen_dtypes(model) == {torch.bfloat16}
    table = check_trainable(model, TrainedParts("adapter"))
    count = sum(model.get_parameter(name).numel() for name in trained)
    assert f"{count:,}" in table


def test_check_trainable_refuses_what_should_be_frozen_or_is_not_trained(
    models_folder: Path,
) -> None:
    model = build(models_folder)
    freeze(model, TrainedParts())
    next(model.vision_tower.parameters()).requires_grad_(True)
    with pytest.raises(RuntimeError, match="vision tower: .* expected 0"):
        check_trainable(model, TrainedParts())
    freeze(model, TrainedParts())
    model.projector.bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match="projector"):
        check_trainable(model, TrainedParts())


def test_freeze_trains_the_full_language_model_or_only_the_projector(models_folder: Path) -> None:
    model = build(models_folder, dtype="bfloat16")
    freeze(model, TrainedParts("full"))
    check_trainable(model, TrainedParts("full"))
    assert model.language_model.dtype == torch.float32, "bfloat16 would round the updates away"
    freeze(model, TrainedParts())
    check_trainable(model, TrainedParts())
    assert {name.split(".")[0] for name in trained_names(model)} == {"projector"}


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_add_lora_trains_biases_if_asked(models_folder: Path, bias: str) -> None:
    model = build(models_folder, "qwen2")  # Its q, k and v projections have biases.
    freeze(model, TrainedParts())
    add_lora(model, 2, 4, bias=bias)
    check_trainable(model, TrainedParts("adapter"))
    assert isinstance(model.language_model, PeftModel)
    assert any(
        parameter.requires_grad and name.endswith("bias")
        for name, parameter in model.language_model.named_parameters()
    )


def test_freeze_of_a_full_tower_trains_only_the_used_parameters(models_folder: Path) -> None:
    parts = TrainedParts(vision_tower="full")
    model = build(models_folder, dtype="bfloat16")
    freeze(model, parts)
    # Exactly the used parameters of the tower are trained.
    prefix = "vision_tower.model."
    trained = set()
    for name in trained_names(model):
        if name.startswith(prefix):
            trained.add(name.removeprefix(prefix))
    assert trained == set(model.vision_tower.used_parameters)
    assert trained_dtypes(model) == {torch.float32}
    table = check_trainable(model, parts)
    count = sum(p.numel() for p in model.vision_tower.parameters() if p.requires_grad)
    assert f"{count:,}" in table
    with pytest.raises(RuntimeError, match="vision tower: .* expected 0"):
        check_trainable(model, TrainedParts())
    # Training the layers above the selected one is an error too.
    model.vision_tower.requires_grad_(True)
    with pytest.raises(RuntimeError, match="vision tower"):
        check_trainable(model, parts)


@pytest.mark.parametrize("with_text_adapter", [True, False])
def test_add_tower_lora_adapts_the_tower_alone(
    models_folder: Path, with_text_adapter: bool
) -> None:
    """Layers of Mistral and of CLIP have the same names. An adapter must not include layers of the other model."""
    model = build(models_folder, dtype="bfloat16")
    freeze(model, TrainedParts())
    add_tower_lora(model, 2, 4)
    if with_text_adapter:
        add_lora(model, 2, 4)
    trained = trained_names(model)
    assert all("lora_" in name or name.startswith("projector.") for name in trained)
    assert any(name.startswith("language_model.") for name in trained) == with_text_adapter

    # Only layers that the features depend on have an adapter.
    prefix = "vision_tower.model.base_model.model."
    adapted = set()
    for name in trained:
        if "vision" in name:
            layer = name.split(".lora_")[0]
            adapted.add(layer.removeprefix(prefix))
    assert adapted
    assert all(f"{name}.weight" in model.vision_tower.used_parameters for name in adapted)
    assert not model.vision_tower.frozen
    assert trained_dtypes(model) == {torch.float32}
    parts = TrainedParts("adapter" if with_text_adapter else "none", "lora")
    assert "vision adapter" in check_trainable(model, parts)

    # Every weight of the adapter gets a gradient.
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    model.train()
    features = model.vision_tower(pixels)
    features.float().sum().backward()
    for name, parameter in model.vision_tower.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None, name

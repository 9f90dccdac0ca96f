"""Only what should train trains."""

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


@pytest.mark.parametrize("text", ["mistral", "llama", "qwen2", "phi"])
def test_all_linear_layers_but_the_head_by_their_full_paths(models_folder: Path, text: str) -> None:
    model = build(models_folder, text)
    layers = find_linear_modules(model.language_model)
    linears = [n for n, m in model.language_model.named_modules() if isinstance(m, nn.Linear)]
    assert set(linears) - set(layers) == {"lm_head"}
    add_lora(model, 2, 4)
    adapted = {
        n.split(".lora_A")[0] for n, _ in model.language_model.named_parameters() if "lora_A" in n
    }
    assert len(adapted) == len(layers)


def test_lora_trains_the_adapter_and_the_projector_and_never_the_tower(models_folder: Path) -> None:
    """The tower has q_proj and k_proj too: a bare name would adapt them."""
    model = build(models_folder, dtype="bfloat16")
    freeze(model, TrainedParts())
    add_lora(model, 2, 4)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or n.startswith("projector.") for n in trained)
    assert not any("lora_" in n for n, _ in model.vision_tower.named_parameters())
    assert {p.dtype for n, p in model.named_parameters() if n in trained} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if n not in trained} == {torch.bfloat16}
    table = check_trainable(model, TrainedParts())
    counted = sum(p.numel() for n, p in model.named_parameters() if n in trained)
    assert f"{counted:,}" in table


def test_the_table_refuses_what_should_not_train(models_folder: Path) -> None:
    model = build(models_folder)
    freeze(model, TrainedParts())
    next(model.vision_tower.parameters()).requires_grad_(True)
    with pytest.raises(RuntimeError, match="vision tower: .* train, should be 0"):
        check_trainable(model, TrainedParts())
    freeze(model, TrainedParts())
    model.projector.bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match="projector"):
        check_trainable(model, TrainedParts())


def test_full_fine_tuning_and_projector_only(models_folder: Path) -> None:
    model = build(models_folder, dtype="bfloat16")
    freeze(model, TrainedParts("full"))
    check_trainable(model, TrainedParts("full"))
    assert model.language_model.dtype == torch.float32, "bfloat16 would round the updates away"
    freeze(model, TrainedParts())
    check_trainable(model, TrainedParts())
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {
        "projector"
    }


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_train_where_asked(models_folder: Path, bias: str) -> None:
    model = build(models_folder, "qwen2")  # its q, k and v projections have biases
    freeze(model, TrainedParts())
    add_lora(model, 2, 4, bias=bias)
    check_trainable(model, TrainedParts())
    assert isinstance(model.language_model, PeftModel)
    assert any(
        p.requires_grad and n.endswith("bias") for n, p in model.language_model.named_parameters()
    )


def trained_names(model: Llava) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def test_a_tower_that_trains_whole_trains_what_its_features_depend_on(models_folder: Path) -> None:
    model = build(models_folder, dtype="bfloat16")
    freeze(model, TrainedParts(vision_tower="full"))
    tower = {
        n.removeprefix("vision_tower.model.")
        for n in trained_names(model)
        if n.startswith("vision_tower.")
    }
    assert tower == set(model.vision_tower.used_parameters)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    table = check_trainable(model, TrainedParts(vision_tower="full"))
    assert (
        f"{sum(p.numel() for p in model.vision_tower.parameters() if p.requires_grad):,}" in table
    )
    with pytest.raises(RuntimeError, match="vision tower: .* should be 0"):
        check_trainable(model, TrainedParts())
    model.vision_tower.requires_grad_(True)  # and the layers above
    with pytest.raises(RuntimeError, match="vision tower"):
        check_trainable(model, TrainedParts(vision_tower="full"))


@pytest.mark.parametrize("text_too", [True, False])
def test_each_model_has_an_adapter_of_its_own(models_folder: Path, text_too: bool) -> None:
    """Mistral's and CLIP's layers share names: neither adapter may reach into the other's model."""
    model = build(models_folder, dtype="bfloat16")
    freeze(model, TrainedParts())
    add_tower_lora(model, 2, 4)
    if text_too:
        add_lora(model, 2, 4)
    names = trained_names(model)
    assert all("lora_" in n or n.startswith("projector.") for n in names)
    assert any(n.startswith("language_model.") for n in names) == text_too
    adapted = {
        n.split(".lora_")[0].removeprefix("vision_tower.model.base_model.model.")
        for n in names
        if "vision" in n
    }
    assert adapted and all(
        f"{name}.weight" in model.vision_tower.used_parameters for name in adapted
    )
    assert not model.vision_tower.frozen
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert "vision adapter" in check_trainable(model, TrainedParts())
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    model.train().vision_tower(pixels).float().sum().backward()
    assert all(
        p.grad is not None
        for n, p in model.named_parameters()
        if "lora_" in n and n.startswith("vision")
    )

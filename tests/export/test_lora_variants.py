"""DoRA, rsLoRA and PiSSA from the options of `llava train` to the files of other tools."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import first_logits, train_checkpoint
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from llava_simplified.export.export_command import merge_main
from llava_simplified.export.gguf_export import export_gguf
from llava_simplified.export.stock import export_stock
from llava_simplified.model.llava import Llava

VARIANTS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "all": {
        "use_dora": True,
        "use_rslora": True,
        "init_lora_weights": "pissa",
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"q_proj": 7},
    },
}


@pytest.mark.medium
@pytest.mark.parametrize("variant", VARIANTS)
def test_run_is_resumed_merged_and_exported(
    models_folder: Path, data_folder: Path, tmp_path: Path, variant: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    # JSON is YAML; booleans in it are read as strings, as in all recipes.
    recipe.write_text(json.dumps({"lora_options": VARIANTS[variant]}))
    options = {
        "config": recipe,
        "model_name_or_path": models_folder / "llama",
        "vision_tower": models_folder / "clip",
        "learning_rate": 1e-3,
        "lora_dropout": 0.1,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 2,
    }
    checkpoint = train_checkpoint(data_folder, tmp_path / "out", **options)
    options["resume_from_checkpoint"] = checkpoint / "checkpoint-1"
    resumed = train_checkpoint(data_folder, tmp_path / "resumed", **options)
    for name in ("adapter/adapter_model.safetensors", "projector.safetensors"):
        expected, actual = load_file(checkpoint / name), load_file(resumed / name)
        assert expected.keys() == actual.keys()
        for key, weight in expected.items():
            assert torch.equal(weight, actual[key]), key

    image = data_folder / "images" / "2.jpg"
    before = first_logits(Llava.from_pretrained(checkpoint), image)
    merge_main([str(checkpoint), "--output", str(tmp_path / "merged")])
    after = first_logits(Llava.from_pretrained(tmp_path / "merged"), image)
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)

    # Each export compares the logits of stock classes with those of the checkpoint.
    for adapter in (False, True):
        export_stock(checkpoint, tmp_path / f"stock-{adapter}", adapter=adapter)
    assert export_gguf(checkpoint, tmp_path / "gguf") > 0

    # The exported base model is the original one, even if PiSSA changed its weights for training.
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "stock-True" / "base")
    original = load_file(models_folder / "llama" / "model.safetensors")
    name = "layers.0.self_attn.q_proj.weight"
    weight = stock.model.language_model.get_parameter(name)
    assert torch.equal(weight, original[f"model.{name}"])
    adapted = PeftModel.from_pretrained(stock, tmp_path / "stock-True" / "adapter")
    assert any("lora_" in parameter for parameter, _ in adapted.named_parameters())
    assert not any(
        "lora_" in parameter and "vision" in parameter
        for parameter, _ in adapted.named_parameters()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_enable": False}, "--lora_options.*--lora_enable"),
        ({"bits": 4}, "--lora_options.*--bits 16"),
        ({"init_from": "x", "lora_options": '{"use_dorra": 1}'}, "did you mean use_dora"),
    ],
)
def test_lora_options_that_cannot_apply_are_refused_before_anything_is_loaded(
    models_folder: Path, data_folder: Path, tmp_path: Path, options: dict, message: str
) -> None:
    values = {
        "model_name_or_path": models_folder / "llama",
        "vision_tower": models_folder / "clip",
        "lora_options": '{"init_lora_weights": "pissa"}',
        **options,
    }
    with pytest.raises(ValueError, match=message):
        train_checkpoint(data_folder, tmp_path / "out", **values)


@pytest.mark.medium
def test_run_with_other_lora_options_is_not_resumed(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    values = {
        "model_name_or_path": models_folder / "llama",
        "vision_tower": models_folder / "clip",
        "lora_options": '{"use_rslora": true}',
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 1,
    }
    checkpoint = train_checkpoint(data_folder, tmp_path / "out", **values)
    values["resume_from_checkpoint"] = checkpoint / "checkpoint-1"
    values["lora_options"] = '{"use_rslora": false}'
    with pytest.raises(ValueError, match="--lora_options.*--init_from"):
        train_checkpoint(data_folder, tmp_path / "again", **values)

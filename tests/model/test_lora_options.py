"""`--lora_options`: names and values, the layers they select, and DoRA, rsLoRA and PiSSA as in PEFT."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from llava_simplified.model import pissa
from llava_simplified.model.build import build_model
from llava_simplified.model.checkpoint import (
    load_checkpoint,
    load_trained_weights,
    read_adapter_config,
    save_checkpoint,
)
from llava_simplified.model.config import LlavaConfig, TrainedParts
from llava_simplified.model.llava import Llava
from llava_simplified.model.lora import add_lora, check_trainable, freeze
from llava_simplified.model.lora_options import (
    _ACCEPTED,
    _OWN_OPTIONS,
    _REFUSED,
    parse_lora_options,
)

ADAPTER = TrainedParts("adapter")
RANK, ALPHA = 3, 5
VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_4"},
    "all": {
        "use_dora": True,
        "use_rslora": True,
        "init_lora_weights": "pissa",
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"layers.0.*q_proj": 7},
    },
}


def build(folder: Path, options: dict[str, Any], dtype: str = "float32") -> Llava:
    """Build a model with an adapter, as a new run does."""
    config = LlavaConfig(str(folder / "mistral"), str(folder / "clip"), dtype=dtype)
    torch.manual_seed(5)
    model = build_model(config)
    freeze(model, ADAPTER)
    add_lora(model, RANK, ALPHA, options=options)
    pissa.initialize(model.language_model)
    return model.eval()


def train(model: torch.nn.Module) -> None:
    """Change the weights of the adapter at random, in the same way in every model with the same parameter names."""
    generator = torch.Generator().manual_seed(8)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            assert parameter.requires_grad
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def logits(language_model: Any) -> torch.Tensor:
    with torch.no_grad():
        return language_model(input_ids=torch.tensor([[5, 9, 3, 7, 4]])).logits


def stock_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "mistral", dtype=torch.float32).eval()


def save(model: Llava, folder: Path, models_folder: Path, dtype: str = "float32") -> Path:
    config = LlavaConfig(str(models_folder / "mistral"), str(models_folder / "clip"), dtype=dtype)
    save_checkpoint(model, folder, config, ADAPTER)
    return folder


# ---- names and values ----


def test_every_field_of_lora_config_is_accepted_or_refused_by_name() -> None:
    tables = [set(_ACCEPTED), set(_OWN_OPTIONS), set(_REFUSED)]
    assert {field.name for field in fields(LoraConfig)} <= set.union(*tables)
    assert sum(map(len, tables)) == len(set.union(*tables))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"use_dorra": true}', "use_dora"),
        ('{"r": 8}', "--lora_r"),
        ('{"modules_to_save": ["lm_head"]}', "modules_to_save .*linear layers"),
        ('{"init_lora_weights": "olora"}', "olora.* changes the frozen weights"),
        ('{"init_lora_weights": "eva"}', "eva.* expected|eva.*Expected"),
        ('{"init_lora_weights": false}', "false"),
        ('{"use_dora": 1}', "use_dora must be true or false"),
        ('{"use_dora": "maybe"}', "use_dora must be true or false"),
        ('{"layers_to_transform": [-1]}', "layers_to_transform"),
        ('{"layers_to_transform": true}', "layers_to_transform"),
        ('{"target_modules": []}', "target_modules"),
        ('{"target_modules": ["q_proj", 1]}', "target_modules"),
        ('{"rank_pattern": {"q_proj": 0}}', "rank_pattern"),
        ('{"alpha_pattern": {"q_proj": "8"}}', "alpha_pattern"),
        ("use_dora", "JSON mapping"),
        ("[1]", "JSON mapping"),
    ],
)
def test_parse_lora_options_names_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"--lora_options.*(?:{message})"):
        parse_lora_options(text)


def test_parse_lora_options_accepts_the_strings_of_yaml() -> None:
    text = '{"use_dora": "true", "use_rslora": "Off", "init_lora_weights": "true", "rank_pattern": null}'
    expected = {"use_dora": True, "use_rslora": False, "init_lora_weights": True}
    assert parse_lora_options(text) == expected
    assert parse_lora_options("") == {}


# ---- layers ----


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj", "mlp.down_proj"]}, r"(q_proj|mlp\.down_proj)"),
        ({"target_modules": r".*\.1\..*_proj"}, r"layers\.1\..*"),
        ({"target_modules": "all-linear", "exclude_modules": ["q_proj"]}, r"(?!.*q_proj).*_proj"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, r"layers\.1\..*q_proj"),
    ],
)
def test_add_lora_adapts_the_layers_that_peft_would(
    models_folder: Path, options: dict[str, Any], expected: str
) -> None:
    model = build(models_folder, options)
    adapted = {
        name for name, module in model.language_model.named_modules() if hasattr(module, "lora_A")
    }
    stock = get_peft_model(stock_model(models_folder), LoraConfig(task_type="CAUSAL_LM", **options))
    assert adapted == {name for name, module in stock.named_modules() if hasattr(module, "lora_A")}
    assert adapted
    assert not any("lora_" in name for name, _ in model.vision_tower.named_parameters())
    check_trainable(model, ADAPTER)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_prj"]}, "q_prj.*did you mean q_proj"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.*output layer"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens.*linear"),
        ({"target_modules": ".*"}, "model.*linear"),
        ({"target_modules": "q_proj"}, "matches no linear layer"),
        ({"target_modules": "("}, "regular expression"),
        ({"target_modules": ["fc1"]}, "fc1.*matches no linear layer"),  # of the vision tower
        ({"exclude_modules": ["k_prj"]}, "k_proj"),
        ({"exclude_modules": r".*_proj"}, "no layer"),
        ({"layers_to_transform": [7]}, "layers_to_transform 7"),
        ({"rank_pattern": {"q_prj": 2}}, "rank_pattern.*q_proj"),
        ({"init_lora_weights": "pissa", "rank_pattern": {"k_proj": 5000}}, "5000.*singular values"),
    ],
)
def test_add_lora_refuses_layers_that_do_not_exist_or_are_not_linear(
    models_folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"--lora_options.*{message}"):
        build(models_folder, options)


# ---- DoRA, rsLoRA and PiSSA ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapter_computes_what_peft_computes(models_folder: Path, variant: str) -> None:
    """Compare our adapter with PEFT's before and after training, and after merging with stock PEFT."""
    options = VARIANTS[variant]
    model = build(models_folder, options)
    torch.manual_seed(5)  # for the random decomposition, as in `build`
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, task_type="CAUSAL_LM", **options)
    config.target_modules = config.target_modules or "all-linear"
    stock: Any = get_peft_model(stock_model(models_folder), config).eval()
    original = logits(stock_model(models_folder))
    torch.testing.assert_close(logits(model.language_model), original, rtol=1e-4, atol=1e-5)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    check_trainable(model, ADAPTER)

    mine = dict(model.language_model.named_parameters())
    theirs = dict(stock.named_parameters())
    assert mine.keys() == theirs.keys()
    if not variant.startswith("pissa_"):
        for name, weight in theirs.items():
            if "lora_A" not in name or "pissa" in variant:
                torch.testing.assert_close(mine[name], weight, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for name, weight in theirs.items():
            weight.copy_(mine[name])
    train(model)
    train(stock)
    trained = logits(model.language_model)
    assert (trained - original).abs().max() > 1e-2
    torch.testing.assert_close(trained, logits(stock), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trained, logits(stock.merge_and_unload()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpoint_loads_and_merges_with_the_same_logits(
    models_folder: Path, tmp_path: Path, variant: str, dtype: str
) -> None:
    model = build(models_folder, VARIANTS[variant], dtype)
    train(model)
    checkpoint = save(model, tmp_path / "c", models_folder, dtype)
    expected = logits(model.language_model)
    loaded = load_checkpoint(checkpoint)
    assert torch.equal(logits(loaded.language_model), expected)
    if dtype == "float32":  # in bfloat16, merged weights are rounded
        merged = load_checkpoint(checkpoint, merge=True)
        assert not isinstance(merged.language_model, PeftModel)
        actual = logits(merged.language_model)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    # Saving the loaded model again does not change the files.
    again = save(loaded, tmp_path / "again", models_folder, dtype)
    name = "adapter/adapter_model.safetensors"
    assert (again / name).read_bytes() == (checkpoint / name).read_bytes()
    assert json.loads((again / "llava.json").read_text()) == json.loads(
        (checkpoint / "llava.json").read_text()
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_stored_adapter_fits_the_original_language_model(
    models_folder: Path, tmp_path: Path, variant: str
) -> None:
    """Stock PEFT loads `adapter/` on the original weights, even if PiSSA has changed them in training."""
    model = build(models_folder, VARIANTS[variant])
    train(model)
    checkpoint = save(model, tmp_path / "c", models_folder)
    stock: Any = PeftModel.from_pretrained(
        stock_model(models_folder), checkpoint / "adapter"
    ).eval()
    expected = logits(model.language_model)
    torch.testing.assert_close(logits(stock), expected, rtol=1e-4, atol=1e-5)
    merged = stock.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["pissa", "pissa_niter", "all"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_pissa_has_the_same_frozen_weights_bit_for_bit(
    models_folder: Path, tmp_path: Path, variant: str, dtype: str
) -> None:
    model = build(models_folder, VARIANTS[variant], dtype)
    train(model)
    checkpoint = save(model, tmp_path / "c", models_folder, dtype)
    config = LlavaConfig(str(models_folder / "mistral"), str(models_folder / "clip"), dtype=dtype)
    resumed = build_model(config)
    freeze(resumed, ADAPTER)
    add_lora(resumed, RANK, ALPHA, options=VARIANTS[variant])
    load_trained_weights(resumed, checkpoint)
    pissa.initialize(resumed.language_model)  # nothing is left to do
    check_trainable(resumed, ADAPTER)
    expected = model.state_dict()
    actual = resumed.state_dict()
    assert expected.keys() == actual.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, actual[name]), name


@pytest.mark.parametrize(
    ("trained", "other", "message"),
    [
        ({"use_rslora": True}, {}, "use_rslora=True"),
        ({}, {"use_dora": True}, "use_dora=False"),
        ({"alpha_pattern": {"q_proj": 9}}, {}, "alpha_pattern"),
        ({"init_lora_weights": "pissa"}, {}, '"init_lora_weights": "pissa"'),
        ({}, {"init_lora_weights": "pissa"}, '"init_lora_weights": true'),
    ],
)
def test_another_kind_of_adapter_is_not_loaded(
    models_folder: Path,
    tmp_path: Path,
    trained: dict[str, Any],
    other: dict[str, Any],
    message: str,
) -> None:
    """The shapes are the same, so only this check finds the difference."""
    checkpoint = save(build(models_folder, trained), tmp_path / "c", models_folder)
    model = build_model(LlavaConfig(str(models_folder / "mistral"), str(models_folder / "clip")))
    add_lora(model, RANK, ALPHA, options=other)
    with pytest.raises(ValueError, match=f"--lora_options|{message}") as error:
        load_trained_weights(model, checkpoint)
    assert message in str(error.value)


def test_adapter_for_changed_base_weights_is_refused(models_folder: Path, tmp_path: Path) -> None:
    """PEFT stores the adapter of PiSSA alone, and decomposes the weights again when it loads it."""
    config = LoraConfig(init_lora_weights="pissa", target_modules=["q_proj"])
    get_peft_model(stock_model(models_folder), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"pissa.*path_initial_model_for_weight_conversion"):
        read_adapter_config(tmp_path)


@pytest.mark.parametrize(
    "damage", [[], {"r": 3}, {"r": "3", "lora_alpha": 5, "rank_pattern": {}, "alpha_pattern": {}}]
)
def test_damaged_entry_of_pissa_is_an_error(
    models_folder: Path, tmp_path: Path, damage: Any
) -> None:
    checkpoint = save(build(models_folder, VARIANTS["pissa"]), tmp_path / "c", models_folder)
    path = checkpoint / "llava.json"
    config = json.loads(path.read_text())
    config["pissa"] = damage
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="pissa|invalid value"):
        load_checkpoint(checkpoint)

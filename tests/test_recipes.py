"""Packaged training recipes: `--config` finds them by name, by the documented path, or as a file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import transformers
import yaml
from tiny import CAPTIONS, make_tokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_simplified.arguments import parse_arguments
from llava_simplified.recipes import RECIPES_FOLDER, resolve_recipe
from llava_simplified.training import build_trainer
from llava_simplified.training.plan import make_plan

ROOT = Path(__file__).parents[1]
GPU_RECIPES = sorted(
    path.stem for path in RECIPES_FOLDER.glob("*.yaml") if "one GPU" in path.read_text()
)
# The configs of the models that these recipes name.
VIT_BASE = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}
VIT_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
CONFIGS = {
    "mistralai/Mistral-7B-Instruct-v0.1": transformers.MistralConfig(
        architectures=["MistralForCausalLM"]
    ),
    "HuggingFaceTB/SmolLM2-360M-Instruct": transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=49152,
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
        tie_word_embeddings=True,
    ),
    "openai/clip-vit-base-patch16": transformers.CLIPVisionConfig(
        architectures=["CLIPVisionModel"], **VIT_BASE
    ),
    "openai/clip-vit-large-patch14-336": transformers.CLIPVisionConfig(
        architectures=["CLIPVisionModel"], **VIT_LARGE
    ),
    "google/siglip-base-patch16-224": transformers.SiglipVisionConfig(
        architectures=["SiglipVisionModel"], **VIT_BASE
    ),
}


@pytest.mark.parametrize("name", ["demo", "demo.yaml", "configs/demo.yaml"])
def test_resolve_recipe_finds_packaged_recipes_outside_a_checkout(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_recipe(name) == RECIPES_FOLDER / "demo.yaml"


def test_resolve_recipe_prefers_an_existing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    Path("configs/demo.yaml").write_text("lora_r: 3\n")
    assert resolve_recipe("configs/demo.yaml") == Path("configs/demo.yaml")
    assert parse_arguments(["--config", "configs/demo.yaml"])[0].lora_r == 3


@pytest.mark.parametrize("name", ["demos", "elsewhere/demo.yaml", "demo.json", ""])
def test_resolve_recipe_lists_the_recipes_for_an_unknown_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"--config .*demo, .*demo_projector"):
        resolve_recipe(name)


def test_parse_arguments_reads_a_packaged_recipe() -> None:
    model, _, training = parse_arguments(["--config", "cc3m_mistral7b_clip_b16_lora"])
    assert model.model_name_or_path == "mistralai/Mistral-7B-Instruct-v0.1"
    assert training.model_max_length == 64


def test_configs_in_the_checkout_is_the_packaged_folder() -> None:
    assert (ROOT / "configs").resolve() == RECIPES_FOLDER.resolve()


def test_the_tutorials_deepspeed_configuration_is_zero2() -> None:
    alias = ROOT / "ds_configs" / "config_zero2.json"
    assert alias.read_text() == (ROOT / "ds_configs" / "zero2.json").read_text()


def write_model_without_weights(name: str, folder: Path) -> str:
    """Write the config of a model, and a small tokenizer or the image processor; return the folder."""
    config = CONFIGS[name]
    config.save_pretrained(folder)
    if hasattr(config, "image_size"):
        size = {"height": config.image_size, "width": config.image_size}
        CLIPImageProcessorPil(
            size={"shortest_edge": config.image_size}, crop_size=size
        ).save_pretrained(folder)
    else:
        make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", GPU_RECIPES)
def test_recipe_fits_the_gpu_that_it_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comment has the estimate of `llava plan`, for captions of about a dozen words."""
    path = resolve_recipe(name)
    hardware = re.search(
        r"# Hardware: one GPU with (\d+) GB \(`llava plan`: ([\d.]+) GB", path.read_text()
    )
    assert hardware is not None
    recipe = yaml.safe_load(path.read_text())
    argv = ["--config", name, "--output_dir", str(tmp_path / "out"), "--eval_strategy", "no"]
    for option in ("model_name_or_path", "vision_tower"):
        argv += [f"--{option}", write_model_without_weights(recipe[option], tmp_path / option)]
    if name.startswith("coco"):
        # COCO has five captions of each image.
        responses = [" ".join(CAPTIONS[:2])] * 5
        records = [{"image": "0.jpg", "instruction": "Describe it.", "responses": responses}]
        (tmp_path / "train.json").write_text(json.dumps(records * 10))
        argv += ["--train_data_path", str(tmp_path / "train.json")]
    if "objective" in recipe:
        # Training on rewards begins with a checkpoint, which the plan checks, but does not load.
        monkeypatch.setattr(build_trainer, "check_origin", lambda *_, **__: None)
        argv += ["--init_from", "checkpoint"]
    # The peak is linear in the number of layers. A plan of a few layers takes much less time than one of all layers.
    peaks = {}
    for layers in (2, 4):
        config = CONFIGS[recipe["model_name_or_path"]].to_dict() | {"num_hidden_layers": layers}
        (tmp_path / "model_name_or_path" / "config.json").write_text(json.dumps(config))
        peaks[layers] = make_plan(*parse_arguments(argv)).peak / 1e9
    layers = CONFIGS[recipe["model_name_or_path"]].num_hidden_layers
    peak = peaks[2] + (layers - 2) / 2 * (peaks[4] - peaks[2])
    assert peak == pytest.approx(float(hardware[2]), rel=0.1)
    # Libraries and the allocator need memory, too.
    assert peak < 0.95 * float(hardware[1])

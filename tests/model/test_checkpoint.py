"""A checkpoint is a folder that loads with one call and no other knowledge, or an error that says why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llava_simplified import cli
from llava_simplified.model.build import build_model
from llava_simplified.model.checkpoint import load_checkpoint, load_trained_weights, save_checkpoint
from llava_simplified.model.config import LlavaConfig, TrainedParts
from llava_simplified.model.llava import Llava
from llava_simplified.model.lora import add_lora, add_tower_lora, freeze
from llava_simplified.model.weights import weights_digest
from llava_simplified.prompt import IMAGE_INDEX


def logits(model: Llava) -> torch.Tensor:
    tokens = model.vision_tower.num_tokens
    ids = torch.tensor([[0, *[IMAGE_INDEX] * tokens, 7, 8, 9]])
    pixels = (
        torch.arange(3 * 32 * 32, dtype=torch.float)
        .remainder(255)
        .view(1, 3, 32, 32)
        .to(torch.uint8)
    )
    with torch.no_grad():
        features = model.vision_tower(pixels)
        return model.language_model(inputs_embeds=model.splice(ids, features)).logits


def trained_model(
    folder: Path, how: str, tower_how: str = "off", **choices
) -> tuple[Llava, LlavaConfig, TrainedParts]:
    text, tower = str(folder / "mistral"), str(folder / "clip")
    prints = {"language_model": weights_digest(text), "vision_tower": weights_digest(tower)}
    architecture = LlavaConfig(text, tower, weights_digests=prints, **choices)
    model = build_model(architecture)
    parts = TrainedParts.from_stored({"trained": how, "trained_tower": tower_how})
    freeze(model, parts)
    if tower_how == "lora":
        add_tower_lora(model, 2, 4)
    if how == "adapter":
        add_lora(model, 2, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval(), architecture, parts


@pytest.mark.parametrize("how", ["adapter", "projector", "language_model"])
@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_a_checkpoint_loads_with_the_same_logits(
    models_folder: Path, tmp_path: Path, how: str, kind: str
) -> None:
    model, architecture, parts = trained_model(models_folder, how, mm_projector_type=kind)
    save_checkpoint(model, tmp_path / "renamed as one likes", architecture, parts)
    again = Llava.from_pretrained(tmp_path / "renamed as one likes")
    assert torch.equal(logits(model), logits(again))
    assert (
        json.loads((tmp_path / "renamed as one likes" / "llava.json").read_text())["trained"] == how
    )


@pytest.mark.parametrize("tower_how", ["full", "lora"])
@pytest.mark.parametrize("how", ["adapter", "language_model"])
def test_a_trained_tower_comes_back(
    models_folder: Path, tmp_path: Path, how: str, tower_how: str
) -> None:
    model, architecture, parts = trained_model(models_folder, how, tower_how)
    save_checkpoint(model, tmp_path / "c", architecture, parts)
    assert json.loads((tmp_path / "c" / "llava.json").read_text())["trained_tower"] == tower_how
    again = Llava.from_pretrained(tmp_path / "c")
    assert torch.equal(logits(model), logits(again))
    base, _, _ = trained_model(models_folder, "projector")
    base.projector.load_state_dict(model.projector.state_dict())
    assert not torch.equal(logits(base), logits(again)), "the tower was trained"
    merged = load_checkpoint(tmp_path / "c", merge=True)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    load_trained_weights(base := trained_model(models_folder, how, tower_how)[0], tmp_path / "c")
    assert torch.equal(logits(model), logits(base)), "as a resume does"
    folder, file = {"full": ("vision_tower", "model"), "lora": ("vision_adapter", "adapter_model")}[
        tower_how
    ]
    path = tmp_path / "c" / folder / f"{file}.safetensors"
    tensors = load_file(path)
    key = next(name for name in tensors if "layers.0." in name)
    save_file({n: t for n, t in tensors.items() if n != key}, path, {"format": "pt"})
    for load in (load_checkpoint, lambda where: load_trained_weights(base, where)):
        with pytest.raises(ValueError, match=r"missing.*layers\.0\."):
            load(tmp_path / "c")


def test_missing_weights_of_a_language_model_are_refused(
    models_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(models_folder / "llama", tmp_path / "llama")
    path = tmp_path / "llama" / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"weights are missing: model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        build_model(LlavaConfig(str(tmp_path / "llama"), str(models_folder / "clip")))


def test_an_adapter_can_be_trained_further(models_folder: Path, tmp_path: Path) -> None:
    model, architecture, parts = trained_model(models_folder, "adapter", "lora")
    save_checkpoint(model, tmp_path / "c", architecture, parts)
    again = load_checkpoint(tmp_path / "c", trainable=True)
    assert all(
        p.requires_grad == ("lora_" in n or n.startswith("projector."))
        for n, p in again.named_parameters()
    )


def test_the_adapter_is_a_stock_peft_adapter(models_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, architecture, parts = trained_model(models_folder, "adapter")
    save_checkpoint(model, tmp_path / "c", architecture, parts)
    base = AutoModelForCausalLM.from_pretrained(models_folder / "mistral")
    stock = PeftModel.from_pretrained(base, str(tmp_path / "c" / "adapter")).eval()
    ids = torch.tensor([[0, 5, 6, 7]])
    assert torch.equal(stock(ids).logits, model.language_model(ids).logits)


def test_several_layers_and_a_pool_come_back(models_folder: Path, tmp_path: Path) -> None:
    model, architecture, parts = trained_model(
        models_folder, "projector", mm_vision_select_layer=(-2, -1), mm_token_pool=2
    )
    save_checkpoint(model, tmp_path / "c", architecture, parts)
    again = load_checkpoint(tmp_path / "c")
    assert again.vision_tower.num_tokens == 4
    assert torch.equal(logits(model), logits(again))


def test_saving_into_a_folder_with_logs_replaces_and_keeps(
    models_folder: Path, tmp_path: Path
) -> None:
    model, architecture, parts = trained_model(models_folder, "adapter")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "trainer_log.jsonl").write_text("{}\n")
    save_checkpoint(model, tmp_path / "out", architecture, parts)
    save_checkpoint(model, tmp_path / "out", architecture, parts)
    assert (tmp_path / "out" / "trainer_log.jsonl").exists()
    assert torch.equal(logits(load_checkpoint(tmp_path / "out")), logits(model))
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "a temporary folder was left behind"


@pytest.mark.parametrize(
    ("file", "key"),
    [("projector.safetensors", "bias"), ("adapter/adapter_model.safetensors", None)],
)
def test_a_missing_weight_is_named(
    models_folder: Path, tmp_path: Path, file: str, key: str | None
) -> None:
    model, architecture, parts = trained_model(models_folder, "adapter")
    save_checkpoint(model, tmp_path / "c", architecture, parts)
    tensors = load_file(tmp_path / "c" / file)
    key = key or sorted(tensors)[0]
    del tensors[key]
    save_file(tensors, tmp_path / "c" / file)
    with pytest.raises(ValueError, match=f"missing .*{key}"):
        load_checkpoint(tmp_path / "c")


def test_an_unexpected_weight_and_a_wrong_shape_are_named(
    models_folder: Path, tmp_path: Path
) -> None:
    model, architecture, parts = trained_model(models_folder, "projector")
    save_checkpoint(model, tmp_path / "c", architecture, parts)
    path = tmp_path / "c" / "projector.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "extra": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"unexpected \['extra'\]"):
        load_checkpoint(tmp_path / "c")
    save_file({**tensors, "bias": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"bias is \(3,\), the model needs \(32,\)"):
        load_checkpoint(tmp_path / "c")


def test_other_base_weights_of_the_same_shape_are_refused(
    models_folder: Path, tmp_path: Path
) -> None:
    model, architecture, parts = trained_model(models_folder, "adapter")
    save_checkpoint(model, tmp_path / "c", architecture, parts)
    other = tmp_path / "mistral"
    shutil.copytree(models_folder / "mistral", other)
    assert torch.equal(
        logits(load_checkpoint(tmp_path / "c", model_base=str(other))), logits(model)
    ), "a copy is fine"
    weights = load_file(other / "model.safetensors")
    save_file(
        {k: v + 0.01 for k, v in weights.items()},
        other / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(
        ValueError, match="other weights than those that this checkpoint was trained with"
    ):
        load_checkpoint(tmp_path / "c", model_base=str(other))


def test_a_base_that_is_gone_names_the_option(models_folder: Path, tmp_path: Path) -> None:
    model, architecture, parts = trained_model(models_folder, "adapter")
    save_checkpoint(model, tmp_path / "c", architecture, parts)
    manifest = json.loads((tmp_path / "c" / "llava.json").read_text())
    manifest["architecture"]["language_model"] = "/nowhere/mistral"
    (tmp_path / "c" / "llava.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="--model-base"):
        load_checkpoint(tmp_path / "c")


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("language", "tokenizer.json"),
        ("language", "config.json"),
        ("language", "model-00002-of-00004.safetensors"),
        ("language", "model.safetensors.index.json"),
        ("vision", "config.json"),
        ("vision", "model.safetensors"),
        ("vision", "preprocessor_config.json"),
    ],
)
def test_a_lone_file_that_is_missing_is_named_before_training_and_after(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    part: str,
    name: str,
) -> None:
    AutoModelForCausalLM.from_pretrained(models_folder / "llama").save_pretrained(
        tmp_path / "language", max_shard_size="40KB"
    )
    AutoTokenizer.from_pretrained(models_folder / "llama").save_pretrained(tmp_path / "language")
    shutil.copytree(models_folder / "clip", tmp_path / "vision")
    parts = {"language_model": str(tmp_path / "language"), "vision_tower": str(tmp_path / "vision")}
    prints = {key: weights_digest(folder) for key, folder in parts.items()}
    architecture = LlavaConfig(**parts, weights_digests=prints)
    freeze(model := build_model(architecture), TrainedParts())
    save_checkpoint(model, tmp_path / "c", architecture, TrainedParts())
    (tmp_path / part / name).unlink()
    words = [
        "--model_name_or_path",
        parts["language_model"],
        "--vision_tower",
        parts["vision_tower"],
    ]
    words += [
        "--train_data_path",
        data_folder / "train.json",
        "--train_image_folder",
        data_folder / "images",
    ]
    assert cli.main(["train", *map(str, [*words, "--output_dir", tmp_path / "out"])]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{name} is missing: put it into {tmp_path / part}" in said
    assert said.startswith(
        "error: --" if "token" not in name and "processor" not in name else "error: the "
    )
    if name != "tokenizer.json":  # the checkpoint has its own
        with pytest.raises(ValueError, match=f"{name} is missing: put it into {tmp_path / part}"):
            load_checkpoint(tmp_path / "c")


def test_a_hubs_weights_are_told_apart_by_the_files_that_are_loaded(
    models_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--me--clip" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--me--clip" / "refs").mkdir()
    (tmp_path / "models--me--clip" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.copy(models_folder / "clip" / "config.json", snapshot)
    with pytest.raises(OSError, match=r"no model\.safetensors"):  # not the digest of no weights
        weights_digest("me/clip")
    shutil.copy(models_folder / "clip" / "model.safetensors", snapshot)
    (snapshot / "tf_model.bin").write_bytes(b"of another library")
    assert weights_digest("me/clip") == weights_digest(str(models_folder / "clip"))


def test_a_folder_that_is_no_checkpoint(models_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"llava\.json is missing"):
        load_checkpoint(tmp_path)
    model, architecture, parts = trained_model(models_folder, "projector")
    save_checkpoint(model, tmp_path / "checkpoint-4", architecture, parts)
    with pytest.raises(ValueError, match="did you mean .*checkpoint-4"):
        load_checkpoint(tmp_path)

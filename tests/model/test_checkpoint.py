"""Saving and loading checkpoints: equal logits after loading, and errors for damaged checkpoints."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Llama4Config,
    Llama4ForCausalLM,
)

from llava_simplified import cli
from llava_simplified.model import checkpoint as checkpoint_module
from llava_simplified.model.build import build_model, build_vision_tower
from llava_simplified.model.checkpoint import (
    copy_checkpoint,
    load_checkpoint,
    load_trained_weights,
    save_checkpoint,
)
from llava_simplified.model.config import LlavaConfig, TrainedParts, read_checkpoint_config
from llava_simplified.model.llava import Llava
from llava_simplified.model.lora import add_lora, add_tower_lora, check_trainable, freeze
from llava_simplified.model.weights import weights_digest
from llava_simplified.prompt import IMAGE_INDEX


def compute_logits(model: Llava) -> torch.Tensor:
    num_tokens = model.vision_tower.num_tokens
    # One image, and three tokens of text.
    ids = torch.tensor([[0, *[IMAGE_INDEX] * num_tokens, 7, 8, 9]])
    values = torch.arange(3 * 32 * 32) % 255
    pixels = values.view(1, 3, 32, 32).to(torch.uint8)
    with torch.no_grad():
        embeds = model.splice(ids, model.vision_tower(pixels))
        return model.language_model(inputs_embeds=embeds).logits


def make_config(folder: Path, **choices: Any) -> LlavaConfig:
    text = str(folder / "mistral")
    tower = str(folder / "clip")
    digests = {"language_model": weights_digest(text), "vision_tower": weights_digest(tower)}
    return LlavaConfig(text, tower, weights_digests=digests, **choices)


def make_trained_model(config: LlavaConfig, parts: TrainedParts) -> Llava:
    """Build a model, and change its trained weights at random."""
    model = build_model(config)
    freeze(model, parts)
    if parts.vision_tower == "lora":
        add_tower_lora(model, 2, 4)
    if parts.language_model == "adapter":
        add_lora(model, 2, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def save_trained_model(
    models_folder: Path, checkpoint: Path, parts: TrainedParts, **choices: Any
) -> Llava:
    """Make a trained model and save it; return the model."""
    config = make_config(models_folder, **choices)
    model = make_trained_model(config, parts)
    save_checkpoint(model, checkpoint, config, parts)
    return model


def remove_tensor(path: Path, name: str) -> None:
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})


# ---- save and load ----


@pytest.mark.parametrize("trained", ["adapter", "projector", "language_model"])
@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_checkpoint_loads_with_the_same_logits(
    models_folder: Path, tmp_path: Path, trained: str, kind: str
) -> None:
    parts = TrainedParts.from_stored({"trained": trained})
    checkpoint = tmp_path / "any name"
    model = save_trained_model(models_folder, checkpoint, parts, mm_projector_type=kind)
    loaded = Llava.from_pretrained(checkpoint)
    assert torch.equal(compute_logits(model), compute_logits(loaded))
    assert json.loads((checkpoint / "llava.json").read_text())["trained"] == trained


@pytest.mark.medium
@pytest.mark.parametrize("trained_tower", ["full", "lora"])
@pytest.mark.parametrize("trained", ["adapter", "language_model"])
def test_checkpoint_includes_a_trained_tower(
    models_folder: Path, tmp_path: Path, trained: str, trained_tower: str
) -> None:
    parts = TrainedParts.from_stored({"trained": trained, "trained_tower": trained_tower})
    checkpoint = tmp_path / "c"
    model = save_trained_model(models_folder, checkpoint, parts)
    assert json.loads((checkpoint / "llava.json").read_text())["trained_tower"] == trained_tower
    logits = compute_logits(model)
    loaded = Llava.from_pretrained(checkpoint)
    assert torch.equal(logits, compute_logits(loaded))

    # The untrained tower gives different logits, even with the trained projector.
    config = make_config(models_folder)
    base = make_trained_model(config, TrainedParts())
    base.projector.load_state_dict(model.projector.state_dict())
    assert not torch.equal(compute_logits(base), logits)

    # Merging removes the adapters and keeps the logits.
    merged = load_checkpoint(checkpoint, merge=True)
    torch.testing.assert_close(compute_logits(merged), logits, rtol=1e-4, atol=1e-4)
    assert not any("lora_" in name for name, _ in merged.named_parameters())

    # Load the weights into a model that is built already, as a resumed run does.
    resumed = make_trained_model(config, parts)
    load_trained_weights(resumed, checkpoint)
    assert torch.equal(logits, compute_logits(resumed))

    # A missing weight of the tower is an error.
    path = checkpoint / "vision_adapter" / "adapter_model.safetensors"
    if trained_tower == "full":
        path = checkpoint / "vision_tower" / "model.safetensors"
    names = [name for name in load_file(path) if "layers.0." in name]
    remove_tensor(path, names[0])
    with pytest.raises(ValueError, match=r"missing.*layers\.0\."):
        load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=r"missing.*layers\.0\."):
        load_trained_weights(resumed, checkpoint)


def test_checkpoint_keeps_layers_token_pool_and_aspect_ratio(
    models_folder: Path, tmp_path: Path
) -> None:
    choices = {
        "mm_vision_select_layer": (-2, -1),
        "mm_token_pool": 2,
        "image_aspect_ratio": "pad",
    }
    model = save_trained_model(models_folder, tmp_path / "c", TrainedParts(), **choices)
    loaded = load_checkpoint(tmp_path / "c")
    assert loaded.vision_tower.transform.pad_color == (122, 116, 104)
    assert loaded.vision_tower.transform == model.vision_tower.transform
    assert loaded.vision_tower.num_tokens == 4
    assert torch.equal(compute_logits(model), compute_logits(loaded))


def test_load_checkpoint_trainable_enables_the_gradients_of_the_trained_parts(
    models_folder: Path, tmp_path: Path
) -> None:
    save_trained_model(models_folder, tmp_path / "c", TrainedParts("adapter", "lora"))
    loaded = load_checkpoint(tmp_path / "c", trainable=True)
    for name, parameter in loaded.named_parameters():
        is_trained = "lora_" in name or name.startswith("projector.")
        assert parameter.requires_grad == is_trained, name


@pytest.mark.parametrize(
    "parts", [TrainedParts(), TrainedParts("full"), TrainedParts("none", "full")], ids=str
)
def test_load_checkpoint_trainable_freezes_all_other_parts(
    models_folder: Path, tmp_path: Path, parts: TrainedParts
) -> None:
    save_trained_model(models_folder, tmp_path / "c", parts)
    loaded = load_checkpoint(tmp_path / "c", trainable=True, device="cpu")
    check_trainable(loaded, parts)


def test_load_checkpoint_refuses_to_merge_what_should_be_trained(
    models_folder: Path, tmp_path: Path
) -> None:
    save_trained_model(models_folder, tmp_path / "c", TrainedParts("adapter"))
    with pytest.raises(ValueError, match="merge or trainable"):
        load_checkpoint(tmp_path / "c", trainable=True, merge=True, device="cpu")


def test_load_checkpoint_accepts_the_attention_name_of_0_1_0(
    models_folder: Path, tmp_path: Path
) -> None:
    save_trained_model(models_folder, tmp_path / "c", TrainedParts())
    for name in ("short", "cpu_matmul"):
        loaded = load_checkpoint(tmp_path / "c", attn_implementation=name)
        assert loaded.config._attn_implementation == "cpu_matmul"


def test_adapter_folder_loads_with_stock_peft(models_folder: Path, tmp_path: Path) -> None:
    model = save_trained_model(models_folder, tmp_path / "c", TrainedParts("adapter"))
    base = AutoModelForCausalLM.from_pretrained(models_folder / "mistral")
    stock = PeftModel.from_pretrained(base, str(tmp_path / "c" / "adapter")).eval()
    ids = torch.tensor([[0, 5, 6, 7]])
    assert torch.equal(stock(ids).logits, model.language_model(ids).logits)


def test_save_checkpoint_replaces_a_checkpoint_and_keeps_other_files(
    models_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "trainer_log.jsonl").write_text("{}\n")
    parts = TrainedParts("adapter")
    config = make_config(models_folder)
    model = make_trained_model(config, parts)
    save_checkpoint(model, output, config, parts)
    save_checkpoint(model, output, config, parts)
    assert (output / "trainer_log.jsonl").exists()
    assert torch.equal(compute_logits(load_checkpoint(output)), compute_logits(model))
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "no temporary folder is left"


def test_save_checkpoint_writes_nothing_beside_a_folder_that_exists(
    models_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder may be a mount point: files of other folders cannot be moved into it."""
    output = tmp_path / "mount"
    output.mkdir()
    monkeypatch.chdir(output)
    beside: list[str] = []
    move = checkpoint_module._move_into_place

    def move_and_look(*arguments: Any) -> None:
        beside.extend(path.name for path in tmp_path.iterdir())
        move(*arguments)

    monkeypatch.setattr(checkpoint_module, "_move_into_place", move_and_look)
    parts = TrainedParts("adapter")
    config = make_config(models_folder)
    model = make_trained_model(config, parts)
    save_checkpoint(model, Path(), config, parts)
    save_checkpoint(model, Path("checkpoint-5"), config, parts)
    copy_checkpoint("checkpoint-5", ".")  # the best checkpoint of a run
    assert set(beside) == {"mount"}
    assert not list(output.glob(".*"))
    load_checkpoint(output)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (TrainedParts("adapter", vision_tower="lora"), TrainedParts("full")),
        (TrainedParts("full", vision_tower="full"), TrainedParts("adapter")),
    ],
)
def test_save_checkpoint_removes_the_weights_of_an_older_checkpoint(
    models_folder: Path, tmp_path: Path, first: TrainedParts, second: TrainedParts
) -> None:
    save_trained_model(models_folder, tmp_path / "out", first)
    model = save_trained_model(models_folder, tmp_path / "out", second)
    folders = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert folders == {"adapter" if second.language_model == "adapter" else "language_model"}
    assert torch.equal(compute_logits(load_checkpoint(tmp_path / "out")), compute_logits(model))


def test_save_checkpoint_keeps_the_base_models_in_its_folder(
    models_folder: Path, tmp_path: Path
) -> None:
    """An imported checkpoint contains the models that a run on it starts from."""
    output = tmp_path / "out"
    for name, source in (("language_model", "mistral"), ("vision_tower", "clip")):
        shutil.copytree(models_folder / source, output / name)
    config = replace(
        make_config(models_folder),
        language_model=str(output / "language_model"),
        vision_tower=str(output / "vision_tower"),
    )
    parts = TrainedParts("adapter")
    model = make_trained_model(config, parts)
    save_checkpoint(model, output, config, parts)
    assert torch.equal(compute_logits(load_checkpoint(output)), compute_logits(model))


def test_copy_checkpoint_replaces_what_a_killed_process_has_left(
    models_folder: Path, tmp_path: Path
) -> None:
    save_trained_model(models_folder, tmp_path / "best", TrainedParts("adapter"))
    left = checkpoint_module._temporary_folder(tmp_path / "out")
    left.mkdir()
    (left / "adapter").write_text("")
    copy_checkpoint(tmp_path / "best", tmp_path / "out")
    load_checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    ("model_parts", "saved_parts", "named"),
    [
        (TrainedParts("adapter"), TrainedParts("full"), "language model"),
        (TrainedParts(), TrainedParts("adapter"), "language model"),
        (TrainedParts(vision_tower="lora"), TrainedParts(), "vision tower"),
    ],
)
def test_save_checkpoint_refuses_parts_that_contradict_the_model(
    models_folder: Path,
    tmp_path: Path,
    model_parts: TrainedParts,
    saved_parts: TrainedParts,
    named: str,
) -> None:
    config = make_config(models_folder)
    model = make_trained_model(config, model_parts)
    with pytest.raises(ValueError, match=named):
        save_checkpoint(model, tmp_path / "c", config, saved_parts)
    assert list(tmp_path.iterdir()) == []


# ---- the config ----


def test_trained_parts_are_stored_under_the_names_of_the_format() -> None:
    stored = {
        TrainedParts(): ("projector", "off"),
        TrainedParts("adapter", "lora"): ("adapter", "lora"),
        TrainedParts("full", "full"): ("language_model", "full"),
    }
    for parts, (trained, trained_tower) in stored.items():
        assert parts.stored == {"trained": trained, "trained_tower": trained_tower}
        assert TrainedParts.from_stored(parts.stored) == parts
    with pytest.raises(ValueError, match="everything"):
        TrainedParts.from_stored({"trained": "everything"})


def test_read_checkpoint_config_refuses_a_newer_format(tmp_path: Path) -> None:
    (tmp_path / "llava.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(ValueError, match="99"):
        read_checkpoint_config(tmp_path)


def test_load_checkpoint_refuses_a_folder_that_is_not_a_checkpoint(
    models_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"llava\.json is missing"):
        load_checkpoint(tmp_path)
    save_trained_model(models_folder, tmp_path / "checkpoint-4", TrainedParts())
    with pytest.raises(ValueError, match="did you mean .*checkpoint-4"):
        load_checkpoint(tmp_path)


# ---- build ----


def test_build_model_on_meta_has_the_parameters_of_a_loaded_model(models_folder: Path) -> None:
    config = make_config(models_folder, dtype="bfloat16")
    loaded = build_model(config)
    meta = build_model(config, device="meta")
    expected = {name: (p.shape, p.dtype) for name, p in loaded.named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in meta.named_parameters()} == expected
    assert all(parameter.is_meta for parameter in meta.parameters())


def test_build_vision_tower_equals_the_tower_of_the_model(models_folder: Path) -> None:
    config = make_config(models_folder)
    pixels = torch.rand(1, 3, 32, 32)
    tower = build_vision_tower(config).eval()
    assert torch.equal(tower(pixels), build_model(config).eval().vision_tower(pixels))
    meta = build_vision_tower(config, device="meta")
    assert meta.num_tokens == tower.num_tokens
    assert all(parameter.is_meta for parameter in meta.parameters())


def test_build_model_refuses_missing_weights(models_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(models_folder / "llama", tmp_path / "llama")
    name = "model.layers.1.mlp.up_proj.weight"
    remove_tensor(tmp_path / "llama" / "model.safetensors", name)
    with pytest.raises(ValueError, match=f"weights are missing: {name}"):
        build_model(LlavaConfig(str(tmp_path / "llama"), str(models_folder / "clip")))


# ---- strict loading ----


@pytest.mark.parametrize("device", [None, "meta"])
def test_build_model_refuses_a_multimodal_language_model(
    models_folder: Path, tmp_path: Path, device: str | None
) -> None:
    """Otherwise, packed examples would silently be trained with wrong masks."""
    Gemma3Config().save_pretrained(tmp_path)
    config = replace(make_config(models_folder), language_model=str(tmp_path))
    with pytest.raises(ValueError, match=r"gemma3 is a multimodal model.*text-only model"):
        build_model(config, device=device)


def test_build_model_uses_the_language_model_of_a_config_that_transformers_splits(
    models_folder: Path,
) -> None:
    text_config = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64}
    source = Llama4Config(text_config=text_config)
    tokenizer = AutoTokenizer.from_pretrained(models_folder / "mistral")
    model = build_model(
        make_config(models_folder), language_model=source, tokenizer=tokenizer, device="meta"
    )
    assert type(model.language_model) is Llama4ForCausalLM


@pytest.mark.parametrize(
    ("file", "name"),
    [("projector.safetensors", "bias"), ("adapter/adapter_model.safetensors", None)],
)
def test_load_checkpoint_names_a_missing_weight(
    models_folder: Path, tmp_path: Path, file: str, name: str | None
) -> None:
    save_trained_model(models_folder, tmp_path / "c", TrainedParts("adapter"))
    path = tmp_path / "c" / file
    name = name or min(load_file(path))
    remove_tensor(path, name)
    with pytest.raises(ValueError, match=f"missing .*{name}"):
        load_checkpoint(tmp_path / "c")


def test_load_checkpoint_names_an_unexpected_weight_and_a_wrong_shape(
    models_folder: Path, tmp_path: Path
) -> None:
    save_trained_model(models_folder, tmp_path / "c", TrainedParts())
    path = tmp_path / "c" / "projector.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "extra": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"unexpected \['extra'\]"):
        load_checkpoint(tmp_path / "c")
    save_file({**tensors, "bias": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"bias .*\(3,\).*\(32,\)"):
        load_checkpoint(tmp_path / "c")


# ---- base weights ----


def test_load_checkpoint_refuses_other_base_weights_of_the_same_shape(
    models_folder: Path, tmp_path: Path
) -> None:
    model = save_trained_model(models_folder, tmp_path / "c", TrainedParts("adapter"))
    other = tmp_path / "mistral"
    shutil.copytree(models_folder / "mistral", other)
    # A copy of the base model is accepted.
    loaded = load_checkpoint(tmp_path / "c", model_base=str(other))
    assert torch.equal(compute_logits(loaded), compute_logits(model))

    path = other / "model.safetensors"
    changed = {name: weight + 0.01 for name, weight in load_file(path).items()}
    save_file(changed, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"language_model .*mistral: .*weights differ"):
        load_checkpoint(tmp_path / "c", model_base=str(other))


def test_load_checkpoint_names_the_option_if_a_base_model_has_moved(
    models_folder: Path, tmp_path: Path
) -> None:
    save_trained_model(models_folder, tmp_path / "c", TrainedParts("adapter"))
    path = tmp_path / "c" / "llava.json"
    checkpoint_config = json.loads(path.read_text())
    checkpoint_config["architecture"]["language_model"] = "/nowhere/mistral"
    path.write_text(json.dumps(checkpoint_config))
    with pytest.raises(ValueError, match="--model-base") as raised:
        load_checkpoint(tmp_path / "c")
    # The reason is a sentence of its own, so it ends with a period already.
    assert ".." not in str(raised.value)


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
def test_missing_file_of_a_base_model_is_named_before_training_and_when_loading(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    part: str,
    name: str,
) -> None:
    language = tmp_path / "language"
    vision = tmp_path / "vision"
    stock = AutoModelForCausalLM.from_pretrained(models_folder / "llama")
    stock.save_pretrained(language, max_shard_size="40KB")
    AutoTokenizer.from_pretrained(models_folder / "llama").save_pretrained(language)
    shutil.copytree(models_folder / "clip", vision)
    digests = {
        "language_model": weights_digest(str(language)),
        "vision_tower": weights_digest(str(vision)),
    }
    config = LlavaConfig(str(language), str(vision), weights_digests=digests)
    save_checkpoint(build_model(config), tmp_path / "c", config, TrainedParts())

    (tmp_path / part / name).unlink()
    arguments = {
        "model_name_or_path": language,
        "vision_tower": vision,
        "train_data_path": data_folder / "train.json",
        "train_image_folder": data_folder / "images",
        "output_dir": tmp_path / "out",
    }
    argv = ["train"]
    for option, value in arguments.items():
        argv += [f"--{option}", str(value)]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{name} is missing" in error
    assert str(tmp_path / part) in error
    # A missing weight file or config is an error that names the option.
    is_option_known = "token" not in name and "processor" not in name
    assert error.startswith("error: --") == is_option_known
    if name == "tokenizer.json":
        return  # The checkpoint has a tokenizer of its own.
    with pytest.raises(ValueError, match=f"{name} is missing") as raised:
        load_checkpoint(tmp_path / "c")
    assert str(tmp_path / part) in str(raised.value)


def test_weights_digest_of_a_hub_model_covers_the_files_that_are_loaded(
    models_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--me--clip"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.copy(models_folder / "clip" / "config.json", snapshot)
    # Without this error, the digest would be that of an empty set of weights.
    with pytest.raises(OSError, match=r"cannot load model\.safetensors"):
        weights_digest("me/clip")
    shutil.copy(models_folder / "clip" / "model.safetensors", snapshot)
    (snapshot / "tf_model.bin").write_bytes(b"of another library")
    assert weights_digest("me/clip") == weights_digest(str(models_folder / "clip"))

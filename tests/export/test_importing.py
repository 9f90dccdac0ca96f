"""Checkpoints in the layouts of other codebases, built file by file, and read back word by word."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_stock import trained
from torch.nn.functional import gelu, linear
from transformers import AutoModelForCausalLM, CLIPVisionModel

from llava_simplified.data.images import decode_image
from llava_simplified.export.importing import import_checkpoint, import_main
from llava_simplified.export.run import merge
from llava_simplified.export.stock import export_stock
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import IMAGE_INDEX, Message


@pytest.fixture(scope="module", params=["llama", "mistral"])
def source(request, models_folder: Path, data_folder: Path, tmp_path_factory) -> tuple[Path, Path]:
    """One of our checkpoints with an adapter, and its merged form: where the weights of the layouts come from."""
    root = tmp_path_factory.mktemp(request.param)
    parts = {"model_name_or_path": models_folder / request.param, "vision_tower": models_folder / "clip"}
    checkpoint = trained(models_folder, data_folder, root / "out", mm_projector_type="mlp2x_gelu", **parts)
    merge(checkpoint, root / "merged")
    return checkpoint, root / "merged"


def projector_weights(checkpoint: Path, prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in load_file(checkpoint / "projector.safetensors").items()}


def original(merged: Path, clip: Path, folder: Path) -> Path:
    """As LLaVA writes a whole model: two pickles, an index, mm_ entries in config.json, the tower along."""
    shutil.copytree(merged / "language_model", folder)
    text = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tower = CLIPVisionModel.from_pretrained(clip).state_dict()
    vision = {
        f"model.vision_tower.vision_tower.vision_model.{k.removeprefix('vision_model.')}": v for k, v in tower.items()
    }
    weights = {**text, **projector_weights(merged, "model.mm_projector."), **vision}
    names = sorted(weights)
    for part, chosen in enumerate((names[::2], names[1::2]), start=1):
        torch.save({name: weights[name].clone() for name in chosen}, folder / f"pytorch_model-0000{part}-of-00002.bin")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": f"llava_{config['model_type']}",
        "architectures": [f"Llava{config['model_type'].title()}ForCausalLM"],
        "mm_vision_tower": str(clip),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": 32,
        "mm_use_im_start_end": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for file in merged.glob("tokenizer*"):
        shutil.copy(file, folder)
    for file in merged.glob("*.jinja"):
        shutil.copy(file, folder)
    return folder


def lora(checkpoint: Path, clip: Path, folder: Path) -> Path:
    """As LLaVA writes a LoRA run: the adapter, and all else that was trained in a pickle beside it."""
    shutil.copytree(checkpoint / "adapter", folder)
    weights = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(weights, folder / "adapter_model.bin")
    torch.save(
        projector_weights(checkpoint, "base_model.model.model.mm_projector."), folder / "non_lora_trainables.bin"
    )
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llava_llama", "mm_vision_tower": str(clip), "mm_vision_select_layer": -2})
    )
    return folder


def plain_caption(merged: Path, projector: Path, clip: Path, image: Path, model: Llava, count: int) -> str:
    """LLaVA in plain torch: features, two matrices, one sequence, argmax, without any cache."""
    text = AutoModelForCausalLM.from_pretrained(merged / "language_model" if merged.name == "merged" else merged).eval()
    pixels = model.vision_tower.transform
    inputs = pixels.normalize(pixels(decode_image(image.read_bytes()))[None])
    with torch.no_grad():
        features = CLIPVisionModel.from_pretrained(clip)(inputs, output_hidden_states=True).hidden_states[-2][0, 1:]
        w = load_file(projector)
        tokens = linear(gelu(linear(features, w["0.weight"], w["0.bias"])), w["2.weight"], w["2.bias"])
        ids = model.prompt.render([Message("user", f"<image>\n{model.instruction}")], None).input_ids
        table = text.get_input_embeddings().weight
        place, said = ids.index(IMAGE_INDEX), []
        embeds = torch.cat([table[ids[:place]], tokens, table[ids[place + 1 :]]])
        while len(said) < count and (not said or said[-1] not in model.prompt.stop_ids):
            said.append(int(text(inputs_embeds=embeds[None]).logits[0, -1].argmax()))
            embeds = torch.cat([embeds, table[said[-1:]]])
    return model.prompt.decode(said).strip()


@pytest.mark.slow
def test_an_original_whole_model(source, models_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    checkpoint, merged = source
    folder = original(merged, models_folder / "clip", tmp_path / "llava-v1.5-tiny")
    report = import_checkpoint(folder, tmp_path / "ours")
    assert "4 weights of the projector" in report
    shutil.rmtree(folder)  # nothing of it is needed any more
    model, image = Llava.from_pretrained(tmp_path / "ours"), data_folder / "images" / "0.jpg"
    wanted = plain_caption(merged, checkpoint / "projector.safetensors", models_folder / "clip", image, model, 8)
    assert model.caption(image, max_new_tokens=8) == wanted


@pytest.mark.slow
def test_a_lora_folder_and_a_lone_projector(source, models_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    checkpoint, _ = source
    base = json.loads((checkpoint / "llava.json").read_text())["architecture"]["language_model"]
    folder = lora(checkpoint, models_folder / "clip", tmp_path / "llava-lora")
    with pytest.raises(ValueError, match="--model-base"):
        import_checkpoint(folder, tmp_path / "ours")
    import_checkpoint(folder, tmp_path / "ours", model_base=base)
    image = data_folder / "images" / "1.jpg"
    model = Llava.from_pretrained(tmp_path / "ours")
    assert model.caption(image, max_new_tokens=8) == Llava.from_pretrained(checkpoint).caption(image, max_new_tokens=8)

    torch.save(projector_weights(checkpoint, "model.mm_projector."), tmp_path / "mm_projector.bin")
    words = [str(tmp_path / "mm_projector.bin"), "--output", str(tmp_path / "lone"), "--model-base", base]
    with pytest.raises(ValueError, match="--vision-tower"):
        import_main(words)
    assert import_main([*words, "--vision-tower", str(models_folder / "clip")]) == 0
    model = Llava.from_pretrained(tmp_path / "lone")
    wanted = plain_caption(Path(base), checkpoint / "projector.safetensors", models_folder / "clip", image, model, 8)
    assert model.caption(image, max_new_tokens=8) == wanted


@pytest.mark.slow
@pytest.mark.parametrize(("tower", "text"), [("clip", "llama"), ("siglip", "qwen2")])
def test_a_stock_folder_comes_back(
    models_folder: Path, data_folder: Path, tmp_path: Path, tower: str, text: str
) -> None:
    parts = {"model_name_or_path": models_folder / text, "vision_tower": models_folder / tower}
    checkpoint = trained(models_folder, data_folder, tmp_path / "out", mm_projector_type="mlp2x_gelu", **parts)
    export_stock(checkpoint, tmp_path / "stock")
    instruction = Llava.from_pretrained(checkpoint).instruction
    import_checkpoint(tmp_path / "stock", tmp_path / "ours", instruction=instruction)
    image = data_folder / "images" / "2.jpg"
    one, other = Llava.from_pretrained(checkpoint), Llava.from_pretrained(tmp_path / "ours")
    assert one.caption(image, max_new_tokens=8) == other.caption(image, max_new_tokens=8)
    more = {"pretrain_mm_mlp_adapter": tmp_path / "ours", "mm_projector_type": "mlp2x_gelu", **parts}
    trained(models_folder, data_folder, tmp_path / "further", **more)


def test_what_is_missing_or_left_over_is_named(models_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    with pytest.raises(ValueError, match="no weights"):
        import_checkpoint(folder, tmp_path / "ours")
    parts = {"model_base": str(models_folder / "llama"), "vision_tower": str(models_folder / "clip")}
    save_file({"model.mm_projector.weight": torch.zeros(32, 24)}, folder / "mm_projector.safetensors")
    with pytest.raises(ValueError, match=r"projector: missing \['bias'\]"):
        import_checkpoint(folder / "mm_projector.safetensors", tmp_path / "ours", **parts)
    (folder / "mm_projector.bin").write_bytes(pickle.dumps({"a": Path()}))
    with pytest.raises(ValueError, match="not a file of tensors"):
        import_checkpoint(folder / "mm_projector.bin", tmp_path / "ours", **parts)
    assert not (tmp_path / "ours").exists()

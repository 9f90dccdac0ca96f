"""Checkpoints in the layouts of other codebases, built file by file; read back, predicted with and trained further.

What they must say is computed by hand from the foreign files: stock towers, language models and adapters, plain torch
between them, and nothing of this project.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from test_stock import trained
from torch.nn.functional import gelu, linear
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers import (
    LlavaConfig as StockLlavaConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_simplified.captioning.caption_command import predict_main
from llava_simplified.export.importing import import_checkpoint, import_main
from llava_simplified.export.merge import merge
from llava_simplified.model.llava import Llava

INSTRUCTION = "Generate a caption of this image:"
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=["llama", "mistral"])
def source(request, models_folder: Path, data_folder: Path, tmp_path_factory) -> tuple[Path, Path]:
    """A trained checkpoint with an adapter, and its merged form: where the weights of the layouts come from."""
    root = tmp_path_factory.mktemp(request.param)
    parts = {
        "model_name_or_path": models_folder / request.param,
        "vision_tower": models_folder / "clip",
    }
    checkpoint = trained(
        models_folder, data_folder, root / "out", mm_projector_type="mlp2x_gelu", **parts
    )
    merge(checkpoint, root / "merged")
    return checkpoint, root / "merged"


@pytest.fixture
def picture(data_folder: Path, tmp_path: Path) -> Path:
    """Of the tower's size: no resizing, whose rounding differs by a grey level or two."""
    (tmp_path / "pictures").mkdir()
    path = tmp_path / "pictures" / "a.png"
    Image.open(data_folder / "images" / "0.jpg").resize((32, 32)).save(path)
    return path


def projector_weights(checkpoint: Path, prefix: str) -> Weights:
    return {
        prefix + name: value
        for name, value in load_file(checkpoint / "projector.safetensors").items()
    }


def original(merged: Path, clip: Path, folder: Path) -> Path:
    """As LLaVA writes a whole model: two pickles, an index, mm_ entries in config.json, the tower along."""
    shutil.copytree(merged / "language_model", folder)
    text = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tower = CLIPVisionModel.from_pretrained(clip).state_dict()
    vision = {
        f"model.vision_tower.vision_tower.vision_model.{k.removeprefix('vision_model.')}": v
        for k, v in tower.items()
    }
    weights = {**text, **projector_weights(merged, "model.mm_projector."), **vision}
    names = sorted(weights)
    where = {}
    for part, chosen in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-0000{part}-of-00002.bin"
        where |= dict.fromkeys(chosen, file)
        torch.save({name: weights[name].clone() for name in chosen}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
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
        "image_aspect_ratio": "pad",
    }
    (folder / "config.json").write_text(json.dumps(config))
    for file in (*merged.glob("tokenizer*"), *merged.glob("*.jinja")):
        shutil.copy(file, folder)
    return folder


def lora(
    checkpoint: Path, clip: Path, folder: Path, kind: str, projector: str = "mlp2x_gelu"
) -> Path:
    """As LLaVA and the tutorial write a LoRA run: the adapter, and all else that was trained in a pickle beside it."""
    folder.mkdir()
    weights = load_file(checkpoint / "adapter" / "adapter_model.safetensors")
    if kind == "bin":
        torch.save(weights, folder / "adapter_model.bin")
    else:
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    leaves = sorted({name.split(".")[-3] for name in weights})
    settings = {
        "base_model_name_or_path": "lmsys/vicuna-7b-v1.5", "bias": "none", "fan_in_fan_out": False, "revision": None,
        "inference_mode": True, "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None,
        "lora_alpha": 16, "lora_dropout": 0.05, "modules_to_save": None, "peft_type": "LORA", "r": 4,
        "target_modules": leaves, "task_type": "CAUSAL_LM", "auto_mapping": None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    rest = projector_weights(checkpoint, "base_model.model.model.mm_projector.")
    if projector == "linear":
        random = torch.Generator().manual_seed(0)
        rest = {
            "weight": torch.randn(32, 24, generator=random) / 5,
            "bias": torch.randn(32, generator=random) / 5,
        }
        rest = {
            f"base_model.model.model.mm_projector.{name}": value for name, value in rest.items()
        }
    torch.save(rest, folder / "non_lora_trainables.bin")
    config = {
        "model_type": "llava_llama",
        "mm_vision_tower": str(clip),
        "mm_vision_select_layer": -2,
    }
    (folder / "config.json").write_text(json.dumps({**config, "mm_projector_type": projector}))
    return folder


@torch.no_grad()
def by_hand(
    text: torch.nn.Module,
    weights: Weights,
    clip: Path,
    tokens_of: Path,
    picture: Path,
    count: int = 8,
) -> str:
    """LLaVA in plain torch: features, one or two matrices, one sequence, argmax, without any cache."""
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(Image.open(picture), return_tensors="pt")[
        "pixel_values"
    ]
    tower = CLIPVisionModel.from_pretrained(clip)
    tokens = tower(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
    layers = {
        re.sub(r".*mm_projector\.", "", name): value
        for name, value in weights.items()
        if "mm_projector" in name
    }
    for place in ("0.", "2.") if "0.weight" in layers else ("",):
        tokens = linear(
            gelu(tokens) if place == "2." else tokens,
            layers[f"{place}weight"],
            layers[f"{place}bias"],
        )
    tokenizer = AutoTokenizer.from_pretrained(tokens_of)
    before, after = (
        tokenizer(part, add_special_tokens=False).input_ids
        for part in ("<s>[INST] ", f"\n{INSTRUCTION} [/INST]")
    )
    table = text.get_input_embeddings().weight
    embeds, said = torch.cat([table[before], tokens, table[after]]), []
    while len(said) < count and 1 not in said:
        said.append(int(text.eval()(inputs_embeds=embeds[None]).logits[0, -1].argmax()))
        embeds = torch.cat([embeds, table[said[-1:]]])
    return tokenizer.decode(said, skip_special_tokens=True).strip()


def assert_works(
    ours: Path, said: str, picture: Path, data: Path, tmp_path: Path, **parts: object
) -> None:
    """`predict.py` says it; and so does what `train.py --init_from` begins with, after a step of length zero."""
    records = tmp_path / "one.json"
    records.write_text(
        json.dumps([{"image": picture.name, "instruction": INSTRUCTION, "response": "x"}])
    )
    folder, output = str(picture.parent), tmp_path / "predictions.json"
    words = [
        "--model-path",
        str(ours),
        "--data-path",
        str(records),
        "--image-folder",
        folder,
        "--output",
        str(output),
    ]
    predict_main([*words, "--temperature", "0", "--max-new-tokens", "8"])
    assert [row["pred_output"] for row in json.loads(output.read_text())] == [said]
    options = {"init_from": ours, "learning_rate": 0, "max_steps": 1, **parts}
    further = trained(data, data, tmp_path / "further", **options)
    assert Llava.from_pretrained(further).caption(picture, max_new_tokens=8) == said


@pytest.mark.slow
@pytest.mark.parametrize("further", ["an adapter on top", "all of it"])
def test_an_original_whole_model(
    source, models_folder: Path, data_folder: Path, picture: Path, tmp_path: Path, further: str
) -> None:
    _, merged = source
    clip = models_folder / "clip"
    folder = original(merged, clip, tmp_path / "llava-v1.5-tiny")
    weights = {
        name: w
        for path in folder.glob("*.bin")
        for name, w in torch.load(path, weights_only=True).items()
    }
    config = json.loads((merged / "language_model" / "config.json").read_text())
    text = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config.pop("model_type"), **config)
    )
    text.load_state_dict(
        {
            name: w
            for name, w in weights.items()
            if "mm_projector" not in name and "tower" not in name
        }
    )
    said = by_hand(text, weights, clip, folder, picture)
    report = import_checkpoint(folder, tmp_path / "ours")
    assert "4 weights of the projector" in report and "image_aspect_ratio pad" in report[-2]
    shutil.rmtree(folder)  # nothing of it is needed any more
    parts = {"mm_projector_type": "mlp2x_gelu", "vision_tower": clip}
    if further == "all of it":
        parts |= {
            "model_name_or_path": models_folder
            / config["architectures"][0][: -len("ForCausalLM")].lower()
        }
        parts |= {"lora_enable": False, "freeze_backbone": False}
    else:
        parts |= {"model_name_or_path": tmp_path / "ours" / "language_model"}
    assert_works(tmp_path / "ours", said, picture, data_folder, tmp_path, **parts)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "projector"), [("bin", "mlp2x_gelu"), ("safetensors", "linear")])
def test_a_lora_folder(
    source,
    models_folder: Path,
    data_folder: Path,
    picture: Path,
    tmp_path: Path,
    kind: str,
    projector: str,
) -> None:
    checkpoint, _ = source
    clip = models_folder / "clip"
    base = json.loads((checkpoint / "llava.json").read_text())["architecture"]["language_model"]
    folder = lora(checkpoint, clip, tmp_path / "llava-lora", kind, projector)
    text = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    weights = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    said = by_hand(text, weights, clip, Path(base), picture)
    with pytest.raises(ValueError, match="--model-base"):
        import_checkpoint(folder, tmp_path / "ours")
    import_checkpoint(folder, tmp_path / "ours", model_base=base)
    parts = {"model_name_or_path": base, "vision_tower": clip, "mm_projector_type": projector}
    assert_works(tmp_path / "ours", said, picture, data_folder, tmp_path, **parts)
    with pytest.raises(ValueError, match="--lora_r 4 --lora_alpha 16, as it was trained with"):
        trained(
            base,
            data_folder,
            tmp_path / "other",
            init_from=tmp_path / "ours",
            lora_alpha=32,
            **parts,
        )


@pytest.mark.slow
def test_a_lone_projector(
    source,
    models_folder: Path,
    data_folder: Path,
    picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint, _ = source
    clip = models_folder / "clip"
    base = json.loads((checkpoint / "llava.json").read_text())["architecture"]["language_model"]
    weights = projector_weights(checkpoint, "model.mm_projector.")
    torch.save(weights, tmp_path / "mm_projector.bin")
    monkeypatch.chdir(base)
    words = [
        str(tmp_path / "mm_projector.bin"),
        "--output",
        str(tmp_path / "ours"),
        "--model-base",
        ".",
    ]
    with pytest.raises(ValueError, match="--vision-tower"):
        import_main(words)
    assert import_main([*words, "--vision-tower", str(clip)]) == 0
    monkeypatch.chdir(tmp_path)
    said = by_hand(AutoModelForCausalLM.from_pretrained(base), weights, clip, Path(base), picture)
    parts = {"model_name_or_path": base, "vision_tower": clip, "mm_projector_type": "mlp2x_gelu"}
    assert_works(tmp_path / "ours", said, picture, data_folder, tmp_path, **parts)


def hub_names(name: str) -> str:
    """As the folders of llava-hf on the hub are written, by transformers 4."""
    name = name.removeprefix("model.")
    if name.startswith("vision_tower."):
        return "vision_tower.vision_model." + name.removeprefix("vision_tower.").removeprefix(
            "vision_model."
        )
    return re.sub(
        "^lm_head",
        "language_model.lm_head",
        name.replace("language_model.", "language_model.model."),
    )


@pytest.mark.slow
@pytest.mark.parametrize("names", [hub_names, str], ids=["transformers-4", "transformers-5"])
@pytest.mark.parametrize("text", ["llama", "mistral"])
def test_a_stock_folder(
    models_folder: Path,
    data_folder: Path,
    picture: Path,
    tmp_path: Path,
    text: str,
    names: Callable[[str], str],
) -> None:
    """Written by transformers alone, and said by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(models_folder / text)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    parts = {
        "text_config": AutoConfig.from_pretrained(models_folder / text, vocab_size=len(tokenizer)),
        "vision_config": AutoConfig.from_pretrained(models_folder / "clip"),
    }
    torch.manual_seed(3)
    image_token = len(tokenizer) - 1
    stock = LlavaForConditionalGeneration(
        StockLlavaConfig(**parts, image_token_index=image_token)
    ).eval()
    for parameter in stock.parameters():
        parameter.data.normal_(0, 0.3)  # wild enough that the picture changes what is said
    folder = tmp_path / "llava-tiny-hf"
    stock.save_pretrained(folder)
    weights = {names(name): value.clone() for name, value in stock.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    image_processor = CLIPImageProcessorPil.from_pretrained(models_folder / "clip")
    choices = {
        "patch_size": 8,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    processor = LlavaProcessor(image_processor, tokenizer, **choices)
    processor.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    question = f"<s>[INST] <image>\n{INSTRUCTION} [/INST]"
    inputs = processor(
        images=Image.open(picture), text=question, return_tensors="pt", add_special_tokens=False
    )
    with torch.no_grad():
        ids = stock.generate(
            **inputs,
            max_new_tokens=8,
            do_sample=False,
            suppress_tokens=[image_token],
            eos_token_id=1,
        )
    said = tokenizer.decode(
        ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    ).strip()
    report = import_checkpoint(folder, tmp_path / "ours")
    assert [line.split(" of the ")[1] for line in report] == [
        "language model",
        "projector",
        "vision tower",
    ]
    shutil.rmtree(folder)
    ours = tmp_path / "ours"
    parts = {"model_name_or_path": ours / "language_model", "vision_tower": ours / "vision_tower"}
    assert_works(
        ours, said, picture, data_folder, tmp_path, mm_projector_type="mlp2x_gelu", **parts
    )


FAULTS = {
    "missing": (lambda w, key: w.pop(key), r"missing \['{name}'\]"),
    "unexpected": (
        lambda w, key: w.update({f"{key}_too": w[key].clone()}),
        r"unexpected \['{name}_too'\]",
    ),
    "shape": (
        lambda w, key: w.update({key: w[key][:-1].clone()}),
        r"{name} is \(.+the model needs \(",
    ),
}
PARTS = {
    "language model": ("whole", "model.norm.weight", "model.norm.weight"),
    "projector": ("whole", "model.mm_projector.2.bias", "2.bias"),
    "adapter": ("lora", "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight", None),
}


@pytest.mark.parametrize("fault", list(FAULTS))
@pytest.mark.parametrize("part", list(PARTS))
def test_what_does_not_fit_is_named(
    source, models_folder: Path, tmp_path: Path, part: str, fault: str
) -> None:
    checkpoint, merged = source
    form, key, name = PARTS[part]
    clip, base = models_folder / "clip", {}
    if form == "whole":
        folder = original(merged, clip, tmp_path / "odd")
    else:
        folder = lora(checkpoint, clip, tmp_path / "odd", "bin")
        base = {
            "model_base": json.loads((checkpoint / "llava.json").read_text())["architecture"][
                "language_model"
            ]
        }
    change, message = FAULTS[fault]
    for path in folder.glob("*.bin"):
        weights = torch.load(path, weights_only=True)
        if key in weights:
            change(weights, key)
            torch.save(weights, path)
    with pytest.raises(
        ValueError, match=f"{part}.*" + message.replace("{name}", re.escape(name or key))
    ):
        import_checkpoint(folder, tmp_path / "ours", **base)
    assert not (tmp_path / "ours").exists()


def test_another_tower_and_an_unknown_form_are_refused(
    source, models_folder: Path, tmp_path: Path
) -> None:
    _, merged = source
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no weights"):
        import_checkpoint(tmp_path / "empty", tmp_path / "ours")
    folder = original(merged, models_folder / "clip", tmp_path / "odd")
    other = tmp_path / "clip"
    shutil.copytree(models_folder / "clip", other)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.endswith("post_layernorm.bias"))
    save_file(
        {**weights, name: weights[name] + 1}, other / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(
        ValueError,
        match=r"vision tower: .*post_layernorm\.bias is not the weight of the tower named",
    ):
        import_checkpoint(folder, tmp_path / "ours", vision_tower=str(other))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mm_use_im_start_end": True}))
    with pytest.raises(ValueError, match="tokens of their own"):
        import_checkpoint(folder, tmp_path / "ours")


class Trap:
    """What a pickle may hold: a call, made while it is read."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple:
        return open, (str(self.victim), "w")


@pytest.mark.parametrize(
    "form", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"]
)
@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "adapter_model.bin", "non_lora_trainables.bin", "mm_projector.bin"],
)
def test_a_pickle_that_does_something_is_refused(
    models_folder: Path, tmp_path: Path, name: str, form: dict
) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "trap"
    folder.mkdir()
    torch.save({"model.mm_projector.weight": Trap(victim)}, folder / name, **form)
    parts = {
        "model_base": str(models_folder / "llama"),
        "vision_tower": str(models_folder / "clip"),
    }
    for source in (folder, folder / name):
        with pytest.raises(ValueError, match=f"{name}: not a file of tensors"):
            import_checkpoint(source, tmp_path / "ours", **parts)
    assert not victim.exists() and not (tmp_path / "ours").exists()
    torch.load(folder / name, weights_only=False)
    assert victim.exists(), "the trap works"

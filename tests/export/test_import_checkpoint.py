"""Import checkpoints of other code bases, caption with them, and continue training them.

The expected captions are computed from the foreign files, by stock towers, language models and adapters with plain
torch between them, without any code of this project.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import first_logits, train_checkpoint
from foreign_llava import (
    LLAVA_HF_TEMPLATE,
    TEMPLATES,
    Weights,
    projector_weights,
    run_stock,
    write_original,
    write_stock,
)
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import gelu, linear
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llava_simplified.captioning.caption_command import predict_main
from llava_simplified.export.gguf_export import export_gguf
from llava_simplified.export.import_check import choose_check_images
from llava_simplified.export.import_checkpoint import (
    fold_linear_projector,
    import_checkpoint,
    read_source,
)
from llava_simplified.export.import_command import main as import_main
from llava_simplified.export.merge import merge_checkpoint
from llava_simplified.export.stock import export_stock
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import Message, Prompt

INSTRUCTION = "Generate a caption of this image:"
EOS_TOKEN_ID = 1
Source = tuple[Path, Path]  # a checkpoint with an adapter, and its merged form


@pytest.fixture(scope="module")
def make_source(
    models_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Source]:
    """Return a trained checkpoint of a language model and its merged form. The foreign files have their weights."""

    @cache
    def make(language_model: str) -> Source:
        root = tmp_path_factory.mktemp(language_model)
        checkpoint = train_checkpoint(
            data_folder,
            root / "out",
            model_name_or_path=models_folder / language_model,
            vision_tower=models_folder / "clip",
            mm_projector_type="mlp2x_gelu",
        )
        merge_checkpoint(checkpoint, root / "merged")
        return checkpoint, root / "merged"

    return make


@pytest.fixture
def source(make_source: Callable[[str], Source]) -> Source:
    """The checkpoints of a Llama, for tests that do not depend on the family."""
    return make_source("llama")


@pytest.fixture
def image(data_folder: Path, tmp_path: Path) -> Path:
    """An image of the tower's size. It is not resized, because a resize in other code rounds differently."""
    folder = tmp_path / "images"
    folder.mkdir()
    path = folder / "a.png"
    Image.open(data_folder / "images" / "0.jpg").resize((32, 32)).save(path)
    return path


# ---- layouts of other code bases ----


def base_language_model(checkpoint: Path) -> str:
    """Return the language model that a checkpoint was trained on."""
    config = json.loads((checkpoint / "llava.json").read_text())
    return config["architecture"]["language_model"]


def write_lora(
    checkpoint: Path, clip: Path, folder: Path, suffix: str, projector: str = "mlp2x_gelu"
) -> Path:
    """Write a LoRA run as original LLaVA and its tutorial do.

    The folder contains the adapter, and a pickle file with everything else that was trained.

    Args:
        checkpoint: One of our checkpoints with an adapter.
        clip: Its vision tower.
        folder: Folder to create.
        suffix: Format of the adapter: "bin" or "safetensors".
        projector: "mlp2x_gelu": that of the checkpoint; "linear": one with random weights.
    """
    folder.mkdir()
    weights = load_file(checkpoint / "adapter" / "adapter_model.safetensors")
    if suffix == "bin":
        torch.save(weights, folder / "adapter_model.bin")
    else:
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    adapter_config = {
        "auto_mapping": None,
        "base_model_name_or_path": "lmsys/vicuna-7b-v1.5",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "revision": None,
        "target_modules": sorted({name.split(".")[-3] for name in weights}),
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config))

    prefix = "base_model.model.model.mm_projector."
    others = projector_weights(checkpoint, prefix)
    if projector == "linear":
        random = torch.Generator().manual_seed(0)
        others = {
            f"{prefix}weight": torch.randn(32, 24, generator=random) / 5,
            f"{prefix}bias": torch.randn(32, generator=random) / 5,
        }
    torch.save(others, folder / "non_lora_trainables.bin")
    config = {
        "model_type": "llava_llama",
        "mm_vision_tower": str(clip),
        "mm_vision_select_layer": -2,
        "mm_projector_type": projector,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# ---- the expected captions ----


def expand_to_square(image: Image.Image, mean: list[float]) -> Image.Image:
    """Return an image on a square of the mean color, by the rule of original LLaVA."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


@torch.no_grad()
def caption_by_hand(
    language_model: torch.nn.Module,
    weights: Weights,
    clip: Path,
    tokenizer_folder: Path,
    image: Path,
    max_new_tokens: int = 8,
) -> str:
    """Caption an image with LLaVA in plain torch: one sequence, greedy, without a cache.

    Images are made square first, as original LLaVA does with `image_aspect_ratio: pad`.

    Args:
        language_model: A stock language model.
        weights: The source's weights, among them `mm_projector.*`.
        clip: Folder of the vision tower.
        tokenizer_folder: Folder of the tokenizer.
        image: Image file.
        max_new_tokens: Maximum length.
    """
    processor = CLIPImageProcessorPil.from_pretrained(clip)
    square = expand_to_square(Image.open(image), processor.image_mean)
    pixels = processor(square, return_tensors="pt")["pixel_values"]
    tower = CLIPVisionModel.from_pretrained(clip)
    tokens = tower(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
    projector = {}
    for name, value in weights.items():
        if "mm_projector" in name:
            projector[re.sub(r".*mm_projector\.", "", name)] = value
    if "0.weight" in projector:
        hidden = linear(tokens, projector["0.weight"], projector["0.bias"])
        tokens = linear(gelu(hidden), projector["2.weight"], projector["2.bias"])
    else:
        tokens = linear(tokens, projector["weight"], projector["bias"])

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    before = tokenizer("<s>[INST] ", add_special_tokens=False).input_ids
    after = tokenizer(f"\n{INSTRUCTION} [/INST]", add_special_tokens=False).input_ids
    table = language_model.get_input_embeddings().weight
    embeds = torch.cat([table[before], tokens, table[after]])
    ids: list[int] = []
    while len(ids) < max_new_tokens and EOS_TOKEN_ID not in ids:
        logits = language_model.eval()(inputs_embeds=embeds[None]).logits[0, -1]
        ids.append(int(logits.argmax()))
        embeds = torch.cat([embeds, table[ids[-1:]]])
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def assert_captions_and_trains(
    checkpoint: Path,
    caption: str,
    image: Path,
    data_folder: Path,
    tmp_path: Path,
    **options: object,
) -> None:
    """Check `llava predict`, and `llava train --init_from` after a step with learning rate 0.

    Args:
        checkpoint: The imported checkpoint.
        caption: What both must generate for the image.
        image: Image file.
        data_folder: What to train on.
        tmp_path: Where to write.
        options: Options of the training run.
    """
    record = {"image": image.name, "instruction": INSTRUCTION, "response": "x"}
    records = tmp_path / "one.json"
    records.write_text(json.dumps([record]))
    output = tmp_path / "predictions.json"
    argv = ["--model-path", str(checkpoint), "--data-path", str(records)]
    argv += ["--image-folder", str(image.parent), "--output", str(output)]
    argv += ["--temperature", "0", "--max-new-tokens", "8"]
    predict_main(argv)
    assert [row["pred_output"] for row in json.loads(output.read_text())] == [caption]

    trained = train_checkpoint(
        data_folder,
        tmp_path / "further",
        init_from=checkpoint,
        learning_rate=0,
        max_steps=1,
        **options,
    )
    assert Llava.from_pretrained(trained).caption(image, max_new_tokens=8) == caption


# ---- original LLaVA ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "trained_further"), [("llama", "adapter"), ("mistral", "everything")]
)
def test_import_checkpoint_reads_a_complete_original_model(
    make_source: Callable[[str], Source],
    models_folder: Path,
    data_folder: Path,
    image: Path,
    tmp_path: Path,
    family: str,
    trained_further: str,
) -> None:
    _, merged = make_source(family)
    clip = models_folder / "clip"
    folder = write_original(merged, clip, tmp_path / "llava-v1.5-tiny")
    weights: Weights = {}
    for path in folder.glob("*.bin"):
        weights |= torch.load(path, weights_only=True)
    config = json.loads((merged / "language_model" / "config.json").read_text())
    model_type = config.pop("model_type")
    language_model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))
    text_weights = {}
    for name, weight in weights.items():
        if "mm_projector" not in name and "tower" not in name:
            text_weights[name] = weight
    language_model.load_state_dict(text_weights)
    Image.open(image).crop((0, 5, 32, 26)).save(image)  # 32 x 21: the borders make it 32 x 32
    caption = caption_by_hand(language_model, weights, clip, folder, image)

    checkpoint = tmp_path / "ours"
    report = import_checkpoint(folder, checkpoint)
    assert report[-1].startswith("not compared")
    assert "4 weights of the projector" in report
    assert "image_aspect_ratio: pad" in report
    shutil.rmtree(folder)  # it is not needed any more
    options: dict[str, object] = {
        "mm_projector_type": "mlp2x_gelu",
        "vision_tower": clip,
        "image_aspect_ratio": "pad",
    }
    if trained_further == "everything":
        options["model_name_or_path"] = models_folder / model_type
        options |= {"lora_enable": False, "freeze_backbone": False}
    else:
        options["model_name_or_path"] = checkpoint / "language_model"
    assert_captions_and_trains(checkpoint, caption, image, data_folder, tmp_path, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "suffix", "projector"),
    [("llama", "bin", "mlp2x_gelu"), ("mistral", "safetensors", "linear")],
)
def test_import_checkpoint_reads_a_lora_folder(
    make_source: Callable[[str], Source],
    models_folder: Path,
    data_folder: Path,
    image: Path,
    tmp_path: Path,
    family: str,
    suffix: str,
    projector: str,
) -> None:
    trained, _ = make_source(family)
    clip = models_folder / "clip"
    base = base_language_model(trained)
    folder = write_lora(trained, clip, tmp_path / "llava-lora", suffix, projector)
    language_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    weights = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    caption = caption_by_hand(language_model, weights, clip, Path(base), image)

    checkpoint = tmp_path / "ours"
    with pytest.raises(ValueError, match="--model-base"):
        import_checkpoint(folder, checkpoint)
    import_checkpoint(folder, checkpoint, model_base=base)
    options = {"model_name_or_path": base, "vision_tower": clip, "mm_projector_type": projector}
    assert_captions_and_trains(checkpoint, caption, image, data_folder, tmp_path, **options)
    with pytest.raises(ValueError, match="--lora_r 4 --lora_alpha 16"):
        train_checkpoint(
            data_folder, tmp_path / "other", init_from=checkpoint, lora_alpha=32, **options
        )


@pytest.mark.slow
def test_import_command_reads_a_single_projector(
    source: Source,
    models_folder: Path,
    data_folder: Path,
    image: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained, _ = source
    clip = models_folder / "clip"
    base = base_language_model(trained)
    weights = projector_weights(trained, "model.mm_projector.")
    torch.save(weights, tmp_path / "mm_projector.bin")
    checkpoint = tmp_path / "ours"
    monkeypatch.chdir(base)
    argv = [str(tmp_path / "mm_projector.bin"), "--output", str(checkpoint), "--model-base", "."]
    with pytest.raises(ValueError, match="--vision-tower"):
        import_main(argv)
    assert import_main([*argv, "--vision-tower", str(clip)]) == 0
    monkeypatch.chdir(tmp_path)  # the relative path must have become absolute

    language_model = AutoModelForCausalLM.from_pretrained(base)
    caption = caption_by_hand(language_model, weights, clip, Path(base), image)
    options = {"model_name_or_path": base, "vision_tower": clip, "mm_projector_type": "mlp2x_gelu"}
    assert_captions_and_trains(checkpoint, caption, image, data_folder, tmp_path, **options)


@pytest.mark.medium
def test_import_checkpoint_uses_the_aspect_ratio_of_the_source(
    source: Source, models_folder: Path, tmp_path: Path
) -> None:
    """The pixels equal those of original LLaVA's image processing."""
    _, merged = source
    clip = models_folder / "clip"
    folder = write_original(merged, clip, tmp_path / "llava-v1.5-tiny")
    import_checkpoint(folder, tmp_path / "pad")
    import_checkpoint(folder, tmp_path / "crop", image_aspect_ratio="crop")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_aspect_ratio": "anyres"}))
    with pytest.raises(ValueError, match="anyres.*--image-aspect-ratio"):
        import_checkpoint(folder, tmp_path / "anyres")
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, "pad", "crop"}

    processor = CLIPImageProcessorPil.from_pretrained(clip)
    for name in ("pad", "crop"):
        transform = Llava.from_pretrained(tmp_path / name).vision_tower.transform
        std = torch.tensor(transform.std).view(3, 1, 1)
        for width, height in ((77, 41), (33, 90), (32, 21), (19, 32)):
            random = np.random.default_rng(width)
            image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
            original = image
            if name == "pad":
                original = expand_to_square(image, processor.image_mean)
            expected = processor(original, return_tensors="pt")["pixel_values"][0]
            actual = transform.normalize(transform(np.asarray(image)))
            gray_levels = ((actual - expected).abs() * 255 * std).max()
            # Equal, if nothing is resized. A resize in Pillow rounds differently than in torch.
            assert gray_levels < (1e-3 if original.size == (32, 32) else 2.01)


# ---- Hugging Face LLaVA ----


def name_in_transformers_4(name: str) -> str:
    """Return a weight's name in a folder that transformers 4 has written, such as those of llava-hf on the hub."""
    name = name.removeprefix("model.")
    if name.startswith("vision_tower."):
        bare_name = name.removeprefix("vision_tower.").removeprefix("vision_model.")
        return f"vision_tower.vision_model.{bare_name}"
    name = name.replace("language_model.", "language_model.model.")
    return re.sub("^lm_head", "language_model.lm_head", name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "rename"),
    [("llama", name_in_transformers_4), ("mistral", str)],
    ids=["llama-transformers-4", "mistral-transformers-5"],
)
def test_import_checkpoint_reads_a_hugging_face_folder(
    models_folder: Path,
    data_folder: Path,
    image: Path,
    tmp_path: Path,
    text: str,
    rename: Callable[[str], str],
) -> None:
    """The folder and the expected caption are made by transformers alone."""
    folder = tmp_path / "llava-tiny-hf"
    stock, processor = write_stock(models_folder, folder, language_model=text)
    weights = {rename(name): value.clone() for name, value in stock.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = processor.tokenizer
    image_token = processor.image_token_id

    inputs = processor(
        images=Image.open(image),
        text=f"<s>[INST] <image>\n{INSTRUCTION} [/INST]",
        return_tensors="pt",
        add_special_tokens=False,
    )
    with torch.no_grad():
        generated = stock.generate(
            **inputs,
            max_new_tokens=8,
            do_sample=False,
            suppress_tokens=[image_token],
            eos_token_id=EOS_TOKEN_ID,
        )
    caption_ids = generated[0, inputs["input_ids"].shape[1] :]
    caption = tokenizer.decode(caption_ids, skip_special_tokens=True).strip()

    checkpoint = tmp_path / "ours"
    report = import_checkpoint(folder, checkpoint)
    found = [line.split(" of the ")[1] for line in report[:3]]
    assert found == ["language model", "projector", "vision tower"]
    assert "2 of 2 greedy captions are equal (generated images)" in report[-1]
    shutil.rmtree(folder)  # it is not needed any more
    options = {
        "model_name_or_path": checkpoint / "language_model",
        "vision_tower": checkpoint / "vision_tower",
        "mm_projector_type": "mlp2x_gelu",
    }
    assert_captions_and_trains(checkpoint, caption, image, data_folder, tmp_path, **options)


@pytest.mark.medium
@pytest.mark.parametrize("shape", TEMPLATES)
def test_import_checkpoint_supports_a_template_that_writes_the_image_token(
    models_folder: Path, image: Path, tmp_path: Path, shape: str
) -> None:
    folder = tmp_path / shape
    write_stock(models_folder, folder, adds_bos=True, **TEMPLATES[shape])
    token = TEMPLATES[shape].get("image_token", "<image>")
    report = import_checkpoint(folder, tmp_path / "ours", check_images=image.parent)
    assert f"the chat template writes the image token {token}" in report
    assert "1 of 1 greedy captions are equal (given images)" in report[-1]

    content: Any = INSTRUCTION
    if shape == "llava-hf":
        content = [{"type": "image"}, {"type": "text", "text": INSTRUCTION}]
    logits, caption = run_stock(folder, [{"role": "user", "content": content}], image)
    shutil.rmtree(folder)  # it is not needed any more
    model = Llava.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(first_logits(model, image), logits, rtol=1e-5, atol=1e-5)
    assert model.caption(image, max_new_tokens=8) == caption
    assert caption

    # The language model in the checkpoint can be trained further, with the same prompts.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours" / "language_model")
    turns = [Message("user", f"<image>\n{INSTRUCTION}")]
    assert Prompt(tokenizer).render(turns, None) == model.prompt.render(turns, None)
    # The export is compared with the checkpoint, and equals the source again. Its template accepts lists.
    export_stock(tmp_path / "ours", tmp_path / "again", images=[image])
    image_part = {"type": "image", "image": Image.open(image)}
    parts = [{"role": "user", "content": [image_part, {"type": "text", "text": INSTRUCTION}]}]
    processor = AutoProcessor.from_pretrained(tmp_path / "again", backend="pil")
    assert processor.image_token == token
    inputs = processor.apply_chat_template(
        parts, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    prompt = model.prompt.render(turns, None).input_ids
    ids = inputs["input_ids"][0]
    assert [i for i in ids if i != processor.image_token_id] == [i for i in prompt if i >= 0]
    with pytest.raises(ValueError, match=f"{re.escape(token)} itself.*--format hf"):
        export_gguf(tmp_path / "ours", tmp_path / "gguf")


@pytest.mark.medium
def test_import_checkpoint_uses_plain_for_sources_without_a_template(
    models_folder: Path, image: Path, tmp_path: Path
) -> None:
    """Such sources are prompted by hand, in the form of Vicuna, which is also the form of llava-hf's template."""
    captions = []
    for name, template in (("plain", ""), ("parts", LLAVA_HF_TEMPLATE)):
        folder = tmp_path / name
        write_stock(models_folder, folder, adds_bos=True, template=template)
        import_checkpoint(folder, tmp_path / f"{name}-ours")
        captions.append(Llava.from_pretrained(tmp_path / f"{name}-ours").caption(image))
    assert captions[0] == captions[1]


@pytest.mark.medium
@pytest.mark.parametrize("pads_itself", [True, False])
def test_import_checkpoint_compares_images_with_borders(
    models_folder: Path, tmp_path: Path, pads_itself: bool
) -> None:
    size = {"height": 32, "width": 32}
    padding = LlavaImageProcessorPil(do_pad=pads_itself, size={"shortest_edge": 32}, crop_size=size)
    write_stock(models_folder, tmp_path / "stock", image_processor=padding)
    options = {} if pads_itself else {"image_aspect_ratio": "pad"}
    report = import_checkpoint(tmp_path / "stock", tmp_path / "ours", **options)
    assert "image_aspect_ratio: pad" in report
    assert "greedy captions are equal" in report[-1]
    transform = Llava.from_pretrained(tmp_path / "ours").vision_tower.transform
    assert transform.pad_color == (122, 116, 104)
    if pads_itself:
        with pytest.raises(ValueError, match="--image_aspect_ratio pad"):
            import_checkpoint(tmp_path / "stock", tmp_path / "crop", image_aspect_ratio="crop")


@pytest.mark.medium
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ({"vision_feature_layer": -1}, "logits .*differ"),
        ({"template": LLAVA_HF_TEMPLATE.replace("<image>", "<image>" * 2)}, "<image> 2 time"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_import_checkpoint_keeps_nothing_that_differs_from_the_source(
    models_folder: Path, tmp_path: Path, change: dict, message: str
) -> None:
    folder = tmp_path / "stock"
    write_stock(models_folder, folder, **change)
    if "vision_feature_layer" in change:  # make the conversion wrong
        config = json.loads((folder / "config.json").read_text())
        del config["vision_feature_layer"]
        config["mm_vision_select_layer"] = -1
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        import_checkpoint(folder, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["stock"], "nothing may be left behind"


def test_import_command_names_wrong_images_before_the_conversion(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, message in (("nowhere", "no such folder"), ("empty", "no image")):
        argv = ["source", "--output", "ours", "--check-images", str(tmp_path / name)]
        with pytest.raises(ValueError, match=f"--check-images .*{name}: .*{message}"):
            import_main(argv)


def test_check_images_are_found_in_subfolders(tmp_path: Path) -> None:
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    (tmp_path / "photos" / "a.txt").write_text("a cat")
    Image.new("RGB", (5, 3), "red").save(tmp_path / "photos" / "cats" / "a.png")
    images, _ = choose_check_images(tmp_path / "photos")
    assert [image.shape for image in images] == [(3, 5, 3)]


# ---- what is refused ----


def remove_weight(weights: Weights, key: str) -> None:
    del weights[key]


def add_weight(weights: Weights, key: str) -> None:
    weights[f"{key}_too"] = weights[key].clone()


def shorten_weight(weights: Weights, key: str) -> None:
    weights[key] = weights[key][:-1].clone()


# Fault -> what is done to a weight, and the error. {name} is the name of the weight in our model.
FAULTS: dict[str, tuple[Callable[[Weights, str], None], str]] = {
    "missing": (remove_weight, r"missing \['{name}'\]"),
    "unexpected": (add_weight, r"unexpected \['{name}_too'\]"),
    "shape": (shorten_weight, r"{name} .*\(.+\(.+\)"),
}
ADAPTER_WEIGHT = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
# Part -> the layout, a weight of it, and the name of this weight in our model.
PARTS = {
    "language model": ("original", "model.norm.weight", "model.norm.weight"),
    "projector": ("original", "model.mm_projector.2.bias", "2.bias"),
    "adapter": ("lora", ADAPTER_WEIGHT, ADAPTER_WEIGHT),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("part", PARTS)
def test_import_checkpoint_names_a_weight_that_does_not_fit(
    source: Source, models_folder: Path, tmp_path: Path, part: str, fault: str
) -> None:
    trained, merged = source
    layout, key, name = PARTS[part]
    change, message = FAULTS[fault]
    clip = models_folder / "clip"
    options: dict[str, Any] = {}
    if layout == "original":
        folder = write_original(merged, clip, tmp_path / "odd")
    else:
        folder = write_lora(trained, clip, tmp_path / "odd", "bin")
        options["model_base"] = base_language_model(trained)
    for path in folder.glob("*.bin"):
        weights = torch.load(path, weights_only=True)
        if key in weights:
            change(weights, key)
            torch.save(weights, path)
    pattern = f"{part}.*" + message.replace("{name}", re.escape(name))
    with pytest.raises(ValueError, match=pattern):
        import_checkpoint(folder, tmp_path / "ours", **options)
    assert not (tmp_path / "ours").exists()


def test_import_checkpoint_refuses_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no weights"):
        import_checkpoint(tmp_path / "empty", tmp_path / "ours")


PROJECTOR = {"mm_projector.0.weight": torch.zeros(2, 2)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"\x10" * 5, "not a file of tensors"),
        ("model.safetensors", b"", "not a file of tensors"),
        ("pytorch_model.bin", b"", "not a file of tensors"),
        ("pytorch_model.bin", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("mm_projector.bin", [torch.zeros(2)], "expected tensors by name, found list"),
        ("mm_projector.bin", {"model": PROJECTOR}, "'model': expected a tensor, found dict"),
        ("mm_projector.bin", {0: torch.zeros(2)}, "0: expected a tensor"),
    ],
)
def test_import_names_a_file_that_contains_no_weights(
    tmp_path: Path, name: str, content: Any, message: str
) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=message) as raised:
        read_source(tmp_path)
    assert str(tmp_path / name) in str(raised.value)
    assert "weights_only" not in str(raised.value)


def test_import_refuses_two_values_of_a_weight(tmp_path: Path) -> None:
    """A folder can contain the weights of an earlier version in another format."""
    weights = {"model.norm.weight": torch.ones(2), "model.mm_projector.weight": torch.ones(2, 2)}
    changed = {name: weight + 1 for name, weight in weights.items()}
    # The projector of the first stage is replaced by that of the complete model.
    torch.save({"model.mm_projector.weight": torch.zeros(2, 2)}, tmp_path / "mm_projector.bin")
    save_file(weights, tmp_path / "model.safetensors")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    source = read_source(tmp_path)
    torch.testing.assert_close(source.projector["weight"], torch.ones(2, 2))

    torch.save(changed, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model\.safetensors and pytorch_model\.bin contain"):
        read_source(tmp_path)


def test_import_names_a_missing_layer_of_a_linear_projector(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"projector_hidden_act": "linear"}')
    weights = {"multi_modal_projector.linear_1.weight": torch.zeros(2, 2)}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"2\.weight"):
        read_source(tmp_path)


def tune_vision_tower(clip: Path, folder: Path, difference: float = 1e-5) -> Path:
    """Write a vision tower whose weights differ slightly, as after training with a low learning rate."""
    shutil.copytree(clip, folder)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if weight.is_floating_point():
            weights[name] = weight + difference
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("difference", [1e-5, 0.3])
def test_import_checkpoint_stores_a_fine_tuned_vision_tower(
    source: Source, models_folder: Path, image: Path, tmp_path: Path, difference: float
) -> None:
    _, merged = source
    published = models_folder / "clip"
    tuned = tune_vision_tower(published, tmp_path / "tuned", difference)
    folder = write_original(merged, tuned, tmp_path / "llava")
    report = import_checkpoint(folder, tmp_path / "ours", vision_tower=str(published))
    assert any("fine-tuned" in line for line in report)

    # The tower is complete: neither the source nor the published tower is needed any more.
    shutil.rmtree(folder)
    config = json.loads((tmp_path / "ours" / "llava.json").read_text())["architecture"]
    assert config["vision_tower"] == str(tmp_path / "ours" / "vision_tower")
    assert "vision_tower" not in config["weights_digests"], "a stored part needs no digest"
    model = Llava.from_pretrained(tmp_path / "ours", device="cpu")
    expected = CLIPVisionModel.from_pretrained(tuned).state_dict()
    stored = model.vision_tower.model.state_dict()
    assert stored.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(stored[name], weight), name
    # A tower with its final weights, from a source that says so, gives the same checkpoint.
    folder = write_original(merged, tuned, tmp_path / "llava")
    import_checkpoint(folder, tmp_path / "same")
    same = Llava.from_pretrained(tmp_path / "same", device="cpu")
    assert not (tmp_path / "same" / "vision_tower").exists()
    assert torch.equal(first_logits(model, image), first_logits(same, image))


@pytest.mark.parametrize("dtypes", [["float16"], ["bfloat16"], ["float16", "bfloat16"]])
def test_import_checkpoint_stores_no_vision_tower_that_was_only_rounded(
    source: Source, models_folder: Path, tmp_path: Path, dtypes: list[str]
) -> None:
    _, merged = source
    folder = write_original(merged, models_folder / "clip", tmp_path / "llava")
    for path in folder.glob("*.bin"):
        weights = torch.load(path, weights_only=True)
        for name, weight in weights.items():
            if "vision_tower" in name and weight.is_floating_point():
                for dtype in dtypes:
                    weight = weight.to(getattr(torch, dtype))
                weights[name] = weight
        torch.save(weights, path)
    report = import_checkpoint(folder, tmp_path / "ours")
    assert any("the same weights as" in line for line in report)
    assert not (tmp_path / "ours" / "vision_tower").exists()


def test_import_checkpoint_adds_frozen_weights_to_the_tuned_ones_of_a_lora_run(
    source: Source, models_folder: Path, tmp_path: Path
) -> None:
    trained, _ = source
    clip = models_folder / "clip"
    folder = write_lora(trained, clip, tmp_path / "llava-lora", "safetensors")
    name = "vision_model.encoder.layers.1.mlp.fc2.weight"
    published = CLIPVisionModel.from_pretrained(clip).state_dict()
    key = next(key for key in published if key.endswith(name.removeprefix("vision_model.")))
    others = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    others[f"base_model.model.model.vision_tower.vision_tower.{name}"] = published[key] + 1
    torch.save(others, folder / "non_lora_trainables.bin")
    import_checkpoint(folder, tmp_path / "ours", model_base=base_language_model(trained))
    stored = Llava.from_pretrained(tmp_path / "ours", device="cpu").vision_tower.model.state_dict()
    for other, weight in published.items():
        assert torch.equal(stored[other], weight + 1 if other == key else weight), other


def change_weight(folder: Path, suffix: str, change: str) -> None:
    """Remove or shorten the weights of a folder whose names end with `suffix`."""
    for path in folder.glob("*.bin"):
        weights = torch.load(path, weights_only=True)
        for name in [name for name in weights if name.endswith(suffix)]:
            weight = weights.pop(name)
            if change == "shorten":
                weights[name] = weight[:-1].clone()
        torch.save(weights, path)


@pytest.mark.parametrize(
    ("suffix", "change"),
    [("layers.0.mlp.fc2.bias", "remove"), ("post_layernorm.bias", "shorten")],
)
def test_import_checkpoint_refuses_a_vision_tower_that_does_not_fit(
    source: Source, models_folder: Path, tmp_path: Path, suffix: str, change: str
) -> None:
    _, merged = source
    folder = write_original(merged, models_folder / "clip", tmp_path / "odd")
    change_weight(folder, f"vision_model.{suffix}".replace("vision_model.layers", "layers"), change)
    with pytest.raises(ValueError, match=f"--vision-tower.*{re.escape(suffix)}"):
        import_checkpoint(folder, tmp_path / "ours")


def test_import_checkpoint_needs_no_weights_that_the_features_do_not_depend_on(
    source: Source, models_folder: Path, tmp_path: Path
) -> None:
    """LLaVA with SigLIP, for example, saves no pooling head."""
    _, merged = source
    tuned = tune_vision_tower(models_folder / "clip", tmp_path / "tuned")
    for name, tower, is_stored in (("same", models_folder / "clip", False), ("new", tuned, True)):
        folder = write_original(merged, tower, tmp_path / f"llava-{name}")
        change_weight(folder, "post_layernorm.bias", "remove")
        import_checkpoint(folder, tmp_path / name, vision_tower=str(models_folder / "clip"))
        assert (tmp_path / name / "vision_tower").exists() == is_stored


def test_import_checkpoint_refuses_options_for_parts_that_the_source_contains(
    source: Source, models_folder: Path, tmp_path: Path
) -> None:
    clip = str(models_folder / "clip")
    write_stock(models_folder, tmp_path / "stock")
    with pytest.raises(ValueError, match="--vision-tower"):
        import_checkpoint(tmp_path / "stock", tmp_path / "ours", vision_tower=clip)
    original = write_original(source[1], models_folder / "clip", tmp_path / "original")
    with pytest.raises(ValueError, match="--model-base"):
        import_checkpoint(original, tmp_path / "ours", model_base=str(models_folder / "llama"))


def test_import_checkpoint_names_the_missing_embeddings_of_a_tied_language_model(
    models_folder: Path, tmp_path: Path
) -> None:
    write_stock(models_folder, tmp_path / "stock", language_model="qwen2")
    path = tmp_path / "stock" / "model.safetensors"
    weights = load_file(path)
    for name in [name for name in weights if "embed_tokens" in name]:
        del weights[name]
    save_file(weights, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "stock" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="embed_tokens"):
        import_checkpoint(tmp_path / "stock", tmp_path / "ours")


def test_imported_adapter_keeps_the_data_type_of_its_language_model(
    source: Source, models_folder: Path, tmp_path: Path
) -> None:
    """In float32, a language model of 16 bits would need twice the memory."""
    trained, _ = source
    base = base_language_model(trained)
    language_model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
    language_model.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "half")
    folder = write_lora(trained, models_folder / "clip", tmp_path / "lora", "safetensors")
    import_checkpoint(folder, tmp_path / "ours", model_base=str(tmp_path / "half"))
    config = json.loads((tmp_path / "ours" / "llava.json").read_text())["architecture"]
    assert config["dtype"] == "float16"


def test_import_checkpoint_refuses_image_start_and_end_tokens(
    source: Source, models_folder: Path, tmp_path: Path
) -> None:
    _, merged = source
    folder = write_original(merged, models_folder / "clip", tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    config["mm_use_im_start_end"] = True
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="mm_use_im_start_end"):
        import_checkpoint(folder, tmp_path / "ours")


class Trap:
    """A pickled object that calls a function when it is read: it creates a file."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple:
        return open, (str(self.victim), "w")


@pytest.mark.parametrize(
    "save_options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"]
)
@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "adapter_model.bin", "non_lora_trainables.bin", "mm_projector.bin"],
)
def test_import_checkpoint_refuses_a_pickle_that_runs_code(
    models_folder: Path, tmp_path: Path, name: str, save_options: dict
) -> None:
    victim = tmp_path / "victim"
    folder = tmp_path / "trap"
    folder.mkdir()
    torch.save({"model.mm_projector.weight": Trap(victim)}, folder / name, **save_options)
    for source in (folder, folder / name):
        with pytest.raises(ValueError, match=f"{name}: not a file of tensors"):
            import_checkpoint(
                source,
                tmp_path / "ours",
                model_base=str(models_folder / "llama"),
                vision_tower=str(models_folder / "clip"),
            )
    assert not victim.exists()
    assert not (tmp_path / "ours").exists()
    torch.load(folder / name, weights_only=False)
    assert victim.exists(), "the trap must work, or the test would prove nothing"


# ---- projectors without an activation ----


@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_projector_of_stock_llava_is_folded_into_one_layer(with_bias: bool) -> None:
    first, second = torch.nn.Linear(5, 7, bias=with_bias), torch.nn.Linear(7, 3, bias=with_bias)
    weights = torch.nn.Sequential(first, torch.nn.Identity(), second).state_dict()
    folded = fold_linear_projector(weights)
    x = torch.randn(4, 5)
    expected = second(first(x))
    actual = torch.nn.functional.linear(x, folded["0.weight"], folded["0.bias"])
    torch.testing.assert_close(actual, expected)


def test_import_names_an_activation_that_it_does_not_support(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"projector_hidden_act": "silu"}')
    save_file({"mm_projector.0.weight": torch.zeros(1, 1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"config\.json.*silu.*projector_hidden_act"):
        read_source(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        [],
        {"vision_config": 3},
        {"text_config": "llama"},
        {"model_type": {}},
        {"text_config": {"model_type": 1}},
        {"vision_config": {"model_type": ["clip"]}},
        {"mm_vision_tower": 5},
        {"mm_vision_select_layer": "last"},
        {"vision_feature_layer": {}},
        {"projector_hidden_act": ["gelu"]},
        {"text_config": {"num_hidden_layers": 10**9}},
    ],
)
def test_import_names_the_config_whose_entries_are_wrong(tmp_path: Path, config: object) -> None:
    save_file({"mm_projector.0.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json"):
        read_source(tmp_path)

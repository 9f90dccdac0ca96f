"""What is exported loads in a process that has never heard of this project, and says the same."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_commands import ENVIRONMENT
from tiny import make_tokenizer
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llava_simplified import cli
from llava_simplified.arguments import parse_arguments
from llava_simplified.data.images import decode_image
from llava_simplified.export.export_command import export_main, merge_main, push_main
from llava_simplified.export.stock import export_stock
from llava_simplified.model.build import build_model
from llava_simplified.model.checkpoint import save_checkpoint
from llava_simplified.model.config import LlavaConfig, TrainedParts
from llava_simplified.model.llava import Llava
from llava_simplified.model.lora import add_lora, freeze
from llava_simplified.training.train_command import train

PAIRS = [("clip", "mistral"), ("clip", "llama"), ("siglip", "qwen2")]
STRANGER = """
import json, sys
sys.modules["llava_simplified"] = None  # installed or not, whoever imports it fails
try:
    import llava_simplified.model.llava
    raise SystemExit("this process can import the project")
except ImportError:
    pass
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
folder, adapter, instruction, image, pixels = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
if adapter:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, adapter).eval()
processor = AutoProcessor.from_pretrained(folder, backend="pil")
messages = [{"role": "user", "content": [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": instruction}]}]
inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
with torch.no_grad():
    logits = model(**{**inputs, "pixel_values": torch.load(pixels)}).logits[0, -1].tolist()
if adapter:
    said = processor.decode(model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1]:])
else:
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    said = pipe(text=messages, max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
adapted = [name for name, _ in model.named_parameters() if "lora_" in name]
print(json.dumps({"logits": logits, "said": said, "adapted": adapted}))
"""


def trained(models: Path, data: Path, output: Path, **more: object) -> Path:
    options = {
        "train_data_path": data / "train.json",
        "train_image_folder": data / "images",
        "output_dir": output,
        "max_steps": 5,
        "learning_rate": 1e-2,
        "lora_r": 4,
        "cache_vision_features": "off",
        "disable_tqdm": True,
        **more,
    }
    words: list[str] = []
    for name, value in options.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return train(*parse_arguments(words))


def stranger(
    folder: Path, image: Path, model: Llava, scratch: Path, adapter: Path | None = None
) -> dict:
    """What a process without our code gets out of the folder, on exactly our pixels and then on its own."""
    transform = model.vision_tower.transform
    torch.save(
        transform.normalize(transform(decode_image(image.read_bytes()))[None]),
        scratch / "pixels.pt",
    )
    words = [
        sys.executable,
        "-I",
        "-c",
        STRANGER,
        folder,
        adapter or "",
        model.instruction,
        image,
        scratch / "pixels.pt",
    ]
    done = subprocess.run(
        list(map(str, words)), cwd=scratch, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def own_logits(model: Llava, image: Path) -> torch.Tensor:
    from llava_simplified.export.stock import _say

    return _say(model, decode_image(image.read_bytes()))["logits"]


def assert_same(got: dict, model: Llava, image: Path) -> None:
    wanted = own_logits(model, image)
    torch.testing.assert_close(
        torch.tensor(got["logits"])[: len(wanted)], wanted, rtol=1e-5, atol=1e-5
    )
    said = got["said"].replace("</s>", "").strip()
    assert said == model.caption(image, max_new_tokens=6)


@pytest.mark.slow
@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize(("tower", "text"), PAIRS)
def test_a_stranger_gets_the_same_from_the_export(
    models_folder: Path, data_folder: Path, tmp_path: Path, tower: str, text: str, projector: str
) -> None:
    parts = {"model_name_or_path": models_folder / text, "vision_tower": models_folder / tower}
    checkpoint = trained(
        models_folder, data_folder, tmp_path / "out", mm_projector_type=projector, **parts
    )
    image = data_folder / "images" / "0.jpg"
    compared = export_stock(checkpoint, tmp_path / "stock", images=[image])
    assert compared["logits differ by"] < 1e-5
    model = Llava.from_pretrained(checkpoint)
    assert_same(stranger(tmp_path / "stock", image, model, tmp_path), model, image)


@pytest.mark.slow
@pytest.mark.parametrize("template", ["plain", "bare"])
def test_our_own_templates_are_rendered_by_the_stock_processor(
    models_folder: Path, data_folder: Path, tmp_path: Path, template: str
) -> None:
    parts = {"model_name_or_path": models_folder / "llama", "vision_tower": models_folder / "clip"}
    rows = json.loads(
        (data_folder / "train.json").read_text()
    )  # half of LLaVA's own have the picture behind
    rows = [{**row, "instruction": "Say what is there.\n<image>"} for row in rows]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    parts["train_data_path"] = tmp_path / "train.json"
    export_stock(
        trained(models_folder, data_folder, tmp_path / "out", template=template, **parts),
        tmp_path / "stock",
    )


@pytest.mark.slow
@pytest.mark.parametrize("names", ["whole", "endings"])
def test_a_stranger_gets_the_same_from_the_adapter(
    models_folder: Path, data_folder: Path, tmp_path: Path, names: str
) -> None:
    parts = {
        "model_name_or_path": models_folder / "mistral",
        "vision_tower": models_folder / "clip",
    }
    checkpoint = trained(models_folder, data_folder, tmp_path / "out", **parts)
    if names == "endings":  # as PEFT writes 20 names or more; the tower's layers have the same
        config = checkpoint / "adapter" / "adapter_config.json"
        settings = json.loads(config.read_text())
        settings["target_modules"] = sorted(
            {name.rpartition(".")[2] for name in settings["target_modules"]}
        )
        config.write_text(json.dumps(settings))
    image = data_folder / "images" / "1.jpg"
    export_stock(checkpoint, tmp_path / "peft", adapter=True)
    model = Llava.from_pretrained(checkpoint)
    got = stranger(
        tmp_path / "peft" / "base", image, model, tmp_path, tmp_path / "peft" / "adapter"
    )
    assert_same(got, model, image)
    assert got["adapted"] and all("language_model" in name for name in got["adapted"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision_tower": "convnext"}, "no convolutional vision towers"),
        ({"mm_token_pool": 2}, "does not pool image tokens"),
        ({"mm_projector_type": "mlp3x_gelu"}, "has two layers, this one 3"),
        ({"model_name_or_path": "gemma2"}, "logits differ by .*stock LLaVA does not"),
        ({"model_name_or_path": "phi"}, "head has no bias"),
        ({"model_name_or_path": "opt"}, "no place for a opt"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_stock_llava_cannot_say_is_refused(
    models_folder: Path, data_folder: Path, tmp_path: Path, options: dict, message: str
) -> None:
    parts = {"model_name_or_path": "mistral", "vision_tower": "clip", **options}
    parts |= {name: models_folder / parts[name] for name in ("model_name_or_path", "vision_tower")}
    checkpoint = trained(
        models_folder, data_folder, tmp_path / "out", tune_mm_mlp_adapter=True, **parts
    )
    with pytest.raises(ValueError, match=message):
        export_stock(checkpoint, tmp_path / "stock")
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is left behind"


def test_an_export_that_says_something_else_is_not_left_behind(
    models_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_simplified.export import stock

    parts = {"model_name_or_path": models_folder / "llama", "vision_tower": models_folder / "clip"}
    checkpoint = trained(models_folder, data_folder, tmp_path / "out", **parts)
    true = stock.two_layers

    def wrong(*args):  # one weight of the projector
        projector = true(*args)
        projector["layers"][0][0].data[0, 0] += 1
        return projector

    monkeypatch.setattr(stock, "two_layers", wrong)
    monkeypatch.setattr(
        stock,
        "_say",
        lambda model, picture, say=stock._say: {**say(model, picture), "logits": torch.zeros(1)},
    )
    with pytest.raises(ValueError, match="logits differ"):
        export_stock(checkpoint, tmp_path / "stock", images=[np.zeros((9, 9, 3), np.uint8)])
    assert not (tmp_path / "stock").exists()


@pytest.mark.parametrize(("tower", "text"), [("clip", "llama"), ("siglip", "qwen2")])
def test_the_folder_has_what_vllms_loader_looks_for(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tower: str,
    text: str,
) -> None:
    """vllm/model_executor/models/llava.py and clip.py: modules of its own, weights by these names; here in many shards."""
    from llava_simplified.export import stock

    parts = {"model_name_or_path": models_folder / text, "vision_tower": models_folder / tower}
    options = {"tune_mm_mlp_adapter": True, "max_steps": 1, "mm_projector_type": "mlp2x_gelu"}
    checkpoint = trained(models_folder, data_folder, tmp_path / "out", **options, **parts)
    monkeypatch.setattr(stock, "SHARD_SIZE", "60KB")
    export_stock(checkpoint, tmp_path / "stock", dtype="float16")
    index = json.loads((tmp_path / "stock" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) >= 2
    block = r"encoder\.layers\.\d+\.(layer_norm[12]|mlp\.fc[12]|self_attn\.(q_proj|k_proj|v_proj|out_proj))\.(weight|bias)"
    layer = r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj|(input|post_attention)_layernorm)\.(weight|bias)"
    known = re.compile(
        rf"vision_tower\.vision_model\.({block}|embeddings\.(class_embedding|(patch|position)_embedding\.(weight|bias))"
        r"|(pre_layrnorm|post_layernorm)\.(weight|bias)|head\..+)"
        r"|multi_modal_projector\.linear_[12]\.(weight|bias)"
        rf"|language_model\.(model\.({layer}|embed_tokens\.weight|norm\.weight)|lm_head\.weight)"
    )
    assert [name for name in index["weight_map"] if not known.fullmatch(name)] == []
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["text_config"]["architectures"] == [f"{text.title()}ForCausalLM"]
    assert config["vision_config"]["model_type"] == f"{tower}_vision_model"
    assert config["projector_hidden_act"] == "gelu" and config["multimodal_projector_bias"] is True
    assert config["image_token_index"] < config["text_config"]["vocab_size"]
    assert config["vision_feature_layer"] == -2
    assert config["vision_feature_select_strategy"] == ("default" if tower == "clip" else "full")
    assert (tmp_path / "stock" / "preprocessor_config.json").is_file()


def test_merging_keeps_every_word_though_the_bases_have_moved(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    here, there = (
        {"model_name_or_path": tmp_path / f / "qwen2", "vision_tower": tmp_path / f / "clip"}
        for f in "ab"
    )
    for folder in here.values():
        shutil.copytree(models_folder / folder.name, folder)
    checkpoint = trained(models_folder, data_folder, tmp_path / "out", **here)
    (tmp_path / "a").rename(tmp_path / "b")
    where = [
        "--model-base",
        str(there["model_name_or_path"]),
        "--vision-tower",
        str(there["vision_tower"]),
    ]
    assert merge_main([str(checkpoint), "--output", str(tmp_path / "merged"), *where]) == 0
    assert not (tmp_path / "merged" / "adapter").exists()
    image = data_folder / "images" / "2.jpg"
    one = Llava.from_pretrained(checkpoint, model_base=where[1], vision_tower=where[3])
    other = Llava.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        own_logits(one, image), own_logits(other, image), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="no adapter to merge"):
        merge_main([str(tmp_path / "merged"), "--output", str(tmp_path / "again")])


@pytest.mark.parametrize("how", ["full", "lora"])
def test_a_trained_tower_is_exported_and_merged(
    models_folder: Path, data_folder: Path, tmp_path: Path, how: str
) -> None:
    parts = {"model_name_or_path": models_folder / "llama", "vision_tower": models_folder / "clip"}
    checkpoint = trained(
        models_folder, data_folder, tmp_path / "out", tune_vision_tower=how, **parts
    )
    for adapter in (False, True):  # each compares what it wrote with the checkpoint
        assert (
            export_stock(checkpoint, tmp_path / str(adapter), adapter=adapter)["logits differ by"]
            < 1e-4
        )
    merge_main([str(checkpoint), "--output", str(tmp_path / "merged")])
    assert {"vision_tower", "language_model"} < {
        path.name for path in (tmp_path / "merged").iterdir()
    }
    image = data_folder / "images" / "2.jpg"
    one, other = Llava.from_pretrained(checkpoint), Llava.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        own_logits(one, image), own_logits(other, image), rtol=1e-4, atol=1e-5
    )


def test_the_command_writes_a_card(
    models_folder: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {"model_name_or_path": models_folder / "llama", "vision_tower": models_folder / "clip"}
    checkpoint = trained(
        models_folder, data_folder, tmp_path / "out", hub_token="hf_secret", **parts
    )
    (tmp_path / "scores.json").write_text(json.dumps({"a": {"mean": {"CIDEr-D": [0.5, 0.4, 0.6]}}}))
    output = tmp_path / "stock"
    words = [str(checkpoint), "--output", str(output), "--scores", str(tmp_path / "scores.json")]
    assert export_main(words) == 0
    card = (output / "README.md").read_text()
    assert (
        "| CIDEr-D | 0.5000 | 0.4000 to 0.6000 |" in card
        and "Generate a caption of this image:" in card
    )
    assert (
        "LoRA on the language model. 5 steps" in card and "# llama that sees through clip" in card
    )
    assert (output / "training.png").is_file()
    for path in output.iterdir():
        assert str(tmp_path.parent).encode() not in path.read_bytes(), (
            f"{path.name} tells a folder of this machine"
        )
    assert push_main([str(output), "me/model", "--dry-run"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert push_main([str(checkpoint), "me/model", "--dry-run"]) == 0
    told = capsys.readouterr()
    assert str(models_folder / "llama") in told.err and str(data_folder / "train.json") in told.err
    assert "llava.json" in told.out and "hf_secret" not in (checkpoint / "llava.json").read_text()
    with pytest.raises(ValueError, match="exists"):
        export_main(words)


CAPTIONS = """
import json, sys
sys.modules["llava_simplified"] = None
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, instruction, *images = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(folder, backend="pil")
said = []
for image in images:
    content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": instruction}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    said.append(processor.decode(ids, skip_special_tokens=True).strip())
print(json.dumps(said))
"""


@pytest.mark.slow
def test_the_demos_commands_with_a_clip_tower_then_fifty_captions_by_a_stranger(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    """Both stages of the demo, in bfloat16 and packed; exported by the command; all that is tiny are the models."""
    configs = Path(__file__).parents[2] / "configs"
    parts = [
        "--model_name_or_path",
        models_folder / "llama",
        "--vision_tower",
        models_folder / "clip",
    ]
    parts += [
        "--train_data_path",
        data_folder / "train.json",
        "--train_image_folder",
        data_folder / "images",
    ]
    parts += [
        "--eval_data_path",
        data_folder / "val.json",
        "--val_image_folder",
        data_folder / "images",
    ]
    parts += [
        "--mm_token_pool",
        0,
        "--mm_vision_select_layer",
        -2,
        "--compile_layers",
        False,
        "--disable_tqdm",
        True,
    ]
    parts += ["--max_steps", 4, "--cache_vision_features", "memory", "--pack_length", 96]
    first, second, output = tmp_path / "projector", tmp_path / "model", tmp_path / "stock"
    stages = [
        ["--config", configs / "demo_projector.yaml", "--output_dir", first],
        [
            "--config",
            configs / "demo.yaml",
            "--pretrain_mm_mlp_adapter",
            first,
            "--output_dir",
            second,
        ],
    ]
    for stage in stages:
        assert cli.main(["train", *map(str, [*stage, *parts])]) == 0
    assert (
        cli.main(
            ["export", str(second), "--format", "hf", "--dtype", "float32", "--output", str(output)]
        )
        == 0
    )
    pictures, random = [], np.random.default_rng(0)
    for number in range(50):
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((32, 32)).save(path := tmp_path / f"{number}.png")
        pictures.append(path)
    model = Llava.from_pretrained(second, dtype="float32")
    words = [sys.executable, "-I", "-c", CAPTIONS, output, model.instruction, *pictures]
    done = subprocess.run(list(map(str, words)), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said == model.caption(pictures, max_new_tokens=8)
    assert len(set(said)) > 10, "the pictures decide what is said"


PEAK = """
import sys, threading, time
from pathlib import Path
from llava_simplified.export.stock import export_stock
small, large, output = sys.argv[1:]

def held():  # what can't be read again from a file
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def watch():
    while not done:
        peaks.append(held())
        time.sleep(0.002)

export_stock(small, output + "-small", "float16")  # all that is imported and kept anyway
before, peaks, done = held(), [], False
thread = threading.Thread(target=watch, daemon=True)  # it ends with an export that fails
thread.start()
export_stock(large, output, "float16")
done = True
thread.join()
print((max(peaks) - before) / sum(path.stat().st_size for path in Path(output).glob("*.safetensors")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured as Linux tells it")
def test_an_export_holds_the_model_once(models_folder: Path, tmp_path: Path) -> None:
    """Loading, converting, merging, writing, reading back: 160 MB of weights, a third of them words, never a fifth more."""
    tokenizer = make_tokenizer()
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["model"]["vocab"] |= {f"{number}th": number for number in range(len(tokenizer), 25_000)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token="</s>"
    )
    shape = {
        "hidden_size": 1024,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    }
    config = LlamaConfig(**shape, vocab_size=len(tokenizer), tie_word_embeddings=True)
    large = LlamaForCausalLM(config).bfloat16()
    large.save_pretrained(tmp_path / "large")
    tokenizer.save_pretrained(tmp_path / "large")
    for name, text in (("a", models_folder / "llama"), ("b", tmp_path / "large")):
        parts = {"language_model": str(text), "vision_tower": str(models_folder / "clip")}
        model = build_model(architecture := LlavaConfig(**parts, dtype="bfloat16"))
        freeze(model, TrainedParts())
        add_lora(model, 4, 8, 0.0, "none")
        save_checkpoint(model, tmp_path / name, architecture, TrainedParts("adapter"))
    del large, model
    words = [sys.executable, "-c", PEAK, tmp_path / "a", tmp_path / "b", tmp_path / "stock"]
    done = subprocess.run(list(map(str, words)), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.splitlines()[-1]) < 1.2

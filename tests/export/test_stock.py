"""Exported folders load in a process without this project, and give the checkpoint's logits and captions."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import TrainPair, first_logits, train_checkpoint
from cli_process import run_command
from PIL import Image
from safetensors.torch import load_file, save_file
from test_commands import ENVIRONMENT
from tiny import MISTRAL_TEMPLATE, make_tokenizer, save_llava
from tokenizers import Tokenizer
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llava_simplified import cli
from llava_simplified.data.images import decode_image
from llava_simplified.export import stock
from llava_simplified.export.export_command import export_main, merge_main, push_main
from llava_simplified.export.model_card import write_model_card
from llava_simplified.export.ollama import modelfile
from llava_simplified.export.stock import export_stock
from llava_simplified.export.stock_check import choose_images
from llava_simplified.model.build import build_model
from llava_simplified.model.checkpoint import save_checkpoint
from llava_simplified.model.config import LlavaConfig, TrainedParts
from llava_simplified.model.llava import Llava
from llava_simplified.model.lora import add_lora, freeze

# The pairs of vision tower and language model that are exported in every variant.
PAIRS = [("clip", "mistral"), ("clip", "llama"), ("siglip", "qwen2")]


# ---- a process without this project ----

# A program that imports the stock libraries once, and then forks a process for each script that it receives.
STOCK_SERVER = """
import gc, json, os, sys, traceback
gc.disable()  # until everything is imported, which takes a quarter longer otherwise
sys.modules["llava_simplified"] = None  # an import fails, whether it is installed or not
# The scripts do not need these modules, and PEFT and transformers would take seconds to import them.
sys.modules["bitsandbytes"] = sys.modules["mistral_common"] = None
try:
    import llava_simplified.model.llava
    raise SystemExit("this process can import the project")
except ImportError:
    pass
import peft, torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, pipeline
import transformers.models.llava.modeling_llava
gc.freeze()
gc.enable()

def run(script, argv, folder, output):
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(1, 2)
    os.chdir(folder)
    sys.argv = ["-c", *argv]
    exec(script, {"__name__": "__main__"})

for line in sys.stdin:
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
        continue
    status = 1
    try:
        run(*json.loads(line))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
"""
STOCK_PROCESS = """
import json, sys
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

folder, adapter, instruction, image, pixels = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
if adapter:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, adapter).eval()
processor = AutoProcessor.from_pretrained(folder, backend="pil")
content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": instruction}]
messages = [{"role": "user", "content": content}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
with torch.no_grad():
    logits = model(**{**inputs, "pixel_values": torch.load(pixels)}).logits[0, -1].tolist()
if adapter:
    generated = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    caption = processor.decode(generated[0, inputs["input_ids"].shape[1]:])
else:
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    results = pipe(text=messages, max_new_tokens=6, do_sample=False, return_full_text=False)
    caption = results[0]["generated_text"]
adapted = [name for name, _ in model.named_parameters() if "lora_" in name]
print(json.dumps({"logits": logits, "caption": caption, "adapted": adapted}))
"""


# Tests that use the process run in the same worker of pytest-xdist, so that it is started once.
in_stock_process = pytest.mark.xdist_group("stock_process")


@functools.cache
def stock_server() -> subprocess.Popen[str]:
    """Start the process that cannot import the project. It ends when the tests close its input."""
    return subprocess.Popen(
        # -I isolates the process: it ignores PYTHONPATH and the current folder.
        [sys.executable, "-I", "-c", STOCK_SERVER],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run_without_project(script: str, *argv: object, folder: Path) -> str:
    """Run a script in a process that cannot import the project; return the last line of its output."""
    if sys.platform == "win32":
        pytest.skip("Windows does not fork processes")
    server = stock_server()
    assert server.stdin and server.stdout
    output = folder / "output.txt"
    output.unlink(missing_ok=True)
    job = [script, [str(argument) for argument in argv], str(folder), str(output)]
    server.stdin.write(json.dumps(job) + "\n")
    server.stdin.flush()
    status = server.stdout.readline()
    printed = output.read_text()
    assert status == "0\n", printed[-3000:]
    return printed.splitlines()[-1]


def run_stock_process(
    folder: Path, image: Path, model: Llava, scratch: Path, adapter: Path | None = None
) -> dict:
    """Return what a process without our code computes.

    Args:
        folder: The exported folder.
        image: An image file.
        model: The checkpoint. The logits are computed from its pixel values, the caption from those
            of the stock processor.
        scratch: Folder for temporary files.
        adapter: Folder of a PEFT adapter.

    Returns:
        "logits" of the first token, the "caption", and the names of "adapted" weights.
    """
    transform = model.vision_tower.transform
    pixels = transform.normalize(transform(decode_image(image.read_bytes()))[None])
    torch.save(pixels, scratch / "pixels.pt")
    argv = [folder, adapter or "", model.instruction, image, scratch / "pixels.pt"]
    return json.loads(run_without_project(STOCK_PROCESS, *argv, folder=scratch))


def assert_same_as_checkpoint(result: dict, model: Llava, image: Path) -> None:
    """Assert that `run_stock_process` returns the logits and the caption of the checkpoint."""
    expected = first_logits(model, image)
    logits = torch.tensor(result["logits"])[: len(expected)]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    caption = result["caption"].replace("</s>", "").strip()
    assert caption == model.caption(image, max_new_tokens=6)


@pytest.mark.slow
@in_stock_process
@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize(("tower", "language_model"), PAIRS)
def test_export_stock_gives_equal_results_in_another_process(
    train_pair: TrainPair,
    data_folder: Path,
    tmp_path: Path,
    tower: str,
    language_model: str,
    projector: str,
) -> None:
    checkpoint = train_pair(tower, language_model, mm_projector_type=projector)
    image = data_folder / "images" / "0.jpg"
    comparison = export_stock(checkpoint, tmp_path / "stock", images=[image])
    assert comparison.max_logit_difference < 1e-5
    model = Llava.from_pretrained(checkpoint)
    result = run_stock_process(tmp_path / "stock", image, model, tmp_path)
    assert_same_as_checkpoint(result, model, image)


@pytest.mark.slow
@pytest.mark.parametrize("template", ["plain", "bare"])
def test_export_stock_renders_our_own_templates(
    models_folder: Path, data_folder: Path, tmp_path: Path, template: str
) -> None:
    records = json.loads((data_folder / "train.json").read_text())
    for record in records:  # half of LLaVA's own records have the image at the end
        record["instruction"] = "Say what is there.\n<image>"
    (tmp_path / "train.json").write_text(json.dumps(records))
    checkpoint = train_checkpoint(
        data_folder,
        tmp_path / "out",
        model_name_or_path=models_folder / "llama",
        vision_tower=models_folder / "clip",
        train_data_path=tmp_path / "train.json",
        template=template,
    )
    export_stock(checkpoint, tmp_path / "stock")  # compares the prompts


@pytest.mark.slow
@in_stock_process
@pytest.mark.parametrize("names", ["complete", "endings"])
def test_export_stock_writes_a_peft_adapter_with_equal_results(
    train_pair: TrainPair, data_folder: Path, tmp_path: Path, names: str
) -> None:
    checkpoint = train_pair("clip", "mistral", mm_projector_type="linear")
    if names == "endings":
        checkpoint = Path(shutil.copytree(checkpoint, tmp_path / "changed"))
        # PEFT writes 20 or more module names as endings. The tower's layers have the same ones.
        path = checkpoint / "adapter" / "adapter_config.json"
        settings = json.loads(path.read_text())
        endings = {name.rpartition(".")[2] for name in settings["target_modules"]}
        settings["target_modules"] = sorted(endings)
        path.write_text(json.dumps(settings))
    image = data_folder / "images" / "1.jpg"
    folder = tmp_path / "peft"
    export_stock(checkpoint, folder, adapter=True)
    model = Llava.from_pretrained(checkpoint)
    result = run_stock_process(folder / "base", image, model, tmp_path, folder / "adapter")
    assert_same_as_checkpoint(result, model, image)
    assert result["adapted"]
    assert all("language_model" in name for name in result["adapted"])


# ---- refusals ----


@pytest.mark.medium
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tower": "convnext"}, "convolutional vision towers.*--vision_tower"),
        ({"mm_token_pool": 2}, "--mm_token_pool 0"),
        ({"mm_projector_type": "mlp3x_gelu"}, "this one has 3.*--mm_projector_type"),
        ({"language_model": "gemma2"}, "logits .*differ by .*language model"),
        ({"language_model": "phi"}, "bias.*--model_name_or_path"),
        ({"language_model": "opt"}, "opt language model.*--model_name_or_path"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_export_stock_refuses_what_stock_llava_does_not_support(
    models_folder: Path, tmp_path: Path, options: dict, message: str
) -> None:
    checkpoint = save_llava(models_folder, tmp_path / "out", **options)
    with pytest.raises(ValueError, match=message):
        export_stock(checkpoint, tmp_path / "stock")
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing may be left behind"


@pytest.mark.medium
def test_export_stock_removes_an_export_with_different_results(
    models_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save_llava(models_folder, tmp_path / "out", "llama")
    to_stock_projector = stock.to_stock_projector
    compute_reference = stock.compute_reference

    def wrong_projector(*args):
        projector = to_stock_projector(*args)
        projector.linear_1.weight.data[0, 0] += 1
        return projector

    def wrong_reference(*args):
        return dataclasses.replace(compute_reference(*args), logits=torch.zeros(1))

    monkeypatch.setattr(stock, "to_stock_projector", wrong_projector)
    monkeypatch.setattr(stock, "compute_reference", wrong_reference)
    with pytest.raises(ValueError, match="logits .*differ"):
        export_stock(checkpoint, tmp_path / "stock", images=[np.zeros((9, 9, 3), np.uint8)])
    assert not (tmp_path / "stock").exists()


# ---- the written files ----


def names_in_vllm() -> re.Pattern[str]:
    """Return a pattern that matches the names of the weights that vLLM loads.

    vLLM has modules of its own (vllm/model_executor/models/llava.py and clip.py), and finds their
    weights by these names.
    """
    parameter = r"(weight|bias)"
    attention = r"self_attn\.(q_proj|k_proj|v_proj|out_proj)"
    block = rf"encoder\.layers\.\d+\.(layer_norm[12]|mlp\.fc[12]|{attention})\.{parameter}"
    position = r"(patch|position)_embedding\.(weight|bias)"
    embeddings = rf"embeddings\.(class_embedding|{position})"
    norms = rf"(pre_layrnorm|post_layernorm)\.{parameter}"
    tower = rf"vision_tower\.vision_model\.({block}|{embeddings}|{norms}|head\..+)"
    projector = rf"multi_modal_projector\.linear_[12]\.{parameter}"
    modules = r"self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj|(input|post_attention)_layernorm"
    layer = rf"layers\.\d+\.({modules})\.{parameter}"
    text = rf"language_model\.(model\.({layer}|embed_tokens\.weight|norm\.weight)|lm_head\.weight)"
    return re.compile(f"{tower}|{projector}|{text}")


@pytest.mark.medium
@pytest.mark.parametrize(("tower", "language_model"), [("clip", "llama"), ("siglip", "qwen2")])
def test_export_stock_writes_what_vllm_loads(
    models_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tower: str,
    language_model: str,
) -> None:
    checkpoint = save_llava(
        models_folder, tmp_path / "out", language_model, tower, mm_projector_type="mlp2x_gelu"
    )
    folder = tmp_path / "stock"
    monkeypatch.setattr(stock, "SHARD_SIZE", "60KB")  # several files
    export_stock(checkpoint, folder, dtype="float16")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) >= 2
    known_names = names_in_vllm()
    assert [name for name in index["weight_map"] if not known_names.fullmatch(name)] == []

    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["text_config"]["architectures"] == [f"{language_model.title()}ForCausalLM"]
    assert config["vision_config"]["model_type"] == f"{tower}_vision_model"
    assert config["projector_hidden_act"] == "gelu"
    assert config["multimodal_projector_bias"] is True
    assert config["image_token_index"] < config["text_config"]["vocab_size"]
    assert config["vision_feature_layer"] == -2
    strategy = "default" if tower == "clip" else "full"
    assert config["vision_feature_select_strategy"] == strategy
    assert (folder / "preprocessor_config.json").is_file()


@pytest.mark.medium
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_export_stock_writes_a_processor_that_makes_images_square(
    models_folder: Path, tmp_path: Path, tower: str
) -> None:
    checkpoint = save_llava(
        models_folder, tmp_path / "out", "llama", tower, image_aspect_ratio="pad"
    )
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((41, 77), (90, 33))]
    export_stock(checkpoint, tmp_path / "stock", images=images)  # compares the pixels
    config = json.loads((tmp_path / "stock" / "preprocessor_config.json").read_text())
    assert config["image_processor_type"] == "LlavaImageProcessor"
    assert config["do_pad"] is True

    # Our borders have the same position as those of the stock processor, and the mean color.
    processor = AutoProcessor.from_pretrained(tmp_path / "stock", backend="pil")
    white = Image.new("RGB", (32, 16), "white")
    pixels = processor.image_processor(white, return_tensors="pt")["pixel_values"][0]
    model = Llava.from_pretrained(checkpoint)
    expected = model.vision_tower.transform(np.asarray(white))
    assert expected[:, 0, 0].tolist() == [122, 116, 104]
    torch.testing.assert_close(pixels, model.vision_tower.transform.normalize(expected))


# ---- merge ----


@pytest.mark.medium
def test_merge_keeps_the_logits_after_the_base_models_have_moved(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    for name in ("qwen2", "clip"):
        shutil.copytree(models_folder / name, tmp_path / "a" / name)
    checkpoint = train_checkpoint(
        data_folder,
        tmp_path / "out",
        model_name_or_path=tmp_path / "a" / "qwen2",
        vision_tower=tmp_path / "a" / "clip",
    )
    (tmp_path / "a").rename(tmp_path / "b")
    language_model = str(tmp_path / "b" / "qwen2")
    vision_tower = str(tmp_path / "b" / "clip")
    merged = tmp_path / "merged"
    argv = [str(checkpoint), "--output", str(merged)]
    argv += ["--model-base", language_model, "--vision-tower", vision_tower]
    assert merge_main(argv) == 0
    assert not (merged / "adapter").exists()
    image = data_folder / "images" / "2.jpg"
    before = Llava.from_pretrained(checkpoint, model_base=language_model, vision_tower=vision_tower)
    after = Llava.from_pretrained(merged)
    torch.testing.assert_close(
        first_logits(before, image), first_logits(after, image), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="no adapter to merge"):
        merge_main([str(merged), "--output", str(tmp_path / "again")])


@pytest.mark.medium
@pytest.mark.parametrize("tune_vision_tower", ["full", "lora"])
def test_trained_vision_tower_is_exported_and_merged(
    models_folder: Path, data_folder: Path, tmp_path: Path, tune_vision_tower: str
) -> None:
    checkpoint = train_checkpoint(
        data_folder,
        tmp_path / "out",
        model_name_or_path=models_folder / "llama",
        vision_tower=models_folder / "clip",
        tune_vision_tower=tune_vision_tower,
    )
    for adapter in (False, True):
        comparison = export_stock(checkpoint, tmp_path / str(adapter), adapter=adapter)
        assert comparison.max_logit_difference < 1e-4
    merged = tmp_path / "merged"
    merge_main([str(checkpoint), "--output", str(merged)])
    assert {"vision_tower", "language_model"} < {path.name for path in merged.iterdir()}
    image = data_folder / "images" / "2.jpg"
    before = first_logits(Llava.from_pretrained(checkpoint), image)
    after = first_logits(Llava.from_pretrained(merged), image)
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)


# ---- images and values of the comparison ----


@pytest.mark.parametrize("first", [{"image": 7}, {"image": "gone.jpg"}, {"image": "notes.txt"}])
def test_bad_training_records_do_not_prevent_an_export(
    data_folder: Path, tmp_path: Path, first: dict
) -> None:
    """Training leaves them out, too."""
    (tmp_path / "notes.txt").write_text("no image")
    images = sorted((data_folder / "images").iterdir())[:2]
    for image in images:
        shutil.copy(image, tmp_path)
    rows = [
        {**row, "instruction": "x", "response": "y"} for row in (first, *map(_image_row, images))
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    chosen, kind = choose_images({"train_data_path": str(tmp_path / "train.json")}, [])
    assert kind == "training images"
    for pixels, image in zip(chosen, images, strict=True):
        np.testing.assert_array_equal(pixels, decode_image(image.read_bytes()))


def _image_row(image: Path) -> dict:
    return {"image": image.name}


def test_images_of_noise_replace_training_data_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("damaged")
    _, kind = choose_images({"train_data_path": str(tmp_path / "train.json")}, [])
    assert kind == "images of noise"


@pytest.mark.medium
@pytest.mark.parametrize("export_format", ["hf", "gguf"])
def test_export_refuses_weights_that_a_data_type_cannot_represent(
    models_folder: Path, tmp_path: Path, export_format: str
) -> None:
    checkpoint = save_llava(models_folder, tmp_path / "out", "llama", mm_projector_type="linear")
    path = checkpoint / "projector.safetensors"
    weights = {name: weight * 1e6 for name, weight in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    argv = [str(checkpoint), "--output", str(tmp_path / "new"), "--format", export_format]
    with pytest.raises(ValueError, match="not finite in float16.*--dtype bfloat16"):
        export_main([*argv, "--dtype", "float16"])
    assert not (tmp_path / "new").exists()


# ---- templates with a date ----

DATED_TEMPLATE = (
    "{{- bos_token }}{%- if strftime_now is defined %}{{- strftime_now('%d %b %Y') }}"
    "{%- endif %}{{- '\n' }}" + MISTRAL_TEMPLATE.removeprefix("{{ bos_token }}")
)


@pytest.mark.medium
def test_exported_templates_write_the_date_of_training(models_folder: Path, tmp_path: Path) -> None:
    """Otherwise, the prompt would change every day, and never be that of training."""
    for kind in ("llama", "clip"):
        shutil.copytree(models_folder / kind, tmp_path / "models" / kind)
    make_tokenizer(DATED_TEMPLATE).save_pretrained(tmp_path / "models" / "llama")
    checkpoint = save_llava(tmp_path / "models", tmp_path / "out", "llama")
    export_stock(checkpoint, tmp_path / "stock")
    processor = AutoProcessor.from_pretrained(tmp_path / "stock", backend="pil")
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert text == "<s>26 Jul 2024\n[INST] <image>\nWhat? [/INST]"
    assert '"""26 Jul 2024\n[INST] ' in modelfile(Llava.from_pretrained(checkpoint))


# ---- commands ----


@pytest.mark.medium
def test_export_command_writes_a_model_card_without_local_paths(
    train_pair: TrainPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = train_pair("clip", "llama", hub_token="hf_secret")
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"a": {"mean": {"CIDEr-D": [0.5, 0.4, 0.6]}}}))
    output = tmp_path / "stock"
    argv = [str(checkpoint), "--output", str(output), "--scores", str(scores)]
    assert export_main(argv) == 0
    card = (output / "README.md").read_text()
    assert "| CIDEr-D | 0.5000 | 0.4000 to 0.6000 |" in card
    assert "Generate a caption of this image:" in card
    assert "LoRA on the language model. 5 steps" in card
    assert "# LLaVA: llama with clip" in card
    assert (output / "training.png").is_file()
    local = str(tmp_path.parent).encode()
    for path in output.iterdir():
        assert local not in path.read_bytes(), f"{path.name} contains a folder of this machine"
    capsys.readouterr()

    assert push_main([str(output), "me/model", "--dry-run"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match=re.escape(str(output))):
        export_main(argv)


@pytest.mark.medium
def test_export_command_reads_the_scores_of_a_benchmark(
    models_folder: Path, tmp_path: Path
) -> None:
    checkpoint = save_llava(models_folder, tmp_path / "out", "llama")
    scores = tmp_path / "scores.json"
    runs = {"greedy": {"mean": {"CIDEr-D": [0.5, None, None]}}, "beam": {"mean": {}}}
    scores.write_text(json.dumps({"settings": {"benchmark": "coco"}, "runs": runs}))
    output = tmp_path / "stock"
    assert export_main([str(checkpoint), "--output", str(output), "--scores", str(scores)]) == 0
    assert "| CIDEr-D | 0.5000 |  |" in (output / "README.md").read_text()


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "3", '{"a": []}', '{"a": {"mean": {"x": "high"}}}', '{"a": {"mean": 1}}'],
)
def test_export_command_refuses_other_scores_before_the_conversion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    scores = tmp_path / "scores.json"
    scores.write_text(text)
    argv = ["export", "gone", "--output", str(tmp_path / "stock"), "--scores", str(scores)]
    assert cli.main(argv) == 2
    assert f"error: --scores {scores}: " in capsys.readouterr().err


def test_model_card_contains_no_address_of_a_server(models_folder: Path, tmp_path: Path) -> None:
    checkpoint = save_llava(models_folder, tmp_path / "out", "llama")
    config = json.loads((checkpoint / "llava.json").read_text())
    config["training"] = {"reward": "qa", "reward_endpoint": "http://me:secret@10.0.0.1:8000/v1"}
    (checkpoint / "llava.json").write_text(json.dumps(config))
    write_model_card(checkpoint, tmp_path, "hf")
    card = (tmp_path / "README.md").read_text()
    assert "- reward: `qa`" in card
    assert "10.0.0.1" not in card


def test_model_card_describes_a_checkpoint_with_required_entries_only(tmp_path: Path) -> None:
    """Checkpoints load without the others, which have defaults."""
    parts = {"language_model": "me/llama", "vision_tower": "me/clip"}
    config = {"format_version": 2, "architecture": parts, "trained": "adapter"}
    (tmp_path / "llava.json").write_text(json.dumps(config))
    write_model_card(tmp_path, tmp_path, "hf")
    card = (tmp_path / "README.md").read_text()
    assert "the projector linear" in card
    assert "`Generate a caption of this image:`" in card
    assert "versions" not in card


@pytest.mark.medium
def test_push_command_warns_of_local_paths_in_a_checkpoint(
    train_pair: TrainPair,
    models_folder: Path,
    data_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = train_pair("clip", "llama", hub_token="hf_secret")
    capsys.readouterr()
    assert push_main([str(checkpoint), "me/model", "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert str(models_folder / "llama") in captured.err
    assert str(data_folder / "train.json") in captured.err
    assert "llava.json" in captured.out
    assert "hf_secret" not in (checkpoint / "llava.json").read_text()


# ---- the demo's recipes with a CLIP tower ----

CAPTION_PROCESS = """
import json, sys
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, instruction, *images = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(folder, backend="pil")
captions = []
for image in images:
    content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": instruction}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    ids = generated[0, inputs["input_ids"].shape[1] :]
    captions.append(processor.decode(ids, skip_special_tokens=True).strip())
print(json.dumps(captions))
"""


def write_random_images(folder: Path, count: int) -> list[Path]:
    """Write images of the tower's size. They are not resized, so rounding cannot cause a difference."""
    random = np.random.default_rng(0)
    paths = []
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        path = folder / f"{number}.png"
        coarse.resize((32, 32)).save(path)
        paths.append(path)
    return paths


@pytest.mark.slow
@in_stock_process
def test_demo_recipes_end_in_an_export_with_equal_captions(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    """Run both stages of the demo in bfloat16, with packing and tiny models, and compare 50 captions."""
    options = {
        "model_name_or_path": models_folder / "llama",
        "vision_tower": models_folder / "clip",
        "train_data_path": data_folder / "train.json",
        "train_image_folder": data_folder / "images",
        "eval_data_path": data_folder / "val.json",
        "val_image_folder": data_folder / "images",
        "mm_token_pool": 0,
        "mm_vision_select_layer": -2,
        "compile_layers": False,
        "dataloader_drop_last": False,  # the packs do not fill a batch of the recipe `demo`
        "disable_tqdm": True,
        "max_steps": 4,
        "cache_vision_features": "memory",
        "pack_length": 96,
    }
    common: list[str] = []
    for name, value in options.items():
        common += [f"--{name}", str(value)]
    projector = str(tmp_path / "projector")
    checkpoint = str(tmp_path / "model")
    output = tmp_path / "stock"
    first = ["train", "--config", "demo_projector", "--output_dir", projector]
    second = ["train", "--config", "demo", "--pretrain_mm_mlp_adapter", projector]
    second += ["--output_dir", checkpoint]
    export = ["export", checkpoint, "--format", "hf", "--dtype", "float32"]
    for argv in ([*first, *common], [*second, *common], [*export, "--output", str(output)]):
        assert cli.main(argv) == 0

    images = write_random_images(tmp_path, 50)
    model = Llava.from_pretrained(checkpoint, dtype="float32")
    argv = [output, model.instruction, *images]
    captions = json.loads(run_without_project(CAPTION_PROCESS, *argv, folder=tmp_path))
    assert captions == model.caption(images, max_new_tokens=8)
    assert len(set(captions)) > 10, "the captions must depend on the images"


# ---- memory ----

MEMORY_PROCESS = """
import sys, threading, time
from pathlib import Path
import numpy as np
from llava_simplified.export import stock_check
from llava_simplified.export.stock import export_stock
small, large, output = sys.argv[1:]
# One image and a short caption: float16 is slow on a CPU, and more tokens hardly take more memory.
images = [np.zeros((32, 32, 3), np.uint8)]
stock_check.CAPTION_LENGTH = 2

def allocated():  # memory that cannot be read from a file again
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def watch():
    while not done:
        peaks.append(allocated())
        time.sleep(0.002)

export_stock(small, output + "-small", images=images, dtype="float16")  # imports, and what stays allocated anyway
before, peaks, done = allocated(), [], False
thread = threading.Thread(target=watch, daemon=True)  # daemon: it ends with an export that fails
thread.start()
export_stock(large, output, images=images, dtype="float16")
done = True
thread.join()
written = sum(path.stat().st_size for path in Path(output).glob("*.safetensors"))
print((max(peaks) - before) / written)
"""


def save_untrained_checkpoint(folder: Path, language_model: Path, vision_tower: Path) -> None:
    """Write a checkpoint with a new adapter."""
    config = LlavaConfig(str(language_model), str(vision_tower), dtype="bfloat16")
    model = build_model(config)
    parts = TrainedParts(language_model="adapter")
    freeze(model, parts)
    add_lora(model, 4, 8, 0.0, "none")
    save_checkpoint(model, folder, config, parts)


def save_large_language_model(folder: Path) -> None:
    """Write a model of 100 MB, a third of which are embeddings."""
    tokenizer = make_tokenizer()
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    for number in range(len(tokenizer), 25_000):
        spec["model"]["vocab"][f"{number}th"] = number
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token="</s>"
    )
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=8,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(),
    reason="reads memory use from /proc, which only Linux has",
)
def test_export_stock_keeps_only_one_copy_in_memory(models_folder: Path, tmp_path: Path) -> None:
    """The peak memory of an export, which includes reading it back, is at most 1.2 times the written weights."""
    save_large_language_model(tmp_path / "large")
    clip = models_folder / "clip"
    save_untrained_checkpoint(tmp_path / "a", models_folder / "llama", clip)
    save_untrained_checkpoint(tmp_path / "b", tmp_path / "large", clip)
    script = tmp_path / "measure.py"
    script.write_text(MEMORY_PROCESS)
    argv = [tmp_path / "a", tmp_path / "b", tmp_path / "stock"]
    process = run_command([script, *argv], tmp_path)
    assert float(process.stdout.splitlines()[-1]) < 1.2

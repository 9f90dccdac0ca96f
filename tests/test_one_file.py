"""`llava_in_one_file.py` computes what the package computes: token ids, losses, gradients, weights, captions.

The reference is a run of the package's own trainer. It starts from a checkpoint that the file has written, and
the file then trains on the same batches.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from one_file import PATH, one_file
from PIL import Image
from test_prompt import byte_level, sentencepiece_like
from torch.optim.optimizer import register_optimizer_step_pre_hook
from training.training_runs import training_options

from llava_simplified import Llava
from llava_simplified.arguments import parse_arguments
from llava_simplified.data.images import load_pixels
from llava_simplified.data.transforms import ImageTransform
from llava_simplified.demo.assets import DEFAULT_CACHE, LAYOUT
from llava_simplified.model.projector import init_projector_scale
from llava_simplified.model.vision import VisionTower
from llava_simplified.prompt import Message, Prompt
from llava_simplified.training.build_trainer import build_trainer

MAX_LINES = 450
STEPS = 4  # the first one has the learning rate zero
BATCH_SIZE = 3
WARMUP = 1
TOLERANCE = 1e-6
DEMO = DEFAULT_CACHE / LAYOUT


class Step(NamedTuple):
    """The inputs and results of one training step."""

    input_ids: torch.Tensor
    positions: list[int]  # positions in the flattened batch at which a token is predicted
    targets: list[int]
    loss: float
    gradients: dict[str, torch.Tensor]


class Case(NamedTuple):
    """Two pretrained models and a data set."""

    settings: dict[str, Any]
    data: Path
    images: Path
    # AdamW divides by the size of the gradient. Where that is nearly zero, differences in the last digit
    # become differences of the size of the learning rate.
    rate: float = 5e-4
    # Maximum number of weights, of millions, that may differ for this reason.
    max_outliers: int = 0
    # Maximum norm of the difference of two gradients, relative to their norm. Rounding errors grow with the depth of
    # the model.
    gradient_tolerance: float = 1e-5


def make_case(
    models: Path, language_model: str, vision_tower: str, data: Path, images: Path, **choices: Any
) -> Case:
    settings = {
        "language_model": str(models / language_model),
        "vision_tower": str(models / vision_tower),
        "mm_projector_type": "linear",
        "mm_vision_select_layer": -2,
        "mm_token_pool": 0,
        "template": "bare",
        "instruction": json.loads(data.read_text())[0]["instruction"],
        "dtype": "float32",
        **choices,
    }
    return Case(settings, data, images)


def make_model(case: Case) -> Any:
    """Return a model of the file with a new projector and a new adapter."""
    torch.manual_seed(0)
    model = one_file.Llava(case.settings)
    names = [record["image"] for record in one_file.read_records(case.data)[:12]]
    features = one_file.look_up_features(model, names, case.images, {})
    table = model.language_model.get_input_embeddings().weight
    model.projector = one_file.new_projector(features, table)
    one_file.add_lora(model, rank=4, alpha=8)
    return model


def short_name(name: str) -> str:
    """Return the name of a parameter without the wrappers of PEFT."""
    return name.replace("base_model.model.", "").replace(".default", "")


def trained_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    weights = {}
    for name, weight in model.state_dict().items():
        if "projector" in name or "lora_" in name:
            weights[short_name(name)] = weight.clone()
    return weights


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        short_name(name): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def train_file(model: Any, case: Case, order: list[list[int]]) -> list[Step]:
    """Train the file's model on batches of records, given by their numbers."""
    records = one_file.read_records(case.data)
    batches = [[records[number] for number in numbers] for numbers in order]
    inputs: list[tuple[torch.Tensor, ...]] = []
    gradients: list[dict[str, torch.Tensor]] = []
    forward_hook = model.register_forward_pre_hook(lambda _, args: inputs.append(args))
    step_hook = register_optimizer_step_pre_hook(lambda *_: gradients.append(gradients_of(model)))
    losses = list(one_file.train(model, batches, case.images, {}, STEPS, WARMUP, case.rate))
    forward_hook.remove()
    step_hook.remove()

    steps = []
    for (input_ids, labels, _, _), loss, gradient in zip(inputs, losses, gradients):
        # The target of a position is the label of the next one.
        targets = torch.full_like(labels, one_file.IGNORE)
        targets[:, :-1] = labels[:, 1:]
        positions = (targets.flatten() != one_file.IGNORE).nonzero().flatten()
        trained = targets.flatten()[positions]
        steps.append(Step(input_ids, positions.tolist(), trained.tolist(), loss, gradient))
    return steps


def train_package(
    case: Case, start: Path, output: Path, **changes: Any
) -> tuple[Llava, list[Step], list[list[int]]]:
    """Train with the package's trainer from a checkpoint.

    Returns:
        The trained model, the steps, and the numbers of the records of each batch.
    """
    values: dict[str, Any] = {
        "model_name_or_path": case.settings["language_model"],
        "vision_tower": case.settings["vision_tower"],
        "mm_vision_select_layer": case.settings["mm_vision_select_layer"],
        "mm_token_pool": case.settings["mm_token_pool"],
        "train_data_path": case.data,
        "train_image_folder": case.images,
        "template": "bare",
        "init_from": start,
        "lora_alpha": 8,
        "learning_rate": case.rate,
        "warmup_steps": WARMUP,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH_SIZE,
        "bf16": False,
        "cache_vision_features": "off",
        "attn_implementation": "eager",
        "optim": "adamw_torch",
        **changes,
    }
    argv = training_options(output.parent, output.parent, output, **values)
    trainer, _ = build_trainer(*parse_arguments(argv))
    model = trainer.unwrapped_model
    inputs: list[dict[str, torch.Tensor]] = []
    losses: list[float] = []
    gradients: list[dict[str, torch.Tensor]] = []
    order: list[list[int]] = []

    def keep_step(*_: Any) -> None:
        gradients.append(gradients_of(model))
        # The id of a record is "train.json row 7", counted from 0.
        order.append([int(name.rpartition(" ")[2]) for name in trainer._step_sample_ids])

    def keep_forward(_: Any, __: Any, arguments: dict[str, torch.Tensor], result: Any) -> None:
        inputs.append(arguments)
        losses.append(result.loss.item() / len(arguments["labels"]))

    forward_hook = model.register_forward_hook(keep_forward, with_kwargs=True)
    step_hook = register_optimizer_step_pre_hook(keep_step)
    with pytest.MonkeyPatch.context() as patch:
        # The package runs convolutions in a faster memory format, in which they round differently.
        patch.setattr(VisionTower, "is_convolutional", False)
        trainer.train()
    forward_hook.remove()
    step_hook.remove()
    trainer.save_final()
    steps = [
        Step(
            arguments["input_ids"],
            arguments["logit_positions"].tolist(),
            arguments["labels"].tolist(),
            loss,
            gradient,
        )
        for arguments, loss, gradient in zip(inputs, losses, gradients)
    ]
    return model, steps, order


def assert_same_names(expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor]) -> None:
    assert expected.keys() == actual.keys()
    assert any("projector" in name for name in expected)
    assert any("lora_B" in name for name in expected)


def assert_close(expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor]) -> None:
    assert_same_names(expected, actual)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, atol=TOLERANCE, rtol=0, msg=lambda text, name=name: name + text
        )


def assert_close_gradients(
    expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor], tolerance: float
) -> None:
    """Compare each gradient relative to its norm, because gradients differ in size by orders of magnitude."""
    assert_same_names(expected, actual)
    for name, gradient in expected.items():
        difference = float((actual[name] - gradient).norm())
        assert difference <= tolerance * float(gradient.norm()), name


def count_outliers(expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor]) -> int:
    """Return how many numbers differ by more than the tolerance."""
    assert expected.keys() == actual.keys()
    differences = [(actual[name] - tensor).abs() for name, tensor in expected.items()]
    return sum(int((difference > TOLERANCE).sum()) for difference in differences)


def assert_equal_training(case: Case, folder: Path, **changes: Any) -> tuple[Any, Llava]:
    """Train the file and the package from the same weights on the same batches, and compare everything.

    Returns:
        The trained model of the file, and the trained model of the package.
    """
    model = make_model(case)
    one_file.save(model, folder / "start")
    package_model, expected, order = train_package(
        case, folder / "start", folder / "package", **changes
    )
    before = trained_weights(model)
    steps = train_file(model, case, order)
    assert len(steps) == len(expected) == STEPS
    for step, expected_step in zip(steps, expected):
        assert torch.equal(step.input_ids, expected_step.input_ids)
        assert step.positions == expected_step.positions
        assert step.targets == expected_step.targets
        assert step.loss == pytest.approx(expected_step.loss, rel=10 * TOLERANCE)
        assert_close_gradients(expected_step.gradients, step.gradients, case.gradient_tolerance)
    after = trained_weights(model)
    if case.max_outliers:
        assert count_outliers(trained_weights(package_model), after) <= case.max_outliers
    else:
        assert_close(trained_weights(package_model), after)
    # Training has moved the weights much further than the tolerance.
    moved = [float((after[name] - weight).abs().max()) for name, weight in before.items()]
    assert min(moved) > max(case.rate / 2, 10 * TOLERANCE)
    return model, package_model


def captions_of_file(model: Any, case: Case, count: int) -> list[str]:
    records = one_file.read_records(case.data)[:count]
    paths = [case.images / record["image"] for record in records]
    instruction = case.settings["instruction"]
    return [one_file.caption(model, path, instruction, max_new_tokens=12) for path in paths]


def captions_of_package(model: Llava, case: Case, count: int) -> list[str]:
    records = one_file.read_records(case.data)[:count]
    paths = [case.images / record["image"] for record in records]
    instruction = case.settings["instruction"]
    return model.caption(paths, instruction, temperature=0, max_new_tokens=12)


# ---- the file equals the package ----


@pytest.mark.medium
@pytest.mark.parametrize(
    ("vision_tower", "language_model", "choices"),
    [
        ("clip", "mistral", {}),
        ("clip", "llama", {"mm_token_pool": 3}),
        ("siglip", "qwen2", {}),
    ],
    ids=["clip-mistral", "clip-llama-pooled", "siglip-qwen2"],
)
def test_training_and_captions_equal_those_of_the_package(
    vision_tower: str,
    language_model: str,
    choices: dict[str, Any],
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
) -> None:
    data, images = data_folder / "train.json", data_folder / "images"
    case = make_case(models_folder, language_model, vision_tower, data, images, **choices)
    model, package_model = assert_equal_training(case, tmp_path)

    expected = captions_of_package(package_model, case, 4)
    assert captions_of_file(model, case, 4) == expected
    assert len(set(expected)) > 1  # captions depend on the image
    # Each side loads the checkpoint of the other.
    one_file.save(model, tmp_path / "file")
    loaded = Llava.from_pretrained(tmp_path / "file", device="cpu")
    assert captions_of_package(loaded, case, 4) == expected
    assert captions_of_file(one_file.load(tmp_path / "package"), case, 4) == expected


@pytest.mark.slow
def test_training_and_captions_equal_those_of_the_package_with_the_models_of_the_demo(
    tmp_path: Path,
) -> None:
    if not DEMO.is_dir():
        pytest.skip("the demo's models are not on this machine; `make demo` downloads them")
    case = make_case(
        DEMO,
        "language_model",
        "vision_tower",
        DEMO / "drawings" / "train.json",
        DEMO / "drawings" / "images",
        mm_vision_select_layer=-1,
        mm_token_pool=3,
    )
    case = case._replace(rate=2e-5, max_outliers=100, gradient_tolerance=1e-3)
    model, package_model = assert_equal_training(case, tmp_path)
    # Loading each other's checkpoints is tested with tiny models only.
    expected = captions_of_package(package_model, case, 2)
    assert captions_of_file(model, case, 2) == expected


@pytest.mark.parametrize("pool", [0, 1])
def test_features_of_a_convolutional_tower_equal_those_of_the_package(
    pool: int, models_folder: Path, data_folder: Path
) -> None:
    data, images = data_folder / "train.json", data_folder / "images"
    layer = -1  # the package's name for the last map
    choices = {"mm_vision_select_layer": layer, "mm_token_pool": pool}
    case = make_case(models_folder, "llama", "efficientnet", data, images, **choices)
    model = one_file.Llava(case.settings)
    tower = VisionTower.from_pretrained(
        case.settings["vision_tower"], select_layer=layer, token_pool=pool
    )
    pixels = tower.transform(load_pixels(images / "0.jpg"))[None]
    normalized = one_file.load_image(images / "0.jpg", model.processor)[None]
    torch.testing.assert_close(normalized, tower.transform.normalize(pixels))
    with torch.no_grad():
        expected = tower.eval()(pixels)
    torch.testing.assert_close(model.encode_images(normalized), expected)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P"])
def test_images_equal_those_of_the_package(
    mode: str, models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    """The images have various modes, are not square, and must be rotated as their EXIF orientation says."""
    noise = torch.randint(256, (40, 52, 4), generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.to(torch.uint8).numpy()).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation of a photo taken in upright format
    image.save(tmp_path / "image.png", exif=exif)
    processor = one_file.AutoImageProcessor.from_pretrained(models_folder / "clip", backend="pil")
    transform = ImageTransform.from_pretrained(models_folder / "clip")
    expected = transform.normalize(transform(load_pixels(tmp_path / "image.png")))
    assert torch.equal(one_file.load_image(tmp_path / "image.png", processor), expected)


def test_new_projector_equals_that_of_the_package() -> None:
    features = torch.randn(5, 4, 6).relu() * 3
    features[..., 2] = 1e-4  # a channel that hardly varies
    embeddings = torch.randn(11, 8) * 0.02
    torch.manual_seed(1)
    projector = one_file.new_projector(features, embeddings)
    torch.manual_seed(1)
    expected = torch.nn.Linear(6, 8)
    init_projector_scale(expected, features, embeddings)
    # The package clamps with a float64 threshold, the file with a float32 one: the last bit can differ.
    torch.testing.assert_close(projector.weight, expected.weight, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(projector.bias, expected.bias, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("style", ["byte level", "no BOS", "first", "always", "legacy", "none"])
def test_token_ids_equal_those_of_the_package(style: str) -> None:
    """The tokenizers add spaces in different places, and one of them has no BOS token."""
    if style in ("byte level", "no BOS"):
        bos = {} if style == "no BOS" else {"bos_token": "<s>"}
        tokenizer = byte_level(["<s>", "</s>"], eos_token="</s>", **bos)
    else:
        tokenizer = sentencepiece_like([], style)
    for instruction in ("What is this?", ""):
        for answer in ("a red car", "keycap: #", "日本 café"):
            record = {"image": "0.jpg", "instruction": instruction, "response": answer}
            ids, labels = one_file.make_sequence(tokenizer, record, num_image_tokens=1)
            turns = [Message("user", f"<image>\n{instruction}")]
            expected = Prompt(tokenizer, "bare").render(turns, answer)
            assert ids == expected.input_ids
            assert labels == expected.labels


# ---- the file by itself ----


def test_file_is_short_and_imports_only_three_libraries() -> None:
    text = PATH.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).partition(".")[0])
    assert imported - sys.stdlib_module_names == {"torch", "transformers", "PIL"}


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_pages_name_the_number_of_lines(page: str) -> None:
    lines = len(PATH.read_text(encoding="utf-8").splitlines())
    assert f"{lines} lines" in (PATH.parent / page).read_text(encoding="utf-8")


def test_annotated_page_contains_the_whole_file() -> None:
    page = (PATH.parent / "docs" / "one-file.md").read_text(encoding="utf-8")
    shown = "".join(re.findall(r"(?s)```python\n(.*?)```", page))
    expected = PATH.read_text(encoding="utf-8")
    assert shown.split() == expected.split()


def command_line(models_folder: Path, data_folder: Path, output: Path) -> list[str]:
    argv = ["--data", data_folder / "train.json", "--images", data_folder / "images"]
    argv += ["--language_model", models_folder / "llama", "--vision_tower", models_folder / "clip"]
    argv += ["--output", output, "--projector_steps", 2, "--steps", 10, "--batch_size", 4]
    argv += ["--dtype", "float32"]
    return [str(argument) for argument in argv]


@pytest.mark.medium
def test_main_trains_saves_and_captions(
    models_folder: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_file.main(command_line(models_folder, data_folder, tmp_path / "model"))
    printed = capsys.readouterr().out
    assert "LoRA: step 10 of 10, loss" in printed
    assert printed.count("greedy:") == printed.count("sampled:") > 0
    assert printed.count("reference:") == printed.count("greedy:")
    model = one_file.load(tmp_path / "model")
    path = data_folder / "images" / "0.jpg"
    greedy = one_file.caption(model, path, model.settings["instruction"])
    package_model = Llava.from_pretrained(tmp_path / "model", device="cpu")
    expected = package_model.caption(path, max_new_tokens=32)
    assert greedy == expected


@pytest.mark.slow
def test_file_runs_alone(models_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    """The file is copied into an empty folder, and Python finds no other code of the project."""
    shutil.copy(PATH, tmp_path)
    argv = command_line(models_folder, data_folder, tmp_path / "model")
    argv += ["--projector_steps", "1", "--steps", "1"]
    command = [sys.executable, "-I", PATH.name, *argv]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "greedy:" in run.stdout


def test_temperature_sharpens_the_probabilities_of_sampling(
    models_folder: Path, data_folder: Path
) -> None:
    """The first token is drawn once at temperature 1.0 and once at 0.5, where the probabilities are squared."""
    data, images = data_folder / "train.json", data_folder / "images"
    case = make_case(models_folder, "llama", "clip", data, images)
    model = make_model(case)
    drawn = []
    stock = torch.multinomial

    def keep(probabilities: torch.Tensor, count: int) -> torch.Tensor:
        drawn.append(probabilities)
        return stock(probabilities, count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", keep)
        for temperature in (1.0, 0.5):
            one_file.caption(
                model, images / "0.jpg", "What?", temperature=temperature, max_new_tokens=1
            )
    plain, sharp = drawn
    expected = plain**2 / (plain**2).sum()  # softmax(x / 0.5) is softmax(x) squared
    torch.testing.assert_close(sharp, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response": " "}, "empty"),
        ({"response": None}, "response"),
    ],
)
def test_unusable_records_are_refused(
    change: dict[str, Any], message: str, models_folder: Path, tmp_path: Path
) -> None:
    record = {"image": "0.jpg", "instruction": "What is this?", "response": "a cat", **change}
    record = {name: value for name, value in record.items() if value is not None}
    (tmp_path / "records.json").write_text(json.dumps([record]))
    tokenizer = one_file.AutoTokenizer.from_pretrained(models_folder / "llama")
    with pytest.raises(ValueError, match=message):
        for row in one_file.read_records(tmp_path / "records.json"):
            one_file.make_sequence(tokenizer, row, 4)


@pytest.fixture(scope="module")
def saved_checkpoint(
    models_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint that `llava_in_one_file.py` has written."""
    data, images = data_folder / "train.json", data_folder / "images"
    folder = tmp_path_factory.mktemp("one-file") / "checkpoint"
    one_file.save(make_model(make_case(models_folder, "llama", "clip", data, images)), folder)
    return folder


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("llava.json", "template", "chat"),
        ("llava.json", "mm_projector_type", "mlp2x_gelu"),
        ("llava.json", "mm_vision_select_feature", "cls_patch"),
        ("llava.json", "image_aspect_ratio", "pad"),
        ("llava.json", "trained_tower", "full"),
        ("adapter/adapter_config.json", "use_rslora", True),
        ("adapter/adapter_config.json", "alpha_pattern", {"q_proj": 2}),
    ],
)
def test_checkpoints_with_unsupported_settings_are_refused(
    file: str,
    name: str,
    value: Any,
    saved_checkpoint: Path,
    tmp_path: Path,
) -> None:
    """Otherwise they would load without an error, and give other results than in the package."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(saved_checkpoint, folder)
    config = json.loads((folder / file).read_text())
    is_architecture_entry = file == "llava.json" and name != "trained_tower"
    entries = config["architecture"] if is_architecture_entry else config
    entries[name] = value
    (folder / file).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=name):
        one_file.load(folder)


def test_main_refuses_too_few_records(
    models_folder: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = command_line(models_folder, data_folder, tmp_path / "model")
    records = json.loads((data_folder / "train.json").read_text())[:8]
    few = tmp_path / "few.json"
    few.write_text(json.dumps(records))
    with pytest.raises(SystemExit):
        one_file.main([*argv, "--data", str(few)])
    assert str(few) in capsys.readouterr().err


def test_lora_refuses_language_models_without_linear_layers() -> None:
    """Otherwise the adapter would have no weights, and stage 2 would train nothing without an error."""
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8)
    model = torch.nn.Module()
    model.language_model = transformers.GPT2LMHeadModel(config)  # its layers are Conv1D
    with pytest.raises(ValueError, match="Linear"):
        one_file.add_lora(model, rank=2, alpha=4)


def test_processors_with_an_unsupported_filter_are_refused(
    models_folder: Path, data_folder: Path
) -> None:
    processor = one_file.AutoImageProcessor.from_pretrained(models_folder / "clip", backend="pil")
    processor.resample = Image.Resampling.BOX
    with pytest.raises(ValueError, match="bicubic"):
        one_file.load_image(data_folder / "images" / "0.jpg", processor)

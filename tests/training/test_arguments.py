"""LLaVA's own script flags are understood; the command line wins over the YAML file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

from llava_simplified.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    parse_arguments,
)

FINETUNE_SH = """
--mm_vision_select_layer -1 --mm_vision_select_feature patch --mm_use_im_start_end False --mm_use_im_patch_token False
--bf16 True --output_dir OUT --num_train_epochs 1 --per_device_train_batch_size 16 --per_device_eval_batch_size 4
--gradient_accumulation_steps 1 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine
--tf32 True --model_max_length 64 --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True
--lora_enable True --lora_r 128 --lora_alpha 256 --lora_dropout 0.05 --report_to none --run_name mine --logging_steps 1
--evaluation_strategy steps --eval_steps 100 --save_strategy steps --save_steps 200 --save_total_limit 1
"""


def test_every_flag_of_the_original_script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data, training = parse_arguments(
        [*FINETUNE_SH.replace("OUT", str(tmp_path)).split(), "--train_data_path", "x.json"]
    )
    assert model.mm_vision_select_layer == [-1]
    assert (model.lora_r, model.lora_alpha, model.lora_enable) == (128, 256, True)
    assert training.eval_strategy == "steps"
    assert training.get_warmup_steps(1000) == 30
    assert training.model_max_length == 64
    assert training.bf16
    assert training.gradient_checkpointing
    assert data.train_data_path == "x.json"
    assert capsys.readouterr().err.count("--lazy_preprocess has no effect") == 1


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "learning_rate: 1e-3\nlora_r: 7\nmm_vision_select_layer: [-1, -3]\nbf16: false\ntrain_data_path: a.json\n"
    )
    model, data, training = parse_arguments(
        ["--config", str(config), "--lora-r=9", "--output_dir", str(tmp_path)]
    )
    assert training.learning_rate == 1e-3  # YAML reads 1e-3 as a text
    assert model.lora_r == 9
    assert model.mm_vision_select_layer == [-1, -3]
    assert data.train_data_path == "a.json"


def test_the_file_says_off_no_and_mappings_as_the_command_line_does(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "cache_vision_features: off\ntune_vision_tower: off\neval_strategy: no\npacking: yes\ngroup_by_length: true\n"
        "lr_scheduler_kwargs: {min_lr_rate: 0.1}\naccelerator_config: {even_batches: false}\nrun_name: null\n"
    )
    model, data, training = parse_arguments(["--config", str(config), "--group_by_length", "False"])
    assert (model.tune_vision_tower, data.cache_vision_features, training.eval_strategy) == (
        "off",
        "off",
        "no",
    )
    assert data.packing
    assert training.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert training.accelerator_config.even_batches is False  # type: ignore[union-attr]
    assert training.train_sampling_strategy == "random"


def test_a_shortened_name_is_no_option(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("lora_r: 7\n")
    with pytest.raises(ValueError, match="unknown option --conf;"):
        parse_arguments(["--conf", str(tmp_path / "c.yaml")])


def test_an_unknown_key_in_the_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("learnin_rate: 1e-3\n")
    with pytest.raises(ValueError, match="unknown option --learnin_rate"):
        parse_arguments(["--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stray", "--bf16", "True"], "'stray' belongs to no option"),
        (
            ["--mm_use_im_start_end", "True"],
            "--mm_use_im_start_end: image start and end tokens is not part",
        ),
        (["--config", "gone.yaml"], "gone.yaml: no such file"),
        (["--config", "list.yaml"], "must be a mapping"),
        (["--config", "broken.yaml"], "not YAML"),
    ],
)
def test_what_is_no_option_is_said(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.yaml").write_text("- lora_r\n")
    Path("broken.yaml").write_text("a: [\n")
    with pytest.raises(ValueError, match=message):
        parse_arguments(words)


def test_names_of_older_versions_are_translated() -> None:
    _, _, training = parse_arguments(["--group_by_length", "True", "--no_cuda", "True"])
    assert training.train_sampling_strategy == "group_by_length" and training.use_cpu
    assert parse_arguments(["--group_by_length", "False"])[2].train_sampling_strategy == "random"
    words = ["--data_path", "x.json", "--image_folder", "y", "--group_by_modality_length", "True"]
    _, data, training = parse_arguments(words)
    assert (data.train_data_path, data.train_image_folder) == ("x.json", "y")
    assert training.train_sampling_strategy == "group_by_length"


@pytest.mark.parametrize(
    ("environment", "words", "message"),
    [
        ({}, ["--deepspeed", "ds_configs/zero2.json"], "--deepspeed needs its launcher"),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"},
            [],
            "several processes and started one",
        ),
        (
            {"LOCAL_RANK": "0", "ACCELERATE_USE_DEEPSPEED": "true"},
            ["--deepspeed", "ds_configs/zero2.json"],
            "under an accelerate launch that has a DeepSpeed configuration",
        ),
    ],
)
def test_a_launch_that_would_do_something_else_is_refused(
    environment: dict[str, str], words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        parse_arguments(words)


def test_a_wrong_value_is_said_in_a_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--learning_rate", "fast"])
    said = capsys.readouterr().err
    assert "--learning_rate/--learning-rate: invalid float value: 'fast'" in said
    assert said.count("\n") < 5


def test_the_output_folder_has_a_default() -> None:
    *_, training = parse_arguments(["--vision_tower", "openai/clip-vit-base-patch16"])
    assert training.output_dir == "output/mistral-7b-instruct-v0.1-clip-vit-base-patch16"


def test_wandb_is_silent_unless_asked() -> None:
    assert parse_arguments([])[2].report_to == []


@pytest.mark.parametrize(
    "recipe", sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_recipe_is_understood_and_says_what_to_expect(recipe: Path) -> None:
    more = ["--bf16", "False"] if recipe.stem.startswith(("cc3m", "coco", "qlora")) else []
    model, _, training = parse_arguments(["--config", str(recipe), *more])
    assert training.max_steps > 0 or training.num_train_epochs >= 1
    assert model.mm_projector_type in ("linear", "mlp2x_gelu")
    comment = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    assert any("Check" in line or "Expect" in line for line in comment)
    assert any(unit in " ".join(comment) for unit in ("day", "hour", "minute")), "the expected time"


def test_every_option_is_read_somewhere() -> None:
    """A flag that nobody reads is a promise that nobody keeps."""
    package = Path(__file__).parents[2] / "llava_simplified"
    code = "".join(path.read_text() for path in package.rglob("*.py"))
    for group in (ModelArguments, DataArguments, TrainingArguments):
        for name in (
            group.__annotations__.keys()
            - transformers.TrainingArguments.__dataclass_fields__.keys()
        ):
            assert re.search(rf"\b\w*(args|data|model|self)\.{name}\b", code), (
                f"--{name} is read by nobody"
            )

"""Tests of the training options: LLaVA's own names, YAML files, and the help text."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import pytest
import transformers

from llava_simplified.arguments import (
    DataArguments,
    ModelArguments,
    non_default_options,
    parse_arguments,
    split_options,
    to_argv,
)
from llava_simplified.training.train_command import build_parser
from llava_simplified.training.train_command import main as train_main
from llava_simplified.training_options import (
    HELP_GROUPS,
    INHERITED,
    TrainingDefaults,
)

PACKAGE = Path(__file__).parents[2] / "llava_simplified"
OWN_OPTIONS = {
    option.name: option
    for group in (ModelArguments, DataArguments, TrainingDefaults)
    for option in fields(group)
}
INHERITED_FIELDS = {option.name: option for option in fields(transformers.TrainingArguments)}

# The command line of LLaVA's finetune.sh.
FINETUNE_SH = """
--mm_vision_select_layer -1 --mm_vision_select_feature patch --mm_use_im_start_end False --mm_use_im_patch_token False
--bf16 True --output_dir OUT --num_train_epochs 1 --per_device_train_batch_size 16 --per_device_eval_batch_size 4
--gradient_accumulation_steps 1 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine
--tf32 True --model_max_length 64 --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True
--image_aspect_ratio pad --lora_enable True --lora_r 128 --lora_alpha 256 --lora_dropout 0.05 --report_to none --run_name mine --logging_steps 1
--evaluation_strategy steps --eval_steps 100 --save_strategy steps --save_steps 200 --save_total_limit 1
"""


def write_config(folder: Path, *lines: str) -> str:
    path = folder / "config.yaml"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


# ---- command line ----


def test_parse_arguments_accepts_every_option_of_finetune_sh(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    argv = FINETUNE_SH.replace("OUT", str(tmp_path)).split()
    model, data, training = parse_arguments([*argv, "--train_data_path", "x.json"])
    assert model.mm_vision_select_layer == [-1]
    assert model.image_aspect_ratio == "pad"
    assert (model.lora_r, model.lora_alpha, model.lora_enable) == (128, 256, True)
    assert training.eval_strategy == "steps"
    assert training.get_warmup_steps(1000) == 30
    assert training.model_max_length == 64
    assert training.bf16
    assert training.gradient_checkpointing
    assert data.train_data_path == "x.json"
    assert caplog.text.count("--lazy_preprocess has no effect") == 1


def test_parse_arguments_accepts_dashes_and_underscores() -> None:
    underscores = ["--lora_r", "9", "--per_device_train_batch_size=3", "--weight_decay", "0.5"]
    dashes = [word.replace("_", "-") for word in underscores]
    for argv in (underscores, dashes):
        model, _, training = parse_arguments(argv)
        assert model.lora_r == 9
        assert training.per_device_train_batch_size == 3
        assert training.weight_decay == 0.5


@pytest.mark.parametrize(
    ("misspelt", "suggestion"),
    [
        ("--learnin_rate", "--learning_rate"),
        ("--lora-rr", "--lora_r"),
        ("--conf", "--config"),  # an abbreviation
        ("--evaluation_strateg", "--evaluation_strategy"),
    ],
)
def test_parse_arguments_suggests_the_nearest_option(misspelt: str, suggestion: str) -> None:
    with pytest.raises(ValueError, match=f"{suggestion}\\?"):
        parse_arguments([misspelt, "1"])


def test_parse_arguments_translates_names_of_older_versions() -> None:
    _, _, training = parse_arguments(["--group_by_length", "True", "--no_cuda", "True"])
    assert training.train_sampling_strategy == "group_by_length"
    assert training.use_cpu
    _, _, training = parse_arguments(["--group_by_length", "False"])
    assert training.train_sampling_strategy == "random"
    argv = ["--data_path", "x.json", "--image_folder", "y", "--group_by_modality_length", "True"]
    argv += ["--image_aspect_ratio", "square"]
    model, data, training = parse_arguments(argv)
    assert (data.train_data_path, data.train_image_folder) == ("x.json", "y")
    assert model.image_aspect_ratio == "crop"
    assert training.train_sampling_strategy == "group_by_length"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["stray", "--bf16", "True"], "'stray'"),
        (["--mm_use_im_start_end", "True"], "--mm_use_im_start_end False"),
        (["--config", "gone.yaml"], "--config gone.yaml"),
        (["--config"], "--config"),
        (["--config", "list.yaml"], "--config list.yaml: .*mapping"),
        (["--config", "broken.yaml"], "--config broken.yaml: .*YAML"),
    ],
)
def test_parse_arguments_names_what_is_wrong(
    argv: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.yaml").write_text("- lora_r\n")
    Path("broken.yaml").write_text("a: [\n")
    with pytest.raises(ValueError, match=named):
        parse_arguments(argv)


def test_parse_arguments_reports_a_wrong_value_in_a_few_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_arguments(["--learning_rate", "fast"])
    assert exit_.value.code == 2
    printed = capsys.readouterr().err
    assert "--learning_rate/--learning-rate: invalid float value: 'fast'" in printed
    assert printed.count("\n") < 5


def test_parse_arguments_names_the_output_folder_after_the_models() -> None:
    model = ["--model_name_or_path", "mistralai/Mistral-7B-Instruct-v0.1"]
    *_, training = parse_arguments([*model, "--vision_tower", "openai/clip-vit-base-patch16"])
    assert training.output_dir == "output/mistral-7b-instruct-v0.1-clip-vit-base-patch16"


def test_parse_arguments_reports_to_no_tracker_by_default() -> None:
    assert parse_arguments([])[2].report_to == []


@pytest.mark.parametrize(
    ("argv", "level"),
    [([], logging.INFO), (["--verbose"], logging.DEBUG), (["--quiet"], logging.WARNING)],
)
def test_parse_arguments_sets_the_log_level(
    argv: list[str], level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "0")  # --quiet would set it for all later tests
    parse_arguments(argv)
    assert logging.getLogger("llava_simplified").level == level


@pytest.mark.parametrize(
    ("environment", "argv", "named"),
    [
        ({}, ["--deepspeed", "ds_configs/zero2.json"], "--deepspeed requires a launcher"),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"},
            [],
            "accelerate launch --multi_gpu",
        ),
        (
            {"LOCAL_RANK": "0", "ACCELERATE_USE_DEEPSPEED": "true"},
            ["--deepspeed", "ds_configs/zero2.json"],
            "--deepspeed: accelerate launch has a DeepSpeed configuration",
        ),
    ],
)
def test_parse_arguments_refuses_launchers_that_do_not_match_the_options(
    environment: dict[str, str], argv: list[str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=named):
        parse_arguments(argv)


# ---- YAML ----


@pytest.mark.parametrize(
    ("metric", "is_greater_better"),
    [("eval_perplexity", False), ("perplexity", False), ("eval_loss", False), ("cider", True)],
)
def test_metric_for_best_model_determines_what_is_better(
    metric: str, is_greater_better: bool
) -> None:
    argv = ["--metric_for_best_model", metric]
    assert parse_arguments(argv)[2].greater_is_better == is_greater_better
    for choice in (True, False):
        args = parse_arguments([*argv, "--greater_is_better", str(choice)])[2]
        assert args.greater_is_better == choice


def test_command_line_has_precedence_over_the_config_file(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        "learning_rate: 1e-3",  # a text for YAML
        "lora_r: 7",
        "mm_vision_select_layer: [-1, -3]",
        "bf16: false",
        "train_data_path: a.json",
    )
    argv = ["--config", config, "--lora-r=9", "--output_dir", str(tmp_path)]
    model, data, training = parse_arguments(argv)
    assert training.learning_rate == 1e-3
    assert model.lora_r == 9
    assert model.mm_vision_select_layer == [-1, -3]
    assert data.train_data_path == "a.json"


def test_config_file_accepts_off_no_and_mappings(tmp_path: Path) -> None:
    """`off` and `no` are False for YAML, but values of options here."""
    config = write_config(
        tmp_path,
        "cache_vision_features: off",
        "tune_vision_tower: off",
        "eval_strategy: no",
        "packing: yes",
        "group_by_length: true",
        "lr_scheduler_kwargs: {min_lr_rate: 0.1}",
        "accelerator_config: {even_batches: false}",
        "run_name: null",
    )
    model, data, training = parse_arguments(["--config", config, "--group_by_length", "False"])
    assert model.tune_vision_tower == "off"
    assert data.cache_vision_features == "off"
    assert training.eval_strategy == "no"
    assert data.packing
    assert training.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert training.accelerator_config.even_batches is False  # type: ignore[union-attr]
    assert training.train_sampling_strategy == "random"


def test_config_file_is_not_read_under_an_abbreviation(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown option --conf;"):
        parse_arguments(["--conf", write_config(tmp_path, "lora_r: 7")])


def test_config_file_with_an_unknown_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown option --learnin_rate"):
        parse_arguments(["--config", write_config(tmp_path, "learnin_rate: 1e-3")])


RECIPES = sorted((PACKAGE.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_states_what_to_expect(recipe: Path) -> None:
    argv = ["--config", str(recipe)]
    if recipe.stem.startswith(("cc3m", "coco", "qlora")):
        argv += ["--bf16", "False"]
    model, _, training = parse_arguments(argv)
    assert training.max_steps > 0 or training.num_train_epochs >= 1
    assert model.mm_projector_type in ("linear", "mlp2x_gelu")
    comments = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    assert any("Check" in line or "Expect" in line for line in comments)
    units = ("day", "hour", "minute")
    assert any(unit in " ".join(comments) for unit in units), (
        "the comments must state the expected time"
    )


# ---- arguments and options ----


def test_split_options_inverts_to_argv() -> None:
    argv = to_argv({"lora_r": 8, "layers": [-1, -2], "kwargs": {"a": 1}, "run_name": None})
    assert split_options(argv) == [
        ("lora_r", ["8"]),
        ("layers", ["-1", "-2"]),
        ("kwargs", ['{"a": 1}']),
    ]


def test_non_default_options_lists_changes_without_access_tokens() -> None:
    groups = parse_arguments(["--lora_r", "8", "--hub_token", "secret", "--packing"])
    changed = non_default_options(*groups)
    assert changed["lora_r"] == 8
    assert changed["packing"] is True
    assert "hub_token" not in changed
    assert "lora_alpha" not in changed


@pytest.mark.medium
def test_every_option_is_read_somewhere() -> None:
    """An option that nothing reads would silently have no effect."""
    code = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    for name in OWN_OPTIONS.keys() - INHERITED_FIELDS.keys():
        assert re.search(rf"\b\w*(args|data|model|self)\.{name}\b", code), f"--{name} is not read"


# ---- help ----


def default_of(option: Field[Any]) -> Any:
    default = option.default
    if option.default_factory is not MISSING:
        default = option.default_factory()
    return getattr(default, "value", default)  # the text of an enumeration's member


def test_help_lists_every_own_option_in_one_group() -> None:
    listed = [name for names in HELP_GROUPS.values() for name in names]
    assert len(listed) == len(set(listed))
    assert set(listed) == OWN_OPTIONS.keys() | INHERITED.keys()
    assert not OWN_OPTIONS.keys() & INHERITED.keys()


@pytest.mark.parametrize("name", INHERITED)
def test_help_states_the_defaults_of_transformers(name: str) -> None:
    assert INHERITED[name].default == default_of(INHERITED_FIELDS[name])


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.medium
def test_help_imports_neither_torch_nor_transformers() -> None:
    printed = run_python(
        "import sys, atexit\n"
        "from llava_simplified.training.train_command import main\n"
        "atexit.register(lambda: print({'torch', 'transformers'} & sys.modules.keys()))\n"
        "main(['--lora-r', '8', '--help'])"
    )
    assert printed.endswith("set()\n")
    for heading in HELP_GROUPS:
        assert f"\n{heading}:\n" in printed
    assert "--lora_r" in printed
    assert "--adam_beta1" not in printed


def test_help_all_lists_every_option_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        train_main(["--help-all"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    for name in OWN_OPTIONS.keys() | {"adam_beta1", "hub_token"}:
        assert len(re.findall(rf"^  --{name}\b", printed, re.MULTILINE)) == 1, name


def test_parser_for_completion_knows_every_option_of_the_help() -> None:
    known = build_parser()._option_string_actions
    for names in HELP_GROUPS.values():
        for name in names:
            assert f"--{name}" in known

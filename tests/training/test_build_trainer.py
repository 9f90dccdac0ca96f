"""Errors that are found before training starts, and the config that a checkpoint records."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from training_runs import run_training, training_options
from transformers import AutoConfig, AutoTokenizer

from llava_simplified.arguments import parse_arguments
from llava_simplified.data.records import Record
from llava_simplified.model.build import build_model
from llava_simplified.model.config import LlavaConfig
from llava_simplified.prompt import Message
from llava_simplified.training import build_trainer
from llava_simplified.training.build_trainer import build_config
from llava_simplified.training.plan import make_plan

REFUSED_OPTIONS = [
    ({"train_data_path": "nowhere.json"}, "nowhere.json: no such file"),
    ({"train_image_folder": "nowhere"}, "--train_image_folder nowhere"),
    ({"model_name_or_path": "nowhere"}, "--model_name_or_path nowhere: .*config.json"),
    ({"vision_tower": "nowhere"}, "--vision_tower nowhere: .*config.json"),
    ({"mm_projector_type": "magic"}, "mm_projector_type .*linear"),
    ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature .*patch.* cls_patch"),
    ({"mm_use_im_start_end": "True"}, "--mm_use_im_start_end"),
    ({"no_such_option": "1"}, "--no_such_option"),
    ({"model_max_length": "6"}, "model_max_length"),
    ({"config": "nowhere.yaml"}, "nowhere.yaml"),
    ({"resume_from_checkpoint": "true"}, "--resume_from_checkpoint true: no checkpoint in"),
    ({"model_name_or_path": ""}, "--model_name_or_path is required"),
    ({"lora_bias": "all", "bf16": "True"}, "--lora_bias all"),
    ({"eval_data_path": "nowhere.json"}, "nowhere.json: no such file"),
    ({"eval_strategy": "steps"}, "--eval_strategy steps .*--eval_data_path"),
    (
        {"tune_vision_tower": "lora", "cache_vision_features": "disk"},
        "--cache_vision_features disk: --tune_vision_tower lora",
    ),
    ({"tune_vision_tower": "yes"}, "--tune_vision_tower yes: .*off, full or lora"),
    (
        {"cache_vision_features": "yes"},
        "--cache_vision_features yes: .*auto, memory, disk, pixels or off",
    ),
    (
        {"attn_implementation": "flash_attention_2", "bf16": "True"},
        "--attn_implementation flash_attention_2 .*--share_prefix False",
    ),
    (
        {"attn_implementation": "paged|sdpa"},
        r"--attn_implementation paged\|sdpa: .*sdpa, eager",
    ),
    ({"torch_compile_backend": "eager"}, "--torch_compile_backend .*--compile_layers True"),
    ({"label_smoothing_factor": "0.1"}, "--label_smoothing_factor"),
    ({"bits": "3"}, "--bits .*4, 8 or 16"),
    ({"gradient_accumulation_steps": "0"}, "--gradient_accumulation_steps 0: .*1 or more"),
    ({"push_to_hub": "True"}, "--push_to_hub True .*`llava push`"),
    ({"max_steps": "0"}, "--max_steps 0: .*-1"),
    ({"num_train_epochs": "0"}, "--num_train_epochs 0"),
    ({"eval_captions": "-1"}, "--eval_captions -1: .*0 or more"),
    ({"max_bad_images": "5"}, "--max_bad_images 5: .*from 0 to 1"),
    ({"max_bad_records": "nan"}, "--max_bad_records nan: .*from 0 to 1"),
    ({"feature_cache_gb": "nan"}, "--feature_cache_gb nan"),
    ({"train_sampling_strategy": "batch_rebalance"}, "batch_rebalance .*group_by_length"),
    (
        {"pretrain_mm_mlp_adapter": "mm_projector.bin"},
        r"mm_projector\.bin: no such folder.*`llava import`",
    ),
]
# This machine does not support these options, but another one may.
REFUSED_ON_THIS_MACHINE = [
    (
        {"attn_implementation": "flash_attention_2", "bf16": "True", "share_prefix": "False"},
        "--attn_implementation flash_attention_2 .*NVIDIA GPU",
    ),
    (
        {"attn_implementation": "flex_attention"},
        "--attn_implementation flex_attention .*backward",
    ),
    ({"use_liger_kernel": "True"}, "--use_liger_kernel: .*CUDA"),
]


@pytest.mark.parametrize(("change", "message"), [*REFUSED_OPTIONS, *REFUSED_ON_THIS_MACHINE])
def test_wrong_option_is_refused_and_named(
    models_folder: Path, data_folder: Path, tmp_path: Path, change: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_training(training_options(models_folder, data_folder, tmp_path / "out", **change))


@pytest.mark.medium
def test_single_process_uses_one_of_several_gpus(
    models_folder: Path, data_folder: Path, tmp_path: Path, package_log: pytest.LogCaptureFixture
) -> None:
    """`nn.DataParallel`, which Transformers uses otherwise, cannot split the batches."""
    arguments = parse_arguments(training_options(models_folder, data_folder, tmp_path / "out"))
    arguments[2]._n_gpu = 2  # the number of GPUs that Transformers has counted
    trainer, _ = build_trainer.build_trainer(*arguments)
    assert trainer.args.n_gpu == 1
    assert trainer.args.train_batch_size == 4
    assert "2 GPUs" in package_log.text
    assert "torchrun --nproc_per_node 2" in package_log.text


@pytest.mark.parametrize("max_steps", [-1, 2])
def test_dropping_all_batches_is_refused(
    models_folder: Path, data_folder: Path, tmp_path: Path, max_steps: int
) -> None:
    options = training_options(
        models_folder,
        data_folder,
        tmp_path / "out",
        dataloader_drop_last=True,
        per_device_train_batch_size=13,
        max_steps=max_steps,
    )
    with pytest.raises(ValueError, match="--dataloader_drop_last True .*only 12 .*a batch of 13"):
        run_training(options)


@pytest.mark.parametrize("change", [change for change, _ in REFUSED_OPTIONS], ids=str)
def test_plan_refuses_the_options_that_training_refuses(
    models_folder: Path, data_folder: Path, tmp_path: Path, change: dict[str, str]
) -> None:
    options = training_options(models_folder, data_folder, tmp_path / "out", **change)
    with pytest.raises(ValueError):
        make_plan(*parse_arguments(options))


@pytest.mark.medium
@pytest.mark.parametrize("change", [change for change, _ in REFUSED_ON_THIS_MACHINE], ids=str)
def test_plan_accepts_options_of_another_machine(
    models_folder: Path, data_folder: Path, tmp_path: Path, change: dict[str, str]
) -> None:
    options = training_options(models_folder, data_folder, tmp_path / "out", **change)
    assert make_plan(*parse_arguments(options)).peak > 0


@pytest.mark.parametrize("option", ["train_data_path", "eval_data_path"])
@pytest.mark.parametrize(
    "change",
    [{"response": " "}, {"response": None}, {"response": None, "responses": ["a cat", ""]}],
)
def test_record_without_answer_is_named_before_a_model_is_loaded(
    models_folder: Path, data_folder: Path, tmp_path: Path, option: str, change: dict[str, object]
) -> None:
    rows = json.loads((data_folder / "train.json").read_text())
    changed_row = {**rows[7], **change}
    rows[7] = {key: value for key, value in changed_row.items() if value is not None}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    changes = {
        "model_name_or_path": "nowhere",  # would be an error too, but a later one
        "max_bad_records": 0,
        "val_image_folder": data_folder / "images",
        option: tmp_path / "rows.json",
    }
    options = training_options(models_folder, data_folder, tmp_path / "out", **changes)
    with pytest.raises(ValueError, match=r"rows.json row 7: "):
        run_training(options)


WHAT_IS_IT = Message("user", "<image>\nWhat is it?")


@pytest.mark.parametrize(
    ("turns", "images", "instruction"),
    [
        ((WHAT_IS_IT,), 1, "What is it?"),
        ((Message("user", "<image>\n<image>\n<image>\nCompare."),), 3, "Compare."),
        ((Message("user", "Compare <image> and <image>."),), 2, "Compare  and ."),
        ((Message("user", "What is it?\n<image>"),), 1, "What is it?\n<image>"),
        (
            (
                Message("system", "Be brief."),
                WHAT_IS_IT,
                Message("assistant", "A cat."),
                Message("user", "Where?"),
            ),
            1,
            "What is it?",
        ),
    ],
)
def test_config_records_the_instruction_of_the_first_image(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    turns: tuple[Message, ...],
    images: int,
    instruction: str,
) -> None:
    options = training_options(models_folder, data_folder, tmp_path / "out")
    model_args, _, args = parse_arguments(options)
    text_only = Record((), (Message("user", "Say hello."),), ("hello",), "0")
    records = [text_only, Record(("a.jpg",) * images, turns, ("a cat",), "1")]
    assert build_config(model_args, args, records).instruction == instruction
    # The instruction is used for single images, so a later record with a single image is preferred.
    records.append(Record(("a.jpg",), (Message("user", "What color?"),), ("red",), "2"))
    preferred = instruction if images == 1 else "What color?"
    assert build_config(model_args, args, records).instruction == preferred


# ---- what would end a run in the middle ----


@pytest.mark.medium
@pytest.mark.parametrize(
    "change",
    [
        {"response": "a \ud83d b"},
        {"instruction": "many words " * 40},
        {"conversations": [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "x"}]},
    ],
    ids=["half a surrogate pair", "long prompt", "video"],
)
@pytest.mark.parametrize("cache", ["off", "disk"])
def test_bad_record_is_set_aside_and_the_run_finishes(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    package_log: pytest.LogCaptureFixture,
    change: dict[str, object],
    cache: str,
) -> None:
    rows = json.loads((data_folder / "train.json").read_text())
    rows[7] = {**rows[7], **change}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    changes = {
        "train_data_path": tmp_path / "rows.json",
        "model_max_length": 100,
        "cache_vision_features": cache,
    }
    options = training_options(models_folder, data_folder, tmp_path / "out", **changes)
    assert (run_training(options) / "llava.json").is_file()
    assert "1 of 12 records" in package_log.text
    assert "rows.json row 7" in package_log.text
    with pytest.raises(ValueError, match="rows.json row 7"):
        run_training([*options, "--max_bad_records", "0"])


def test_long_prompt_of_every_record_is_an_error_before_a_model_is_loaded(
    models_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_trainer, "build_model", None)
    options = training_options(models_folder, data_folder, tmp_path / "out", model_max_length=6)
    with pytest.raises(ValueError, match="row 0.*--model_max_length 6"):
        run_training(options)


@pytest.mark.medium
def test_tokenizer_that_is_wider_than_the_embedding_table_is_refused_with_the_token(
    models_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = tmp_path / "wide"
    shutil.copytree(models_folder / "mistral", wide)
    tokenizer = AutoTokenizer.from_pretrained(wide)
    rows = AutoConfig.from_pretrained(wide).vocab_size
    missing = [f"<|extra_{number}|>" for number in range(rows - len(tokenizer))]
    tokenizer.add_special_tokens({"additional_special_tokens": [*missing, "<|im_end|>"]})
    tokenizer.save_pretrained(wide)
    options = training_options(
        models_folder, data_folder, tmp_path / "out", model_name_or_path=wide
    )
    # A token that no prompt contains does no harm.
    assert (run_training(options) / "llava.json").is_file()

    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.content }}<|im_end|>{% endfor %}"
    )
    tokenizer.save_pretrained(wide)
    expected = rf"<\|im_end\|>.* {rows}, .*{rows} rows"
    monkeypatch.setattr(build_trainer, "build_model", None)
    with pytest.raises(ValueError, match=expected):
        run_training(options)
    with pytest.raises(ValueError, match=expected):
        build_model(LlavaConfig(str(wide), str(models_folder / "clip")))

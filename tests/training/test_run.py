"""Whole runs on tiny models of the true classes: what a user types, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_simplified.arguments import parse_arguments
from llava_simplified.data.records import Record
from llava_simplified.model.checkpoint import load_checkpoint
from llava_simplified.prompt import Message
from llava_simplified.training.build_trainer import build_config
from llava_simplified.training.kernels import can_compile
from llava_simplified.training.plots import plot_training
from llava_simplified.training.train_command import train


def options(models_folder: Path, data_folder: Path, output: Path, **more: object) -> list[str]:
    values = {
        "model_name_or_path": models_folder / "mistral",
        "vision_tower": models_folder / "clip",
        "train_data_path": data_folder / "train.json",
        "train_image_folder": data_folder / "images",
        "output_dir": output,
        "lora_r": 4,
        "lora_dropout": 0,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "feature_cache_dir": output.parent / "features",
        **more,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def run(argv: list[str]) -> Path:
    return train(*parse_arguments(argv))


def losses(folder: Path, key: str = "loss") -> list[float]:
    rows = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return {
        **load_file(folder / "adapter" / "adapter_model.safetensors"),
        **load_file(folder / "projector.safetensors"),
    }


def test_a_run_learns_and_leaves_a_checkpoint_a_log_and_a_picture(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    more = {
        "eval_data_path": data_folder / "val.json",
        "val_image_folder": data_folder / "images",
        "evaluation_strategy": "steps",  # its name in LLaVA's scripts
        "eval_steps": 15,
        "num_train_epochs": 10,
        "save_strategy": "steps",
        "save_steps": 10,
        "save_total_limit": 2,
    }
    output = run(options(models_folder, data_folder, tmp_path / "out", **more))
    curve = losses(output)
    assert curve[-1] < 0.7 * curve[0]
    assert len(losses(output, "eval_loss")) == 2
    assert (output / "training.png").stat().st_size > 5000
    assert sorted(p.name for p in output.glob("checkpoint-*")) == ["checkpoint-20", "checkpoint-30"]
    for folder in (output, output / "checkpoint-20"):
        assert (
            load_checkpoint(folder).caption(data_folder / "images" / "0.jpg", max_new_tokens=4)
            is not None
        )
    assert not (output / ".saving").exists()


def test_eval_loss_is_the_mean_over_tokens_not_over_batches(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    """Captions of one and of many tokens, in batches of different sizes."""
    rows = json.loads((data_folder / "val.json").read_text())[:3]
    rows[0]["response"], rows[2]["response"] = (
        "a",
        "a very long caption that goes on and on and on for many words",
    )
    (tmp_path / "val.json").write_text(json.dumps(rows))
    seen = []
    for batch in (1, 2, 3):
        more = {
            "eval_data_path": tmp_path / "val.json",
            "val_image_folder": data_folder / "images",
            "eval_strategy": "steps",
            "eval_steps": 1,
            "max_steps": 1,
            "learning_rate": 0,
            "per_device_eval_batch_size": batch,
        }
        output = run(options(models_folder, data_folder, tmp_path / f"out{batch}", **more))
        seen += losses(output, "eval_loss")
    assert max(seen) - min(seen) < 1e-5


def test_accumulation_averages_tokens(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    """Four micro-batches of 1 are one batch of 4; with means of means the short caption would weigh more."""
    rows = json.loads((data_folder / "train.json").read_text())
    for index, row in enumerate(rows):
        row["response"] = (
            "a" if index % 2 else row["response"] + " and some more words to make it long"
        )
    (tmp_path / "train.json").write_text(json.dumps(rows))
    results = []
    for batch, accumulation in ((4, 1), (1, 4)):
        more = {
            "train_data_path": tmp_path / "train.json",
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "max_steps": 3,
        }
        output = run(options(models_folder, data_folder, tmp_path / f"out{batch}", **more))
        results.append((losses(output), adapter(output)))
    (loss_a, weights_a), (loss_b, weights_b) = results
    assert loss_a == pytest.approx(loss_b, rel=1e-5)
    for name, weight in weights_a.items():
        torch.testing.assert_close(weight, weights_b[name], rtol=1e-3, atol=1e-4, msg=name)


def test_resume_repeats_the_straight_run_bit_for_bit(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    more = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "lora_dropout": 0.1}
    straight = run(options(models_folder, data_folder, tmp_path / "straight", **more))
    words = options(models_folder, data_folder, tmp_path / "resumed", **more)
    resumed = run([*words, "--resume_from_checkpoint", str(straight / "checkpoint-4")])
    for name, weight in adapter(straight).items():
        assert torch.equal(weight, adapter(resumed)[name]), name
    again = run([*words, "--resume_from_checkpoint", "true"])  # there is nothing left to do
    assert not (again / "checkpoint-7").exists()
    for name, weight in adapter(straight).items():
        assert torch.equal(weight, adapter(again)[name]), name


def test_length_grouped_batches_resume_in_the_second_epoch(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    more = {
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "group_by_length": True,
    }
    rows = json.loads((data_folder / "train.json").read_text())[:6]  # three steps an epoch
    (tmp_path / "train.json").write_text(json.dumps(rows))
    more |= {"train_data_path": tmp_path / "train.json", "eval_strategy": "steps", "eval_steps": 3}
    more |= {"eval_data_path": data_folder / "val.json", "val_image_folder": data_folder / "images"}
    straight = run(options(models_folder, data_folder, tmp_path / "straight", **more))
    words = options(models_folder, data_folder, tmp_path / "resumed", **more)
    resumed = run([*words, "--resume_from_checkpoint", str(straight / "checkpoint-4")])
    for name, weight in adapter(straight).items():
        assert torch.equal(weight, adapter(resumed)[name]), name


@pytest.mark.skipif(not can_compile("cpu"), reason="no C++ compiler here")
def test_compiled_layers_change_nothing(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    more = {"attn_implementation": "eager", "max_steps": 4}
    plain = run(options(models_folder, data_folder, tmp_path / "plain", **more))
    compiled = run(
        options(models_folder, data_folder, tmp_path / "compiled", compile_layers=True, **more)
    )
    assert losses(plain) == pytest.approx(losses(compiled), rel=1e-4)
    assert load_checkpoint(compiled).caption(data_folder / "images" / "0.jpg", max_new_tokens=4)


def test_compiling_without_a_compiler(
    models_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"--compile_layers: .*no-such-compiler"):
        run(options(models_folder, data_folder, tmp_path / "out", compile_layers=True))


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_cached_features_change_nothing(
    models_folder: Path, data_folder: Path, tmp_path: Path, mode: str
) -> None:
    more = {
        "num_train_epochs": 3,
        "eval_data_path": data_folder / "val.json",
        "val_image_folder": data_folder / "images",
    }
    plain = run(
        options(models_folder, data_folder, tmp_path / "plain", cache_vision_features="off", **more)
    )
    cached = run(
        options(models_folder, data_folder, tmp_path / "cached", cache_vision_features=mode, **more)
    )
    assert losses(plain) == pytest.approx(losses(cached), rel=1e-5)


def test_projector_stage_then_lora_stage(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    first = run(options(models_folder, data_folder, tmp_path / "1", tune_mm_mlp_adapter=True))
    assert json.loads((first / "llava.json").read_text())["trained"] == "projector"
    more = {"pretrain_mm_mlp_adapter": first, "max_steps": 1, "learning_rate": 0}
    second = run(options(models_folder, data_folder, tmp_path / "2", **more))
    before, after = (
        load_file(first / "projector.safetensors"),
        load_file(second / "projector.safetensors"),
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    for change, message in (  # of the same shapes, all of them
        (
            {"mm_vision_select_layer": -1},
            "its projector was trained with --mm_vision_select_layer -2",
        ),
        ({"vision_tower": models_folder / "siglip"}, "vision_tower .*siglip: other weights"),
        ({"init_from": second}, "--init_from brings a projector along"),
    ):
        with pytest.raises(ValueError, match=message):
            run(options(models_folder, data_folder, tmp_path / "3", **more, **change))


def test_a_new_run_starts_from_all_that_a_checkpoint_trained(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    first = run(options(models_folder, data_folder, tmp_path / "first", max_steps=3))
    still = {"max_steps": 1, "learning_rate": 0}
    second = run(options(models_folder, data_folder, tmp_path / "second", init_from=first, **still))
    for name, weight in adapter(first).items():
        assert torch.equal(weight, adapter(second)[name]), name
    other = {"init_from": first, "model_name_or_path": models_folder / "qwen2"}
    with pytest.raises(ValueError, match="language_model .*qwen2: other weights"):
        run(options(models_folder, data_folder, tmp_path / "other", **other))
    alone = {"tune_mm_mlp_adapter": True, **still}
    with pytest.raises(
        ValueError, match="trained its adapter, this run trains the projector; `llava merge`"
    ):
        run(options(models_folder, data_folder, tmp_path / "third", init_from=first, **alone))
    projector = run(
        options(
            models_folder, data_folder, tmp_path / "fourth", tune_mm_mlp_adapter=True, max_steps=3
        )
    )
    fifth = run(
        options(models_folder, data_folder, tmp_path / "fifth", init_from=projector, **still)
    )
    for name, weight in load_file(projector / "projector.safetensors").items():
        assert torch.equal(weight, load_file(fifth / "projector.safetensors")[name]), name


def test_full_fine_tuning_keeps_the_language_model(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    more = {"lora_enable": False, "freeze_backbone": False, "max_steps": 2}
    output = run(options(models_folder, data_folder, tmp_path / "out", **more))
    base = load_file(models_folder / "mistral" / "model.safetensors")
    tuned = load_file(output / "language_model" / "model.safetensors")
    assert any(not torch.equal(base[name], tuned[name]) for name in base)
    assert (
        load_checkpoint(output).caption(data_folder / "images" / "0.jpg", max_new_tokens=4)
        is not None
    )


def test_the_projector_has_its_own_learning_rate(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    start = run(options(models_folder, data_folder, tmp_path / "0", max_steps=1, learning_rate=0))
    moved = run(
        options(
            models_folder,
            data_folder,
            tmp_path / "1",
            max_steps=2,
            learning_rate=0,
            mm_projector_lr=1e-2,
        )
    )
    before, after = adapter(start), adapter(moved)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"weight", "bias"}
    assert losses(moved, "learning_rate") == [0, 0], (
        "what is logged is that of the option of this name"
    )


def test_steps_that_a_resumed_run_repeats_are_drawn_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"step": step, "loss": loss} for step, loss in ((1, 9), (2, 8), (3, 7), (2, 6), (3, 5))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn: list[tuple] = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.plot", lambda axes, *points, **_: drawn.append(points[:2])
    )
    plot_training(tmp_path / "log.jsonl", tmp_path / "plot.png")
    assert drawn == [((1, 2, 3), (9, 6, 5))]


def tower(folder: Path, how: str) -> dict[str, torch.Tensor]:
    file = {"full": "vision_tower/model", "lora": "vision_adapter/adapter_model"}[how]
    return load_file(folder / f"{file}.safetensors")


@pytest.mark.parametrize("how", ["full", "lora"])
def test_the_tower_trains_at_a_rate_of_its_own_and_resumes(
    models_folder: Path, data_folder: Path, tmp_path: Path, how: str
) -> None:
    more = {
        "tune_vision_tower": how,
        "gradient_checkpointing": True,
        "lora_dropout": 0.1,
        "save_strategy": "steps",
    }
    more |= {
        "save_steps": 2,
        "max_steps": 6,
        "cache_vision_features": "auto",
        "feature_cache_gb": 0,
    }
    straight = run(options(models_folder, data_folder, tmp_path / "straight", **more))
    words = options(models_folder, data_folder, tmp_path / "resumed", **more)
    resumed = run([*words, "--resume_from_checkpoint", str(straight / "checkpoint-4")])
    for name, weight in tower(straight, how).items():
        assert torch.equal(weight, tower(resumed, how)[name]), name
    still = {**more, "vision_lr": 0, "save_strategy": "no", "init_from": straight, "max_steps": 2}
    further = run(options(models_folder, data_folder, tmp_path / "further", **still))
    assert all(
        torch.equal(weight, tower(further, how)[name])
        for name, weight in tower(straight, how).items()
    )
    assert not all(
        torch.equal(weight, adapter(further)[name]) for name, weight in adapter(straight).items()
    )
    with pytest.raises(
        ValueError, match=f"vision tower was trained too: --tune_vision_tower {how}"
    ):
        run(
            options(models_folder, data_folder, tmp_path / "other", init_from=straight, max_steps=1)
        )
    if how == "full":
        frozen = {"init_from": straight, "vision_tower": straight / "vision_tower", "max_steps": 1}
        assert "vision_tower" not in {
            p.name
            for p in run(options(models_folder, data_folder, tmp_path / "f", **frozen)).iterdir()
        }


def test_pictures_kept_as_pixels_change_nothing(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    """A tower that trains can't have its features kept, but is spared the decoding."""
    more = {"tune_vision_tower": "lora", "num_train_epochs": 2}
    plain = run(
        options(models_folder, data_folder, tmp_path / "plain", cache_vision_features="off", **more)
    )
    kept = run(
        options(models_folder, data_folder, tmp_path / "kept", cache_vision_features="auto", **more)
    )
    assert losses(plain) == losses(kept)
    assert len(list((tmp_path / "features").glob("*.features"))) == 1


def test_bad_images_are_replaced_counted_and_over_budget_fatal(
    models_folder: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads((data_folder / "train.json").read_text())
    rows[5]["image"] = "gone.jpg"
    (tmp_path / "train.json").write_text(json.dumps(rows))
    more = {"train_data_path": tmp_path / "train.json"}
    run(options(models_folder, data_folder, tmp_path / "out", **more))
    printed = capsys.readouterr().out
    assert "bad image, train.json row 5" in printed
    assert "1 bad image" in printed
    for row in rows[2:9]:
        row["image"] = "gone.jpg"
    (tmp_path / "train.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="more than --max_bad_images 0.01"):
        run(options(models_folder, data_folder, tmp_path / "out", **more))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_data_path": "nowhere.json"}, "nowhere.json: no such file"),
        ({"train_image_folder": "nowhere"}, "--train_image_folder nowhere: no such folder"),
        (
            {"model_name_or_path": "nowhere"},
            "--model_name_or_path nowhere: no config.json; name a folder",
        ),
        ({"vision_tower": "nowhere"}, "--vision_tower nowhere: no config.json; name a folder"),
        ({"mm_projector_type": "magic"}, "mm_projector_type is linear"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature is patch or cls_patch"),
        ({"mm_use_im_start_end": "True"}, "--mm_use_im_start_end"),
        ({"no_such_option": "1"}, "unknown option --no_such_option"),
        ({"model_max_length": "6"}, "leaves no room for an answer"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml: no such file"),
        ({"resume_from_checkpoint": "true"}, "no checkpoint in"),
        ({"eval_strategy": "steps"}, "--eval_strategy steps needs --eval_data_path"),
        (
            {"tune_vision_tower": "lora", "cache_vision_features": "disk"},
            "changes the features with every step",
        ),
        ({"tune_vision_tower": "yes"}, "--tune_vision_tower is off, full or lora"),
        (
            {"cache_vision_features": "yes"},
            "--cache_vision_features is auto, memory, disk, pixels or off",
        ),
        (
            {"attn_implementation": "flash_attention_2"},
            "--attn_implementation flash_attention_2: needs an NVIDIA GPU",
        ),
        (
            {"attn_implementation": "flex_attention"},
            "--attn_implementation flex_attention has no backward",
        ),
        ({"attn_implementation": "paged|sdpa"}, "--attn_implementation is sdpa, eager"),
        ({"use_liger_kernel": "True"}, "--use_liger_kernel: Triton kernels for CUDA"),
        (
            {"torch_compile_backend": "eager"},
            "--torch_compile_...: the layers are compiled one by one",
        ),
        ({"label_smoothing_factor": "0.1"}, "--label_smoothing_factor"),
        ({"bits": "3"}, "--bits .*4, 8 or 16"),
        (
            {"pretrain_mm_mlp_adapter": "mm_projector.bin"},
            "llava\\.json is missing.*`llava import`",
        ),
    ],
)
def test_faults_are_named(
    models_folder: Path, data_folder: Path, tmp_path: Path, change: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(options(models_folder, data_folder, tmp_path / "out", **change))


PICTURE = Message("user", "<image>\nWhat is it?")
ASKED = [
    ((PICTURE,), 1, "What is it?"),
    ((Message("user", "<image>\n<image>\n<image>\nCompare."),), 3, "Compare."),
    ((Message("user", "What is it?\n<image>"),), 1, "What is it?\n<image>"),
    (
        (
            Message("system", "Be brief."),
            PICTURE,
            Message("assistant", "A cat."),
            Message("user", "Where?"),
        ),
        1,
        "What is it?",
    ),
]


@pytest.mark.parametrize(("turns", "images", "question"), ASKED)
def test_what_is_asked_where_nothing_is_said_is_what_the_first_picture_was_asked(
    models_folder: Path, data_folder: Path, tmp_path: Path, turns: tuple, images: int, question: str
) -> None:
    model_args, _, args = parse_arguments(options(models_folder, data_folder, tmp_path / "out"))
    without = Record((), (Message("user", "Say hello."),), ("hello",), "0")
    records = [without, Record(("a.jpg",) * images, turns, ("a cat",), "1")]
    assert build_config(model_args, args, records).instruction == question


@pytest.mark.parametrize("option", ["train_data_path", "eval_data_path"])
@pytest.mark.parametrize(
    "change", [{"response": " "}, {"response": None}, {"responses": ["a cat", ""]}]
)
def test_a_record_without_an_answer_is_named_before_anything_is_loaded(
    models_folder: Path, data_folder: Path, tmp_path: Path, option: str, change: dict
) -> None:
    rows = json.loads((data_folder / "train.json").read_text())
    rows[7] = {key: value for key, value in {**rows[7], **change}.items() if value is not None}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    more = {
        "model_name_or_path": "nowhere",
        "val_image_folder": data_folder / "images",
        option: tmp_path / "rows.json",
    }
    with pytest.raises(ValueError, match=r"rows.json row 7: no answer to learn from"):
        run(options(models_folder, data_folder, tmp_path / "out", **more))


def test_an_image_folder_without_the_images(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="none of the first images can be read"):
        run(options(models_folder, data_folder, tmp_path / "out", train_image_folder=tmp_path))

"""Whole training runs on tiny models of real architectures: what they learn and leave behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import (
    assert_equal_weights,
    read_log,
    run_training,
    trained_weights,
    training_options,
)

from llava_simplified.model.checkpoint import load_checkpoint
from llava_simplified.training.plots import plot_training


def vision_tower_weights(folder: Path, how: str) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint's trained tower, or of the tower's adapter."""
    files = {"full": "vision_tower/model", "lora": "vision_adapter/adapter_model"}
    return load_file(folder / f"{files[how]}.safetensors")


def projector_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "projector.safetensors")


@pytest.mark.medium
def test_train_learns_and_writes_checkpoints_log_and_plot(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    options = training_options(
        models_folder,
        data_folder,
        tmp_path / "out",
        eval_data_path=data_folder / "val.json",
        val_image_folder=data_folder / "images",
        evaluation_strategy="steps",  # the name of --eval_strategy in LLaVA's scripts
        eval_steps=15,
        num_train_epochs=10,
        save_strategy="steps",
        save_steps=10,
        save_total_limit=2,
    )
    output = run_training(options)
    curve = read_log(output)
    assert curve[-1] < 0.7 * curve[0]
    assert len(read_log(output, "eval_loss")) == 2
    # The tests draw one plot for all runs: `training.png` is a copy.
    assert (output / "training.png").is_file()
    plot_training(output / "trainer_log.jsonl", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
    checkpoints = sorted(path.name for path in output.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-20", "checkpoint-30"]
    for folder in (output, output / "checkpoint-20"):
        model = load_checkpoint(folder)
        assert model.caption(data_folder / "images" / "0.jpg", max_new_tokens=4) is not None
    assert not (output / ".saving").exists()


@pytest.mark.medium
def test_new_run_sets_the_logs_of_an_earlier_run_aside(
    models_folder: Path, data_folder: Path, tmp_path: Path, package_log: pytest.LogCaptureFixture
) -> None:
    """Otherwise, the plot would show the last steps of the longer, earlier run."""
    changes: dict[str, object] = {
        "eval_data_path": data_folder / "val.json",
        "val_image_folder": data_folder / "images",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_captions": 1,
    }
    for max_steps in (3, 2, 1):
        options = training_options(
            models_folder, data_folder, tmp_path / "out", max_steps=max_steps, **changes
        )
        output = run_training(options)
        assert len(read_log(output)) == max_steps
        captions = {path.name for path in (output / "eval_captions").iterdir()}
        assert captions == {f"step-{step}.jsonl" for step in range(1, max_steps + 1)}
    assert len((output / "trainer_log.previous.jsonl").read_text().splitlines()) == 2 + 2 + 1
    assert len(list((output / "eval_captions.previous").iterdir())) == 2
    assert "trainer_log.previous.jsonl" in package_log.text


@pytest.mark.medium
def test_train_without_matplotlib_skips_the_plot_and_names_the_extra(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    package_log: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("llava_simplified.extras.find_spec", lambda name: None)
    options = training_options(models_folder, data_folder, tmp_path / "out", max_steps=1)
    output = run_training(options)
    assert not (output / "training.png").exists()
    assert (output / "llava.json").exists()
    (message,) = [text for text in package_log.messages if "training.png" in text]
    assert "matplotlib" in message and "[report]" in message


@pytest.mark.medium
def test_train_without_terminal_logs_one_line_per_logging_step(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    package_log: pytest.LogCaptureFixture,
) -> None:
    options = training_options(
        models_folder, data_folder, tmp_path / "out", max_steps=4, logging_steps=2
    )
    assert not sys.stderr.isatty()
    run_training(options)
    lines = [text for text in package_log.messages if text.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 2 of 4", "step 4 of 4"]
    for part in ("loss", "lr", "tokens/s", "left"):
        assert part in lines[0]


# ---- loss ----


@pytest.mark.medium
def test_eval_loss_is_the_mean_over_tokens_and_not_over_batches(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    """The captions have one token or many, and the batches have different sizes."""
    rows = json.loads((data_folder / "val.json").read_text())[:3]
    rows[0]["response"] = "a"
    rows[2]["response"] = "a very long caption that goes on and on and on for many words"
    (tmp_path / "val.json").write_text(json.dumps(rows))
    eval_losses = []
    for batch_size in (1, 2, 3):
        options = training_options(
            models_folder,
            data_folder,
            tmp_path / f"out{batch_size}",
            eval_data_path=tmp_path / "val.json",
            val_image_folder=data_folder / "images",
            eval_strategy="steps",
            eval_steps=1,
            max_steps=1,
            learning_rate=0,
            per_device_eval_batch_size=batch_size,
            dataloader_drop_last=True,  # only for batches that are trained on
        )
        eval_losses += read_log(run_training(options), "eval_loss")
    assert max(eval_losses) - min(eval_losses) < 1e-5


@pytest.mark.medium
def test_gradient_accumulation_averages_tokens(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    """Four micro-batches of 1 equal one batch of 4. A mean of means would give short captions more weight."""
    rows = json.loads((data_folder / "train.json").read_text())
    for index, row in enumerate(rows):
        if index % 2:
            row["response"] = "a"
        else:
            row["response"] += " and some more words to make it long"
    (tmp_path / "train.json").write_text(json.dumps(rows))
    losses = []
    weights = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        options = training_options(
            models_folder,
            data_folder,
            tmp_path / f"out{batch_size}",
            train_data_path=tmp_path / "train.json",
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
        )
        output = run_training(options)
        losses.append(read_log(output))
        weights.append(trained_weights(output))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-3, atol=1e-4, msg=name)


# ---- resuming ----


@pytest.mark.medium
def test_resumed_run_equals_the_uninterrupted_run_bit_for_bit(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "lora_dropout": 0.1}
    uninterrupted = run_training(
        training_options(models_folder, data_folder, tmp_path / "uninterrupted", **changes)
    )
    options = training_options(models_folder, data_folder, tmp_path / "resumed", **changes)
    checkpoint = uninterrupted / "checkpoint-4"
    resumed = run_training([*options, "--resume_from_checkpoint", str(checkpoint)])
    assert_equal_weights(trained_weights(uninterrupted), trained_weights(resumed))

    # A finished run has no steps left.
    again = run_training([*options, "--resume_from_checkpoint", "true"])
    assert not (again / "checkpoint-7").exists()
    assert_equal_weights(trained_weights(uninterrupted), trained_weights(again))


@pytest.mark.medium
def test_resumed_run_continues_length_grouped_batches_in_the_second_epoch(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    rows = json.loads((data_folder / "train.json").read_text())[:6]  # three steps per epoch
    (tmp_path / "train.json").write_text(json.dumps(rows))
    changes = {
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "group_by_length": True,
        "train_data_path": tmp_path / "train.json",
        "eval_strategy": "steps",
        "eval_steps": 3,
        "eval_data_path": data_folder / "val.json",
        "val_image_folder": data_folder / "images",
    }
    uninterrupted = run_training(
        training_options(models_folder, data_folder, tmp_path / "uninterrupted", **changes)
    )
    options = training_options(models_folder, data_folder, tmp_path / "resumed", **changes)
    checkpoint = uninterrupted / "checkpoint-4"
    resumed = run_training([*options, "--resume_from_checkpoint", str(checkpoint)])
    assert_equal_weights(trained_weights(uninterrupted), trained_weights(resumed))


# ---- options that must not change the result ----
#
# test_levers.py has those that make training cheaper, --compile_layers among them.


def test_compile_layers_without_compiler_is_refused(
    models_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    options = training_options(models_folder, data_folder, tmp_path / "out", compile_layers=True)
    with pytest.raises(ValueError, match=r"--compile_layers: .*no-such-compiler"):
        run_training(options)


@pytest.mark.medium
@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_cached_features_do_not_change_the_losses(
    models_folder: Path, data_folder: Path, tmp_path: Path, mode: str
) -> None:
    losses = []
    for cache in ("off", mode):
        options = training_options(
            models_folder,
            data_folder,
            tmp_path / cache,
            num_train_epochs=3,
            eval_data_path=data_folder / "val.json",
            val_image_folder=data_folder / "images",
            cache_vision_features=cache,
        )
        losses.append(read_log(run_training(options)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.medium
def test_cached_pixels_do_not_change_the_losses(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    """Features of a tower that is trained cannot be cached, but the pixels of the images can."""
    losses = []
    for cache in ("off", "auto"):
        options = training_options(
            models_folder,
            data_folder,
            tmp_path / cache,
            tune_vision_tower="lora",
            num_train_epochs=2,
            cache_vision_features=cache,
        )
        losses.append(read_log(run_training(options)))
    assert losses[0] == losses[1]
    assert len(list((tmp_path / "features").glob("*.features"))) == 1


# ---- what is trained, and from which weights it starts ----


@pytest.mark.medium
def test_projector_stage_is_followed_by_lora_stage(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    first = run_training(
        training_options(models_folder, data_folder, tmp_path / "1", tune_mm_mlp_adapter=True)
    )
    assert json.loads((first / "llava.json").read_text())["trained"] == "projector"
    changes = {"pretrain_mm_mlp_adapter": first, "max_steps": 1, "learning_rate": 0}
    second = run_training(training_options(models_folder, data_folder, tmp_path / "2", **changes))
    assert_equal_weights(projector_weights(first), projector_weights(second))

    # In all cases but the last, the weights would have the right shapes, but would not fit the features. In the last case,
    # two options contradict each other.
    for change, message in (
        ({"mm_vision_select_layer": -1}, "Pass --mm_vision_select_layer -2"),
        ({"mm_vision_select_feature": "cls_patch"}, "Pass --mm_vision_select_feature patch"),
        ({"mm_token_pool": 2}, "Pass --mm_token_pool 0"),
        ({"image_aspect_ratio": "pad"}, "Pass --image_aspect_ratio crop"),
        ({"vision_tower": models_folder / "siglip"}, "vision_tower .*siglip"),
        ({"init_from": second}, "--init_from and --pretrain_mm_mlp_adapter"),
    ):
        options = training_options(models_folder, data_folder, tmp_path / "3", **changes, **change)
        with pytest.raises(ValueError, match=message):
            run_training(options)


@pytest.mark.medium
def test_init_from_loads_all_trained_parts_of_a_checkpoint(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    first = run_training(
        training_options(models_folder, data_folder, tmp_path / "first", max_steps=3)
    )
    no_change = {"max_steps": 1, "learning_rate": 0}
    second = run_training(
        training_options(
            models_folder, data_folder, tmp_path / "second", init_from=first, **no_change
        )
    )
    assert_equal_weights(trained_weights(first), trained_weights(second))

    other_model = training_options(
        models_folder,
        data_folder,
        tmp_path / "other",
        init_from=first,
        model_name_or_path=models_folder / "qwen2",
    )
    with pytest.raises(ValueError, match="language_model .*qwen2"):
        run_training(other_model)

    projector_only = training_options(
        models_folder,
        data_folder,
        tmp_path / "third",
        init_from=first,
        tune_mm_mlp_adapter=True,
        **no_change,
    )
    with pytest.raises(ValueError, match="--init_from .* adapter .*`llava merge "):
        run_training(projector_only)

    projector = run_training(
        training_options(
            models_folder, data_folder, tmp_path / "fourth", tune_mm_mlp_adapter=True, max_steps=3
        )
    )
    fifth = run_training(
        training_options(
            models_folder, data_folder, tmp_path / "fifth", init_from=projector, **no_change
        )
    )
    assert_equal_weights(projector_weights(projector), projector_weights(fifth))


@pytest.mark.medium
def test_init_from_with_another_lora_rank_names_the_options_to_pass(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    first = run_training(
        training_options(models_folder, data_folder, tmp_path / "first", max_steps=1)
    )
    options = training_options(
        models_folder, data_folder, tmp_path / "second", init_from=first, lora_r=8
    )
    with pytest.raises(ValueError, match="--lora_r 4 --lora_alpha 16"):
        run_training(options)


@pytest.mark.medium
def test_full_fine_tuning_saves_the_language_model(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    options = training_options(
        models_folder,
        data_folder,
        tmp_path / "out",
        lora_enable=False,
        freeze_backbone=False,
        max_steps=2,
    )
    output = run_training(options)
    base = load_file(models_folder / "mistral" / "model.safetensors")
    tuned = load_file(output / "language_model" / "model.safetensors")
    assert any(not torch.equal(base[name], tuned[name]) for name in base)
    model = load_checkpoint(output)
    assert model.caption(data_folder / "images" / "0.jpg", max_new_tokens=4) is not None


@pytest.mark.medium
def test_projector_has_its_own_learning_rate(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    unchanged = run_training(
        training_options(models_folder, data_folder, tmp_path / "0", max_steps=1, learning_rate=0)
    )
    changed = run_training(
        training_options(
            models_folder,
            data_folder,
            tmp_path / "1",
            max_steps=2,
            learning_rate=0,
            mm_projector_lr=1e-2,
        )
    )
    before, after = trained_weights(unchanged), trained_weights(changed)
    different = {name for name in before if not torch.equal(before[name], after[name])}
    assert different == {"weight", "bias"}, "only the projector may change"
    assert read_log(changed, "learning_rate") == [0, 0], "the log must show --learning_rate"


@pytest.mark.medium
@pytest.mark.parametrize("how", ["full", "lora"])
def test_vision_tower_trains_at_its_own_rate_and_resumes(
    models_folder: Path, data_folder: Path, tmp_path: Path, how: str
) -> None:
    changes: dict[str, object] = {
        "tune_vision_tower": how,
        "gradient_checkpointing": True,
        "lora_dropout": 0.1,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 6,
        "cache_vision_features": "auto",
        "feature_cache_gb": 0,
    }
    uninterrupted = run_training(
        training_options(models_folder, data_folder, tmp_path / "uninterrupted", **changes)
    )
    options = training_options(models_folder, data_folder, tmp_path / "resumed", **changes)
    checkpoint = uninterrupted / "checkpoint-4"
    resumed = run_training([*options, "--resume_from_checkpoint", str(checkpoint)])
    tower = vision_tower_weights(uninterrupted, how)
    assert_equal_weights(tower, vision_tower_weights(resumed, how))

    # With --vision_lr 0, the tower does not change, but the other parts continue to train.
    changes |= {"vision_lr": 0, "save_strategy": "no", "init_from": uninterrupted, "max_steps": 2}
    further = run_training(
        training_options(models_folder, data_folder, tmp_path / "further", **changes)
    )
    assert_equal_weights(tower, vision_tower_weights(further, how))
    before, after = trained_weights(uninterrupted), trained_weights(further)
    assert not all(torch.equal(weight, after[name]) for name, weight in before.items())

    # The trained tower must not be dropped silently.
    frozen_tower = training_options(
        models_folder, data_folder, tmp_path / "other", init_from=uninterrupted, max_steps=1
    )
    with pytest.raises(ValueError, match=f"--tune_vision_tower {how}"):
        run_training(frozen_tower)
    if how == "full":
        own_tower = training_options(
            models_folder,
            data_folder,
            tmp_path / "frozen",
            init_from=uninterrupted,
            vision_tower=uninterrupted / "vision_tower",
            max_steps=1,
        )
        output = run_training(own_tower)
        assert "vision_tower" not in {path.name for path in output.iterdir()}


# ---- bad images ----


@pytest.mark.medium
def test_bad_images_are_replaced_and_counted_and_too_many_stop_the_run(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    package_log: pytest.LogCaptureFixture,
) -> None:
    rows = json.loads((data_folder / "train.json").read_text())
    rows[5]["image"] = "gone.jpg"
    records = tmp_path / "train.json"
    records.write_text(json.dumps(rows))
    options = training_options(
        models_folder, data_folder, tmp_path / "out", train_data_path=records
    )
    run_training(options)
    assert "bad image, train.json row 5" in package_log.text
    assert "bad image: 1" in package_log.text

    for row in rows[2:9]:
        row["image"] = "gone.jpg"
    records.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="--max_bad_images 0.01"):
        run_training(options)


def test_image_folder_without_the_images_is_refused(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    options = training_options(
        models_folder, data_folder, tmp_path / "out", train_image_folder=tmp_path
    )
    with pytest.raises(ValueError, match="--train_image_folder"):
        run_training(options)

"""What a run reports: progress, throughput, unusual gradients, and the best checkpoint."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from training_runs import (
    assert_equal_weights,
    read_log,
    run_training,
    trained_weights,
    training_options,
)
from transformers import TrainerControl, TrainerState

from llava_simplified.model.checkpoint import load_checkpoint
from llava_simplified.model.config import read_checkpoint_config
from llava_simplified.prompt import Message
from llava_simplified.training.callbacks import (
    GradientNormMonitor,
    ProgressLine,
    ProgressLog,
    progress_callback,
)

LOGS = {
    "loss": 2.5,
    "learning_rate": 1e-4,
    "samples_per_second": 10.0,
    "tokens_per_second": 2500.0,
    "padding": 0.1,
}


def test_progress_callback_is_a_line_on_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: True))
    assert isinstance(progress_callback(disable_tqdm=False), ProgressLine)
    assert isinstance(progress_callback(disable_tqdm=True), ProgressLog)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: False))
    assert isinstance(progress_callback(disable_tqdm=False), ProgressLog)


@pytest.mark.parametrize("callback_class", [ProgressLine, ProgressLog])
def test_progress_shows_steps_losses_and_time_left(
    callback_class: type[ProgressLine | ProgressLog],
    capsys: pytest.CaptureFixture[str],
    package_log: pytest.LogCaptureFixture,
) -> None:
    callback = callback_class()
    args: Any = None
    state, control = TrainerState(max_steps=10, is_world_process_zero=True), TrainerControl()
    callback.on_train_begin(args, state, control)
    state.global_step = 5
    callback.on_step_end(args, state, control)
    callback.on_log(args, state, control, logs=dict(LOGS))
    logging.getLogger("llava_simplified.test").warning("a message in between")
    callback.on_log(args, state, control, logs={"eval_loss": 1.25, "eval_cider": 0.5})
    callback.on_train_end(args, state, control)
    captured = capsys.readouterr()
    text = captured.out + captured.err + package_log.text
    for part in ("loss 2.500", "1.0e-04", "2,500 tokens/s", "validation loss 1.2500, CIDEr 0.500"):
        assert part in text
    assert "a message in between" in text
    if callback_class is ProgressLog:
        assert "step 5 of 10: " in text
        assert "0:00:00 left" in text
    else:
        assert "5/10" in text


def test_time_left_does_not_expect_slow_first_steps_to_continue(
    monkeypatch: pytest.MonkeyPatch, package_log: pytest.LogCaptureFixture
) -> None:
    """The first 5 steps take 60 s, because layers are compiled, and all others 1 s each."""
    now = 0.0
    monkeypatch.setattr("llava_simplified.training.callbacks.time.monotonic", lambda: now)
    args: Any = None
    state, control = TrainerState(max_steps=100, is_world_process_zero=True), TrainerControl()
    callback = ProgressLog()
    callback.on_train_begin(args, state, control)
    for now, step in ((60.0, 5), (65.0, 10), (70.0, 15)):  # noqa: B007 - `now` is read by the clock
        state.global_step = step
        callback.on_log(args, state, control, logs=dict(LOGS))
    left = [line.rpartition(", ")[2].split()[0] for line in package_log.text.splitlines()]
    assert left == ["0:19:00", "0:01:30", "0:01:25"]


@pytest.mark.medium
def test_throughput_and_padding_are_logged(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    """The run has three steps of two micro-batches of two samples, in the order of the file."""
    options = training_options(
        models_folder,
        data_folder,
        tmp_path / "out",
        train_sampling_strategy="sequential",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=3,
    )
    output = run_training(options)
    logged = json.loads((output / "trainer_log.jsonl").read_text().splitlines()[0])

    prompt = load_checkpoint(output).prompt
    lengths = []
    for row in json.loads((data_folder / "train.json").read_text()):
        turns = [Message("user", f"<image>\n{row['instruction']}")]
        rendered = prompt.render(turns, row["response"])
        lengths.append(len(rendered.input_ids) + 15)  # 16 image tokens in place of one placeholder
    positions = 0
    for pair in zip(lengths[::2], lengths[1::2]):
        positions += 2 * max(pair)
    assert logged["padding"] == pytest.approx(1 - sum(lengths) / positions)
    tokens_per_sample = logged["tokens_per_second"] / logged["samples_per_second"]
    assert tokens_per_sample == pytest.approx(sum(lengths) / 12)


# ---- values that are not finite, unusual gradients ----


@pytest.mark.medium
@pytest.mark.parametrize("max_grad_norm", [0, 1])
def test_non_finite_value_names_step_samples_and_last_checkpoint(
    models_folder: Path, data_folder: Path, tmp_path: Path, max_grad_norm: float
) -> None:
    output = tmp_path / "out"
    options = training_options(
        models_folder,
        data_folder,
        output,
        max_grad_norm=max_grad_norm,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=1,
        max_steps=5,
        save_strategy="steps",
        save_steps=1,
        learning_rate=1e30,
        warmup_steps=0,
    )
    last = str(output / "checkpoint-1")
    message = rf"at step 2, samples train.json row 1; .*checkpoint: {last}\."
    with pytest.raises(FloatingPointError, match=message):
        run_training(options)


def test_gradient_norm_monitor_warns_ten_times_at_most() -> None:
    monitor = GradientNormMonitor(factor=10, min_history=20)
    first_norms = [1000.0, *[1.0] * 30]
    assert [monitor.check(norm) for norm in first_norms] == [None] * 31
    assert monitor.check(9.0) is None
    warning = monitor.check(50.0)
    assert warning is not None
    assert "gradient norm 50, 50 times the median 1" in warning
    assert sum(monitor.check(50.0) is not None for _ in range(20)) == 9


def test_gradient_norm_after_steps_without_a_gradient_is_not_reported() -> None:
    """In reinforcement learning, the gradient is 0 if all captions of an image have the same reward."""
    monitor = GradientNormMonitor(min_history=5)
    assert [monitor.check(norm) for norm in [0.0] * 10 + [1.0]] == [None] * 11


# ---- the best checkpoint ----


@pytest.mark.medium
@pytest.mark.parametrize("load_best", [True, False])
def test_early_stopping_saves_the_best_or_the_last_checkpoint(
    models_folder: Path, data_folder: Path, tmp_path: Path, load_best: bool
) -> None:
    """The highest loss is declared the best: unlike the lowest one, it is sure to stop improving."""
    options = training_options(
        models_folder,
        data_folder,
        tmp_path / "out",
        eval_data_path=data_folder / "val.json",
        val_image_folder=data_folder / "images",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=3,
        save_total_limit=1,
        max_steps=12,
        lora_dropout=0.1,
        disable_tqdm=True,
        eval_captions=0,
        early_stopping_patience=2,
        load_best_model_at_end=load_best,
        greater_is_better=True,
        learning_rate=0.3,
        lr_scheduler_type="constant",
        warmup_steps=0,
    )
    output = run_training(options)
    curve = read_log(output, "eval_loss")
    best = curve.index(max(curve)) + 1
    assert len(curve) == best + 2 < 12
    assert best % 3 != 0, "the best step must not be one of --save_steps"
    last_step = best if load_best else best + 2
    assert read_checkpoint_config(output)["training"]["steps"] == last_step
    assert not (output / "trainer_state").exists()
    assert (output / f"checkpoint-{best}").exists() == load_best
    if load_best:
        best_weights = trained_weights(output / f"checkpoint-{best}")
        assert_equal_weights(best_weights, trained_weights(output))

"""What a run tells while it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from test_run import adapter, losses, options, run

from llava_simplified.data.records import open_records
from llava_simplified.evaluation.metrics import evaluate
from llava_simplified.evaluation.predictions import read_predictions
from llava_simplified.model.checkpoint import load_checkpoint
from llava_simplified.model.config import read_checkpoint_config
from llava_simplified.prompt import Message
from llava_simplified.training.callbacks import EvalCaptions, GradientAlarm


@pytest.fixture
def watched(data_folder: Path) -> dict[str, Any]:
    return {
        "eval_data_path": data_folder / "val.json",
        "val_image_folder": data_folder / "images",
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "steps",
        "save_steps": 4,
        "max_steps": 12,
        "lora_dropout": 0.1,
        "disable_tqdm": True,
    }


def test_captions_are_the_checkpoints_own_and_change_nothing(
    models_folder: Path, data_folder: Path, tmp_path: Path, watched: dict[str, Any]
) -> None:
    output = run(options(models_folder, data_folder, tmp_path / "watched", **watched))
    assert len(losses(output, "eval_cider")) == 3
    images = data_folder / "images"
    for step, cider in zip((4, 8, 12), losses(output, "eval_cider")):
        samples = read_predictions(output / "eval_captions" / f"step-{step}.jsonl")
        said = load_checkpoint(output / f"checkpoint-{step}").caption(
            [images / f"{n}.jpg" for n in range(12, 16)]
        )
        assert [sample.captions[0] for sample in samples] == said
        assert cider == pytest.approx(
            evaluate(samples, java=False, resamples=0).mean["CIDEr-D"].value
        )
    blind = run(options(models_folder, data_folder, tmp_path / "blind", **watched, eval_captions=0))
    assert not (blind / "eval_captions").exists()
    for name, weight in adapter(blind).items():
        assert torch.equal(weight, adapter(output)[name]), name


def test_as_many_pictures_are_watched_as_asked_for(data_folder: Path, tmp_path: Path) -> None:
    dataset: Any = SimpleNamespace(
        records=open_records(data_folder / "val.json"), load_images=lambda record: None
    )
    for number, watched in ((1, [0]), (2, [0, 2]), (3, [0, 1, 2]), (9, [0, 1, 2, 3])):
        assert [index for index, _ in EvalCaptions(dataset, number, tmp_path).rows] == watched


@pytest.mark.parametrize("wanted", [True, False])
def test_an_early_stop_leaves_the_best_checkpoint(
    models_folder: Path, data_folder: Path, tmp_path: Path, watched: dict[str, Any], wanted: bool
) -> None:
    """The best is taken to be the highest loss: the one that is sure to stop coming."""
    more = {
        **watched,
        "eval_steps": 1,
        "save_steps": 3,
        "save_total_limit": 1,
        "eval_captions": 0,
        "early_stopping_patience": 2,
        "load_best_model_at_end": wanted,
        "greater_is_better": True,
        "learning_rate": 0.3,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
    }
    output = run(options(models_folder, data_folder, tmp_path / "out", **more))
    curve = losses(output, "eval_loss")
    best = curve.index(max(curve)) + 1
    assert len(curve) == best + 2 < 12
    assert best % 3 and read_checkpoint_config(output)["training"]["steps"] == best + 2 * (
        not wanted
    )
    assert not (output / "trainer_state").exists()
    assert (output / f"checkpoint-{best}").exists() == wanted
    for name, weight in adapter(output / f"checkpoint-{best}").items() if wanted else ():
        assert torch.equal(weight, adapter(output)[name]), name


def test_speed_and_padding_are_logged(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    """Three steps of two batches of two: of the six pairs of lengths, in order."""
    more = {
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    output = run(
        options(models_folder, data_folder, tmp_path / "out", **{**more, "logging_steps": 3})
    )
    row = json.loads((output / "trainer_log.jsonl").read_text().splitlines()[0])
    prompt, rows = (
        load_checkpoint(output).prompt,
        json.loads((data_folder / "train.json").read_text()),
    )
    said = [[Message("user", f"<image>\n{row['instruction']}")] for row in rows]
    lengths = [
        len(prompt.render(turns, row["response"]).input_ids) + 15 for turns, row in zip(said, rows)
    ]
    positions = sum(2 * max(pair) for pair in zip(lengths[::2], lengths[1::2]))
    assert row["padding"] == pytest.approx(1 - sum(lengths) / positions)
    assert row["tokens_per_second"] / row["samples_per_second"] == pytest.approx(sum(lengths) / 12)


@pytest.mark.parametrize("max_grad_norm", [0, 1])
def test_what_is_not_finite_is_named(
    models_folder: Path, data_folder: Path, tmp_path: Path, max_grad_norm: float
) -> None:
    more = {
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": 1,
        "max_steps": 5,
    }
    more |= {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e30, "warmup_steps": 0}
    output = tmp_path / "out"
    last = str(output / "checkpoint-1")
    with pytest.raises(
        FloatingPointError,
        match=rf"at step 2, samples train.json row 1; last good checkpoint: {last}\.",
    ):
        run(options(models_folder, data_folder, output, max_grad_norm=max_grad_norm, **more))


def test_an_unusual_gradient_is_said_ten_times_at_most() -> None:
    alarm = GradientAlarm(times=10, known=20)
    assert [alarm.check(norm) for norm in [1000, *[1.0] * 30]] == [
        None
    ] * 31  # the first steps say nothing
    assert alarm.check(9.0) is None
    assert alarm.check(50.0) == "gradient norm 50, 50 times the usual 1"
    assert sum(alarm.check(50.0) is not None for _ in range(20)) == 9


def test_tensorboard_gets_pictures_and_captions(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    watched: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    more = {**watched, "eval_captions": 2, "report_to": "tensorboard", "max_steps": 8}
    run(options(models_folder, data_folder, tmp_path / "out", **more))
    events = accumulator.EventAccumulator(str(tmp_path / "board")).Reload()
    assert events.Tags()["images"] == ["eval_captions/000_12.jpg", "eval_captions/001_14.jpg"]
    assert [event.step for event in events.Images("eval_captions/000_12.jpg")] == [4]
    said = events.Tensors("eval_captions/001_14.jpg/text_summary")
    assert [event.step for event in said] == [4, 8]
    rows = [
        json.loads(line)
        for line in (tmp_path / "out" / "eval_captions" / "step-8.jsonl").read_text().splitlines()
    ]
    assert rows[1]["pred_output"] in said[1].tensor_proto.string_val[0].decode()
    assert [event.step for event in events.Scalars("eval/cider")] == [4, 8]


def test_wandb_gets_pictures_and_captions(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    watched: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The real one, offline: it writes what it would send."""
    wandb = pytest.importorskip("wandb", reason="the wandb extra is not installed")
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_SILENT": "true",
    }.items():
        monkeypatch.setenv(name, value)
    more = {**watched, "eval_captions": 2, "report_to": "wandb", "max_steps": 8}
    run(options(models_folder, data_folder, tmp_path / "out", **more))
    wandb.finish()
    wandb.teardown()  # its service writes on until then
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    pictures = sorted((folder / "files" / "media" / "images").glob("eval_captions_*.png"))
    assert len(pictures) == 2 * 2, "two pictures at two evaluations"
    with Image.open(pictures[0]) as picture:
        assert picture.size == (32, 32)
    rows = [
        json.loads(line)
        for line in (tmp_path / "out" / "eval_captions" / "step-8.jsonl").read_text().splitlines()
    ]
    (record,) = folder.glob("run-*.wandb")
    assert all(f"true: {row['gt_caption']}".encode() in record.read_bytes() for row in rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"metric_for_best_model": "bleu"},
            "--metric_for_best_model is eval_loss or cider, not 'bleu'",
        ),
        (
            {"metric_for_best_model": "cider", "eval_captions": 0},
            "no validation picture to caption",
        ),
        (
            {"early_stopping_patience": 1, "eval_strategy": "no"},
            "--eval_strategy steps --eval_data_path",
        ),
    ],
)
def test_what_can_not_be_watched_is_said_before(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    watched: dict[str, Any],
    change: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        run(options(models_folder, data_folder, tmp_path / "out", **{**watched, **change}))

"""Captions of validation images during training."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from training_runs import (
    assert_equal_weights,
    read_log,
    run_training,
    trained_weights,
    training_options,
)

from llava_simplified.data.records import open_records
from llava_simplified.evaluation.metrics import evaluate
from llava_simplified.evaluation.predictions import read_predictions
from llava_simplified.model.checkpoint import load_checkpoint
from llava_simplified.training.eval_captions import EvalCaptions


@pytest.fixture
def evaluated(data_folder: Path) -> dict[str, Any]:
    """Options of a run with evaluations and saves after steps 4, 8 and 12."""
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


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.medium
def test_captions_are_those_of_the_checkpoint_and_do_not_change_the_run(
    models_folder: Path, data_folder: Path, tmp_path: Path, evaluated: dict[str, Any]
) -> None:
    output = run_training(
        training_options(models_folder, data_folder, tmp_path / "with", **evaluated)
    )
    ciders = read_log(output, "eval_cider")
    assert len(ciders) == 3
    images = [data_folder / "images" / f"{number}.jpg" for number in range(12, 16)]
    for step, cider in zip((4, 8, 12), ciders):
        samples = read_predictions(output / "eval_captions" / f"step-{step}.jsonl").samples
        captions = load_checkpoint(output / f"checkpoint-{step}").caption(images)
        assert [sample.captions[0] for sample in samples] == captions
        score = evaluate(samples, java=False, resamples=0).mean["CIDEr-D"].value
        assert cider == pytest.approx(score)

    without = run_training(
        training_options(
            models_folder, data_folder, tmp_path / "without", **evaluated, eval_captions=0
        )
    )
    assert not (without / "eval_captions").exists()
    assert_equal_weights(trained_weights(without), trained_weights(output))


@pytest.mark.parametrize(
    ("count", "indices"), [(1, [0]), (2, [0, 2]), (3, [0, 1, 2]), (9, [0, 1, 2, 3])]
)
def test_captioned_images_are_spread_evenly(
    data_folder: Path, tmp_path: Path, count: int, indices: list[int]
) -> None:
    dataset: Any = SimpleNamespace(
        records=open_records(data_folder / "val.json"), load_images=lambda record: None
    )
    captions = EvalCaptions(dataset, count, tmp_path)
    assert [index for index, _ in captions.rows] == indices


@pytest.mark.medium
def test_tensorboard_gets_images_and_captions(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    evaluated: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    evaluated |= {"eval_captions": 2, "report_to": "tensorboard", "max_steps": 8}
    run_training(training_options(models_folder, data_folder, tmp_path / "out", **evaluated))
    events = accumulator.EventAccumulator(str(tmp_path / "board")).Reload()
    assert events.Tags()["images"] == ["eval_captions/000_12.jpg", "eval_captions/001_14.jpg"]
    assert [event.step for event in events.Images("eval_captions/000_12.jpg")] == [4]
    texts = events.Tensors("eval_captions/001_14.jpg/text_summary")
    assert [event.step for event in texts] == [4, 8]
    rows = read_rows(tmp_path / "out" / "eval_captions" / "step-8.jsonl")
    assert rows[1]["pred_output"] in texts[1].tensor_proto.string_val[0].decode()
    assert [event.step for event in events.Scalars("eval/cider")] == [4, 8]


@pytest.mark.medium
def test_wandb_gets_images_and_captions(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    evaluated: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The real client runs in offline mode: it writes to files what it would send."""
    wandb = pytest.importorskip("wandb", reason="the wandb extra is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    evaluated |= {"eval_captions": 2, "report_to": "wandb", "max_steps": 8}
    run_training(training_options(models_folder, data_folder, tmp_path / "out", **evaluated))
    wandb.finish()
    wandb.teardown()  # until then its service continues to write
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    images = sorted((folder / "files" / "media" / "images").glob("eval_captions_*.png"))
    assert len(images) == 2 * 2, "expected two images at each of two evaluations"
    with Image.open(images[0]) as image:
        assert image.size == (32, 32)
    rows = read_rows(tmp_path / "out" / "eval_captions" / "step-8.jsonl")
    (run_file,) = folder.glob("run-*.wandb")
    content = run_file.read_bytes()
    assert all(f"reference: {row['gt_caption']}".encode() in content for row in rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"metric_for_best_model": "bleu"},
            "--metric_for_best_model bleu: .*eval_loss.* cider",
        ),
        (
            {"metric_for_best_model": "cider", "eval_captions": 0},
            "--metric_for_best_model cider .*--eval_captions",
        ),
        (
            {"early_stopping_patience": 1, "eval_strategy": "no"},
            "--eval_strategy steps --eval_data_path",
        ),
    ],
)
def test_best_metric_that_is_not_computed_is_refused(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    evaluated: dict[str, Any],
    change: dict[str, Any],
    message: str,
) -> None:
    options = training_options(
        models_folder, data_folder, tmp_path / "out", **{**evaluated, **change}
    )
    with pytest.raises(ValueError, match=message):
        run_training(options)

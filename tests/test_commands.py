"""What the README and LLaVA's tutorial say to type, typed: separate processes, tiny local models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_simplified.arguments import parse_arguments
from llava_simplified.training.train_command import train

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}

LAUNCHERS = {
    "deepspeed": "deepspeed --num_accelerators 2 --master_port 29871",
    "torchrun": "torchrun --nproc_per_node 2 --master_port 29872",
    "accelerate": "accelerate launch --multi_gpu --num_processes 2 --main_process_port 29873",
}


def call(*words: object, folder: Path, **environment: object) -> str:
    done = subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        env=ENVIRONMENT | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def tutorial(models: Path, data: Path) -> list[object]:
    return [
        *("--model_name_or_path", models / "mistral", "--vision_tower", models / "clip"),
        *("--train_data_path", data / "train.json", "--train_image_folder", data / "images"),
        *("--eval_data_path", data / "val.json", "--val_image_folder", data / "images"),
        *("--max_steps", 2),
    ]


def predict(checkpoint: Path, data: Path, folder: Path) -> list[dict]:
    words = [
        "--model-path",
        checkpoint,
        "--data-path",
        data / "val.json",
        "--image-folder",
        data / "images",
    ]
    call(sys.executable, ROOT / "predict.py", *words, "--max-new-tokens", 4, folder=folder)
    return json.loads((folder / "predictions.json").read_text())


@pytest.mark.slow
def test_train_then_predict_as_the_tutorial_says(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    call(sys.executable, ROOT / "train.py", *tutorial(models_folder, data_folder), folder=tmp_path)
    rows = predict(tmp_path / "output" / "mistral-clip", data_folder, tmp_path)
    assert [row["index"] for row in rows] == [i for i in range(4) for _ in range(3)], (
        "three trials a picture"
    )
    assert set(rows[0]) == {"index", "image", "instruction", "gt_caption", "pred_output"}


@pytest.mark.slow
def test_the_launch_scripts_train_and_predict_as_written(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    """Every flag of LLaVA's finetune.sh, in the folders that the tutorial speaks of; only the models are tiny."""
    for split in ("train", "val"):
        (tmp_path / f"conceptual_captions_instruct_{split}_clean.json").symlink_to(
            data_folder / f"{split}.json"
        )
        (tmp_path / split).symlink_to(data_folder / "images")
    tiny = (
        "--model_name_or_path",
        models_folder / "mistral",
        "--vision_tower",
        models_folder / "clip",
    )
    model = tmp_path / "model"
    more = (*tiny, "--output_dir", model, "--max_steps", 2, "--dataloader_num_workers", 1)
    said = call(ROOT / "finetune.sh", *more, folder=tmp_path, DATA=tmp_path)
    assert "lazy_preprocess has no effect" in said
    output = tmp_path / "predictions.json"
    words = ("--output", output, "--max-new-tokens", 4)
    call(ROOT / "predict.sh", *words, folder=tmp_path, DATA=tmp_path, MODEL=model)
    assert len(json.loads(output.read_text())) == 12, "three trials of four pictures"


@pytest.fixture(scope="module")
def loss_of_one(
    models_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> float:
    """The first loss of one process, four pictures a step."""
    output = tmp_path_factory.mktemp("one")
    words = [
        *tutorial(models_folder, data_folder),
        "--per_device_train_batch_size",
        4,
        "--logging_steps",
        1,
    ]
    train(*parse_arguments([*map(str, words), "--seed", "42", "--output_dir", str(output)]))
    return first_loss(output)


def first_loss(folder: Path) -> float:
    return json.loads((folder / "trainer_log.jsonl").read_text().splitlines()[0])["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_are_one_training(
    models_folder: Path, data_folder: Path, tmp_path: Path, launcher: str, loss_of_one: float
) -> None:
    """One training of two processes, not two trainings: 2 steps x 2 processes x 2 pictures are seen."""
    start = [*LAUNCHERS[launcher].split(), ROOT / "train.py"]
    if launcher == "deepspeed":
        pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
        start += ["--deepspeed", ROOT / "ds_configs" / "config_zero2.json"]
    words = [
        *tutorial(models_folder, data_folder),
        "--per_device_train_batch_size",
        2,
        "--logging_steps",
        1,
    ]
    call(*start, *words, "--seed", 42, "--output_dir", tmp_path / "two", folder=tmp_path)
    assert first_loss(tmp_path / "two") == pytest.approx(loss_of_one, rel=1e-3), (
        "the same pictures, whoever sees them"
    )
    assert len(predict(tmp_path / "two", data_folder, tmp_path)) == 12


def test_the_help_needs_no_heavy_import() -> None:
    code = "import sys; from llava_simplified.cli import main; main(['--help']); print('torch' in sys.modules)"
    assert call(sys.executable, "-c", code, folder=ROOT).strip().endswith("False")


def test_a_user_error_is_one_line(tmp_path: Path) -> None:
    words = [sys.executable, ROOT / "predict.py", "--model-path", tmp_path, "--image", "gone.jpg"]
    done = subprocess.run(
        [str(w) for w in words], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "error: no image at gone.jpg"

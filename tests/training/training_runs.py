"""Training runs for the tests: options of a tiny run, and what the run leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from llava_simplified.arguments import parse_arguments
from llava_simplified.training.train_command import train

ROOT = Path(__file__).parents[2]


def training_options(
    models_folder: Path, data_folder: Path, output: Path, **changes: object
) -> list[str]:
    """Return the command line of a short run on tiny models; `changes` replace or add options."""
    values: dict[str, object] = {
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
        **changes,
    }
    argv: list[str] = []
    for name, value in values.items():
        argv += [f"--{name}", str(value)]
    return argv


def run_training(argv: list[str]) -> Path:
    """Train in this process, and return the output folder."""
    return train(*parse_arguments(argv))


def read_log(folder: Path, key: str = "loss") -> list[float]:
    """Return the values of one key of `trainer_log.jsonl`, in the order of the steps."""
    rows = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def trained_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the adapter and the projector of a checkpoint."""
    return {
        **load_file(folder / "adapter" / "adapter_model.safetensors"),
        **load_file(folder / "projector.safetensors"),
    }


def assert_equal_weights(
    expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor]
) -> None:
    """Check that two checkpoints have the same weights, bit for bit."""
    assert expected.keys() == actual.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, actual[name]), name

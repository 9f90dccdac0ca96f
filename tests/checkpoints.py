"""Train checkpoints for the tests of exports, and compute their logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from llava_simplified.arguments import parse_arguments
from llava_simplified.data.images import decode_image
from llava_simplified.export.stock_check import compute_reference
from llava_simplified.model.llava import Llava
from llava_simplified.training.train_command import train

TrainPair = Callable[..., Path]  # (vision tower, language model, **options) -> checkpoint


def train_checkpoint(data_folder: Path, output: Path, **options: object) -> Path:
    """Train for five steps, and return the checkpoint.

    Args:
        data_folder: The fixture: `train.json` and `images/`.
        output: Folder of the run.
        options: Options of `llava train`, which take precedence over the defaults below.
    """
    defaults = {
        "train_data_path": data_folder / "train.json",
        "train_image_folder": data_folder / "images",
        "output_dir": output,
        "max_steps": 5,
        "learning_rate": 1e-2,
        "lora_r": 4,
        "cache_vision_features": "off",
        "disable_tqdm": True,
    }
    argv: list[str] = []
    for name, value in (defaults | options).items():
        values = value if isinstance(value, list) else [value]
        argv += [f"--{name}", *map(str, values)]
    return train(*parse_arguments(argv))


def first_logits(model: Llava, image: Path) -> torch.Tensor:
    """Return the logits from which a model chooses the first token of an image's caption."""
    return compute_reference(model, decode_image(image.read_bytes())).logits

"""Words of the demo's command lines that several of its commands share."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path

import yaml

from llava_simplified.demo.assets import DemoAssets
from llava_simplified.doctor_command import has_fast_bfloat16
from llava_simplified.options import quote_words
from llava_simplified.recipes import resolve_recipe

logger = logging.getLogger(__name__)


def option_words(**values: object) -> list[str]:
    """Return command-line options: `option_words(max_steps=5)` is ["--max_steps", "5"]."""
    argv: list[str] = []
    for name, value in values.items():
        argv += [f"--{name}", str(value)]
    return argv


def number_of_steps(recipe: str, max_steps: int | None) -> int:
    """Return the number of steps of a recipe, at most `max_steps`."""
    steps: int = yaml.safe_load(resolve_recipe(recipe).read_text(encoding="utf-8"))["max_steps"]
    return steps if max_steps is None else min(steps, max_steps)


def training_words(assets: DemoAssets, seed: int) -> list[str]:
    """Return the options of all training runs: models, data, seed, and what suits this machine.

    Args:
        assets: The models and images.
        seed: Seed of the training.
    """
    words = model_words(assets)
    words += option_words(
        train_data_path=assets.train_json,
        train_image_folder=assets.images,
        eval_data_path=assets.preview_json,
        val_image_folder=assets.images,
        seed=seed,
    )
    return [*words, *_machine_words()]


def model_words(assets: DemoAssets) -> list[str]:
    """Return the options that name the pretrained models."""
    return option_words(
        model_name_or_path=assets.language_model,
        vision_tower=assets.vision_tower,
    )


def _machine_words() -> list[str]:
    """Return the options that adapt the recipes to this machine."""
    import torch

    from llava_simplified.training.kernels import can_compile

    argv: list[str] = []
    # torch.compile generates C++ code for the CPU.
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if not can_compile("cpu" if accelerator is None else accelerator.type):
        logger.info(
            "There is no compiler (C++ for the CPU, Triton for a GPU), so layers are not compiled. Training takes "
            "50 % longer."
        )
        argv += option_words(compile_layers=False)
    if not torch.accelerator.is_available() and not has_fast_bfloat16():
        logger.info("bfloat16 is slow on this CPU. Training uses float32.")
        argv += option_words(bf16=False)
    return argv


def predict_words(
    assets: DemoAssets, model: Path, predictions: Path, limit: int | None
) -> list[str]:
    """Return the command that captions the held-out images.

    Args:
        assets: The models and images.
        model: The checkpoint.
        predictions: Output file.
        limit: Maximum number of images, or None.
    """
    # Decode greedily, because each image has one right answer. 24 tokens are enough for the names.
    words = ["predict", "--model-path", str(model), "--data-path", str(assets.val_json)]
    words += ["--image-folder", str(assets.images), "--temperature", "0"]
    words += ["--max-new-tokens", "24", "--batch-size", "50", "--output", str(predictions)]
    if limit:
        words += ["--limit", str(limit)]
    return words


def evaluate_words(
    assets: DemoAssets, predictions: list[Path], model: Path, output: Path
) -> list[str]:
    """Return the command that scores prediction files, and writes `scores.json` and `report.html`.

    Args:
        assets: The models and images.
        predictions: Prediction files; later ones are compared with the first.
        model: The checkpoint whose settings and curves the report shows.
        output: Output folder.
    """
    # Pass --train-captions, so that the report distinguishes copied captions from new ones. Pass --no-java
    # to skip the metrics that require Java.
    words = ["evaluate", *map(str, predictions), "--train-captions", str(assets.train_json)]
    words += ["--image-folder", str(assets.images), "--model-path", str(model)]
    words += ["--output", str(output / "scores.json"), "--report", str(output / "report.html")]
    return [*words, "--no-java"]


def llava_word() -> str:
    """Return the word that starts `llava` in a shell: its path, if the shell would not find it by name."""
    llava = "llava"
    if shutil.which(llava) is None:  # the virtual environment is not activated
        llava = str(Path(sys.executable).with_name(llava))
    return quote_words([llava])

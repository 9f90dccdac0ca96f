"""Build the command-line arguments that several commands of the demo share."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path

import yaml

from llava_simplified.demo.assets import DemoAssets
from llava_simplified.options import quote_arguments
from llava_simplified.recipes import resolve_recipe

logger = logging.getLogger(__name__)


def option_argv(**values: object) -> list[str]:
    """Return values as command-line options: `option_argv(max_steps=5)` returns ["--max_steps", "5"]."""
    argv: list[str] = []
    for name, value in values.items():
        argv += [f"--{name}", str(value)]
    return argv


def number_of_steps(recipe: str, max_steps: int | None) -> int:
    """Return the number of steps of a recipe, at most `max_steps`."""
    steps: int = yaml.safe_load(resolve_recipe(recipe).read_text(encoding="utf-8"))["max_steps"]
    return steps if max_steps is None else min(steps, max_steps)


def training_argv(assets: DemoAssets, seed: int) -> list[str]:
    """Return the options of all training runs: models, data, seed, and the settings for this machine.

    Args:
        assets: The models and images.
        seed: Seed of the training.
    """
    argv = model_argv(assets)
    # Evaluate only a part of the validation images while the model trains, since every evaluation takes time.
    argv += option_argv(
        train_data_path=assets.train_json,
        train_image_folder=assets.images,
        eval_data_path=assets.preview_json,
        val_image_folder=assets.images,
        seed=seed,
    )
    return [*argv, *_machine_argv()]


def model_argv(assets: DemoAssets) -> list[str]:
    """Return the options that name the pretrained models."""
    return option_argv(
        model_name_or_path=assets.language_model,
        vision_tower=assets.vision_tower,
    )


def _machine_argv() -> list[str]:
    """Return the options that adapt the recipes to this machine."""
    import torch

    from llava_simplified.model.cpu_dtype import trains_fast_in
    from llava_simplified.training.kernels import can_compile

    argv: list[str] = []
    # torch.compile generates C++ code for a CPU and Triton code for a GPU, and both need a compiler.
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if not can_compile("cpu" if accelerator is None else accelerator.type):
        logger.info(
            "No compiler was found (C++ for the CPU, Triton for a GPU), so layers are not compiled. Training takes "
            "50 % longer."
        )
        argv += option_argv(compile_layers=False)
    # The recipes use bfloat16, which CPUs without instructions for it emulate slowly.
    if not torch.accelerator.is_available() and not trains_fast_in(torch.bfloat16):
        logger.info("bfloat16 is slow on this CPU. Training uses float32.")
        argv += option_argv(bf16=False)
    return argv


def predict_argv(
    assets: DemoAssets,
    model: Path,
    predictions: Path,
    limit: int | None,
    num_samples: int | None = None,
) -> list[str]:
    """Return the command that captions the held-out images.

    Args:
        assets: The models and images.
        model: The checkpoint.
        predictions: Output file.
        limit: Maximum number of images; None for all.
        num_samples: Number of captions to sample for each image; None to decode one caption greedily.
    """
    argv = ["predict", "--model-path", str(model), "--data-path", str(assets.val_json)]
    argv += ["--image-folder", str(assets.images)]
    if num_samples is None:
        argv += ["--temperature", "0"]
    else:
        argv += ["--temperature", "1", "--trials", str(num_samples), "--seed", "0"]
    # 24 tokens are enough for the names of emoji.
    argv += ["--max-new-tokens", "24", "--batch-size", "50", "--output", str(predictions)]
    if limit:
        argv += ["--limit", str(limit)]
    return argv


def evaluate_argv(
    assets: DemoAssets, predictions: list[Path], model: Path, output: Path
) -> list[str]:
    """Return the command that scores prediction files, and writes `scores.json` and `report.html`.

    Args:
        assets: The models and images.
        predictions: Prediction files. If there are several, the others are compared with the first.
        model: The checkpoint whose settings and curves the report shows.
        output: Output folder.
    """
    # Pass --train-captions, so that the report distinguishes copied captions from new ones. Pass --no-java
    # to skip the metrics that require Java.
    argv = ["evaluate", *map(str, predictions), "--train-captions", str(assets.train_json)]
    argv += ["--image-folder", str(assets.images), "--model-path", str(model)]
    argv += ["--output", str(output / "scores.json"), "--report", str(output / "report.html")]
    return [*argv, "--no-java"]


def llava_program() -> str:
    """Return how to call `llava` in a shell, for commands that the user can paste: its name or its path."""
    llava = "llava"
    # If the virtual environment is not activated, the shell does not find the program by its name.
    if shutil.which(llava) is None:
        llava = str(Path(sys.executable).with_name(llava))
    return quote_arguments([llava])

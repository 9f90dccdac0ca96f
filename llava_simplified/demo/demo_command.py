"""`llava demo`: train, caption and evaluate with small pretrained models and emoji drawings.

The demo downloads models and images (`assets.py`), then prints and runs the same `llava` commands that you
would run on your own data.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from llava_simplified import cli
from llava_simplified.demo.assets import DemoAssets, fetch
from llava_simplified.doctor_command import has_fast_bfloat16
from llava_simplified.options import CommandParser, add_limit_option, print_text
from llava_simplified.recipes import resolve_recipe

logger = logging.getLogger(__name__)


class Step(NamedTuple):
    """One command of the demo: a title, and the arguments of `llava`."""

    title: str
    argv: list[str]


def build_parser() -> CommandParser:
    """Return the parser of `llava demo`."""
    parser = CommandParser(
        "llava demo",
        "Train, caption and evaluate with small pretrained models, on 2 CPU cores in 20 minutes.",
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        help="Folder for downloaded models and images (default: ~/.cache/llava-simplified)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output/demo"),
        help="Output folder (default: %(default)s)",
    )
    parser.add_argument(
        "--max-steps",
        type=int,
        help="Maximum number of steps of each training stage, for a quick try",
    )
    add_limit_option(parser, "images when captioning")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run `llava demo`."""
    args = build_parser().parse_args(argv)
    start = time.monotonic()
    # Delete the partial captions of an interrupted demo: this run trains a new model, so it must not
    # resume them.
    for part in args.output.glob("predictions.json.part*"):
        part.unlink()
    assets = fetch(args.cache_dir)
    for step in plan_steps(assets, args.output, args.max_steps, args.limit):
        seconds = time.monotonic() - start
        print_text(f"\n== {step.title} ({seconds:.0f} s)")
        print_text(f"$ llava {shlex.join(step.argv)}")
        status = cli.main(step.argv)
        if status:
            return status
    scores = json.loads((args.output / "scores.json").read_text(encoding="utf-8"))
    # scores.json has one entry per prediction file, and the demo evaluates one file.
    first_scores = next(iter(scores.values()))
    print_text(summarize(first_scores, args.output, time.monotonic() - start))
    return 0


def plan_steps(
    assets: DemoAssets, output: Path, max_steps: int | None, limit: int | None
) -> list[Step]:
    """Return the commands of the demo, in order.

    Args:
        assets: The models and images.
        output: Output folder.
        max_steps: Maximum number of steps of each training stage, or None.
        limit: Maximum number of images to caption, or None.
    """
    # Options that several commands share.
    models = _options(
        model_name_or_path=assets.language_model,
        vision_tower=assets.vision_tower,
    )
    records = _options(
        train_data_path=assets.train_json,
        train_image_folder=assets.images,
        eval_data_path=assets.val_json,
        val_image_folder=assets.images,
    )
    train = [*models, *records, *_training_options()]
    projector = str(output / "projector")
    model = str(output / "model")
    predictions = str(output / "predictions.json")

    # Repeat the options of the recipes that affect the tokens: 3 x 3 image tokens, and a template without
    # roles. `llava inspect` does not read recipes.
    inspect = ["inspect", "--data", str(assets.train_json), "--image_folder", str(assets.images)]
    inspect += ["--template", "bare", "--count", "1", "--mm_token_pool", "3", *models]

    # Train in LLaVA's two stages. The first stage trains only the projector: an adapter that is trained
    # from the start would adapt to the image tokens of a random projector.
    stage1 = ["train", "--config", "demo_projector", *train, "--output_dir", projector]
    stage1 += _fewer_steps("demo_projector", max_steps)

    stage2 = ["train", "--config", "demo", "--pretrain_mm_mlp_adapter", projector, *train]
    stage2 += ["--output_dir", model, *_fewer_steps("demo", max_steps)]

    # Decode greedily, because each image has one right answer. 24 tokens are enough for the names.
    predict = ["predict", "--model-path", model, "--data-path", str(assets.val_json)]
    predict += ["--image-folder", str(assets.images), "--temperature", "0"]
    predict += ["--max-new-tokens", "24", "--batch-size", "50", "--output", predictions]
    if limit:
        predict += ["--limit", str(limit)]

    # Pass --train-captions, so that the report distinguishes copied captions from new ones. Pass --no-java
    # to skip the metrics that require Java.
    evaluate = ["evaluate", predictions, "--train-captions", str(assets.train_json)]
    evaluate += ["--image-folder", str(assets.images), "--model-path", model]
    evaluate += ["--output", str(output / "scores.json"), "--report", str(output / "report.html")]
    evaluate += ["--no-java", "--title", "LLaVA Simplified: captions of unseen images"]

    return [
        Step("Inspect the tokens of a training sample", inspect),
        Step("Stage 1: train the projector only", stage1),
        Step("Stage 2: train LoRA on the language model, and the projector further", stage2),
        Step("Caption images that the model was not trained on", predict),
        Step("Scores and report", evaluate),
    ]


def _options(**values: object) -> list[str]:
    """Return command-line options: `_options(max_steps=5)` is ["--max_steps", "5"]."""
    argv: list[str] = []
    for name, value in values.items():
        argv += [f"--{name}", str(value)]
    return argv


def _fewer_steps(recipe: str, max_steps: int | None) -> list[str]:
    """Return the option that ends a stage after `max_steps`, if its recipe has more steps."""
    steps = yaml.safe_load(resolve_recipe(recipe).read_text(encoding="utf-8"))["max_steps"]
    if max_steps is None or max_steps >= steps:
        return []
    return _options(max_steps=max_steps)


def _training_options() -> list[str]:
    """Return the options that adapt the recipes to this machine."""
    import torch

    argv: list[str] = []
    # torch.compile generates C++ code for the CPU.
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        logger.info(
            "There is no C++ compiler, so layers are not compiled. Training takes 50 % longer."
        )
        argv += _options(compile_layers=False)
    if not torch.accelerator.is_available() and not has_fast_bfloat16():
        logger.info("bfloat16 is slow on this CPU. Training uses float32.")
        argv += _options(bf16=False)
    return argv


def summarize(
    scores: Mapping[str, Mapping[str, Sequence[float]]], output: Path, seconds: float
) -> str:
    """Return the final output of the demo: scores, paths, and a command to try next.

    Args:
        scores: "mean", and "shuffled" (each caption compared with the reference of a different image);
            both map the name of a metric to its value and confidence interval.
        output: Output folder.
        seconds: Duration of the demo.
    """
    # Show the shuffled scores too: they are what the model would reach without using the image.
    mean = scores["mean"]
    shuffled = scores["shuffled"]
    llava = "llava"
    if shutil.which(llava) is None:  # the virtual environment is not activated
        llava = str(Path(sys.executable).with_name(llava))
    lines = [
        "",
        f"word F1 {mean['word F1'][0]:.3f} (images shuffled: {shuffled['word F1'][0]:.3f}), "
        f"exact match {mean['exact match'][0]:.1%} (shuffled: {shuffled['exact match'][0]:.1%})",
        f"report: {(output / 'report.html').resolve()}",
        f"model:  {(output / 'model').resolve()}",
        f"The demo took {seconds / 60:.1f} minutes. Now caption your own image:",
        f"  {llava} predict --model-path {shlex.quote(str(output / 'model'))} --image YOUR_IMAGE.png",
    ]
    return "\n".join(lines)

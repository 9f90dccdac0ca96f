"""`llava demo`: the whole recipe on small pretrained models and emoji drawings.

The demo has no code of its own for training or captioning. It downloads models and images (`assets.py`),
and runs the commands that you would run on your own data, after printing each of them.
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
from llava_simplified.options import CommandParser, add_limit_option
from llava_simplified.recipes import resolve_recipe

logger = logging.getLogger(__name__)


class Step(NamedTuple):
    """One command of the demo: a title, and the words behind `llava`."""

    title: str
    words: list[str]


def build_parser() -> CommandParser:
    """Return the parser of `llava demo`."""
    parser = CommandParser(
        "llava demo",
        "Train, caption and evaluate with small pretrained models, on 2 CPU cores in 20 minutes.",
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        help="Folder of the downloaded models and images (default: ~/.cache/llava-simplified)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output/demo"),
        help="Folder of the results (default: %(default)s)",
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
    # Captions of an interrupted demo: this one trains another model, and must not continue them.
    for part in args.output.glob("predictions.json.part*"):
        part.unlink()
    assets = fetch(args.cache_dir)
    for step in plan_steps(assets, args.output, args.max_steps, args.limit):
        seconds = time.monotonic() - start
        print(f"\n== {step.title} ({seconds:.0f} s)", flush=True)
        print(f"$ llava {shlex.join(step.words)}", flush=True)
        status = cli.main(step.words)
        if status:
            return status
    scores = json.loads((args.output / "scores.json").read_text(encoding="utf-8"))
    first_file = next(iter(scores.values()))
    print(summarize(first_file, args.output, time.monotonic() - start))
    return 0


def plan_steps(
    assets: DemoAssets, output: Path, max_steps: int | None, limit: int | None
) -> list[Step]:
    """Return the commands of the demo, in order.

    Args:
        assets: The models and images.
        output: Folder of the results.
        max_steps: Maximum number of steps of each training stage, or None.
        limit: Maximum number of images to caption, or None.
    """
    # Options that several commands have in common.
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

    # The options that the recipes set, as far as they decide what the model is shown: 3 x 3 image tokens,
    # and a template without roles.
    inspect = ["inspect", "--data", str(assets.train_json), "--image_folder", str(assets.images)]
    inspect += ["--template", "bare", "--count", "1", "--mm_token_pool", "3", *models]

    # LLaVA's two stages. First the projector learns to translate, with everything else frozen; an adapter
    # that started at the same time would adapt to random image tokens.
    stage1 = ["train", "--config", "demo_projector", *train, "--output_dir", projector]
    stage1 += _fewer_steps("demo_projector", max_steps)

    stage2 = ["train", "--config", "demo", "--pretrain_mm_mlp_adapter", projector, *train]
    stage2 += ["--output_dir", model, *_fewer_steps("demo", max_steps)]

    # Greedy, because each image has one right answer. 24 tokens are enough for the names.
    predict = ["predict", "--model-path", model, "--data-path", str(assets.val_json)]
    predict += ["--image-folder", str(assets.images), "--temperature", "0"]
    predict += ["--max-new-tokens", "24", "--batch-size", "50", "--output", predictions]
    if limit:
        predict += ["--limit", str(limit)]

    # `--train-captions` lets the report tell copied captions from new ones. `--no-java`: scores that need
    # Java are skipped.
    evaluate = ["evaluate", predictions, "--train-captions", str(assets.train_json)]
    evaluate += ["--image-folder", str(assets.images), "--model-path", model]
    evaluate += ["--output", str(output / "scores.json"), "--report", str(output / "report.html")]
    evaluate += ["--no-java", "--title", "LLaVA Simplified: captions of unseen images"]

    return [
        Step("What the model is shown, and which tokens it is trained on", inspect),
        Step("Stage 1: train the projector alone", stage1),
        Step("Stage 2: train LoRA on the language model, and the projector further", stage2),
        Step("Caption images that the model was not trained on", predict),
        Step("Scores and report", evaluate),
    ]


def _options(**values: object) -> list[str]:
    """Return options as words of a command line."""
    words: list[str] = []
    for name, value in values.items():
        words += [f"--{name}", str(value)]
    return words


def _fewer_steps(recipe: str, max_steps: int | None) -> list[str]:
    """Return the option that ends a stage after `max_steps`, if its recipe has more steps."""
    steps = yaml.safe_load(resolve_recipe(recipe).read_text(encoding="utf-8"))["max_steps"]
    if max_steps is None or max_steps >= steps:
        return []
    return _options(max_steps=max_steps)


def _training_options() -> list[str]:
    """Return the options that adapt the recipes to this machine."""
    import torch

    words: list[str] = []
    # torch.compile generates C++ code for the CPU.
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        logger.info(
            "There is no C++ compiler, so layers are not compiled. Training takes 50 % longer."
        )
        words += _options(compile_layers=False)
    if not torch.accelerator.is_available() and not has_fast_bfloat16():
        logger.info("bfloat16 is slow on this CPU. Training uses float32.")
        words += _options(bf16=False)
    return words


def summarize(
    scores: Mapping[str, Mapping[str, Sequence[float]]], output: Path, seconds: float
) -> str:
    """Return the last lines of the demo: scores, where everything is, and what to do next.

    Args:
        scores: "mean", and "shuffled" (each caption scored against another image's), each a mapping
            from the name of a score to its value and interval.
        output: Folder of the results.
        seconds: Duration of the demo.
    """
    # Scores of shuffled images show what guessing would reach: captions that are right without looking.
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
        f"The demo took {seconds / 60:.1f} minutes. Caption an image of your own:",
        f"  {llava} predict --model-path {shlex.quote(str(output / 'model'))} --image YOUR_IMAGE.png",
    ]
    return "\n".join(lines)

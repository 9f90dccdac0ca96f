"""`llava demo`: train, caption and evaluate with small pretrained models and emoji drawings.

The demo downloads models and images (`assets.py`), then prints and runs the same `llava` commands that you
would run on your own data.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from pathlib import Path

import yaml

from llava_simplified.demo.assets import DemoAssets, fetch
from llava_simplified.demo.demo_images import NUM_HELD_OUT
from llava_simplified.demo.demo_steps import Demo, Step
from llava_simplified.demo.progress import captioning_progress, training_progress
from llava_simplified.demo.terminal import redirect_output
from llava_simplified.doctor_command import has_fast_bfloat16
from llava_simplified.jobs import format_duration
from llava_simplified.options import CommandParser, add_limit_option, print_text, quote_words
from llava_simplified.recipes import resolve_recipe

logger = logging.getLogger(__name__)


def build_parser() -> CommandParser:
    """Return the parser of `llava demo`."""
    parser = CommandParser(
        "llava demo",
        "Train, caption and evaluate with small pretrained models, on 2 CPU cores in 10 minutes.",
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
        "--long",
        action="store_true",
        help="Train three times as long, for better captions",
    )
    parser.add_argument(
        "--max-steps",
        type=int,
        help="Maximum number of steps of each training stage, for a quick try",
    )
    parser.add_argument(
        "--seed", type=int, default=42, help="Seed of the training (default: %(default)s)"
    )
    add_limit_option(parser, "images when captioning")
    parser.add_argument(
        "--download-only", action="store_true", help="Download models and images, and stop"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run `llava demo`."""
    args = build_parser().parse_args(argv)
    if args.download_only:
        assets = fetch(args.cache_dir)
        print_text(
            f"models: {assets.language_model}, {assets.vision_tower}\nimages: {assets.images}"
        )
        return 0
    output: Path = args.output
    output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with redirect_output(output / "log.txt") as terminal:
        demo = Demo(output, terminal)
        assets = demo.download(args.cache_dir)
        steps = plan_steps(
            assets,
            output,
            recipe="demo_long" if args.long else "demo",
            max_steps=args.max_steps,
            seed=args.seed,
            limit=args.limit,
        )
        status = demo.run(assets, steps)
        if status:
            return status
        terminal.print(summarize(output, time.monotonic() - start))
    return 0


def plan_steps(
    assets: DemoAssets,
    output: Path,
    *,
    recipe: str = "demo",
    max_steps: int | None = None,
    seed: int = 42,
    limit: int | None = None,
) -> list[Step]:
    """Return the commands of the demo, in order.

    Args:
        assets: The models and images.
        output: Output folder.
        recipe: Recipe of the second training stage.
        max_steps: Maximum number of steps of each training stage, or None.
        seed: Seed of the training.
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
        eval_data_path=assets.preview_json,
        val_image_folder=assets.images,
    )
    train = [*models, *records, "--seed", str(seed), *_training_options()]
    projector = output / "projector"
    model = output / "model"
    predictions = output / "predictions.json"
    projector_steps = _number_of_steps("demo_projector", max_steps)
    model_steps = _number_of_steps(recipe, max_steps)
    num_images = min(limit or NUM_HELD_OUT, NUM_HELD_OUT)

    # Repeat the options of the recipes that affect the tokens: 3 x 3 image tokens, and a template without
    # roles. `llava inspect` does not read recipes.
    inspect = ["inspect", "--data", str(assets.train_json), "--image_folder", str(assets.images)]
    inspect += ["--template", "bare", "--count", "1", "--mm_token_pool", "3", *models]

    # Train in LLaVA's two stages. The first stage trains only the projector: an adapter that is trained
    # from the start would adapt to the image tokens of a random projector.
    stage1 = ["train", "--config", "demo_projector", *train, "--output_dir", str(projector)]
    stage1 += _options(max_steps=projector_steps)
    stage2 = ["train", "--config", recipe, "--pretrain_mm_mlp_adapter", str(projector), *train]
    stage2 += _options(output_dir=model, max_steps=model_steps)

    # Decode greedily, because each image has one right answer. 24 tokens are enough for the names.
    predict = ["predict", "--model-path", str(model), "--data-path", str(assets.val_json)]
    predict += ["--image-folder", str(assets.images), "--temperature", "0"]
    predict += ["--max-new-tokens", "24", "--batch-size", "50", "--output", str(predictions)]
    if limit:
        predict += ["--limit", str(limit)]

    # Pass --train-captions, so that the report distinguishes copied captions from new ones. Pass --no-java
    # to skip the metrics that require Java.
    evaluate = ["evaluate", str(predictions), "--train-captions", str(assets.train_json)]
    evaluate += ["--image-folder", str(assets.images), "--model-path", str(model)]
    evaluate += ["--output", str(output / "scores.json"), "--report", str(output / "report.html")]
    evaluate += ["--no-java", "--title", "LLaVA Simplified: captions of unseen images"]

    return [
        Step("Inspect the tokens of a training sample", inspect, seconds=8),
        Step(
            "Stage 1: train the projector only",
            stage1,
            seconds=50,
            read_progress=lambda: training_progress(projector, projector_steps),
            run_folder=projector,
        ),
        Step(
            "Stage 2: train LoRA on the language model, and the projector further",
            stage2,
            seconds=1150 if recipe == "demo_long" else 380,
            read_progress=lambda: training_progress(model, model_steps),
            run_folder=model,
        ),
        Step(
            "Caption images that the model was not trained on",
            predict,
            seconds=25,
            read_progress=lambda: captioning_progress(predictions, num_images),
        ),
        Step("Scores and report", evaluate, seconds=10),
    ]


def _options(**values: object) -> list[str]:
    """Return command-line options: `_options(max_steps=5)` is ["--max_steps", "5"]."""
    argv: list[str] = []
    for name, value in values.items():
        argv += [f"--{name}", str(value)]
    return argv


def _number_of_steps(recipe: str, max_steps: int | None) -> int:
    """Return the number of steps of a recipe, at most `max_steps`."""
    steps: int = yaml.safe_load(resolve_recipe(recipe).read_text(encoding="utf-8"))["max_steps"]
    return steps if max_steps is None else min(steps, max_steps)


def _training_options() -> list[str]:
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
        argv += _options(compile_layers=False)
    if not torch.accelerator.is_available() and not has_fast_bfloat16():
        logger.info("bfloat16 is slow on this CPU. Training uses float32.")
        argv += _options(bf16=False)
    return argv


def summarize(output: Path, seconds: float) -> str:
    """Return the final output of the demo: scores, paths, and three commands to try next.

    Args:
        output: Output folder, with `scores.json`.
        seconds: Duration of the demo.
    """
    scores = json.loads((output / "scores.json").read_text(encoding="utf-8"))
    # scores.json has one entry per prediction file, and the demo evaluates one file.
    first_scores = next(iter(scores.values()))
    # Show the shuffled scores too: they are what the model would reach without using the image.
    mean = first_scores["mean"]
    shuffled = first_scores["shuffled"]
    llava = "llava"
    if shutil.which(llava) is None:  # the virtual environment is not activated
        llava = str(Path(sys.executable).with_name(llava))
    llava = quote_words([llava])
    model = quote_words([str(output / "model")])
    lines = [
        "",
        f"word F1 {mean['word F1'][0]:.3f} (images shuffled: {shuffled['word F1'][0]:.3f}), "
        f"exact match {mean['exact match'][0]:.1%} (shuffled: {shuffled['exact match'][0]:.1%})",
        f"report: {(output / 'report.html').resolve()}",
        f"This took {format_duration(seconds)}.",
        "",
        "Caption an image of your own:",
        f"  {llava} caption YOUR_IMAGE.png --model-path {model}",
        "Open the web page, at http://127.0.0.1:8000:",
        f"  {llava} serve {model}",
        "Train on a folder of your images, with a caption beside each (cat.jpg, cat.txt):",
        f"  {llava} train --data YOUR_FOLDER",
    ]
    return "\n".join(lines)

"""`llava demo`: train, caption and evaluate with small pretrained models and emoji drawings.

The demo downloads models and images (`assets.py`), then prints and runs the same `llava` commands that you
would run on your own data.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from llava_simplified.demo.assets import DemoAssets, fetch
from llava_simplified.demo.demo_images import NUM_HELD_OUT
from llava_simplified.demo.demo_options import (
    evaluate_argv,
    llava_program,
    model_argv,
    number_of_steps,
    option_argv,
    predict_argv,
    training_argv,
)
from llava_simplified.demo.demo_steps import Demo, Step, caption_step, evaluate_step
from llava_simplified.demo.progress import training_progress
from llava_simplified.demo.reward_demo import EXPECTED_SECONDS as REWARD_SECONDS
from llava_simplified.demo.reward_demo import FOLDER as REWARD_FOLDER
from llava_simplified.demo.reward_demo import NUM_STEPS as NUM_REWARD_STEPS
from llava_simplified.demo.reward_demo import (
    SAMPLES_FOLDER,
    check_finished,
    forget_outdated_steps,
    plan_reward_steps,
    summarize_rewards,
)
from llava_simplified.demo.terminal import redirect_output
from llava_simplified.jobs import format_duration
from llava_simplified.options import (
    CommandParser,
    add_limit_option,
    check_at_least,
    print_text,
    quote_arguments,
)


def build_parser() -> CommandParser:
    """Return the parser of `llava demo`."""
    parser = CommandParser(
        "llava demo",
        "Train, caption and evaluate with small pretrained models, on 2 CPU cores in 10 to 35 minutes.",
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
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--long",
        action="store_true",
        help="Train three times as long, for better captions",
    )
    kinds.add_argument(
        "--reward",
        action="store_true",
        help="Continue training the model of a finished demo with reinforcement learning: its own captions are scored, "
        "and the scores are the rewards",
    )
    parser.add_argument(
        "--max-steps",
        type=int,
        help="Maximum number of steps of each training stage, for a quick test",
    )
    parser.add_argument(
        "--seed", type=int, default=42, help="Seed of the training (default: %(default)s)"
    )
    add_limit_option(parser, "images in the captioning step")
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
    check_at_least(1, limit=args.limit, max_steps=args.max_steps)
    return _run_reward_demo(args) if args.reward else _run_demo(args)


def _run_demo(args: argparse.Namespace) -> int:
    """Run the demo, and return the exit status."""
    output: Path = args.output
    output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    # The log contains the output of all commands; the terminal shows only the progress.
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


def _run_reward_demo(args: argparse.Namespace) -> int:
    """Run `llava demo --reward`, and return the exit status."""
    check_finished(args.output, args.limit)
    forget_outdated_steps(args.output)
    # Write to a separate folder, because the results of the demo are needed for the comparison.
    folder: Path = args.output / REWARD_FOLDER
    (folder / SAMPLES_FOLDER).mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with redirect_output(folder / "log.txt") as terminal:
        demo = Demo(
            folder,
            terminal,
            num_steps=NUM_REWARD_STEPS,
            expected_seconds=REWARD_SECONDS,
        )
        assets = demo.download(args.cache_dir)
        steps = plan_reward_steps(
            assets, args.output, max_steps=args.max_steps, seed=args.seed, limit=args.limit
        )
        status = demo.run(assets, steps)
        if status:
            return status
        terminal.print(summarize_rewards(args.output, time.monotonic() - start))
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
        max_steps: Maximum number of steps of each training stage; None for the numbers in the recipes.
        seed: Seed of the training runs.
        limit: Maximum number of images to caption; None for all held-out images.
    """
    train = training_argv(assets, seed)
    projector = output / "projector"
    model = output / "model"
    predictions = output / "predictions.json"
    projector_steps = number_of_steps("demo_projector", max_steps)
    model_steps = number_of_steps(recipe, max_steps)
    num_images = min(limit or NUM_HELD_OUT, NUM_HELD_OUT)

    # `llava inspect` does not read recipes, so repeat their options that affect the tokens: an image becomes 3 x 3
    # tokens, and the template has no roles.
    inspect = ["inspect", "--data", str(assets.train_json), "--image_folder", str(assets.images)]
    inspect += ["--template", "bare", "--count", "1", "--mm_token_pool", "3", *model_argv(assets)]

    # Train in LLaVA's two stages. The first stage trains only the projector: an adapter that is trained
    # from the start would adapt to the image tokens of a random projector.
    stage1 = ["train", "--config", "demo_projector", *train, "--output_dir", str(projector)]
    stage1 += option_argv(max_steps=projector_steps)
    stage2 = ["train", "--config", recipe, "--pretrain_mm_mlp_adapter", str(projector), *train]
    stage2 += option_argv(output_dir=model, max_steps=model_steps)

    predict = predict_argv(assets, model, predictions, limit)
    evaluate = evaluate_argv(assets, [predictions], model, output)
    evaluate += ["--title", "LLaVA Simplified: captions of unseen images"]

    return [
        # The expected seconds were measured on two CPU cores. `Watcher` adapts them to the speed of this machine.
        Step("Inspect the tokens of a training sample", inspect, seconds=8),
        Step(
            "Stage 1: train the projector only",
            stage1,
            seconds=50,
            read_progress=lambda: training_progress(projector, projector_steps),
            run_folder=projector,
            outputs=(projector / "llava.json",),
        ),
        Step(
            "Stage 2: train LoRA on the language model, and continue to train the projector",
            stage2,
            seconds=1150 if recipe == "demo_long" else 380,
            read_progress=lambda: training_progress(model, model_steps),
            run_folder=model,
            outputs=(model / "llava.json",),
        ),
        caption_step(predict, predictions, num_images),
        evaluate_step(evaluate, output, "Scores and report"),
    ]


def summarize(output: Path, seconds: float) -> str:
    """Return the final output of the demo: scores, paths, and three commands to try next.

    Args:
        output: Output folder, with `scores.json`.
        seconds: Duration of the demo.
    """
    scores = json.loads((output / "scores.json").read_text(encoding="utf-8"))
    # scores.json has one entry per prediction file, and the demo evaluates only one file.
    first_scores = next(iter(scores.values()))
    # A score is stored with its interval: [value, low, high].
    # Show the scores with shuffled images too: a model that ignores the image would have equal scores.
    mean = first_scores["mean"]
    shuffled = first_scores["shuffled"]
    llava = llava_program()
    model = quote_arguments([str(output / "model")])
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

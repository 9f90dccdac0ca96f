"""`llava demo --reward`: continue training the demo's model with rewards, and compare captions before and after.

The reward of a caption is its score. Like the demo itself, this prints and runs ordinary `llava` commands. It needs the
output folder of a finished `llava demo`, with the checkpoint and the captions of held-out drawings, and writes to the
subfolder `reward`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_simplified.demo.assets import DemoAssets
from llava_simplified.demo.demo_images import NUM_HELD_OUT
from llava_simplified.demo.demo_options import (
    evaluate_argv,
    llava_program,
    number_of_steps,
    option_argv,
    predict_argv,
    training_argv,
)
from llava_simplified.demo.demo_steps import Step, caption_step
from llava_simplified.demo.progress import training_progress
from llava_simplified.jobs import format_duration
from llava_simplified.options import quote_arguments

RECIPE = "demo_reward"
FOLDER = "reward"  # a subfolder of the output folder of the demo
NUM_STEPS = 4  # download, training, captioning, evaluation
TRAINING_SECONDS = 560
EXPECTED_SECONDS = TRAINING_SECONDS + 35  # expected duration of all steps after the download
SHOWN_METRICS = ("CIDEr-D", "word F1")


def check_finished(output: Path) -> None:
    """Check that `llava demo` has finished.

    Args:
        output: Output folder of `llava demo`.

    Raises:
        ValueError: There is no model, or it has not captioned the held-out images.
    """
    model_config = output / "model" / "llava.json"
    predictions = output / "predictions.json"
    is_finished = model_config.is_file() and predictions.is_file()
    # If the captions are older than the model, an earlier model generated them.
    if not is_finished or predictions.stat().st_mtime < model_config.stat().st_mtime:
        raise ValueError(
            f"--reward continues to train the model of a finished demo, but the demo in {output} is not finished. "
            f"Run `make demo` (llava demo --output {quote_arguments([str(output)])}) first."
        )


def forget_outdated_steps(output: Path) -> None:
    """Delete the list of finished steps of a reward demo that trained an earlier model, so that all steps run again.

    Args:
        output: Output folder of a finished `llava demo`.
    """
    predictions = output / "predictions.json"
    finished = output / FOLDER / "finished_steps.json"
    # If the demo has run again since then, its predictions are newer than the list.
    if finished.is_file() and finished.stat().st_mtime < predictions.stat().st_mtime:
        finished.unlink()


def plan_reward_steps(
    assets: DemoAssets,
    output: Path,
    *,
    max_steps: int | None = None,
    seed: int = 42,
    limit: int | None = None,
) -> list[Step]:
    """Return the commands of the reward demo, in order.

    Args:
        assets: The models and images.
        output: Output folder of the finished `llava demo`.
        max_steps: Maximum number of training steps; None for the number in the recipe.
        seed: Seed of the training.
        limit: Maximum number of images to caption; None for all held-out images.
    """
    before = output / "predictions.json"
    folder = output / FOLDER
    model = folder / "model"
    predictions = folder / "predictions.json"
    num_steps = number_of_steps(RECIPE, max_steps)
    num_images = min(limit or NUM_HELD_OUT, NUM_HELD_OUT)

    # Begin with the checkpoint of the demo. The recipe has the same projector and the same adapter.
    train = ["train", "--config", RECIPE, *training_argv(assets, seed)]
    train += option_argv(init_from=output / "model", output_dir=model, max_steps=num_steps)
    predict = predict_argv(assets, model, predictions, limit)
    evaluate = evaluate_argv(assets, [before, predictions], model, folder)
    evaluate += ["--title", "LLaVA Simplified: captions before and after training with rewards"]
    return [
        Step(
            "Sample captions of the training images, and make those with a high reward more likely",
            train,
            seconds=TRAINING_SECONDS,
            read_progress=lambda: training_progress(model, num_steps),
            run_folder=model,
        ),
        caption_step(predict, predictions, num_images),
        Step("Compare the captions before and after", evaluate, seconds=10),
    ]


def summarize_rewards(output: Path, seconds: float) -> str:
    """Return the final output of the reward demo: scores before and after, and paths.

    Args:
        output: Output folder of `llava demo`.
        seconds: Duration of the reward demo.
    """
    folder = output / FOLDER
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    # scores.json has one entry per prediction file, in the order of the command line.
    before, after = scores.values()
    lines = ["", f"Scores on {after['images']} drawings that neither training run used:"]
    lines.append(f"{'':18}{'before':>8}{'after':>8}   difference, 95 % interval")
    for name in SHOWN_METRICS:
        lines.append(_metric_line(name, before, after))
    # Compare the lengths too: some rewards can be raised by longer captions alone.
    lengths = [run["text"]["captions"]["words, mean"] for run in (before, after)]
    reference_length = after["text"]["references"]["words, mean"]
    cells = "".join(f"{length:8.2f}" for length in lengths)
    lines.append(f"{'words per caption':18}{cells}   (references: {reference_length:.2f})")
    lines += [
        f"report, with the captions side by side: {(folder / 'report.html').resolve()}",
        f"This took {format_duration(seconds)}.",
        "",
        "Caption an image of your own:",
        f"  {llava_program()} caption YOUR_IMAGE.png --model-path {quote_arguments([str(folder / 'model')])}",
    ]
    return "\n".join(lines)


def _metric_line(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return one line of the table: a metric before and after, and the difference with its interval."""
    # A mean is stored with its interval: [mean, low, high].
    values = f"{before['mean'][name][0]:8.3f}{after['mean'][name][0]:8.3f}"
    difference, low, high = after["compared with"]["differences"][name]["difference"]
    # There is no interval if no resamples were drawn.
    interval = "" if low is None else f" [{low:+.3f}, {high:+.3f}]"
    return f"{name:18}{values}   {difference:+.3f}{interval}"

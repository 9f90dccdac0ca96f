"""`llava demo --reward`: train the demo's model further, on rewards, and compare its captions before and after.

Like the demo itself, it prints and runs ordinary `llava` commands. It needs what `llava demo` has left in its output
folder, the checkpoint and the captions of held-out drawings, and writes to the folder `reward` in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_simplified.demo.assets import DemoAssets
from llava_simplified.demo.demo_images import NUM_HELD_OUT
from llava_simplified.demo.demo_options import (
    evaluate_words,
    llava_word,
    number_of_steps,
    option_words,
    predict_words,
    training_words,
)
from llava_simplified.demo.demo_steps import Step, caption_step
from llava_simplified.demo.progress import training_progress
from llava_simplified.jobs import format_duration
from llava_simplified.options import quote_words

RECIPE = "demo_reward"
FOLDER = "reward"  # in the output folder of the demo
NUM_STEPS = 4  # with the download
TRAINING_SECONDS = 560
EXPECTED_SECONDS = TRAINING_SECONDS + 35  # of all steps after the download
SHOWN_METRICS = ("CIDEr-D", "word F1")


def check_finished(output: Path) -> None:
    """Check that `llava demo` has finished, and forget a reward demo that began with another model.

    Args:
        output: Output folder of `llava demo`.

    Raises:
        ValueError: There is no model, or there are no captions of it.
    """
    model_config = output / "model" / "llava.json"
    predictions = output / "predictions.json"
    is_finished = model_config.is_file() and predictions.is_file()
    # Captions that are older than the model are those of the model before it.
    if not is_finished or predictions.stat().st_mtime < model_config.stat().st_mtime:
        raise ValueError(
            f"--reward trains the model of a finished demo further, but {output} contains none. Run `make demo` "
            f"(llava demo --output {quote_words([str(output)])}) first."
        )
    # The steps of the reward demo are remembered in this file. Those with another model must run again.
    finished = output / FOLDER / "finished_steps.json"
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
        max_steps: Maximum number of training steps, or None.
        seed: Seed of the training.
        limit: Maximum number of images to caption, or None.
    """
    before = output / "predictions.json"
    folder = output / FOLDER
    model = folder / "model"
    predictions = folder / "predictions.json"
    num_steps = number_of_steps(RECIPE, max_steps)
    num_images = min(limit or NUM_HELD_OUT, NUM_HELD_OUT)

    train = ["train", "--config", RECIPE, *training_words(assets, seed)]
    train += option_words(init_from=output / "model", output_dir=model, max_steps=num_steps)
    predict = predict_words(assets, model, predictions, limit)
    evaluate = evaluate_words(assets, [before, predictions], model, folder)
    evaluate += ["--title", "LLaVA Simplified: captions before and after training on rewards"]
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
    # In the order of the prediction files on the command line.
    before, after = scores.values()
    lines = ["", f"On {after['images']} drawings that neither training has seen:"]
    lines.append(f"{'':18}{'before':>8}{'after':>8}   difference, 95 % interval")
    for name in SHOWN_METRICS:
        lines.append(_metric_line(name, before, after))
    lengths = [run["text"]["captions"]["words, mean"] for run in (before, after)]
    reference_length = after["text"]["references"]["words, mean"]
    cells = "".join(f"{length:8.2f}" for length in lengths)
    lines.append(f"{'words per caption':18}{cells}   (references: {reference_length:.2f})")
    lines += [
        f"report, with the captions side by side: {(folder / 'report.html').resolve()}",
        f"This took {format_duration(seconds)}.",
        "",
        "Caption an image of your own:",
        f"  {llava_word()} caption YOUR_IMAGE.png --model-path {quote_words([str(folder / 'model')])}",
    ]
    return "\n".join(lines)


def _metric_line(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    values = f"{before['mean'][name][0]:8.3f}{after['mean'][name][0]:8.3f}"
    difference, low, high = after["compared with"]["differences"][name]["difference"]
    interval = "" if low is None else f" [{low:+.3f}, {high:+.3f}]"
    return f"{name:18}{values}   {difference:+.3f}{interval}"

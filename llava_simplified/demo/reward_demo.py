"""`llava demo --reward`: continue training the demo's model with rewards, and compare captions before and after.

The reward of a caption is its score. Like the demo itself, this prints and runs ordinary `llava` commands. It needs the
output folder of a finished `llava demo`, with the checkpoint and the captions of held-out drawings, and writes to the
subfolder `reward`.

Training on rewards raises the mean reward of *sampled* captions, so samples are compared. Greedy captions, one for each
drawing, are compared too: they change less, because the most likely caption often stays the same when it becomes more
likely.
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
from llava_simplified.demo.demo_steps import Step, caption_step, evaluate_step
from llava_simplified.demo.progress import training_progress
from llava_simplified.jobs import format_duration
from llava_simplified.options import quote_arguments

RECIPE = "demo_reward"
FOLDER = "reward"  # a subfolder of the output folder of the demo
SAMPLES_FOLDER = "samples"  # scores and report of the sampled captions, a subfolder of FOLDER
NUM_SAMPLES = 20  # samples per drawing in the comparison
# download, training, samples of the two models and their comparison, greedy captions and their comparison
NUM_STEPS = 7
TRAINING_SECONDS = 400
SAMPLING_SECONDS = 40
EXPECTED_SECONDS = (
    TRAINING_SECONDS + 2 * SAMPLING_SECONDS + 45
)  # expected duration of all steps after the download
SHOWN_METRICS = ("CIDEr-D", "word F1")


def check_finished(output: Path, limit: int | None = None) -> None:
    """Check that `llava demo` has finished, with the same limit.

    Args:
        output: Output folder of `llava demo`.
        limit: Maximum number of images to caption; None for all held-out images.

    Raises:
        ValueError: There is no model, it has not captioned the held-out images, or it has captioned more or fewer of them
            than this run is going to.
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
    # Captions before and after the training are compared, so they must be those of the same images.
    captioned = len(json.loads(predictions.read_text(encoding="utf-8")))
    expected = min(limit or NUM_HELD_OUT, NUM_HELD_OUT)
    if captioned != expected:
        repeat = f"llava demo --output {quote_arguments([str(output)])}"
        if limit:
            repeat += f" --limit {limit}"
        raise ValueError(
            f"--reward compares the captions of {expected} drawings, but {predictions} contains those of {captioned}. "
            f"Pass --limit {captioned}, or caption the same drawings with the demo's model first: {repeat}"
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
    folder = output / FOLDER
    model = folder / "model"
    num_steps = number_of_steps(RECIPE, max_steps)
    num_images = min(limit or NUM_HELD_OUT, NUM_HELD_OUT)

    # Begin with the checkpoint of the demo. The recipe has the same projector and the same adapter.
    train = ["train", "--config", RECIPE, *training_argv(assets, seed)]
    train += option_argv(init_from=output / "model", output_dir=model, max_steps=num_steps)

    samples_folder = folder / SAMPLES_FOLDER
    sample_steps = []
    sample_files = []
    for name, checkpoint in (("before", output / "model"), ("after", model)):
        path = folder / f"samples_{name}.json"
        sample = predict_argv(assets, checkpoint, path, limit, NUM_SAMPLES)
        title = f"Sample {NUM_SAMPLES} captions of each unseen image, {name} the training"
        sample_steps.append(
            caption_step(sample, path, num_images * NUM_SAMPLES, title, SAMPLING_SECONDS)
        )
        sample_files.append(path)
    compare_samples = evaluate_argv(assets, sample_files, model, samples_folder)
    compare_samples += [
        "--title",
        "LLaVA Simplified: samples before and after training with rewards",
    ]

    # The demo has already captioned the held-out images greedily.
    greedy = folder / "predictions.json"
    predict = predict_argv(assets, model, greedy, limit)
    compare_greedy = evaluate_argv(assets, [output / "predictions.json", greedy], model, folder)
    compare_greedy += [
        "--title",
        "LLaVA Simplified: captions before and after training with rewards",
    ]
    return [
        Step(
            "Sample captions of the training images, and make those with a high reward more likely",
            train,
            seconds=TRAINING_SECONDS,
            read_progress=lambda: training_progress(model, num_steps),
            run_folder=model,
            outputs=(model / "llava.json",),
        ),
        *sample_steps,
        evaluate_step(compare_samples, samples_folder, "Compare the samples before and after"),
        caption_step(predict, greedy, num_images),
        evaluate_step(compare_greedy, folder, "Compare the greedy captions before and after"),
    ]


def summarize_rewards(output: Path, seconds: float) -> str:
    """Return the final output of the reward demo: scores before and after, and paths.

    Args:
        output: Output folder of `llava demo`.
        seconds: Duration of the reward demo.
    """
    folder = output / FOLDER
    samples_folder = folder / SAMPLES_FOLDER
    lines = ["", f"{'Scores on drawings that neither':34}{'before':>8}{'after':>8}   difference,"]
    lines.append(f"{'training run used':34}{'':16}   95 % interval")
    lines += _comparison_lines(f"{NUM_SAMPLES} samples per drawing", samples_folder / "scores.json")
    lines += _comparison_lines("the greedy caption", folder / "scores.json")
    lines += [
        "reports, with the captions side by side:",
        f"  samples: {(samples_folder / 'report.html').resolve()}",
        f"  greedy captions: {(folder / 'report.html').resolve()}",
        f"This took {format_duration(seconds)}.",
        "",
        "Caption an image of your own:",
        f"  {llava_program()} caption YOUR_IMAGE.png --model-path {quote_arguments([str(folder / 'model')])}",
    ]
    return "\n".join(lines)


def read_comparison(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the scores before and after the training from a `scores.json` with two prediction files."""
    # scores.json has one entry per prediction file, in the order of the command line.
    before, after = json.loads(path.read_text(encoding="utf-8")).values()
    return before, after


def _comparison_lines(name: str, path: Path) -> list[str]:
    """Return the lines of the table for one comparison: the metrics, and the lengths of the captions.

    Args:
        name: What was compared.
        path: The scores of the two prediction files.
    """
    before, after = read_comparison(path)
    lines = [f"{name}, {after['images']} drawings:"]
    lines += [_metric_line(metric, before, after) for metric in SHOWN_METRICS]
    # Compare the lengths too: some rewards can be raised by longer captions alone.
    lengths = [run["text"]["captions"]["words, mean"] for run in (before, after)]
    reference_length = after["text"]["references"]["words, mean"]
    cells = "".join(f"{length:8.2f}" for length in lengths)
    lines.append(f"  {'words per caption':32}{cells}   (references: {reference_length:.2f})")
    return lines


def _metric_line(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return one line of the table: a metric before and after, and the difference with its interval."""
    # A mean is stored with its interval: [mean, low, high].
    values = f"{before['mean'][name][0]:8.3f}{after['mean'][name][0]:8.3f}"
    difference, low, high = after["compared with"]["differences"][name]["difference"]
    # There is no interval if no resamples were drawn.
    interval = "" if low is None else f" [{low:+.3f}, {high:+.3f}]"
    return f"  {name:32}{values}   {difference:+.3f}{interval}"

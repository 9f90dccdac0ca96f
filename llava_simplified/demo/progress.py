"""Read the progress of a command of the demo from the files that the command writes while it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llava_simplified.evaluation.training_curves import read_training_log

TRAINING_LOG = "trainer_log.jsonl"
EVAL_CAPTIONS = "eval_captions"


class Progress(NamedTuple):
    """The progress of one command.

    Attributes:
        fraction: Completed part of the work, 0 to 1.
        text: The progress in words, with the latest loss or reward.
    """

    fraction: float
    text: str


NOT_STARTED = Progress(0.0, "starting")
ReadProgress = Callable[[], Progress]


class CaptionRow(NamedTuple):
    """One validation image, its generated caption, and a reference."""

    image: str
    caption: str
    reference: str


def training_progress(folder: Path, max_steps: int) -> Progress:
    """Return the progress of `llava train`.

    Args:
        folder: Output folder of the run.
        max_steps: Number of steps of the run.
    """
    curves = read_curves(folder)
    # In a run with rewards, show the reward, because a lower loss does not mean better captions there.
    shown = "reward" if curves["reward"] else "training"
    if not curves[shown]:
        return NOT_STARTED
    step, value = curves[shown][-1]
    name = "reward" if shown == "reward" else "loss"
    return Progress(step / max_steps, f"step {step:.0f} of {max_steps}, {name} {value:.2f}")


def captioning_progress(predictions: Path, total: int) -> Progress:
    """Return the progress of `llava predict`.

    Args:
        predictions: Output file. Until it is complete, the captions are in a file beside it.
        total: Number of captions.
    """
    # The journal of the unfinished job has one line per caption.
    journal = predictions.with_name(f"{predictions.name}.part.jsonl")
    try:
        done = journal.read_bytes().count(b"\n")
    except FileNotFoundError:
        return NOT_STARTED
    return Progress(min(done / total, 1.0), f"{done} of {total} captions")


def read_curves(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Return the points (step, value) of a run by the name of the curve: "training", "validation", "reward"."""
    names = ("training", "validation", "reward")
    log = folder / TRAINING_LOG
    if not log.is_file():
        return {name: [] for name in names}
    curves = read_training_log(log)
    return {name: curves[name] for name in names}


def read_eval_captions(folder: Path) -> dict[int, list[CaptionRow]]:
    """Return the captions of validation images that a training run has written, by training step."""
    captions = {}
    for path in (folder / EVAL_CAPTIONS).glob("step-*.jsonl"):
        rows = []
        # The trainer writes a file in one call, but not atomically. Skip a file whose end has not been written yet.
        text = path.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            continue
        for line in text.removesuffix("\n").split("\n"):
            row = json.loads(line)
            rows.append(CaptionRow(row["image"], row["pred_output"], row["gt_caption"]))
        captions[int(path.stem.removeprefix("step-"))] = rows
    return dict(sorted(captions.items()))

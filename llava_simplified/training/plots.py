"""The picture of a run."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot_training(log: Path, output: Path) -> None:
    """Training and validation loss, and the learning rate below them, from `trainer_log.jsonl`."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for axes, key, label, style in (
        (loss, "loss", "training", "-"),
        (loss, "eval_loss", "validation", "o-"),
        (rate, "learning_rate", "", "-"),
    ):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points), style, label=label, markersize=4)
    loss.set_ylabel("loss per token (nats)")
    if loss.get_legend_handles_labels()[1]:
        loss.legend()
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    for axes in (loss, rate):
        axes.grid(alpha=0.3)
    figure.savefig(output, dpi=110)

"""The picture of a run."""

from __future__ import annotations

import json
from pathlib import Path


def plot_training(log: Path, output: Path) -> None:
    """Training and validation loss, CIDEr where captions were watched, and the learning rate, from `trainer_log.jsonl`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    panels = [
        (
            "loss per token (nats)",
            3,
            (("loss", "training", "-"), ("eval_loss", "validation", "o-")),
        ),
        ("CIDEr-D, validation", 2, (("eval_cider", None, "o-"),)),
        ("learning rate", 1, (("learning_rate", None, "-"),)),
    ]
    panels = panels[:1] + [
        panel for panel in panels[1:] if any(panel[2][0][0] in row for row in rows)
    ]
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(
        len(panels), sharex=True, squeeze=False, height_ratios=[height for _, height, _ in panels]
    )
    for axes, (title, _, lines) in zip(all_axes[:, 0], panels):
        for key, label, style in lines:
            points = {
                row["step"]: row[key] for row in rows if key in row
            }  # steps that a resumed run repeats: as it was last
            if points:
                axes.plot(*zip(*sorted(points.items())), style, label=label, markersize=4)
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
    all_axes[-1, 0].set_xlabel("step")
    figure.savefig(output, dpi=110)

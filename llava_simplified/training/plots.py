"""Plot a run to `training.png`: losses, CIDEr-D of the captions, and learning rate over the steps."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from llava_simplified.extras import require_extra

logger = logging.getLogger(__name__)


class Curve(NamedTuple):
    """One line of a panel: a key of `trainer_log.jsonl`, its legend, and its matplotlib style."""

    key: str
    label: str | None
    style: str


class Panel(NamedTuple):
    """One panel of the figure. `height` is relative to the heights of the other panels."""

    title: str
    height: int
    curves: tuple[Curve, ...]


LOSS_PANEL = Panel(
    "loss per token (nats)",
    3,
    (Curve("loss", "training", "-"), Curve("eval_loss", "validation", "o-")),
)
OPTIONAL_PANELS = (
    Panel("reward of samples", 2, (Curve("reward", None, "-"),)),
    Panel("CIDEr-D, validation", 2, (Curve("eval_cider", None, "o-"),)),
    Panel("learning rate", 1, (Curve("learning_rate", None, "-"),)),
)


def plot_training(log: Path, output: Path) -> None:
    """Plot a training log.

    Args:
        log: `trainer_log.jsonl`.
        output: The image file.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_extra("report", "matplotlib", purpose="the plot of a run")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = _read_rows(log)
    panels = [LOSS_PANEL]
    for panel in OPTIONAL_PANELS:
        if any(panel.curves[0].key in row for row in rows):
            panels.append(panel)

    # Use the object interface: `pyplot` has global state and looks for a display.
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    heights = [panel.height for panel in panels]
    grid = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)
    for axes, panel in zip(grid[:, 0], panels):
        for curve in panel.curves:
            _plot_curve(axes, curve, rows)
        axes.set_ylabel(panel.title)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
    grid[-1, 0].set_xlabel("step")
    figure.savefig(output, dpi=110)


def _read_rows(log: Path) -> list[dict[str, float]]:
    """Return the rows of a training log. A damaged row is left out, with a warning: it must not end a complete run."""
    rows: list[dict[str, float]] = []
    for number, line in enumerate(log.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            # The process was killed, or the disk was full, while the row was written.
            logger.warning("%s line %d is damaged and is left out of the plot.", log, number)
    return rows


def _plot_curve(axes: Any, curve: Curve, rows: list[dict[str, float]]) -> None:
    # Use the last row of each step: a resumed run repeats the steps after its checkpoint.
    points = {row["step"]: row[curve.key] for row in rows if curve.key in row}
    if not points:
        return
    steps, values = zip(*sorted(points.items()))
    axes.plot(steps, values, curve.style, label=curve.label, markersize=4)

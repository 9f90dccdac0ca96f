"""The plot of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_simplified.training.plots import plot_training


def test_plot_draws_repeated_steps_of_a_resumed_run_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    # The run was killed after step 3, and resumed from a checkpoint of step 1.
    points = ((1, 9), (2, 8), (3, 7), (2, 6), (3, 5))
    rows = [{"step": step, "loss": loss} for step, loss in points]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.plot", lambda axes, *arguments, **_: drawn.append(arguments[:2])
    )
    plot_training(log, tmp_path / "plot.png")
    assert drawn == [((1, 2, 3), (9, 6, 5))]


def test_plot_leaves_out_a_damaged_row_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package_log: pytest.LogCaptureFixture
) -> None:
    """A row is damaged if the disk was full while it was written. The resumed run continues behind it."""
    pytest.importorskip("matplotlib")
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "loss": 9}\n{"step": 2, "lo{"step": 2, "loss": 8}\n')
    drawn: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.plot", lambda axes, *arguments, **_: drawn.append(arguments[:2])
    )
    plot_training(log, tmp_path / "plot.png")
    assert drawn == [((1,), (9,))]
    assert "log.jsonl line 2 is damaged" in package_log.text

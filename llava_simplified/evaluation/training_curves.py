"""Read the curves of a training run from its log."""

from __future__ import annotations

import json
import math
from pathlib import Path

# Name of each curve in the report -> key of its values in the rows of the log.
CURVES = {
    "training": "loss",
    "validation": "eval_loss",
    "CIDEr-D": "eval_cider",
    "reward": "reward",
}


def read_training_log(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Read the curves of a `trainer_log.jsonl`.

    Args:
        path: A file of JSON lines with `step` and one of the keys of `CURVES`; other rows are skipped. If a step occurs
            several times, because the run was resumed, its last value is used.

    Returns:
        Points (step, value) by the name of the curve, in the order of the steps.

    Raises:
        ValueError: A line is not a row of a training log. (An incomplete last line is ignored.)
    """
    curves: dict[str, dict[float, float]] = {name: {} for name in CURVES}
    # Do not use splitlines(), which also splits at separators such as U+2028: JSON strings may contain these.
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            for name, key in CURVES.items():
                # Skip NaN and infinity, which a diverged run logs and which cannot be drawn.
                if key in row and math.isfinite(row[key]):
                    curves[name][row["step"]] = row[key]
        except (ValueError, TypeError, KeyError) as error:
            is_last = number == len(lines)
            if not is_last:
                raise ValueError(
                    f"{path} line {number}: this is not a row of a training log ({error!r}). Pass the "
                    "trainer_log.jsonl of a run, or remove the line."
                ) from None
    return {name: sorted(points.items()) for name, points in curves.items()}

"""Names of runs, from the names of their prediction files. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

# Other numbers are parts of names: clip-vit-base-patch16, effnet-b0, run-2.
_STEP = re.compile(r"(?:(.*)[^A-Za-z])?(?:step|checkpoint)-(\d+)")


def name_runs(paths: Sequence[Path]) -> list[str]:
    """Return a name for each prediction file: its stem, or the name of its folder if stems are equal."""
    stems = [path.stem for path in paths]
    folders = [path.resolve().parent.name for path in paths]
    for names in (stems, folders):
        if len(set(names)) == len(names):
            return names
    # Neither distinguishes the files.
    return list(map(str, paths))


def training_steps(names: Sequence[str]) -> list[int] | None:
    """Return the training steps of a series of checkpoints of one run; None if they are not.

    The names of a series end with `step-N` or `checkpoint-N`, and are equal before it.
    """
    steps = []
    prefixes = set()
    for name in names:
        match = _STEP.fullmatch(name)
        if match is None:
            return None
        prefixes.add(match[1])
        steps.append(int(match[2]))
    # The checkpoints of two runs are not a series, even if their steps differ.
    return steps if len(prefixes) == 1 else None


def sort_by_step(paths: Sequence[Path]) -> list[Path]:
    """Sort the files of a series of checkpoints by their steps; other files keep their order.

    A shell expands `step-*.jsonl` to step-1000 before step-500.
    """
    steps = training_steps(name_runs(paths))
    if steps is None:
        return list(paths)
    return [path for _, path in sorted(zip(steps, paths))]

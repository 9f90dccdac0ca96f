"""Names of runs, from the names of their prediction files.

`llava evaluate --help` imports this module, so it must not import large packages.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

# Only "step-N" and "checkpoint-N" are steps. Other numbers are parts of names: clip-vit-base-patch16, effnet-b0, run-2.
_STEP = re.compile(r"(?:(.*)[^A-Za-z])?(?:step|checkpoint)-(\d+)")


def name_runs(paths: Sequence[Path]) -> list[str]:
    """Return a name for each prediction file: its stem. If stems are equal, use the folders, or else the full paths."""
    stems = [path.stem for path in paths]
    folders = [path.resolve().parent.name for path in paths]
    for names in (stems, folders):
        if len(set(names)) == len(names):
            return names
    # Neither stems nor folders distinguish the files, so use the full paths.
    return list(map(str, paths))


def training_steps(names: Sequence[str]) -> list[int] | None:
    """Return the training steps if the names belong to checkpoints of one training run; otherwise None.

    The names of such checkpoints end with `step-N` or `checkpoint-N`, and are equal before it.
    """
    steps = []
    prefixes = set()
    for name in names:
        match = _STEP.fullmatch(name)
        if match is None:
            return None
        prefixes.add(match[1])
        steps.append(int(match[2]))
    # Checkpoints of two training runs must not be shown as one series, even if their steps differ.
    return steps if len(prefixes) == 1 else None


def sort_by_step(paths: Sequence[Path]) -> list[Path]:
    """Sort the files of checkpoints of one training run by step; other files keep their order.

    This corrects the order in which a shell expands `step-*.jsonl`: step-1000 before step-500.
    """
    steps = training_steps(name_runs(paths))
    if steps is None:
        return list(paths)
    return [path for _, path in sorted(zip(steps, paths))]

"""Run the fuzz targets on their known inputs: unchanged, truncated, and with changed bytes."""

from __future__ import annotations

import random

import pytest
import targets


@pytest.mark.medium
@pytest.mark.parametrize("name", targets.TARGETS)
def test_target_accepts_its_known_inputs(name: str) -> None:
    target = targets.TARGETS[name]
    randomness = random.Random(0)
    known = list(targets.seeds(name))
    assert known
    for data in known:
        target(data)
        target(data[: len(data) // 2])
        changed = bytearray(data)
        for _ in range(3):
            changed[randomness.randrange(len(changed))] = randomness.randrange(256)
        target(bytes(changed))

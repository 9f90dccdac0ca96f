"""Samples of large families of tests and inputs: `make test` takes some, `make fuzz` all of them."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from typing import TypeVar

# `make fuzz` sets this variable.
IS_COMPLETE = bool(os.environ.get("FUZZ"))

T = TypeVar("T")


def sample(cases: Iterable[T], count: int) -> list[T]:
    """Return some of the cases, always the same ones; all of them in `make fuzz`."""
    cases = list(cases)
    if IS_COMPLETE or len(cases) <= count:
        return cases
    return random.Random(7).sample(cases, count)


def num_examples(complete: int) -> int:
    """Return how many random inputs a test tries: `complete` in `make fuzz`, otherwise a third of it."""
    return complete if IS_COMPLETE else complete // 3

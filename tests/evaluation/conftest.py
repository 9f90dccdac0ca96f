"""The process of METEOR that the tests share."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def one_meteor_process() -> Iterator[None]:
    """Start METEOR once, because loading its tables takes many seconds.

    Tests that use it belong to the group `meteor` of pytest-xdist, so that they run in the same worker.
    """
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("pycocoevalcap"):
            from pycocoevalcap.meteor import meteor

            patch.setattr(meteor, "Meteor", functools.cache(meteor.Meteor))
        yield

"""A checkpoint that the tests of captioning share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkpoint(
    models_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tiny model after one training step."""
    from checkpoints import train_checkpoint

    return train_checkpoint(
        data_folder,
        tmp_path_factory.mktemp("model") / "out",
        model_name_or_path=models_folder / "mistral",
        vision_tower=models_folder / "clip",
        max_steps=1,
    )

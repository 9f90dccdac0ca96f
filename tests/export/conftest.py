"""The checkpoints that the tests of exports share, and shorter comparisons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import TrainPair, train_checkpoint

from llava_simplified.export import stock_check


@pytest.fixture(autouse=True)
def short_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare the beginnings of captions: each export and import generates four of them."""
    monkeypatch.setattr(stock_check, "CAPTION_LENGTH", 6)


@pytest.fixture(scope="session")
def train_pair(
    models_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> TrainPair:
    """Train a tiny vision tower with a tiny language model; the options are those of `llava train`.

    A pair is trained once for the same options, so a test must not change the checkpoint.
    """
    checkpoints: dict[str, Path] = {}

    def train(tower: str, language_model: str, **options: object) -> Path:
        key = json.dumps([tower, language_model, options], sort_keys=True)
        if key not in checkpoints:
            checkpoints[key] = train_checkpoint(
                data_folder,
                tmp_path_factory.mktemp("trained"),
                model_name_or_path=models_folder / language_model,
                vision_tower=models_folder / tower,
                **options,
            )
        return checkpoints[key]

    return train

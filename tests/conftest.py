"""Fixtures of every room: models and data on disk, no network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # two test processes share two cores: spinning would stall both

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CAPTIONS, save_language_model, save_vision_model


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `mistral`, `llama`, `clip`, ... as they would come from a hub."""
    root = tmp_path_factory.mktemp("models")
    for kind in ("mistral", "llama", "qwen2", "gemma2", "phi", "opt"):
        save_language_model(kind, root / kind)
    for kind in ("clip", "siglip", "dinov2", "vit", "swin", "convnext", "efficientnet"):
        save_vision_model(kind, root / kind)
    return root


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`images/*.jpg`, `train.json` (12 records) and `val.json` (4), in the instruction form."""
    root = tmp_path_factory.mktemp("data")
    (root / "images").mkdir()
    random = np.random.default_rng(0)
    rows = []
    for index in range(16):
        coarse = random.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((48, 40)).save(root / "images" / f"{index}.jpg", quality=95)
        caption = CAPTIONS[index % len(CAPTIONS)]
        rows.append(
            {
                "image": f"{index}.jpg",
                "instruction": "Generate a caption of this image:",
                "response": caption,
            }
        )
    (root / "train.json").write_text(json.dumps(rows[:12]))
    (root / "val.json").write_text(json.dumps(rows[12:]))
    return root

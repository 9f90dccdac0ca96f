"""A tiny model that says something else of every picture, as a checkpoint and in memory."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava_simplified.model.build import build_model
from llava_simplified.model.checkpoint import save_checkpoint
from llava_simplified.model.config import LlavaConfig, TrainedParts
from llava_simplified.model.llava import Llava


@pytest.fixture(scope="session")
def checkpoint(models_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture = LlavaConfig(str(models_folder / "mistral"), str(models_folder / "clip"))
    torch.manual_seed(2)
    model = build_model(architecture).requires_grad_(False)
    for parameter in model.projector.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    folder = tmp_path_factory.mktemp("served") / "tiny"
    save_checkpoint(model, folder, architecture, TrainedParts())
    return folder


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> Llava:
    model = Llava.from_pretrained(checkpoint)
    model.prompt.stop_ids = [
        *model.prompt.stop_ids,
        *range(3, 20),
    ]  # a random model would never end
    return model


@pytest.fixture(scope="session")
def photos() -> list[bytes]:
    """Files of 20 pictures."""
    random, files = np.random.default_rng(5), []
    for _ in range(20):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize((48, 40)).save(
            file, "PNG"
        )
        files.append(file.getvalue())
    return files

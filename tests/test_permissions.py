"""Finished outputs have the permissions that the umask allows, even if a library has written the files."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava_simplified.arguments import parse_arguments
from llava_simplified.export.export_command import export_main, merge_main
from llava_simplified.jobs import atomic_directory, atomic_file
from llava_simplified.training.train_command import train

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX permissions")


@pytest.fixture(params=[0o002, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    previous = os.umask(request.param)
    yield request.param
    os.umask(previous)


def assert_permissions(folder: Path, umask: int) -> None:
    for path in [folder, *folder.rglob("*")]:
        expected = 0o777 if path.is_dir() else 0o666
        found = path.stat().st_mode & 0o777
        assert found == expected & ~umask, f"{path} has the permissions {found:o}"


def test_atomic_outputs_have_the_permissions_of_new_files(tmp_path: Path, umask: int) -> None:
    tensors = {"weight": torch.zeros(1)}
    with atomic_directory(tmp_path / "folder") as part:
        (part / "inner").mkdir()
        save_file(tensors, part / "inner" / "model.safetensors")
        (part / "config.json").write_text("{}")
    assert_permissions(tmp_path / "folder", umask)
    file = tmp_path / "model.safetensors"
    with atomic_file(file) as part:
        save_file(tensors, part)
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.medium
def test_checkpoints_have_the_permissions_of_new_files(
    models_folder: Path, data_folder: Path, tmp_path: Path, umask: int
) -> None:
    """Also check intermediate checkpoints, the feature cache, and merged and exported models."""
    output = tmp_path / "out"
    values = {
        "model_name_or_path": models_folder / "llama",
        "vision_tower": models_folder / "clip",
        "train_data_path": data_folder / "train.json",
        "train_image_folder": data_folder / "images",
        "output_dir": output,
        "max_steps": 1,
        "save_steps": 1,
        "cache_vision_features": "disk",
        "feature_cache_dir": tmp_path / "features",
    }
    argv = []
    for name, value in values.items():
        argv += [f"--{name}", str(value)]
    train(*parse_arguments(argv))
    assert merge_main([str(output), "--output", str(tmp_path / "merged")]) == 0
    assert export_main([str(output), "--output", str(tmp_path / "stock")]) == 0
    for name in ("out", "features", "merged", "stock"):
        assert_permissions(tmp_path / name, umask)
    assert (output / "checkpoint-1" / "trainer_state" / "optimizer.safetensors").is_file()

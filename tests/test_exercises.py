"""The solutions of the exercises run, and their own assertions hold."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from one_file import load_module

FOLDER = Path(__file__).parents[1] / "docs" / "exercises"
PATHS = sorted(FOLDER.glob("exercise_*.py"))


def test_all_exercises_are_found() -> None:
    assert len(PATHS) == 5


@pytest.mark.medium
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_solution_runs(
    path: Path,
    models_folder: Path,
    data_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    argv = ["--data", data_folder / "train.json", "--images", data_folder / "images"]
    argv += ["--language_model", models_folder / "llama", "--vision_tower", models_folder / "clip"]
    argv += ["--dtype", "float32", "--batch_size", 6, "--steps", 15, "--rate", 1e-2]
    load_module(path).main([str(argument) for argument in argv])
    assert capsys.readouterr().out

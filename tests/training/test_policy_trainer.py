"""Training on rewards: what it improves, resumes, logs and refuses, on tiny models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from training_runs import (
    assert_equal_weights,
    read_log,
    run_training,
    trained_weights,
    training_options,
)

from llava_simplified.training.build_trainer import build_trainer  # noqa: F401

REWARD_MODULE = """
def ends_in_time(images, references, captions):
    assert all(image.endswith(".jpg") for image in images)
    return [caption.count("a") - 0.02 * len(caption) for caption in captions]

def constant(images, references, captions):
    return [0.1] * len(captions)

def broken(images, references, captions):
    return [float("nan")] * len(captions)
"""


@pytest.fixture(scope="module")
def checkpoint(models_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory):  # noqa: ANN201
    """A supervised checkpoint that ends its captions, and a module with reward functions beside it."""
    folder = tmp_path_factory.mktemp("supervised")
    options = training_options(models_folder, data_folder, folder / "out", max_steps=60)
    run_training(options)
    (folder / "tiny_rewards.py").write_text(REWARD_MODULE)
    return folder / "out"


@pytest.fixture
def policy_options(models_folder: Path, data_folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: ANN201, E501
    """Return a function that makes the command line of a run on rewards."""
    monkeypatch.syspath_prepend(checkpoint.parent)

    def make(output: str = "out", **changes: object) -> list[str]:
        values: dict[str, object] = {
            "init_from": checkpoint,
            "objective": "rloo",
            "reward": "word_f1",
            "num_samples": 3,
            "sample_max_tokens": 12,
            "learning_rate": 1e-3,
            "max_steps": 2,
            "cache_vision_features": "off",
            **changes,
        }
        return training_options(models_folder, data_folder, tmp_path / output, **values)

    return make


def test_reward_rises(policy_options) -> None:  # noqa: ANN001
    output = run_training(
        policy_options(reward="tiny_rewards:ends_in_time", max_steps=25, learning_rate=1e-2)
    )
    rewards = read_log(output, "reward")
    assert len(rewards) == 25
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 1
    for key in ("reward_std", "caption_tokens", "share_at_limit", "share_distinct"):
        assert len(read_log(output, key)) == 25

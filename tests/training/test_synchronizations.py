"""A training step must not make the host wait for a GPU, except for one read of all values of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from synchronizations import SynchronizationFinder
from training_runs import run_training, training_options
from transformers import Trainer

from llava_simplified.arguments import parse_arguments
from llava_simplified.model import language_model
from llava_simplified.training.trainer import LlavaTrainer


@pytest.mark.medium
@pytest.mark.parametrize(
    "data",
    [
        {"share_prefix": True},
        {"packing": True, "pack_length": 128},
        {"share_prefix": True, "cache_vision_features": "memory"},
    ],
    ids=["padded", "packed", "features"],
)
def test_training_step_reads_the_device_once(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    data: dict[str, Any],
) -> None:
    # Use the code paths of a GPU on a CPU.
    monkeypatch.setattr(language_model, "HOST_DEVICES", ())
    steps: list[list[str]] = []
    begin_step, clip = Trainer.training_step, LlavaTrainer._get_grad_norm

    def training_step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        with SynchronizationFinder() as finder:
            loss = begin_step(self, *args, **kwargs)
        steps.append(finder.places)
        return loss

    def get_grad_norm(self: Any, *args: Any, **kwargs: Any) -> Any:
        with SynchronizationFinder() as finder:
            norm = clip(self, *args, **kwargs)
        steps.append(finder.places)
        return norm

    monkeypatch.setattr(Trainer, "training_step", training_step)
    monkeypatch.setattr(LlavaTrainer, "_get_grad_norm", get_grad_norm)
    options = training_options(
        models_folder,
        data_folder,
        tmp_path / "out",
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        attn_implementation="sdpa",
        preflight="false",
        **data,
    )
    run_training(options)
    first, second, update = steps
    assert first == second == []
    (read,) = update
    assert read.startswith("tolist < trainer.py:_check_losses")


def test_training_options_avoid_reads_and_unfused_updates(tmp_path: Path) -> None:
    """The filter of the Trainer would read every loss; the fused AdamW is one kernel for all weights."""
    _, _, args = parse_arguments(["--output_dir", str(tmp_path)])
    assert not args.logging_nan_inf_filter
    assert args.optim == "adamw_torch_fused"

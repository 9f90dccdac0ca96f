"""A killed run is resumed as if nothing had happened, bit for bit; another run is refused."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_runs import (
    ROOT,
    assert_equal_weights,
    read_log,
    run_training,
    trained_weights,
    training_options,
)

# As much as possible at once: packs, worker processes, dropout.
OPTIONS = {
    "packing": True,
    "pack_length": 128,
    "per_device_train_batch_size": 1,
    "dataloader_num_workers": 2,
    "lora_dropout": 0.1,
    "save_strategy": "steps",
    "save_steps": 2,
    "max_steps": 14,
    "disable_tqdm": True,
}
# KILLS=10 kills the run at ten different moments.
KILLS = int(os.environ.get("KILLS", "2"))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals")
@pytest.mark.parametrize("seed", range(KILLS))
def test_run_killed_at_a_random_step_resumes_bit_for_bit(
    models_folder: Path, data_folder: Path, tmp_path: Path, seed: int
) -> None:
    uninterrupted = run_training(
        training_options(models_folder, data_folder, tmp_path / "uninterrupted", **OPTIONS)
    )
    output = tmp_path / "killed"
    options = training_options(models_folder, data_folder, output, **OPTIONS)
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # With another number of threads, sums would be taken in another order.
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    steps = random.Random(seed).randrange(3, 13)  # after the first checkpoint
    log = output / "trainer_log.jsonl"
    while not log.exists() or len(read_log(output)) < steps:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "llava.json").exists()

    run_training([*options, "--resume_from_checkpoint", "true"])
    assert_equal_weights(trained_weights(uninterrupted), trained_weights(output))


def test_resume_with_other_options_is_refused_or_reported(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    package_log: pytest.LogCaptureFixture,
) -> None:
    changes: dict[str, object] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    output = run_training(training_options(models_folder, data_folder, tmp_path / "out", **changes))
    changes["resume_from_checkpoint"] = output / "checkpoint-1"
    for change, message in (
        ({"lora_r": 8}, "--lora_r: .* 4, .* 8, .*--init_from"),
        ({"packing": True}, "--packing: .* default, .* True"),
        ({"mm_projector_type": "mlp2x_gelu"}, "mm_projector_type linear, .* mlp2x_gelu"),
        ({"vision_tower": models_folder / "siglip"}, "weights_digests"),
    ):
        options = training_options(
            models_folder, data_folder, tmp_path / "out", **{**changes, **change}
        )
        with pytest.raises(ValueError, match=message):
            run_training(options)

    changes["learning_rate"] = 1e-3
    run_training(training_options(models_folder, data_folder, tmp_path / "out", **changes))
    assert "--learning_rate was 0.005, is 0.001" in package_log.text

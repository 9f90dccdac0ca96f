"""A run that is killed goes on as if nothing had happened, bit for bit."""

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
from test_run import adapter, losses, options, run

ROOT = Path(__file__).parents[2]
EVERYTHING = {
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


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("KILLS", "2"))))
def test_kill_9_at_a_random_moment_then_resume(
    models_folder: Path, data_folder: Path, tmp_path: Path, seed: int
) -> None:
    """KILLS=10 tries ten moments."""
    straight = run(options(models_folder, data_folder, tmp_path / "straight", **EVERYTHING))
    output = tmp_path / "killed"
    words = options(models_folder, data_folder, output, **EVERYTHING)
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # another number of threads adds up in another order
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    wanted = random.Random(seed).randrange(3, 13)  # the first checkpoint is there by then
    while not (output / "trainer_log.jsonl").exists() or len(losses(output)) < wanted:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "llava.json").exists()

    run([*words, "--resume_from_checkpoint", "true"])
    for name, weight in adapter(straight).items():
        assert torch.equal(weight, adapter(output)[name]), name


def test_what_differs_is_listed_or_refused(
    models_folder: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    output = run(options(models_folder, data_folder, tmp_path / "out", **more))
    again = {**more, "resume_from_checkpoint": output / "checkpoint-1"}
    for change, message in (
        ({"lora_r": 8}, "--lora_r was 4, is 8: not the same run.*--init_from"),
        ({"packing": True}, "--packing was default, is True"),
        (
            {"mm_projector_type": "mlp2x_gelu"},
            "mm_projector_type was linear, is mlp2x_gelu: that is another model",
        ),
        ({"vision_tower": models_folder / "siglip"}, "weights_digests was"),
    ):
        with pytest.raises(ValueError, match=message):
            run(options(models_folder, data_folder, tmp_path / "out", **{**again, **change}))
    run(options(models_folder, data_folder, tmp_path / "out", **again, learning_rate=1e-3))
    assert "--learning_rate was 0.005, is 0.001" in capsys.readouterr().err

"""A resumed run equals an uninterrupted one bit for bit; resuming with other records or options is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_process import ForkedProcess
from torch.optim.lr_scheduler import LambdaLR
from training_runs import (
    ROOT,
    assert_equal_weights,
    read_log,
    run_training,
    trained_weights,
    training_options,
)

from llava_simplified.arguments import parse_arguments
from llava_simplified.model.config import read_checkpoint_config
from llava_simplified.training.optimizer import load_scheduler_state
from llava_simplified.training.resume import find_resume_folder
from llava_simplified.training.train_command import describe_interruption

# Everything that makes it difficult to resume exactly: packs, worker processes, dropout.
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
KILLS = int(os.environ.get("KILLS", "1"))


def make_checkpoint(folder: Path) -> None:
    """Write the file by which a checkpoint that can be resumed is recognized."""
    (folder / "trainer_state").mkdir(parents=True)
    (folder / "trainer_state" / "optimizer.safetensors").touch()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
@pytest.mark.parametrize("seed", range(KILLS))
def test_run_killed_at_a_random_step_resumes_bit_for_bit(
    models_folder: Path, data_folder: Path, tmp_path: Path, seed: int
) -> None:
    uninterrupted = run_training(
        training_options(models_folder, data_folder, tmp_path / "uninterrupted", **OPTIONS)
    )
    output = tmp_path / "killed"
    options = training_options(models_folder, data_folder, output, **OPTIONS)
    # With another number of threads, sums would be computed in another order.
    environment = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = ForkedProcess([ROOT / "train.py", *options], environment=environment)
    steps = random.Random(seed).randrange(3, 13)  # after the first checkpoint
    log = output / "trainer_log.jsonl"
    while not log.exists() or len(read_log(output)) < steps:
        assert process.poll() is None, process.stderr
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "llava.json").exists()

    run_training([*options, "--resume_from_checkpoint", "true"])
    assert_equal_weights(trained_weights(uninterrupted), trained_weights(output))


def test_new_run_in_the_output_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"
    args = parse_arguments(["--output_dir", str(output)])[2]
    assert find_resume_folder(args) is None
    # A run that was killed before its first checkpoint can be started again.
    (output / ".saving" / "checkpoint-500").mkdir(parents=True)
    (output / "trainer_log.jsonl").touch()
    (output / "checkpoint-500-good").mkdir()  # renamed by the user
    assert find_resume_folder(args) is None

    for step in (500, 1000):
        make_checkpoint(output / f"checkpoint-{step}")
    with pytest.raises(ValueError, match="contains checkpoint-1000 of another run.*--output_dir"):
        find_resume_folder(args)
    args.resume_from_checkpoint = "true"
    assert find_resume_folder(args) == output / "checkpoint-1000"


def test_resume_from_a_checkpoint_without_the_optimizer_is_refused(tmp_path: Path) -> None:
    """`--save_only_model True` saves such checkpoints."""
    checkpoint = tmp_path / "checkpoint-5"
    make_checkpoint(checkpoint)
    (checkpoint / "trainer_state" / "optimizer.safetensors").unlink()
    args = parse_arguments(["--output_dir", str(tmp_path), "--resume_from_checkpoint", "true"])[2]
    with pytest.raises(ValueError, match="checkpoint-5: .*--save_only_model True.*--init_from"):
        find_resume_folder(args)
    message = describe_interruption(["--save_only_model", "True"], tmp_path)
    assert f"--init_from {checkpoint}" in message
    assert "--resume_from_checkpoint" not in message


def test_resume_from_an_earlier_checkpoint_warns_of_the_later_ones(
    tmp_path: Path, package_log: pytest.LogCaptureFixture
) -> None:
    for step in (50, 1000):
        make_checkpoint(tmp_path / f"checkpoint-{step}")
    argv = ["--output_dir", str(tmp_path), "--resume_from_checkpoint"]
    last, earlier = (str(tmp_path / f"checkpoint-{step}") for step in (1000, 50))
    find_resume_folder(parse_arguments([*argv, last])[2])
    assert not package_log.text
    find_resume_folder(parse_arguments([*argv, earlier])[2])
    assert "later checkpoints, up to checkpoint-1000" in package_log.text


def test_schedule_continues_with_fewer_learning_rates() -> None:
    """Without `--mm_projector_lr`, for example, all parameters are in one group."""

    def decay(step: int, num_steps: int) -> float:
        return 1 - step / num_steps

    def start(rates: list[float]) -> tuple[torch.optim.Optimizer, LambdaLR]:
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
        optimizer = torch.optim.SGD(groups)
        # The schedules of Transformers are objects of `partial`, too.
        return optimizer, LambdaLR(optimizer, partial(decay, num_steps=10))

    optimizer, schedule = start([0.1, 0.2])
    for _ in range(3):
        optimizer.step()
        schedule.step()
    new_optimizer, new_schedule = start([0.5])
    load_scheduler_state(new_schedule, new_optimizer, schedule.state_dict())
    assert new_optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 0.7)
    new_optimizer.step()
    new_schedule.step()
    assert new_optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 0.6)


@pytest.mark.medium
def test_resumed_run_stops_after_its_own_early_stopping_patience(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    """The highest loss is declared the best, so that no evaluation after the first is an improvement."""
    options = training_options(
        models_folder,
        data_folder,
        tmp_path / "out",
        eval_data_path=data_folder / "val.json",
        val_image_folder=data_folder / "images",
        eval_strategy="steps",
        eval_steps=1,
        eval_captions=0,
        save_strategy="steps",
        save_steps=1,
        max_steps=4,
        disable_tqdm=True,
        early_stopping_patience=10,
        greater_is_better=True,
        warmup_steps=0,
    )
    output = run_training(options)
    curve = read_log(output, "eval_loss")
    assert curve.index(max(curve)) == 0
    checkpoint = str(output / "checkpoint-2")  # one evaluation without an improvement
    changes = ["--resume_from_checkpoint", checkpoint, "--early_stopping_patience", "2"]
    run_training([*options, *changes])
    assert read_checkpoint_config(output)["training"]["steps"] == 3


@pytest.fixture(scope="module")
def finished_run(
    models_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of two steps with batches of four, with a checkpoint after each step."""
    output = tmp_path_factory.mktemp("finished") / "out"
    changes: dict[str, object] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    return run_training(training_options(models_folder, data_folder, output, **changes))


def resume(
    run: Path, models_folder: Path, data_folder: Path, output: Path, **changes: object
) -> None:
    """Resume a run from its first checkpoint, with changed options."""
    values = {
        "max_steps": 2,
        "resume_from_checkpoint": run / "checkpoint-1",
        **changes,
    }
    run_training(training_options(models_folder, data_folder, output, **values))


@pytest.mark.parametrize(
    "edit",
    [
        lambda rows: rows[:5],
        lambda rows: rows[:4] + rows,
        lambda rows: rows + rows[:1],
        lambda rows: rows[::-1],
        # The file keeps its size.
        lambda rows: [*rows[:7], {**rows[7], "response": rows[7]["response"].upper()}, *rows[8:]],
    ],
    ids=["fewer", "in front", "appended", "reordered", "edited"],
)
def test_resume_with_other_records_is_refused(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    finished_run: Path,
    edit: Callable[[list[Any]], list[Any]],
) -> None:
    """The file has the same name; its size and time may be the same, too."""
    original = data_folder / "train.json"
    edited = tmp_path / "train.json"
    edited.write_text(json.dumps(edit(json.loads(original.read_text()))))
    modified = original.stat().st_mtime_ns
    os.utime(edited, ns=(modified, modified))
    changes = {"train_data_path": edited, "train_image_folder": data_folder / "images"}
    with pytest.raises(ValueError, match=r"--train_data_path .*train\.json"):
        resume(finished_run, models_folder, data_folder, tmp_path / "out", **changes)


@pytest.mark.medium
def test_resume_accepts_the_same_records_in_another_place(
    models_folder: Path, data_folder: Path, tmp_path: Path, finished_run: Path
) -> None:
    copy = tmp_path / "copy.json"
    copy.write_bytes((data_folder / "train.json").read_bytes())
    output = tmp_path / "out"
    resume(finished_run, models_folder, data_folder, output, train_data_path=copy)
    assert_equal_weights(trained_weights(finished_run), trained_weights(output))


@pytest.mark.medium
def test_resume_of_a_checkpoint_without_a_digest_compares_the_path(
    models_folder: Path, data_folder: Path, tmp_path: Path, finished_run: Path
) -> None:
    """Version 0.1.0 stored neither a digest of the data nor `image_aspect_ratio`."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    config = run / "checkpoint-1" / "llava.json"
    stored = json.loads(config.read_text())
    del stored["training"]["train_data_sha256"]
    del stored["architecture"]["image_aspect_ratio"]
    stored["training"]["accelerator_config"] = "AcceleratorConfig(split_batches=False)"
    config.write_text(json.dumps(stored))
    resume(run, models_folder, data_folder, tmp_path / "out")
    copy = tmp_path / "copy.json"
    shutil.copy(data_folder / "train.json", copy)
    with pytest.raises(ValueError, match="--train_data_path"):
        resume(run, models_folder, data_folder, tmp_path / "out", train_data_path=copy)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("per_device_train_batch_size", 2),
        ("gradient_accumulation_steps", 2),
        ("ignore_data_skip", True),
        ("dataloader_drop_last", True),
        ("accelerator_config", '{"use_seedable_sampler": false}'),
        ("train_sampling_strategy", "group_by_length"),
        ("data_seed", 1),
        ("seed", 1),
        ("share_prefix", False),
        ("packing", True),
    ],
)
def test_resume_refuses_options_that_repeat_or_skip_records(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    finished_run: Path,
    option: str,
    value: object,
) -> None:
    with pytest.raises(ValueError, match=f"--{option}"):
        resume(finished_run, models_folder, data_folder, tmp_path / "out", **{option: value})


@pytest.mark.medium
def test_resume_accepts_the_same_records_per_step_in_smaller_batches(
    models_folder: Path, data_folder: Path, tmp_path: Path, finished_run: Path
) -> None:
    output = tmp_path / "out"
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    resume(finished_run, models_folder, data_folder, output, **changes)
    expected = trained_weights(finished_run)
    for name, weight in trained_weights(output).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=5e-6)


@pytest.mark.medium
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
        ({"lora_r": 8}, r"--lora_r: .* 4, .* 8\..*--init_from"),
        ({"packing": True}, "--packing: .* default, .* True"),
        ({"optim": "adafactor"}, r"--optim: .* default, .* adafactor\."),
        ({"mm_projector_type": "mlp2x_gelu"}, "mm_projector_type linear, .* mlp2x_gelu"),
        ({"vision_tower": models_folder / "siglip"}, "weights_digests"),
    ):
        options = training_options(
            models_folder, data_folder, tmp_path / "out", **{**changes, **change}
        )
        with pytest.raises(ValueError, match=message):
            run_training(options)

    changes["learning_rate"] = 1e-3
    changes["optim"] = "adamw_torch"  # has the same state as the default, which is fused
    run_training(training_options(models_folder, data_folder, tmp_path / "out", **changes))
    assert "--learning_rate was 0.005, is 0.001" in package_log.text

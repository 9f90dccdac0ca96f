"""If a signal ends a run, the run saves a checkpoint and prints the command that continues it."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
from cli_process import ForkedProcess, start_fork_server
from torch.utils.data import DataLoader
from training_runs import (
    ROOT,
    assert_equal_weights,
    read_log,
    run_training,
    trained_weights,
    training_options,
)
from transformers.trainer_utils import seed_worker

from llava_simplified.training.callbacks import ThroughputMeter
from llava_simplified.training.interruption import (
    InterruptionCallback,
    TrainingInterrupted,
    ignore_interrupts,
)
from llava_simplified.training.train_command import main
from llava_simplified.training.trainer import LlavaTrainer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")

OPTIONS: dict[str, object] = {"max_steps": 4, "disable_tqdm": True, "save_strategy": "no"}


def interrupt_in_step(patch: pytest.MonkeyPatch, step: int) -> None:
    """Send SIGINT while a run is in a step, counted from its start or from where it is resumed."""
    start_step = ThroughputMeter.start_step
    steps = []

    def start_step_with_signal(self: ThroughputMeter) -> None:
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), signal.SIGINT)
        start_step(self)

    patch.setattr(ThroughputMeter, "start_step", start_step_with_signal)


@pytest.mark.medium
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_run_after_the_step_with_a_checkpoint(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    handler = signal.getsignal(number)
    uninterrupted = run_training(
        training_options(models_folder, data_folder, tmp_path / "uninterrupted", **OPTIONS)
    )
    options = training_options(models_folder, data_folder, tmp_path / "out", **OPTIONS)
    start_step = ThroughputMeter.start_step
    steps = []

    def send_in_second_step(self: ThroughputMeter) -> None:
        steps.append(1)
        if len(steps) == 2:
            # Send the signal twice, like a launcher that passes it on.
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        start_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(ThroughputMeter, "start_step", send_in_second_step)
        with pytest.raises(TrainingInterrupted) as interrupted:
            run_training(options)
    assert (interrupted.value.signal, interrupted.value.step) == (number, 2)
    assert signal.getsignal(number) is handler, "the handler of the caller must be restored"
    assert not (tmp_path / "out" / "llava.json").exists()

    resumed = run_training([*options, "--resume_from_checkpoint", "true"])
    assert_equal_weights(trained_weights(uninterrupted), trained_weights(resumed))


@pytest.mark.medium
def test_interruption_keeps_and_names_its_checkpoint_although_later_ones_exist(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    package_log: pytest.LogCaptureFixture,
) -> None:
    changes = {**OPTIONS, "save_strategy": "steps", "save_steps": 1}
    options = training_options(models_folder, data_folder, tmp_path / "out", **changes)
    output = run_training(options)
    interrupt_in_step(monkeypatch, 1)
    first = str(output / "checkpoint-1")
    status = main([*options, "--resume_from_checkpoint", first, "--save_total_limit", "2"])
    assert status == 130
    saved = output / "checkpoint-2"
    assert (saved / "trainer_state").is_dir()
    assert f"The last checkpoint is {saved}." in package_log.text
    assert package_log.text.rstrip().endswith(f"--resume_from_checkpoint {saved}")
    kept = {folder.name for folder in output.glob("checkpoint-*")}
    assert kept == {"checkpoint-2", "checkpoint-4"}


@pytest.mark.medium
@pytest.mark.parametrize(("step", "is_evaluated"), [(2, False), (6, True)])
def test_interruption_evaluates_complete_epochs_only(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    is_evaluated: bool,
) -> None:
    """A resumed run starts after a complete epoch, so it would skip that evaluation."""
    options = training_options(
        models_folder,
        data_folder,
        tmp_path / "out",
        disable_tqdm=True,
        per_device_train_batch_size=2,
        max_steps=12,  # two epochs
        save_strategy="epoch",
        eval_strategy="epoch",
        eval_captions=0,
        eval_data_path=data_folder / "val.json",
        val_image_folder=data_folder / "images",
    )
    interrupt_in_step(monkeypatch, step)
    with pytest.raises(TrainingInterrupted) as interrupted:
        run_training(options)
    assert interrupted.value.step == step
    assert bool(read_log(tmp_path / "out", "eval_loss")) == is_evaluated
    state_file = interrupted.value.checkpoint / "trainer_state" / "trainer_state.json"
    rows = json.loads(state_file.read_text())["log_history"]
    assert any("eval_loss" in row for row in rows) == is_evaluated


@pytest.mark.medium
def test_interruption_saves_although_the_evaluation_is_not_the_best(
    models_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {
        **OPTIONS,
        "save_strategy": "best",
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
        "warmup_steps": 0,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_captions": 0,
        "eval_data_path": data_folder / "val.json",
        "val_image_folder": data_folder / "images",
    }
    options = training_options(models_folder, data_folder, tmp_path / "out", **changes)
    interrupt_in_step(monkeypatch, 2)
    with pytest.raises(TrainingInterrupted) as interrupted:
        run_training(options)
    first, second = read_log(tmp_path / "out", "eval_loss")
    assert second < first, "the second evaluation must not be the best"
    assert (interrupted.value.checkpoint / "trainer_state").is_dir()


@pytest.mark.medium
def test_interruption_keeps_its_checkpoint_and_renamed_ones_beside_the_best(
    models_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The highest loss is declared the best, so that the first checkpoint stays the best."""
    changes = {
        **OPTIONS,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_captions": 0,
        "eval_data_path": data_folder / "val.json",
        "val_image_folder": data_folder / "images",
    }
    output = tmp_path / "out"
    renamed = output / "checkpoint-1-good"
    renamed.mkdir(parents=True)
    options = training_options(models_folder, data_folder, output, **changes)
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 3)
        with pytest.raises(TrainingInterrupted) as interrupted:
            run_training(options)
    assert interrupted.value.checkpoint.is_dir()
    assert (output / "checkpoint-1").is_dir()

    run_training([*options, "--resume_from_checkpoint", "true"])
    # A complete run keeps the best checkpoint only.
    assert sorted(output.glob("checkpoint-*")) == [output / "checkpoint-1", renamed]


def test_second_signal_ends_the_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_simplified.training.interruption._SAME_SIGNAL_SECONDS", 0.01)
    callback = InterruptionCallback()
    with callback.watch_signals():
        os.kill(os.getpid(), signal.SIGINT)
        assert callback.signal == signal.SIGINT
        time.sleep(0.05)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


@pytest.mark.medium
@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_workers_ignore_ctrl_c(start_method: str) -> None:
    """Like spawned workers, those of a fork server inherit no handler, but have imported everything already."""
    if start_method == "forkserver":
        start_fork_server()
    loader = DataLoader(
        [*range(12)],  # type: ignore[arg-type]
        batch_size=1,
        num_workers=1,
        multiprocessing_context=start_method,
        worker_init_fn=ignore_interrupts,
    )
    batches = iter(loader)
    values = [int(next(batches))]
    [worker] = batches._workers  # type: ignore[attr-defined]
    for batch in batches:
        os.kill(worker.pid, signal.SIGINT)
        values.append(int(batch))
    assert values == [*range(12)]


@pytest.mark.medium
def test_loaders_of_the_trainer_ignore_ctrl_c(
    models_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def stop_at_first_step(self: LlavaTrainer) -> None:
        found.append(self.get_train_dataloader().worker_init_fn)
        raise ValueError("stop")

    monkeypatch.setattr(LlavaTrainer, "create_optimizer", stop_at_first_step)
    options = training_options(models_folder, data_folder, tmp_path / "out", **OPTIONS)
    with pytest.raises(ValueError, match="stop"):
        run_training(options)
    [init] = found
    assert init.func is ignore_interrupts
    assert init.keywords["then"].func is seed_worker


@pytest.mark.slow
def test_interrupted_command_prints_the_command_that_continues_it(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    """As with Ctrl-C in a terminal, the signal reaches the data loader workers too."""
    output = tmp_path / "out"
    changes = {"max_steps": 2000, "num_train_epochs": 700, "dataloader_num_workers": 2}
    options = training_options(
        models_folder, data_folder, output, **{**OPTIONS, **changes, "preflight": False}
    )
    process = ForkedProcess([ROOT / "train.py", *options], new_session=True)
    log = output / "trainer_log.jsonl"
    while not log.exists() or len(read_log(output)) < 3:
        assert process.poll() is None, process.stderr
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    status = process.wait(120)
    printed = process.stdout + process.stderr
    assert status == 130, printed
    assert "Traceback" not in printed
    [checkpoint] = output.glob("checkpoint-*")
    assert str(checkpoint) in printed
    command = shlex.split(re.search(r"^  train\.py (.*)$", printed, re.MULTILINE)[1])
    steps = int(checkpoint.name.removeprefix("checkpoint-"))
    run_training([*command, "--max_steps", str(steps + 1)])
    assert (output / "llava.json").is_file()

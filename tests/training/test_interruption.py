"""If a signal ends a run, the run saves a checkpoint and prints the command that continues it."""

from __future__ import annotations

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
from llava_simplified.training.trainer import LlavaTrainer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")

OPTIONS: dict[str, object] = {"max_steps": 4, "disable_tqdm": True, "save_strategy": "no"}


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

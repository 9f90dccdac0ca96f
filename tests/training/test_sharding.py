"""Two processes train as one does: under every engine, losses, weights, optimizer state and checkpoints are the same."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
from pathlib import Path

import pytest
import torch
from cli_process import fork_process, skip_without_deepspeed
from safetensors.torch import load_file
from training_runs import (
    ROOT,
    assert_equal_weights,
    read_log,
    run_training,
    trained_weights,
    training_options,
)

from llava_simplified.model.checkpoint import load_checkpoint
from llava_simplified.training import plots

ENGINES: dict[str, dict[str, object]] = {
    "ddp": {},
    "fsdp": {"fsdp": True},
    "zero2": {"deepspeed": ROOT / "ds_configs" / "zero2.json"},
    "zero3": {"deepspeed": ROOT / "ds_configs" / "zero3.json"},
}
PROCESSES = 2
TIMEOUT = 100  # seconds after which a process that waits for the other one is ended


def train_as_rank(rank: int, port: int, options: list[str]) -> None:
    """Train as one of two processes, with the environment that a launcher would set."""
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(PROCESSES),
        "LOCAL_WORLD_SIZE": str(PROCESSES),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        # DeepSpeed compiles an optimizer that is not used here, and imports torch's compiler for this, which takes half
        # of the time of a run.
        "TORCHDYNAMO_DISABLE": "1",
    }
    os.environ.update(environment)
    faulthandler.dump_traceback_later(TIMEOUT, exit=True)
    plots.plot_training = lambda *_: None
    torch.set_num_threads(1)
    run_training(options)


def train_in_two_processes(options: list[str]) -> None:
    """Train in two processes, forked from a server that has imported everything already."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(PROCESSES):
        processes.append(fork_process(train_as_rank, rank, port, options))
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint, those of the optimizer included."""
    tensors = {}
    for path in folder.glob("**/*.safetensors"):
        for name, tensor in load_file(path).items():
            tensors[f"{path.name}:{name}"] = tensor
    return tensors


def assert_same_checkpoints(one: Path, other: Path, rtol: float = 0.0, atol: float = 0.0) -> None:
    first, second = saved_tensors(one), saved_tensors(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        torch.testing.assert_close(tensor, second[name], rtol=rtol, atol=atol, msg=name)


@pytest.fixture(scope="session")
def mixed(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Options of a run whose batches have an image in the first, the second or neither process.

    The number of validation records is odd: one process gets a padding sample.
    """
    train_rows = json.loads((data_folder / "train.json").read_text())
    for index in (1, 2, 4, 5, 7):
        del train_rows[index]["image"]
    eval_rows = json.loads((data_folder / "val.json").read_text())[:3]
    del eval_rows[2]["image"]
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "train.json").write_text(json.dumps(train_rows))
    (folder / "val.json").write_text(json.dumps(eval_rows))
    return {
        "cache_vision_features": "off",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": 5,
        "per_device_train_batch_size": 1,
        "train_data_path": folder / "train.json",
        "eval_data_path": folder / "val.json",
        "val_image_folder": data_folder / "images",
        "train_sampling_strategy": "sequential",
        "eval_strategy": "steps",
        "eval_steps": 5,
        "per_device_eval_batch_size": 1,
    }


@pytest.fixture(scope="session")
def single_process_run(
    models_folder: Path,
    data_folder: Path,
    mixed: dict[str, object],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The run that two processes with batches of 1 must equal: one process with batches of 2."""
    output = tmp_path_factory.mktemp("single") / "out"
    changes = {**mixed, "per_device_train_batch_size": 2}
    return run_training(training_options(models_folder, data_folder, output, **changes))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_equal_one(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    mixed: dict[str, object],
    single_process_run: Path,
    engine: str,
    package_log: pytest.LogCaptureFixture,
) -> None:
    if engine.startswith("zero"):
        skip_without_deepspeed()
    two = tmp_path / "two"
    changes = {**mixed, **ENGINES[engine]}
    train_in_two_processes(training_options(models_folder, data_folder, two, **changes))
    assert read_log(two) == pytest.approx(read_log(single_process_run), rel=2e-6)
    eval_losses = read_log(single_process_run, "eval_loss")
    assert read_log(two, "eval_loss") == pytest.approx(eval_losses, rel=2e-6)
    for name in ("checkpoint-3", "checkpoint-5", ""):
        assert_same_checkpoints(single_process_run / name, two / name, rtol=1e-4, atol=5e-6)
    captions = []
    for folder in (single_process_run, two):
        model = load_checkpoint(folder / "checkpoint-5")
        captions.append(model.caption(data_folder / "images" / "0.jpg"))
    assert captions[0] == captions[1]

    # If the run is resumed in two processes, the results are equal bit for bit.
    resume = ["--resume_from_checkpoint", str(two / "checkpoint-3")]
    again = tmp_path / "again"
    options = training_options(models_folder, data_folder, again, **changes)
    train_in_two_processes([*options, *resume])
    assert_same_checkpoints(two / "checkpoint-5", again / "checkpoint-5")

    # The run can also be resumed in a single process, without the engine.
    changes = {**mixed, "per_device_train_batch_size": 2}
    options = training_options(models_folder, data_folder, tmp_path / "one", **changes)
    output = run_training([*options, *resume])
    assert_same_checkpoints(single_process_run, output, rtol=1e-4, atol=5e-6)
    assert "number of processes" in package_log.text


FULL_FINE_TUNING = {
    "lora_enable": False,
    "freeze_backbone": False,
    "tune_vision_tower": "full",
    "learning_rate": 1e-3,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "changes"),
    [("zero3", FULL_FINE_TUNING), ("fsdp", {"cache_vision_features": "memory"})],
    ids=["zero3 full fine-tuning", "fsdp with cached features"],
)
def test_two_processes_equal_one_with_other_options(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    mixed: dict[str, object],
    engine: str,
    changes: dict[str, object],
) -> None:
    """In some steps, one process has no image. Its dummy image must have the same form as the images of the other."""
    if engine.startswith("zero"):
        skip_without_deepspeed()
    changes = {**mixed, **changes, "max_steps": 3}
    single = {**changes, "per_device_train_batch_size": 2}
    one = run_training(training_options(models_folder, data_folder, tmp_path / "one", **single))
    two = tmp_path / "two"
    options = training_options(models_folder, data_folder, two, **changes, **ENGINES[engine])
    train_in_two_processes(options)
    assert read_log(two) == pytest.approx(read_log(one), rel=2e-6)
    assert_same_checkpoints(one, two, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_two_processes_resume_length_grouped_batches_in_the_second_epoch(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    rows = json.loads((data_folder / "train.json").read_text())[:6]  # three steps per epoch
    (tmp_path / "train.json").write_text(json.dumps(rows))
    changes = {
        "save_strategy": "steps",
        "save_steps": 4,
        "max_steps": 6,
        "per_device_train_batch_size": 1,
        "group_by_length": True,
        "train_data_path": tmp_path / "train.json",
        "disable_tqdm": True,
    }
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    train_in_two_processes(training_options(models_folder, data_folder, uninterrupted, **changes))
    options = training_options(models_folder, data_folder, resumed, **changes)
    checkpoint = str(uninterrupted / "checkpoint-4")
    train_in_two_processes([*options, "--resume_from_checkpoint", checkpoint])
    assert read_log(resumed) == read_log(uninterrupted)[4:]
    assert_equal_weights(trained_weights(uninterrupted), trained_weights(resumed))


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "objective"), [("ddp", "grpo"), ("zero2", "dpo")])
def test_two_processes_equal_one_with_rewards_and_preferences(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    mixed: dict[str, object],
    single_process_run: Path,
    engine: str,
    objective: str,
) -> None:
    """Both processes sample what one would, and count captions, pairs and logged values together."""
    if engine.startswith("zero"):
        skip_without_deepspeed()
    rows = json.loads(Path(str(mixed["train_data_path"])).read_text())
    if objective == "dpo":
        for row, other in zip(rows, [*rows[1:], rows[0]]):
            row |= {"chosen": row["response"], "rejected": other["response"]}
        for row in rows:
            del row["response"]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    changes = {
        **mixed,
        "train_data_path": tmp_path / "train.json",
        "init_from": single_process_run,
        "objective": objective,
        "reward": "word_f1",
        "num_samples": 3,
        "sample_max_tokens": 8,
        "sft_weight": 0.1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "max_steps": 3,
    }
    single = {**changes, "per_device_train_batch_size": 2}
    one = run_training(training_options(models_folder, data_folder, tmp_path / "one", **single))
    two = tmp_path / "two"
    options = training_options(models_folder, data_folder, two, **changes, **ENGINES[engine])
    train_in_two_processes(options)
    logged = ["reward", "kl", "entropy"] if objective == "grpo" else ["margin", "accuracy"]
    for key in ("loss", *logged):
        assert read_log(two, key) == pytest.approx(read_log(one, key), rel=1e-4, abs=1e-6), key
    assert_same_checkpoints(one, two, rtol=1e-4, atol=2e-5)

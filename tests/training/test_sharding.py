"""Two processes are one: whichever engine carries them, loss, weights, optimizer and checkpoints are the single process's."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_run import losses, options, run

from llava_simplified.model.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]
ENGINES = {
    "ddp": {},
    "fsdp": {"fsdp": True},
    "zero2": {"deepspeed": ROOT / "ds_configs" / "zero2.json"},
    "zero3": {"deepspeed": ROOT / "ds_configs" / "zero3.json"},
}
TINY = {
    "cache_vision_features": "off",
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 3,
    "max_steps": 5,
    "per_device_train_batch_size": 1,
}


def one_of_several(rank: int, port: int, argv: list[str]) -> None:
    """What a launcher starts."""
    where = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": 2,
        "LOCAL_WORLD_SIZE": 2,
    }
    os.environ.update(
        {name: str(value) for name, value in {**where, "RANK": rank, "LOCAL_RANK": rank}.items()}
    )
    faulthandler.dump_traceback_later(
        100, exit=True
    )  # of a process that waits for the other in vain
    torch.set_num_threads(1)
    run(argv)


def run_twofold(argv: list[str]) -> None:
    """Train in two processes, forked from one that has its imports behind it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["llava_simplified.training.train_command", "deepspeed", "test_run"]
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=one_of_several, args=(rank, port, argv)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds of weights, and of the optimizer's state."""
    return {
        f"{path.name}:{k}": v
        for path in folder.glob("**/*.safetensors")
        for k, v in load_file(path).items()
    }


def assert_same(one: Path, other: Path, **tolerance: float) -> None:
    first, second = saved(one), saved(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        torch.testing.assert_close(
            tensor, second[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name
        )


@pytest.fixture(scope="session")
def mixed(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Rows of which the first, the second or neither process has an image; three for validation, an odd number."""
    rows = [json.loads((data_folder / f"{split}.json").read_text()) for split in ("train", "val")]
    for index in (1, 2, 4, 5, 7):
        del rows[0][index]["image"]
    del rows[1][2]["image"]
    folder = tmp_path_factory.mktemp("mixed")
    for split, part in zip(("train", "val"), (rows[0], rows[1][:3])):
        (folder / f"{split}.json").write_text(json.dumps(part))
    return {
        **TINY,
        "train_data_path": folder / "train.json",
        "eval_data_path": folder / "val.json",
        "val_image_folder": data_folder / "images",
        "train_sampling_strategy": "sequential",
        "eval_strategy": "steps",
        "eval_steps": 5,
        "per_device_eval_batch_size": 1,
    }


@pytest.fixture(scope="session")
def alone(
    models_folder: Path, data_folder: Path, mixed: dict, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("alone") / "out"
    return run(
        options(models_folder, data_folder, output, **{**mixed, "per_device_train_batch_size": 2})
    )


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_of_batch_1_are_one_of_batch_2(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    mixed: dict,
    alone: Path,
    engine: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    words = options(models_folder, data_folder, tmp_path / "two", **{**mixed, **ENGINES[engine]})
    run_twofold(words)
    assert losses(tmp_path / "two") == pytest.approx(losses(alone), rel=2e-6)
    assert losses(tmp_path / "two", "eval_loss") == pytest.approx(
        losses(alone, "eval_loss"), rel=2e-6
    )
    for folder in ("checkpoint-3", "checkpoint-5", ""):
        assert_same(alone / folder, tmp_path / "two" / folder, rtol=1e-4, atol=5e-6)
    picture = data_folder / "images" / "0.jpg"
    captions = [
        load_checkpoint(folder / "checkpoint-5").caption(picture)
        for folder in (alone, tmp_path / "two")
    ]
    assert captions[0] == captions[1]

    start = ["--resume_from_checkpoint", str(tmp_path / "two" / "checkpoint-3")]
    again = options(models_folder, data_folder, tmp_path / "again", **{**mixed, **ENGINES[engine]})
    run_twofold([*again, *start])
    assert_same(tmp_path / "two" / "checkpoint-5", tmp_path / "again" / "checkpoint-5")
    single = options(
        models_folder,
        data_folder,
        tmp_path / "single",
        **{**mixed, "per_device_train_batch_size": 2},
    )
    assert_same(alone, run([*single, *start]), rtol=1e-4, atol=5e-6)
    assert "another number of processes" in capsys.readouterr().err


WHOLE = {
    "lora_enable": False,
    "freeze_backbone": False,
    "tune_vision_tower": "full",
    "learning_rate": 1e-3,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "more"),
    [("zero3", WHOLE), ("fsdp", {"cache_vision_features": "memory"})],
    ids=["zero3 trains all", "fsdp with features"],
)
def test_so_they_are_with_all_weights_trained_and_with_cached_features(
    models_folder: Path, data_folder: Path, tmp_path: Path, mixed: dict, engine: str, more: dict
) -> None:
    """Also where a process has no picture at all: what stands in for one has the form of the others."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    more = {**mixed, **more, "max_steps": 3}
    one = run(
        options(
            models_folder,
            data_folder,
            tmp_path / "one",
            **{**more, "per_device_train_batch_size": 2},
        )
    )
    run_twofold(options(models_folder, data_folder, tmp_path / "two", **more, **ENGINES[engine]))
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=2e-6)
    assert_same(one, tmp_path / "two", rtol=1e-4, atol=2e-5)

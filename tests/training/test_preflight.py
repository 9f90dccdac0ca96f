"""What is tried before a long run: it changes nothing of the run, and says what would go wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_run import adapter, losses, options

from llava_simplified.arguments import parse_arguments
from llava_simplified.training import preflight as module
from llava_simplified.training.plan import make_plan
from llava_simplified.training.preflight import preflight
from llava_simplified.training.train_command import main


def left_behind(folder: Path) -> list[Path]:
    return list(folder.glob(".preflight*"))


def test_the_run_behind_it_is_bit_for_bit_the_run_without(
    models_folder: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads((data_folder / "train.json").read_text())
    two = {
        "instruction": "What have <image> and <image> in common?"
    }  # of one picture it can't be asked
    (tmp_path / "two.json").write_text(
        json.dumps([{**row, **two, "image": [row["image"], "0.jpg"]} for row in rows])
    )
    for choice in ("true", "false"):
        more = {"preflight": choice, "lora_dropout": 0.1, "train_data_path": tmp_path / "two.json"}
        assert main(options(models_folder, data_folder, tmp_path / choice, **more)) == 0
        assert ("saved, loaded, the same logits" in capsys.readouterr().out) == (choice == "true")
    assert losses(tmp_path / "true") == losses(tmp_path / "false")
    with_it, without = adapter(tmp_path / "true"), adapter(tmp_path / "false")
    assert with_it.keys() == without.keys()
    assert all(torch.equal(with_it[name], without[name]) for name in without)
    assert not left_behind(tmp_path / "true")


def test_a_fault_of_the_first_steps_is_reported(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    more = {"preflight": "true", "learning_rate": 1e38, "warmup_steps": 0}
    with pytest.raises(
        ValueError, match="preflight: the run fails in its first steps: .* at step 2"
    ):
        main(options(models_folder, data_folder, tmp_path / "out", **more))
    assert not left_behind(tmp_path / "out")
    assert not (tmp_path / "out" / "trainer_log.jsonl").exists()  # the run itself did not begin


def test_what_does_not_fit_is_refused_with_what_to_change(
    models_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = options(models_folder, data_folder, tmp_path / "out", preflight="true")
    peak = make_plan(*parse_arguments(argv)).peak
    monkeypatch.setattr(module, "_available_memory", lambda args: peak - 1)
    ways = "--per_device_train_batch_size 3 .*--gradient_checkpointing True; --bf16 True"
    with pytest.raises(ValueError, match=f"does not fit into memory.*{ways}"):
        main(argv)
    assert not left_behind(tmp_path / "out")


def test_auto_leaves_short_runs_and_launched_ones_alone(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "make_plan", None)  # whoever calls it fails
    short, long, asked, odd = (
        (argv, *parse_arguments(argv))
        for more in ({}, {"max_steps": 5000}, {"preflight": "true"}, {"preflight": "maybe"})
        for argv in [options(models_folder, data_folder, tmp_path / "out", **more)]
    )
    preflight(*short)
    with pytest.raises(TypeError):
        preflight(*long)
    with pytest.raises(ValueError, match="auto, true or false"):
        preflight(*odd)
    monkeypatch.setenv("LOCAL_RANK", "0")
    preflight(*long)
    assert "left out under a launcher" in capsys.readouterr().out
    with pytest.raises(ValueError, match="this one has a launcher"):
        preflight(*asked)

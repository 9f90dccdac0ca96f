"""The dry run before a long run: it finds what would fail, and does not change the run."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli_process import run_forked
from training_runs import assert_equal_weights, read_log, trained_weights, training_options

from llava_simplified.arguments import parse_arguments
from llava_simplified.training import preflight as preflight_module
from llava_simplified.training.plan import make_plan
from llava_simplified.training.preflight import preflight
from llava_simplified.training.train_command import main


def run_dry_run(
    command: Sequence[str], env: Mapping[str, str], **options: object
) -> subprocess.CompletedProcess:
    """Run the dry run in a forked process, after checking that `python -m MODULE` would find the module."""
    python, _, module, *_ = command
    search = f"import importlib.util; assert importlib.util.find_spec({module!r})"
    # `subprocess.run` is replaced by this function.
    finder = subprocess.Popen([python, "-c", search], env=env, cwd="/")
    assert finder.wait(60) == 0
    return run_forked(command, env, **options)


def scratch_folders(folder: Path) -> list[Path]:
    return list(folder.glob(".preflight*"))


@pytest.mark.medium
def test_preflight_does_not_change_the_run(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    package_log: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(preflight_module.subprocess, "run", run_dry_run)
    # Two images in a prompt: the dry run's caption must use both.
    rows = json.loads((data_folder / "train.json").read_text())
    for row in rows:
        row["instruction"] = "What have <image> and <image> in common?"
        row["image"] = [row["image"], "0.jpg"]
    records = tmp_path / "two_images.json"
    records.write_text(json.dumps(rows))
    for choice in ("true", "false"):
        options = training_options(
            models_folder,
            data_folder,
            tmp_path / choice,
            preflight=choice,
            lora_dropout=0.1,
            train_data_path=records,
        )
        package_log.clear()
        assert main(options) == 0
        was_reported = "preflight: " in package_log.text
        assert was_reported == (choice == "true")
    assert read_log(tmp_path / "true") == read_log(tmp_path / "false")
    assert_equal_weights(trained_weights(tmp_path / "false"), trained_weights(tmp_path / "true"))
    assert not scratch_folders(tmp_path / "true")


@pytest.mark.medium
def test_dry_run_reads_its_records_without_the_sidecars_of_the_run(
    models_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.mkdir()
    for row in json.loads((data_folder / "train.json").read_text()):
        image = shutil.copy(data_folder / "images" / row["image"], source)
        Path(image).with_suffix(".txt").write_text(row["response"])
    options = ["--data", str(source), "--sidecar", "txt", "--preflight", "true"]
    options += ["--model_name_or_path", str(models_folder / "mistral")]
    options += ["--vision_tower", str(models_folder / "clip")]
    options += ["--output_dir", str(tmp_path / "out")]
    parsed = []

    def parse_only(argv: Sequence[str], *_: object) -> None:
        _, data, _ = parse_arguments(list(argv))
        parsed.append(data)
        raise ValueError("parsed")

    monkeypatch.setattr(preflight_module, "_start_dry_run", parse_only)
    with pytest.raises(ValueError, match="parsed"):
        main(options)
    [data] = parsed
    records = Path(data.train_data_path)
    assert records.name == "train.jsonl"
    assert Path(data.train_image_folder) == source


@pytest.mark.medium
def test_preflight_refuses_the_output_folder_of_another_run(
    models_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dry run writes to another folder, so it would not find this error."""
    monkeypatch.setattr(preflight_module, "_start_dry_run", lambda *_: pytest.fail("started"))
    (tmp_path / "out" / "checkpoint-500").mkdir(parents=True)
    options = training_options(models_folder, data_folder, tmp_path / "out", preflight="true")
    with pytest.raises(ValueError, match="checkpoint-500 of another run"):
        main(options)


@pytest.mark.medium
def test_preflight_reports_an_error_of_the_first_steps(
    models_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight_module.subprocess, "run", run_forked)
    output = tmp_path / "out"
    options = training_options(
        models_folder, data_folder, output, preflight="true", learning_rate=1e38, warmup_steps=0
    )
    with pytest.raises(ValueError, match="preflight: .* at step 2"):
        main(options)
    assert not scratch_folders(output)
    assert not (output / "trainer_log.jsonl").exists(), "the run itself must not start"


@pytest.mark.medium
def test_preflight_refuses_what_does_not_fit_and_names_the_remedies(
    models_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = training_options(models_folder, data_folder, tmp_path / "out", preflight="true")
    peak = make_plan(*parse_arguments(options)).peak
    monkeypatch.setattr(preflight_module, "_available_memory", lambda args: peak - 1)
    remedies = "--per_device_train_batch_size 3 .*--gradient_checkpointing True; --bf16 True"
    with pytest.raises(ValueError, match=f"preflight: .*memory.*{remedies}"):
        main(options)
    assert not scratch_folders(tmp_path / "out")


@pytest.mark.medium
@pytest.mark.parametrize(
    ("free_checkpoints", "advice"), [(3.5, "--save_total_limit 2, or"), (1.5, "Pass another")]
)
def test_preflight_names_the_limit_of_checkpoints_that_fits_on_the_disk(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free_checkpoints: float,
    advice: str,
) -> None:
    changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 9, "preflight": "true"}
    options = training_options(models_folder, data_folder, tmp_path / "out", **changes)
    plan = make_plan(*parse_arguments(options))
    free = int(free_checkpoints * plan.checkpoint) + plan.final_model
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(ValueError, match=f"preflight: .*{advice}"):
        main(options)
    # With the recommended limit, the run fits: two checkpoints are kept while the third is written.
    args = parse_arguments([*options, "--save_total_limit", "2"])[2]
    assert (plan.disk_peak(args) <= free) == (free_checkpoints > 3)


def test_preflight_auto_skips_short_runs_and_launched_runs(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    package_log: pytest.LogCaptureFixture,
) -> None:
    def start_preflight(**changes: object) -> None:
        options = training_options(models_folder, data_folder, tmp_path / "out", **changes)
        preflight(options, *parse_arguments(options))

    class MakePlanCalledError(Exception):
        """The preflight has decided to try the run."""

    def fail(*_: object) -> None:
        raise MakePlanCalledError

    monkeypatch.setattr(preflight_module, "make_plan", fail)
    start_preflight()
    with pytest.raises(MakePlanCalledError):
        start_preflight(max_steps=5000)
    with pytest.raises(ValueError, match="--preflight maybe: .*auto, true or false"):
        start_preflight(preflight="maybe")

    long_run = training_options(models_folder, data_folder, tmp_path / "out", max_steps=5000)
    forced = training_options(models_folder, data_folder, tmp_path / "out", preflight="true")
    long_groups, forced_groups = parse_arguments(long_run), parse_arguments(forced)
    monkeypatch.setenv("LOCAL_RANK", "0")
    preflight(long_run, *long_groups)
    assert "under a launcher" in package_log.text
    with pytest.raises(ValueError, match="--preflight false"):
        preflight(forced, *forced_groups)

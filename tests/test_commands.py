"""Tests of the commands as users type them: in separate processes, with tiny local models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_process import command_programs, run_command, skip_without_deepspeed

from llava_simplified.arguments import parse_arguments
from llava_simplified.cli import COMMANDS, configure_process, main
from llava_simplified.training.train_command import train

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}

# With these options, a launcher starts a program instead of a Python script. The program lets each process be forked
# from one that has imported everything (see `command_programs`).
LAUNCHERS = {
    "deepspeed": "deepspeed --no_python --num_accelerators 2 --master_port 29871",
    "torchrun": "torchrun --no-python --nproc_per_node 2 --master_port 29872",
    "accelerate": "accelerate launch --no_python --multi_gpu --num_processes 2 --main_process_port 29873",
}

# This is DeepSpeed's launcher. It starts another process, which would import torch again.
DEEPSPEED = """
import os, sys
from deepspeed.launcher.runner import main
sys.executable = {python!r}
# DeepSpeed compiles an optimizer that is not used here, and imports torch's compiler for this.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
main()
"""


def without_u(argv: list[str]) -> list[str]:
    """Remove the option -u of `python -u -m MODULE`: the output of a forked process is not shown while it runs."""
    return argv[1:] if argv[0] == "-u" else argv


def run(*arguments: object, folder: Path, **environment: object) -> str:
    """Run a command that must succeed; return its standard output and standard error."""
    done = subprocess.run(
        [str(argument) for argument in arguments],
        cwd=folder,
        env=ENVIRONMENT | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def training_options(models: Path, data: Path) -> list[object]:
    """Return the options of the tutorial's training run, with tiny models and two steps."""
    return [
        *("--model_name_or_path", models / "mistral", "--vision_tower", models / "clip"),
        *("--train_data_path", data / "train.json", "--train_image_folder", data / "images"),
        *("--eval_data_path", data / "val.json", "--val_image_folder", data / "images"),
        *("--max_steps", 2),
    ]


def prediction_options(checkpoint: Path, data: Path) -> list[object]:
    """Return the options of the tutorial's prediction for the validation records."""
    return [
        *("--model-path", checkpoint),
        *("--data-path", data / "val.json", "--image-folder", data / "images"),
        *("--max-new-tokens", 4),
    ]


# ---- the tutorial's scripts ----


@pytest.mark.slow
def test_train_py_and_predict_py_work_as_in_the_tutorial(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    options = training_options(models_folder, data_folder)
    run_command([ROOT / "train.py", *options], tmp_path)
    options = prediction_options(tmp_path / "output" / "mistral-clip", data_folder)
    run_command([ROOT / "predict.py", *options], tmp_path)
    rows = json.loads((tmp_path / "predictions.json").read_text())
    three_per_image = [index for index in range(4) for _ in range(3)]
    assert [row["index"] for row in rows] == three_per_image
    assert set(rows[0]) == {"index", "image", "instruction", "gt_caption", "pred_output"}


@pytest.mark.slow
def test_finetune_sh_and_predict_sh_run_as_written(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    """`finetune.sh` has all options of LLaVA's script. Only the models, the steps and the workers are replaced."""
    for split in ("train", "val"):
        records = tmp_path / f"{split}.json"
        records.symlink_to(data_folder / f"{split}.json")
        (tmp_path / split).symlink_to(data_folder / "images")
    model = tmp_path / "model"
    training = [
        *(ROOT / "finetune.sh", "--output_dir", model),
        *("--model_name_or_path", models_folder / "mistral"),
        *("--vision_tower", models_folder / "clip"),
        *("--max_steps", 2, "--dataloader_num_workers", 1),
    ]
    output = tmp_path / "predictions.json"
    prediction = [ROOT / "predict.sh", "--output", output, "--max-new-tokens", 4]
    programs = tmp_path / "bin"
    environment = {"PATH": f"{programs}:{ENVIRONMENT['PATH']}", "DATA": tmp_path, "MODEL": model}
    with command_programs(programs):
        printed = run(*training, folder=tmp_path, **environment)
        assert "lazy_preprocess has no effect" in printed
        run(*prediction, folder=tmp_path, **environment)
    assert len(json.loads(output.read_text())) == 12, (
        "expected three captions for each of four images"
    )


# ---- launchers ----


def first_loss(folder: Path) -> float:
    first_line = (folder / "trainer_log.jsonl").read_text().partition("\n")[0]
    return json.loads(first_line)["loss"]


@pytest.fixture(scope="module")
def single_process_loss(
    models_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> float:
    """The first loss of one process with four images per step."""
    output = tmp_path_factory.mktemp("one")
    argv = [
        *training_options(models_folder, data_folder),
        *("--per_device_train_batch_size", 4, "--logging_steps", 1),
        *("--seed", 42, "--output_dir", output),
    ]
    train(*parse_arguments([str(argument) for argument in argv]))
    return first_loss(output)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_start_one_run_with_two_processes(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    launcher: str,
    single_process_loss: float,
) -> None:
    """2 processes with 2 images each train on the same 4 images per step as one process."""
    script = ROOT / "train.py"
    options: list[object] = []
    if launcher == "deepspeed":
        skip_without_deepspeed()
        options = ["--deepspeed", ROOT / "ds_configs" / "config_zero2.json"]
    programs = tmp_path / "bin"
    with command_programs(programs, without_u, scripts=[script]):
        name, *launcher_options = LAUNCHERS[launcher].split()
        program = Path(sys.executable).parent / name
        if launcher == "deepspeed":
            program = tmp_path / name
            program.write_text(DEEPSPEED.format(python=str(programs / "python")))
        command = [program, *launcher_options, programs / script.name]
        options += [
            *training_options(models_folder, data_folder),
            *("--per_device_train_batch_size", 2, "--logging_steps", 1),
            *("--seed", 42, "--output_dir", tmp_path / "two"),
        ]
        run_command([*command, *options], tmp_path)
    assert first_loss(tmp_path / "two") == pytest.approx(single_process_loss, rel=1e-3)
    output = tmp_path / "predictions.json"
    options = [*prediction_options(tmp_path / "two", data_folder), "--output", output]
    assert main(["predict", *map(str, options)]) == 0
    assert len(json.loads(output.read_text())) == 12


# ---- the llava command ----


def test_llava_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["-h"], ["--help"]):
        assert main(argv) == 0
        printed = capsys.readouterr().out
        for name, command in COMMANDS.items():
            assert f"  {name} " in printed
            assert command.summary in printed


def test_llava_version_is_the_version_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    from llava_simplified import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out.split()[-1] == __version__


@pytest.mark.parametrize(
    ("name", "suggestion"), [("capton", "caption"), ("doc", "doctor"), ("xyz", ""), ("--vers", "")]
)
def test_llava_suggests_the_nearest_command_if_one_is_similar(
    name: str, suggestion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name]) == 2
    printed = capsys.readouterr().err
    assert name in printed
    assert ("did you mean " in printed) == bool(suggestion)
    assert suggestion in printed


@pytest.mark.medium
def test_python_m_llava_simplified_is_the_llava_command() -> None:
    assert run(sys.executable, "-m", "llava_simplified", folder=ROOT).startswith("usage: llava")


IMPORTS_NOTHING_HEAVY = """
import sys
{code}
heavy = {{"torch", "transformers", "numpy", "pyarrow", "aiohttp", "fsspec", "PIL", "jinja2", "rich"}}
heavy |= {{"starlette", "pydantic"}}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""


@pytest.mark.medium
@pytest.mark.parametrize(
    "code",
    [
        "import llava_simplified; dir(llava_simplified); llava_simplified.__version__",
        "from llava_simplified import train, evaluate, Message",
        "from llava_simplified.cli import main; main(['--help']); main(['--version'])",
    ],
)
def test_package_and_help_import_nothing_heavy(code: str) -> None:
    run(sys.executable, "-c", IMPORTS_NOTHING_HEAVY.format(code=code), folder=ROOT)


@pytest.mark.medium
def test_help_of_every_command_is_fast_and_complete() -> None:
    """Building the parsers of all commands imports nothing heavy, and every option has a help text."""
    code = """
import contextlib, io, sys
from llava_simplified.cli import COMMANDS, main, resolve
for name, command in COMMANDS.items():
    printed = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(printed):
        main([name, "--help"])
    assert printed.getvalue().startswith(f"usage: llava {name}"), name
    for action in resolve(command.parser)()._actions:
        assert action.help, (name, action.option_strings)
"""
    run(sys.executable, "-c", IMPORTS_NOTHING_HEAVY.format(code=code), folder=ROOT)


IMPORT_AGAIN_WITH_BITSANDBYTES = """
import importlib.util, sys, transformers
from preloaded import PRINTED
print(PRINTED, end="")
transformers.logging.set_verbosity_warning()
for name in list(sys.modules):
    if name.partition(".")[0] in ("llava_simplified", "peft"):
        del sys.modules[name]
import peft
assert ("bitsandbytes" in sys.modules) == bool(importlib.util.find_spec("bitsandbytes"))
from llava_simplified import Llava, CaptionDataset
import llava_simplified.training.trainer
"""


@pytest.mark.medium
def test_importing_the_package_prints_nothing(tmp_path: Path) -> None:
    """If bitsandbytes is installed, PEFT imports it; this must not print anything either.

    The process is forked from one that has imported the package and its libraries, and remembers what this printed.
    """
    script = tmp_path / "script.py"
    script.write_text(IMPORT_AGAIN_WITH_BITSANDBYTES)
    process = run_command([script], tmp_path)
    assert process.stdout + process.stderr == ""


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "a/b/model", "~/model"])
@pytest.mark.parametrize("option", ["--model_name_or_path", "--vision_tower"])
@pytest.mark.parametrize("command", ["train", "plan", "inspect", "caption"])
def test_mistyped_path_of_a_model_is_named_as_a_path(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    option: str,
    name: str,
) -> None:
    parts = {
        "--model_name_or_path": str(models_folder / "mistral"),
        "--vision_tower": str(models_folder / "clip"),
        option: name,
    }
    models = [argument for pair in parts.items() for argument in pair]
    data = str(data_folder / "train.json")
    images = str(data_folder / "images")
    argv = {
        "train": [*models, "--train_data_path", data, "--train_image_folder", images],
        "plan": models,
        "inspect": [*models, "--data", data],
        "caption": [images, "--model-path", name, "--output", str(tmp_path / "x.jsonl")],
    }
    if command == "train":
        argv["train"] += ["--output_dir", str(tmp_path / "out")]
    assert main([command, *argv[command]]) == 2
    printed = capsys.readouterr().err
    assert "no such folder" in printed
    assert str(Path(name)) in printed
    assert "Repo id" not in printed


@pytest.mark.medium
def test_user_error_is_one_line_with_exit_status_2(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "predict.py")]
    command += ["--model-path", str(tmp_path), "--image", "gone.jpg"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "gone.jpg" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.medium
def test_scripts_show_their_own_name_in_the_help() -> None:
    printed = run(sys.executable, ROOT / "predict.py", "--help", folder=ROOT)
    assert printed.startswith("usage: predict.py")
    printed = run(sys.executable, "-m", "llava_simplified", "predict", "--help", folder=ROOT)
    assert printed.startswith("usage: llava predict")


def raise_keyboard_interrupt(argv: list[str]) -> int:
    raise KeyboardInterrupt


def raise_os_error(argv: list[str]) -> int:
    raise OSError("the disk is full")


def raise_bug(argv: list[str]) -> int:
    raise TypeError("a bug")


def test_main_distinguishes_interrupts_user_errors_and_bugs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def replace_command(function: str) -> None:
        command = COMMANDS["completion"]._replace(main=f"{__name__}:{function}")
        monkeypatch.setitem(COMMANDS, "completion", command)

    replace_command("raise_keyboard_interrupt")
    assert main(["completion"]) == 130
    replace_command("raise_os_error")
    assert main(["completion"]) == 2
    assert "error: the disk is full" in capsys.readouterr().err
    monkeypatch.setenv("LLAVA_TRACEBACK", "1")
    with pytest.raises(OSError, match="the disk is full"):
        main(["completion"])
    replace_command("raise_bug")
    with pytest.raises(TypeError):
        main(["completion"])


@pytest.mark.parametrize(
    ("uses_torch", "world_size", "expected"),
    [(True, "2", "PASSIVE"), (False, "2", None)],
)
def test_configure_process_sets_passive_waiting_on_shared_cpus(
    monkeypatch: pytest.MonkeyPatch, uses_torch: bool, world_size: str, expected: str | None
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    configure_process(uses_torch=uses_torch)
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE", "the user's choice must be kept"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("WORLD_SIZE", world_size)
    configure_process(uses_torch=uses_torch)
    assert os.environ.get("OMP_WAIT_POLICY") == expected

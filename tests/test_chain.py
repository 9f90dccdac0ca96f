"""Run the documented commands one after the other: URLs -> shards -> clean records -> a checkpoint -> captions."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_process import command_programs, run_command

ROOT = Path(__file__).parents[1]


@pytest.fixture
def mirror(data_folder: Path, tmp_path: Path) -> Iterator[str]:
    """Serve the images of `data_folder` and an HTML page; other URLs return status 404."""
    images = shutil.copytree(data_folder / "images", tmp_path / "mirror")
    (images / "page.jpg").write_text("<html>moved</html>")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(images))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def call(*argv: object, folder: Path) -> str:
    """Run a command in a forked process; return its standard output."""
    return run_command(argv, folder).stdout


@pytest.mark.slow
@pytest.mark.parametrize("way", ["shards", "files"])
def test_list_of_urls_becomes_captions(
    models_folder: Path, data_folder: Path, mirror: str, tmp_path: Path, way: str
) -> None:
    """Of 18 URLs, 16 return images, one is missing, and one returns an HTML page.

    "shards" is the way of `llava download`, and "files" that of the tutorial's scripts.
    """
    names = [*(f"{i}.jpg" for i in range(16)), "gone.jpg", "page.jpg"]
    captions = [
        row["response"]
        for name in ("train", "val")
        for row in json.loads((data_folder / f"{name}.json").read_text())
    ]
    tsv = tmp_path / "captions.tsv"
    tsv.write_text(
        "".join(f"{text}\t{mirror}/{name}\n" for text, name in zip([*captions, "x", "y"], names))
    )
    tower = models_folder / "clip"
    if way == "shards":
        summary = call(
            "llava",
            "download",
            tsv,
            "--output",
            "cc",
            "--allow-private",
            "--shard-size",
            8,
            folder=tmp_path,
        )
        call(
            "llava",
            "clean",
            "cc",
            "--vision_tower",
            tower,
            "--output",
            "clean.jsonl",
            "--compact",
            "small",
            "--compact-size",
            36,
            "--dedupe",
            "exact",
            folder=tmp_path,
        )
        records, images = tmp_path / "clean.jsonl", tmp_path / "small"
    else:
        scripts = ROOT / "data_preprocessing"
        summary = call(
            scripts / "retrieve_images.py",
            tsv,
            "--output",
            "cc",
            "--allow-private",
            folder=tmp_path,
        )
        images = tmp_path / "cc" / "images"
        call(
            scripts / "reformat.py",
            tsv,
            "--image-folder",
            images,
            "--output",
            "all.json",
            folder=tmp_path,
        )
        call(
            scripts / "clean.py",
            "all.json",
            "--image-folder",
            images,
            "--vision_tower",
            tower,
            "--output",
            "clean.json",
            folder=tmp_path,
        )
        call(scripts / "reduce.py", "clean.json", "--count", 12, folder=tmp_path)
        records = tmp_path / "clean_12.json"
    assert summary.split()[:2] == ["16", "ok"]
    assert "1 html" in summary
    assert "1 http_404" in summary
    call(
        ROOT / "train.py",
        "--model_name_or_path",
        models_folder / "mistral",
        "--vision_tower",
        tower,
        "--train_data_path",
        records,
        "--train_image_folder",
        images,
        "--max_steps",
        2,
        "--output_dir",
        "model",
        folder=tmp_path,
    )
    call(
        ROOT / "predict.py",
        "--model-path",
        "model",
        "--data-path",
        records,
        "--image-folder",
        images,
        "--max-new-tokens",
        4,
        "--trials",
        1,
        folder=tmp_path,
    )
    rows = json.loads((tmp_path / "predictions.json").read_text())
    assert len(rows) == (16 if way == "shards" else 12)
    assert {row["gt_caption"] for row in rows} <= set(captions)


# Options that are added to the commands of the pages: access to a server on this machine, and small runs.
EXTRA_OPTIONS = {
    "download": ["--allow-private", "--workers", "1"],
    "train": [
        *("--max_steps", "2", "--eval_steps", "2", "--eval_captions", "1", "--bf16", "False"),
        *("--dataloader_num_workers", "0", "--per_device_train_batch_size", "2"),
    ],
    "predict": ["--max-new-tokens", "4"],
    "evaluate": ["--no-java"],
}


def substitute_models(argv: list[str], models: Path) -> list[str]:
    """Return a documented command with tiny models, which are on this machine, and fewer records."""
    if argv[0] != "llava":
        return argv
    argv = [argument.replace("openai/clip-vit-base-patch16", f"{models}/clip") for argument in argv]
    command = argv[1]
    if command == "reduce":
        argv[argv.index("1000")] = "5"
    argv += EXTRA_OPTIONS.get(command, [])
    if command == "train":
        argv += ["--model_name_or_path", f"{models}/mistral", "--vision_tower", f"{models}/clip"]
    return argv


def commands_of(page: str, heading: str) -> str:
    """Return the first block of commands under a heading of a page."""
    section = (ROOT / "docs" / page).read_text(encoding="utf-8").partition(f"{heading}\n")[2]
    return section.partition("```bash\n")[2].partition("```")[0]


@pytest.mark.slow
def test_documented_commands_run_one_after_the_other(
    models_folder: Path, data_folder: Path, mirror: str, tmp_path: Path
) -> None:
    """Run the commands of the pages, from the list of URLs to the report, and the two scripts of the tutorial."""
    captions = [
        row["response"]
        for name in ("train", "val")
        for row in json.loads((data_folder / f"{name}.json").read_text())
    ]
    rows = [f"{text}\t{mirror}/{i}.jpg\n" for i, text in enumerate(captions)]
    (tmp_path / "Train_GCC-training.tsv").write_text("".join(rows[:12]))
    (tmp_path / "Validation_GCC-1.1.0-Validation.tsv").write_text("".join(rows[12:]))
    programs = tmp_path / "bin"
    script = "\n".join(
        [
            "set -eu",
            commands_of("data.md", "## Start from a list of URLs"),
            commands_of("training.md", "# Training"),
            commands_of("evaluation.md", "# Evaluation"),
            "export DATA=$PWD/data/cc3m MODEL=$PWD/model",
            f"'{ROOT}/finetune.sh' --model_name_or_path '{models_folder}/mistral' "
            f"--vision_tower '{models_folder}/clip' --max_steps 2 --output_dir $MODEL "
            "--dataloader_num_workers 0",
            f"'{ROOT}/predict.sh' --max-new-tokens 4 --output $PWD/more.json",
        ]
    )
    with command_programs(programs, lambda argv: substitute_models(argv, models_folder)):
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=tmp_path,
            env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "report.html").is_file()
    assert len(json.loads((tmp_path / "data/cc3m/train_5.json").read_text())) == 5
    assert len(json.loads((tmp_path / "more.json").read_text())) == 12

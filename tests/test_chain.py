"""The whole chain by the documented commands: URLs -> shards -> clean records -> a checkpoint -> captions."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def mirror(data_folder: Path, tmp_path: Path) -> Iterator[str]:
    """The pictures of `data_folder` and a page, served; what is not there is a 404."""
    pictures = shutil.copytree(data_folder / "images", tmp_path / "mirror")
    (pictures / "page.jpg").write_text("<html>moved</html>")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(pictures))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def call(*words: object, folder: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(word) for word in words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("way", ["shards", "files"])
def test_from_a_list_of_urls_to_captions(
    models_folder: Path, data_folder: Path, mirror: str, tmp_path: Path, way: str
) -> None:
    """16 good pictures, a missing one and one that is a page, by `llava` and by the tutorial's scripts."""
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
    tower, python = models_folder / "clip", sys.executable
    llava = [python, "-m", "llava_simplified.cli"]
    if way == "shards":
        told = call(
            *llava,
            "download",
            tsv,
            "--output",
            "cc",
            "--allow-private",
            "--shard-size",
            8,
            folder=tmp_path,
        )
        call(*llava, "clean", "cc", "--vision_tower", tower, "--output", "clean.jsonl", "--compact", "small",
             "--compact-size", 36, "--dedupe", "exact", folder=tmp_path)  # fmt: skip
        records, images = tmp_path / "clean.jsonl", tmp_path / "small"
    else:
        scripts = ROOT / "data_preprocessing"
        told = call(
            python,
            scripts / "retrieve_images.py",
            tsv,
            "--output",
            "cc",
            "--allow-private",
            folder=tmp_path,
        )
        images = tmp_path / "cc" / "images"
        call(
            python,
            scripts / "reformat.py",
            tsv,
            "--image-folder",
            images,
            "--output",
            "all.json",
            folder=tmp_path,
        )
        call(python, scripts / "clean.py", "all.json", "--image-folder", images, "--vision_tower", tower,
             "--output", "clean.json", folder=tmp_path)  # fmt: skip
        call(python, scripts / "reduce.py", "clean.json", "--count", 12, folder=tmp_path)
        records = tmp_path / "clean_12.json"
    assert told.split()[:2] == ["16", "ok"]
    assert "1 html" in told
    assert "1 http_404" in told
    call(python, ROOT / "train.py", "--model_name_or_path", models_folder / "mistral", "--vision_tower", tower,
         "--train_data_path", records, "--train_image_folder", images, "--max_steps", 2,
         "--output_dir", "model", folder=tmp_path)  # fmt: skip
    call(python, ROOT / "predict.py", "--model-path", "model", "--data-path", records, "--image-folder", images,
         "--max-new-tokens", 4, "--trials", 1, folder=tmp_path)  # fmt: skip
    rows = json.loads((tmp_path / "predictions.json").read_text())
    assert len(rows) == (16 if way == "shards" else 12)
    assert {row["gt_caption"] for row in rows} <= set(captions)


# What the commands of the pages lack here: models from the Hub, a day of time, public addresses.
SUBSTITUTE_LLAVA = """#!{python}
import subprocess, sys
models = {models!r}
extra = {{
    "download": ["--allow-private", "--workers", "1"],
    "train": [
        "--model_name_or_path", models + "/mistral", "--vision_tower", models + "/clip",
        "--max_steps", "2", "--eval_steps", "2", "--eval_captions", "1", "--bf16", "False",
        "--dataloader_num_workers", "0", "--per_device_train_batch_size", "2",
    ],
    "predict": ["--max-new-tokens", "4"],
    "evaluate": ["--no-java"],
}}
words = [word.replace("openai/clip-vit-base-patch16", models + "/clip") for word in sys.argv[1:]]
if words[0] == "reduce":
    words[words.index("1000")] = "5"
command = [sys.executable, "-m", "llava_simplified", *words, *extra.get(words[0], [])]
sys.exit(subprocess.run(command).returncode)
"""


def commands_of(page: str, heading: str) -> str:
    """Return the first block of commands under a heading of a page."""
    section = (ROOT / "docs" / page).read_text(encoding="utf-8").partition(f"{heading}\n")[2]
    return section.partition("```bash\n")[2].partition("```")[0]


@pytest.mark.slow
def test_documented_commands_run_one_after_the_other(
    models_folder: Path, data_folder: Path, mirror: str, tmp_path: Path
) -> None:
    """From the list of URLs to the report, as the pages write it; and the tutorial's two scripts."""
    captions = [
        row["response"]
        for name in ("train", "val")
        for row in json.loads((data_folder / f"{name}.json").read_text())
    ]
    rows = [f"{text}\t{mirror}/{i}.jpg\n" for i, text in enumerate(captions)]
    (tmp_path / "Train_GCC-training.tsv").write_text("".join(rows[:12]))
    (tmp_path / "Validation_GCC-1.1.0-Validation.tsv").write_text("".join(rows[12:]))
    program = tmp_path / "bin" / "llava"
    program.parent.mkdir()
    program.write_text(SUBSTITUTE_LLAVA.format(python=sys.executable, models=str(models_folder)))
    program.chmod(0o755)
    script = "\n".join(
        [
            "set -eu",
            f"export PATH='{program.parent}':\"$PATH\" PYTHONPATH='{ROOT}'",
            commands_of("data.md", "## Start from a list of URLs"),
            commands_of("training.md", "# Training"),
            commands_of("evaluation.md", "# Evaluation"),
        ]
    )
    call("bash", "-c", script, folder=tmp_path)
    assert (tmp_path / "report.html").is_file()
    assert len(json.loads((tmp_path / "data/cc3m/train_5.json").read_text())) == 5

    environment = f"PATH='{Path(sys.executable).parent}':\"$PATH\" DATA='{tmp_path}/data/cc3m'"
    model = tmp_path / "model"
    call(
        "bash",
        "-c",
        f"{environment} '{ROOT}/finetune.sh' --model_name_or_path '{models_folder}/mistral' "
        f"--vision_tower '{models_folder}/clip' --max_steps 2 --output_dir '{model}' "
        f"--dataloader_num_workers 0 && {environment} MODEL='{model}' '{ROOT}/predict.sh' "
        f"--max-new-tokens 4 --output '{tmp_path}/more.json'",
        folder=tmp_path,
    )
    assert len(json.loads((tmp_path / "more.json").read_text())) == 12

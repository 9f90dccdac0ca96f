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

"""`llava demo`: the whole recipe on small real weights and real pictures, by the commands of any other run."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import time
from pathlib import Path

from llava_simplified import cli
from llava_simplified.demo.assets import DemoAssets, fetch
from llava_simplified.doctor import fast_bf16

CONFIGS = Path(__file__).parents[2] / "configs"


def main(argv: list[str] | None = None) -> int:
    """Fetch, inspect, train in two stages, caption 300 pictures the model never saw, score, report."""
    parser = argparse.ArgumentParser("llava demo", description=main.__doc__)
    parser.add_argument(
        "--cache-dir",
        type=Path,
        help="where models and pictures are kept (~/.cache/llava-simplified)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("output/demo"), help="(default: %(default)s)"
    )
    parser.add_argument(
        "--max-steps", type=int, help="stop each stage after so many steps, to try the way through"
    )
    parser.add_argument("--limit", type=int, help="caption only so many pictures")
    args = parser.parse_args(argv)
    if not CONFIGS.is_dir():
        raise ValueError(
            f"{CONFIGS} is not there: the demo runs from a checkout of the project (git clone, make demo)"
        )
    start = time.monotonic()
    for left in args.output.glob(
        "predictions.json.part*"
    ):  # of a demo that was stopped; its model is gone
        left.unlink()
    assets = fetch(args.cache_dir)
    for title, words in commands(assets, args.output, args.max_steps, args.limit):
        print(
            f"\n== {title} ({time.monotonic() - start:.0f} s)\n$ llava {shlex.join(words)}",
            flush=True,
        )
        if status := cli.main(words):
            return status
    scores = json.loads((args.output / "scores.json").read_text(encoding="utf-8"))
    print(summary(next(iter(scores.values())), args.output, time.monotonic() - start))
    return 0


def commands(
    assets: DemoAssets, output: Path, max_steps: int | None, limit: int | None
) -> list[tuple[str, list[str]]]:
    """Every command of the demo, in order: what a person would type."""
    import torch

    q = shlex.quote
    train, val, images = q(str(assets.train_json)), q(str(assets.val_json)), q(str(assets.images))
    parts = f"--model_name_or_path {q(str(assets.language_model))} --vision_tower {q(str(assets.vision_tower))}"
    data = f"--train_data_path {train} --train_image_folder {images} --eval_data_path {val} --val_image_folder {images}"
    more = f"--max_steps {max_steps}" if max_steps else ""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        print(
            "no C++ compiler here: the layers are not compiled, training takes half as long again"
        )
        more += " --compile_layers False"
    if not torch.accelerator.is_available() and not fast_bf16():
        print("bfloat16 is slow on this CPU: training is in float32")
        more += " --bf16 False"
    first, second, out, configs = (
        q(str(path)) for path in (output / "projector", output / "model", output, CONFIGS)
    )
    lines = {
        "what the model is shown, and which tokens it is trained on": (
            f"inspect --data {train} --image_folder {images} --template bare --count 1 --mm_token_pool 3 {parts}"
        ),
        "stage 1: the projector alone": (
            f"train --config {configs}/demo_projector.yaml {parts} {data} --output_dir {first} {more}"
        ),
        "stage 2: LoRA on the language model, and the projector further": (
            f"train --config {configs}/demo.yaml --pretrain_mm_mlp_adapter {first} {parts} {data} "
            f"--output_dir {second} {more}"
        ),
        "captions of pictures that it never saw": (
            f"predict --model-path {second} --data-path {val} --image-folder {images} --temperature 0 "
            f"--max-new-tokens 24 --batch-size 50 --output {out}/predictions.json"
            + (f" --limit {limit}" if limit else "")
        ),
        "scores and report": (
            f"evaluate {out}/predictions.json --train-captions {train} --image-folder {images} --model-path {second} "
            f"--output {out}/scores.json --report {out}/report.html --no-java "
            "--title 'LLaVA Simplified: what it says of pictures it never saw'"
        ),
    }
    return [(title, shlex.split(line)) for title, line in lines.items()]


def summary(scores: dict[str, dict[str, list[float]]], output: Path, seconds: float) -> str:
    """The last lines that a person sees."""

    def value(part: str, name: str) -> float:
        return scores[part][name][0]

    return (
        f"\nword F1 {value('mean', 'word F1'):.3f} (pictures shuffled: {value('shuffled', 'word F1'):.3f}), "
        f"exact match {value('mean', 'exact match'):.1%} (shuffled: {value('shuffled', 'exact match'):.1%})\n"
        f"report: {(output / 'report.html').resolve()}\nmodel:  {(output / 'model').resolve()}\n"
        f"the whole demo took {seconds / 60:.1f} minutes; caption a picture of your own:\n"
        f"  .venv/bin/llava predict --model-path {output / 'model'} --image YOUR_PICTURE.png"
    )

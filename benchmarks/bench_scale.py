"""What a training run costs as its data grows: speed, memory of trainer and worker, time to the first step.

    python benchmarks/bench_scale.py [--records 1000 10000 100000] [--steps 300] [--workers 1]

Synthetic captions of 64 pictures, tiny models of the true classes: what is left to see is the handling of records. Each
size is a process of its own. Prints samples per second and the memory that is a process's own (RssAnon: what a forked
worker shares with the trainer counts for both) as ratios to the smallest size, and the seconds from the command to the
first step. The speed is that of the best tenth of the steps: what else the machine does only slows. `--records 3300000`
is Conceptual Captions.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORDS = [
    "red",
    "dog",
    "a",
    "car",
    "the",
    "man",
    "of",
    "two",
    "woman",
    "with",
    "old",
    "street",
    "on",
    "field",
    "in",
    "park",
    "near",
    "water",
    "tree",
    "city",
    "people",
    "night",
]


def write_data(folder: Path, records: int) -> Path:
    path, draw = folder / f"{records}.jsonl", random.Random(0)
    with path.open("w") as file:
        for index in range(records):
            caption = " ".join(draw.choices(WORDS, k=draw.randint(5, 16)))
            row = {
                "image": f"{index % 64}.png",
                "instruction": "Describe the picture.",
                "response": caption,
            }
            file.write(json.dumps(row) + "\n")
    return path


def own_megabytes(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return (
        next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
        / 1e3
    )


def one_run(words: list[str], begun: float) -> dict[str, Any]:
    """In a process of its own; `begun` is when it was started."""
    import psutil
    from transformers import TrainerCallback

    from llava_simplified.arguments import parse_arguments
    from llava_simplified.training.build_trainer import build_trainer

    seen: dict[str, Any] = {"workers": 0.0}

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen.setdefault("start", time.time() - begun)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % 10 == 0:
                workers = [own_megabytes(child.pid) for child in psutil.Process().children()]
                seen["workers"] = max([seen["workers"], *workers])

    trainer, _ = build_trainer(*parse_arguments(words))
    trainer.add_callback(Look())
    trainer.train()
    rates = [
        row["samples_per_second"]
        for row in trainer.state.log_history
        if "samples_per_second" in row
    ]
    return {**seen, "rate": max(rates), "trainer": own_megabytes(psutil.Process().pid)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--run", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(one_run(args.run[1:], float(args.run[0]))))
        return
    sys.path.insert(0, str(ROOT / "tests"))
    import numpy as np
    from PIL import Image

    with contextlib.redirect_stdout(sys.stderr):  # where libraries speak as they are imported
        from tiny import save_language_model, save_vision_model

    first: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with contextlib.redirect_stdout(sys.stderr):
            models = (
                save_language_model("mistral", folder / "text"),
                save_vision_model("clip", folder / "clip"),
            )
        print(
            f"{'records':>10}{'samples/s':>11}{'trainer MB':>12}{'worker MB':>11}{'to first step':>15}   to the smallest"
        )
        for index in range(64):
            pixels = np.random.default_rng(index).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
        for records in args.records:
            options = {
                "model_name_or_path": models[0],
                "vision_tower": models[1],
                "train_data_path": write_data(folder, records),
                "output_dir": folder / "out",
                "max_steps": args.steps,
                "per_device_train_batch_size": 8,
                "dataloader_num_workers": args.workers,
                "cache_vision_features": "off",
                "logging_steps": max(1, args.steps // 10),
                "lora_r": 4,
                "save_strategy": "no",
                "disable_tqdm": True,
            }
            words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
            command = [sys.executable, __file__, "--run", str(time.time()), *words]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{records} records failed:\n{done.stderr[-3000:]}")
            result = json.loads(done.stdout.splitlines()[-1])
            first = first or result
            ratios = ", ".join(
                f"{result[k] / first[k]:.2f}" for k in ("rate", "trainer", "workers") if first[k]
            )
            print(
                f"{records:>10,}{result['rate']:>11.1f}{result['trainer']:>12.0f}{result['workers']:>11.0f}"
                f"{result['start']:>13.1f} s   {ratios}",
                flush=True,
            )
            Path(options["train_data_path"]).unlink()


if __name__ == "__main__":
    main()

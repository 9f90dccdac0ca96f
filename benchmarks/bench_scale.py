"""The cost of a training run as its data grows: speed, memory of trainer and worker, time to the first step.

    python benchmarks/bench_scale.py [--records 1000 10000 100000] [--steps 300] [--workers 1]

Synthetic captions of 64 images, and tiny models of the real classes: what remains is the handling of
records. Each size runs in a separate process. Prints samples per second and the private memory of the processes
(RssAnon; memory that a forked worker shares with the trainer counts for both) as ratios to the smallest size,
and the seconds from the start of the command to the first step. The speed is that of the best tenth of the
steps, because other processes only make steps slower. `--records 3300000` is as large as Conceptual Captions.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from workload import option_words, run_child

ROOT = Path(__file__).parents[1]
NUM_IMAGES = 64
VOCABULARY = """red dog a car the man of two woman with old street on field in park near water tree city people
night"""
WORDS = VOCABULARY.split()


def write_images(folder: Path) -> None:
    """Write the images that all records refer to."""
    for index in range(NUM_IMAGES):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")


def write_records(folder: Path, count: int) -> Path:
    """Write records with captions of 5 to 16 words."""
    path = folder / f"{count}.jsonl"
    draw = random.Random(0)
    with path.open("w") as file:
        for index in range(count):
            record = {
                "image": f"{index % NUM_IMAGES}.png",
                "instruction": "Describe the image.",
                "response": " ".join(draw.choices(WORDS, k=draw.randint(5, 16))),
            }
            file.write(json.dumps(record) + "\n")
    return path


def private_megabytes(pid: int) -> float:
    """Return the private memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1e3
    raise ValueError(f"no RssAnon in /proc/{pid}/status")


def run_training(words: list[str], started: float) -> dict[str, float]:
    """Train in this process.

    Args:
        words: Options of `llava train`.
        started: When this process was started, in seconds since the epoch.

    Returns:
        Seconds to the first step ("start"), samples per second ("rate"), and the megabytes of
        "trainer" and "workers".
    """
    import psutil
    from transformers import TrainerCallback

    from llava_simplified.arguments import parse_arguments
    from llava_simplified.training.build_trainer import build_trainer

    result = {"workers": 0.0}

    class Recorder(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            result.setdefault("start", time.time() - started)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % 10 == 0:
                for child in psutil.Process().children():
                    result["workers"] = max(result["workers"], private_megabytes(child.pid))

    trainer, _ = build_trainer(*parse_arguments(words))
    trainer.add_callback(Recorder())
    trainer.train()
    rates = []
    for row in trainer.state.log_history:
        if "samples_per_second" in row:
            rates.append(row["samples_per_second"])
    result["rate"] = max(rates)
    result["trainer"] = private_megabytes(psutil.Process().pid)
    return result


def measure(
    folder: Path, models: tuple[str, str], records: Path, args: argparse.Namespace
) -> dict[str, float]:
    """Train on a file of records, in a separate process."""
    options = {
        "model_name_or_path": models[0],
        "vision_tower": models[1],
        "train_data_path": records,
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
    words = ["--run", time.time(), *option_words(options)]
    output = run_child(__file__, *words, name=records.name)
    return json.loads(output.splitlines()[-1])


def main() -> None:
    """Run the benchmark, or one size of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--run", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(run_training(args.run[1:], float(args.run[0]))))
        return
    sys.path.insert(0, str(ROOT / "tests"))
    smallest: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # Libraries print while they are imported; only the table is the result.
        with contextlib.redirect_stdout(sys.stderr):
            from tiny import save_language_model, save_vision_model

            language_model = save_language_model("mistral", folder / "text")
            models = (language_model, save_vision_model("clip", folder / "clip"))
        write_images(folder)
        print(
            f"{'records':>10}{'samples/s':>11}{'trainer MB':>12}{'worker MB':>11}"
            f"{'to first step':>15}   ratios to the smallest"
        )
        for count in args.records:
            records = write_records(folder, count)
            result = measure(folder, models, records, args)
            records.unlink()
            smallest = smallest or result
            ratios = []
            for name in ("rate", "trainer", "workers"):
                if smallest[name]:
                    ratios.append(f"{result[name] / smallest[name]:.2f}")
            print(
                f"{count:>10,}{result['rate']:>11.1f}{result['trainer']:>12.0f}"
                f"{result['workers']:>11.0f}{result['start']:>13.1f} s   {', '.join(ratios)}",
                flush=True,
            )


if __name__ == "__main__":
    main()

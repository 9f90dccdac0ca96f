"""Measure how the cost of a training run grows with its data: speed, memory, and the time to the first step.

    python benchmarks/bench_scale.py [--records 1000 10000 100000] [--steps 300] [--workers 1]

The captions of 64 images are synthetic, and the models are tiny, so that most of the time is spent on the handling of
records. Each size runs in a separate process. Prints samples per second and the private memory of the processes
(RssAnon; memory that a forked worker shares with the trainer counts for both) as ratios to the smallest size, and
the seconds from the start of the command to the first step. The printed speed is that of the fastest tenth of the
steps, because other processes of the machine can only make steps slower. `--records 3300000` is the size of
Conceptual Captions.
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
from workload import option_arguments, run_child

ROOT = Path(__file__).parents[1]
NUM_IMAGES = 64
VOCABULARY = """red dog a car the man of two woman with old street on field in park near water tree city people
night"""
WORDS = VOCABULARY.split()


def write_images(folder: Path) -> None:
    """Write the images that all records refer to."""
    # Small images, so that decoding them takes little time.
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
    """Return the private memory (RssAnon) of a process in megabytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1e3
    raise ValueError(
        f"/proc/{pid}/status has no line RssAnon; this benchmark requires Linux 4.5 or later"
    )


def run_training(arguments: list[str], started: float) -> dict[str, float]:
    """Train in this process.

    Args:
        arguments: Command-line arguments of `llava train`.
        started: Start time of this process, in seconds since the epoch.

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
        """Record the time of the first step, and the peak memory of the data loader workers."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            result.setdefault("start", time.time() - started)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if (
                state.global_step % 10 == 0
            ):  # reading the memory costs time, so do not do it at every step
                for child in psutil.Process().children():
                    result["workers"] = max(result["workers"], private_megabytes(child.pid))

    trainer, _ = build_trainer(*parse_arguments(arguments))
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
        "cache_vision_features": "off",  # filling the cache would delay the first step
        "logging_steps": max(
            1, args.steps // 10
        ),  # each logged rate is the mean of a tenth of the steps
        "lora_r": 4,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    arguments = ["--run", time.time(), *option_arguments(options)]
    output = run_child(__file__, *arguments, name=f"the run on {records.name}")
    # The trainer prints before the result, which is the last line.
    return json.loads(output.splitlines()[-1])


def main() -> None:
    """Run the benchmark, or one size of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--records",
        type=int,
        nargs="+",
        default=[1000, 10_000, 100_000],
        help="Numbers of records to measure (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, default=300, help="Steps of each run (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="Data loader workers (default: %(default)s)"
    )
    parser.add_argument("--run", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        started, *arguments = args.run
        print(json.dumps(run_training(arguments, float(started))))
        return
    sys.path.insert(0, str(ROOT / "tests"))
    smallest: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # Libraries print while they are imported. Standard output is for the table only.
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
            smallest = smallest or result  # the first size is the baseline
            ratios = []
            for name in ("rate", "trainer", "workers"):
                if smallest[name]:  # with --workers 0, the memory of the workers is 0
                    ratios.append(f"{result[name] / smallest[name]:.2f}")
            print(
                f"{count:>10,}{result['rate']:>11.1f}{result['trainer']:>12.0f}"
                f"{result['workers']:>11.0f}{result['start']:>13.1f} s   {', '.join(ratios)}",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""Compare a step of `llava train --objective grpo` with a step of TRL's GRPOTrainer: time and memory.

    python benchmarks/bench_rewards.py [--language-model FOLDER] [--images 4] [--samples 5] [--steps 3] [--rounds 1]

A step samples captions, and then updates the weights; both parts are measured.

Both sides have the same weights (SmolLM2-135M, downloaded if no folder is given, a random tower in the shape of
CLIP ViT-B/16, and a projector that was trained for one step), images of 224 pixels, prompts, reward (word F1), number
of samples, limit of tokens, LoRA settings and optimizer, and neither computes a KL divergence. Frozen weights are
bfloat16, with bfloat16 autocast (float32 on a machine where bfloat16 is slow). Every run is a separate process, whose
first two steps are not measured. The extra `bench` installs TRL.

Sampling is random, so the two sides do not sample the same captions. Nearly all captions reach the limit of tokens,
because the projector is hardly trained. The table shows their mean length.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench_train import LORA, Models, common_options, train_ours, write_projector
from workload import compute_dtype, peak_memory, run_child, write_data, write_models

WARM_UP_STEPS = 2  # steps that are slower, because they fill caches and allocate memory
OURS, TRL = "llava train", "TRL's GRPOTrainer"


class Times:
    """The start time of each step, and the duration of the sampling in it."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.sampling: list[float] = []

    def record(self, owner: type, name: str) -> None:
        """Replace a method by one that also measures its calls.

        Args:
            owner: The class of the trainer.
            name: Name of the method, which is called once per step, at its start, and samples the captions.
        """
        method: Callable[..., Any] = getattr(owner, name)

        def measured(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            self.starts.append(start)
            result = method(trainer, *args, **kwargs)
            self.sampling.append(time.perf_counter() - start)
            return result

        setattr(owner, name, measured)

    def summary(self) -> dict[str, float]:
        """Return the mean duration of a step in seconds, and how much of it is sampling."""
        # A step ends when the next one starts, so the duration of the last step is not known.
        measured = len(self.starts) - 1 - WARM_UP_STEPS
        seconds = (self.starts[-1] - self.starts[WARM_UP_STEPS]) / measured
        sampling = sum(self.sampling[WARM_UP_STEPS:-1]) / measured
        return {"seconds": seconds, "sampling": sampling}


# ---- the two sides ----


def run_ours(folder: Path, models: Models, args: argparse.Namespace) -> float:
    """Train with `llava train`, and return the mean number of tokens of a sample."""
    options = {
        "init_from": folder / "projector",
        "objective": "grpo",
        "kl_coef": 0,
        "reward": "word_f1",
        "num_samples": args.samples,
        "sample_max_tokens": args.tokens,
        "cache_vision_features": "off",  # TRL encodes every image in the step, too
        **LORA,
    }
    train_ours(folder, models, folder / "ours", args.images, num_steps(args), **options)
    lines = (folder / "ours" / "trainer_log.jsonl").read_text().splitlines()
    logs = [json.loads(line) for line in lines]
    return mean([row["caption_tokens"] for row in logs if "caption_tokens" in row])


def run_trl(folder: Path, args: argparse.Namespace) -> float:
    """Train with TRL, and return the mean number of tokens of a sample."""
    import torch
    from datasets import Dataset
    from datasets import Image as ImageColumn
    from peft import LoraConfig
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    from trl import GRPOConfig, GRPOTrainer

    from llava_simplified.evaluation.metrics import word_f1

    stock = folder / "stock"
    model = LlavaForConditionalGeneration.from_pretrained(
        stock, dtype=getattr(torch, compute_dtype())
    )
    rows: list[dict[str, Any]] = []
    for record in json.loads((folder / "train.json").read_text()):
        turn = {"role": "user", "content": record["instruction"]}
        image = str(folder / record["image"])
        rows.append({"image": image, "prompt": [turn], "references": record["responses"]})
    samples = Dataset.from_list(rows).cast_column("image", ImageColumn())
    lengths: list[int] = []

    def reward(
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        references: Sequence[Sequence[str]],
        **_: Any,
    ) -> list[float]:
        """Return the word F1 of each sample, and record its length."""
        lengths.extend(map(len, completion_ids))
        texts = [completion[0]["content"] for completion in completions]
        return [word_f1(text, group) for text, group in zip(texts, references)]

    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=args.images * args.samples,  # TRL counts samples, not images
        num_generations=args.samples,
        steps_per_generation=1,  # sample new captions for every update
        max_completion_length=args.tokens,
        temperature=1.0,
        beta=0.0,  # no KL divergence, and so no reference model
        loss_type="grpo",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        shuffle_dataset=False,
        lr_scheduler_type="cosine",
        **common_options(num_steps(args)),
    )
    adapter = LoraConfig(
        r=LORA["lora_r"],
        lora_alpha=LORA["lora_alpha"],
        target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
        modules_to_save=["multi_modal_projector"],
    )
    GRPOTrainer(
        model,
        reward_funcs=reward,
        args=config,
        train_dataset=samples,
        processing_class=AutoProcessor.from_pretrained(stock),
        peft_config=adapter,
    ).train()
    return mean(lengths)


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


def num_steps(args: argparse.Namespace) -> int:
    """Return the number of steps of a run: warm-up, measured steps, and a last one that is not measured (see `Times`)."""
    steps: int = WARM_UP_STEPS + args.steps + 1
    return steps


def run_side(folder: Path, models: Models, name: str, args: argparse.Namespace) -> dict[str, float]:
    """Measure one side, in this process, which was started for it.

    Returns:
        "seconds": duration of a step; "sampling": seconds of it that are spent on sampling; "tokens": mean length of a
        sample; "memory": peak bytes.
    """
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    times = Times()
    # For each side, measure the method that the trainer calls once at the beginning of a step to sample captions.
    if name == OURS:
        from llava_simplified.training.policy_trainer import PolicyTrainer

        times.record(PolicyTrainer, "prepare_micro_batches")
        tokens = run_ours(folder, models, args)
    else:
        from trl import GRPOTrainer

        times.record(GRPOTrainer, "_generate_and_score_completions")
        tokens = run_trl(folder, args)
    memory = peak_memory(os.getpid())
    return {**times.summary(), "tokens": tokens, "memory": memory}


# ---- the table ----


def print_table(results: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> None:
    """Print the fastest run of each side, and the ratios: TRL's time / ours, our memory / TRL's."""
    best = {name: min(runs, key=lambda run: run["seconds"]) for name, runs in results.items()}
    print(
        f"\n{args.images} images x {args.samples} samples of at most {args.tokens} tokens a step, "
        f"{compute_dtype()}, {os.cpu_count()} cores"
    )
    heads = ("s/step", "sampling", "update", "tokens", "memory")
    print(f"{'':20}" + "".join(f"{head:>10}" for head in heads))
    columns: dict[str, list[float]] = {}
    for name, run in best.items():
        update = run["seconds"] - run["sampling"]
        columns[name] = [run["seconds"], run["sampling"], update]
        values = [f"{value:.2f}" for value in columns[name]]
        values += [f"{run['tokens']:.1f}", f"{run['memory'] / 1e9:.2f} GB"]
        print(f"{name:20}" + "".join(f"{value:>10}" for value in values))
    # A time ratio above 1 means that our side is faster, and a memory ratio below 1 that it needs less memory.
    ratios = [peer / own for own, peer in zip(columns[OURS], columns[TRL])]
    values = [f"{ratio:.1f}x" for ratio in ratios]
    memory = best[OURS]["memory"] / best[TRL]["memory"]
    values += ["", f"{memory:.2f}x"]
    print(f"{'ours / TRL':20}" + "".join(f"{value:>10}" for value in values))


def write_stock_model(folder: Path) -> None:
    """Export the checkpoint from which both sides start, in the format that TRL loads."""
    from llava_simplified.export.stock import export_stock

    export_stock(folder / "projector", folder / "stock")


def main() -> None:
    """Run the benchmark, or one side of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--language-model", type=Path, help="Folder of SmolLM2-135M-Instruct")
    parser.add_argument("--images", type=int, default=4, help="Images per step")
    parser.add_argument("--samples", type=int, default=5, help="Captions per image")
    parser.add_argument(
        "--tokens", type=int, default=32, help="Maximum number of tokens of a caption"
    )
    parser.add_argument("--steps", type=int, default=3, help="Number of measured steps")
    parser.add_argument(
        "--rounds", type=int, default=1, help="Runs of each side; the fastest is reported"
    )
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        folder, language_model, tower, name = args.run
        result = run_side(Path(folder), (language_model, tower), name, args)
        (Path(folder) / "result.json").write_text(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # Libraries print while they load. Standard output is for the table only.
        with contextlib.redirect_stdout(sys.stderr):
            language_model, tower = write_models(folder, args.language_model)
            # Every step gets new images, as in the first epoch of a real run.
            write_data(folder, args.images * num_steps(args), captions=1)
            write_projector(folder, (str(language_model), str(tower)))
            write_stock_model(folder)
        results: dict[str, list[dict[str, float]]] = {OURS: [], TRL: []}
        for _ in range(args.rounds):
            for name, runs in results.items():
                arguments = ["--images", args.images, "--samples", args.samples]
                arguments += ["--tokens", args.tokens, "--steps", args.steps]
                arguments += ["--run", folder, language_model, tower, name]
                run_child(__file__, *arguments, name=name)
                runs.append(json.loads((folder / "result.json").read_text()))
                print(f"{name}: {runs[-1]['seconds']:.2f} s per step", file=sys.stderr, flush=True)
        print_table(results, args)


if __name__ == "__main__":
    main()

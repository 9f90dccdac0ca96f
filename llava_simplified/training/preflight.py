"""Before the first hour: two steps of the very run on its longest examples, a save, a load, a caption.

They happen in a process of its own: the run itself is untouched, and where memory ends it is not the run that is killed.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from llava_simplified.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    parse_arguments,
)
from llava_simplified.data.dataset import open_data
from llava_simplified.data.images import ImageError, read_image_bytes
from llava_simplified.data.records import open_records
from llava_simplified.model.checkpoint import load_checkpoint
from llava_simplified.training.build_trainer import build_trainer
from llava_simplified.training.plan import Plan, duration, make_plan

MANY_STEPS = 2000  # `auto`: a run of fewer has soon shown by itself what is wrong with it
STEPS = 2  # the first one allocates and compiles, the second is timed
_NO_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "MemoryError",
)


def preflight(
    argv: Sequence[str], model: ModelArguments, data: DataArguments, args: TrainingArguments
) -> None:
    """Try what the command line `argv` asks for, if `--preflight` says so.

    Raises:
        ValueError: it can't be done: what is wrong, and what to change.
    """
    choice = args.preflight.lower()  # YAML has true and false of its own
    if choice not in ("auto", "true", "false"):
        raise ValueError(f"--preflight is auto, true or false, not {args.preflight!r}")
    resumes = args.resume_from_checkpoint not in (None, "", "False", "false")
    if choice == "false" or not data.train_data_path or (choice == "auto" and resumes):
        return
    if "LOCAL_RANK" in os.environ:  # the trial would meet the run itself at its launcher's address
        if choice == "true":
            raise ValueError(
                "--preflight true tries a run of one process, this one has a launcher: --preflight false, and "
                "`llava plan --devices N` or --max_steps 20 ahead of it"
            )
        if args.process_index == 0:
            print(
                "preflight: left out under a launcher; `llava plan --devices N` says what the run needs"
            )
        return
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    steps = args.max_steps
    if steps <= 0:
        steps = int(args.num_train_epochs * len(open_records(data.train_data_path)) / batch)
    if choice == "auto" and steps < MANY_STEPS:
        return
    plan = make_plan(model, data, args)
    output = Path(str(args.output_dir))
    output.mkdir(parents=True, exist_ok=True)
    _check_room(plan, args)
    with tempfile.TemporaryDirectory(prefix=".preflight-", dir=output) as scratch:
        found = _try(
            [*argv, *_shortened(data, args, plan, Path(scratch))], Path(scratch), plan, args
        )
    whole = found["seconds"] * plan.steps * args.gradient_accumulation_steps / _accumulated(args)
    average = whole * (1 if data.packing else plan.positions / plan.longest)
    print(
        f"preflight: {found['seconds']:.2f} s a step on the longest examples: {duration(average)} to {duration(whole)} "
        f"in all; {found['peak'] / 1e9:.2f} GB (planned: {plan.peak / 1e9:.2f}); saved, loaded, the same logits"
        + (
            f"; says of a picture, untrained: {found['caption']!r}"
            if found["caption"] is not None
            else ""
        )
    )


def _check_room(plan: Plan, args: TrainingArguments) -> None:
    if plan.peak > (room := _memory(args)):
        raise ValueError(
            _too_large(plan, args, f"it needs {plan.peak / 1e9:.3g} GB, {room / 1e9:.3g} are free")
        )
    free, needed = shutil.disk_usage(str(args.output_dir)).free, plan.checkpoint * plan.kept(args)
    if needed > free:
        raise ValueError(
            f"preflight: {plan.kept(args)} checkpoints of {plan.checkpoint / 1e9:.2f} GB do not fit on the disk of "
            f"{args.output_dir}, {free / 1e9:.1f} GB are free: --save_total_limit {max(1, free // plan.checkpoint)}, or "
            "another --output_dir"
        )


def _memory(args: TrainingArguments) -> int:
    """Bytes that are free for the run, on its device."""
    return (
        torch.cuda.mem_get_info(args.device)[0]
        if args.device.type == "cuda"
        else psutil.virtual_memory().available
    )


def _too_large(plan: Plan, args: TrainingArguments, what: str) -> str:
    size = args.per_device_train_batch_size
    each = (plan.memory["activations"] + plan.memory["logits"]) / size
    fits = int(size - (plan.peak - _memory(args)) / each)
    ways = (
        [f"--per_device_train_batch_size {fits} (and more --gradient_accumulation_steps)"]
        if 0 < fits < size
        else []
    )
    ways += [] if args.gradient_checkpointing else ["--gradient_checkpointing True"]
    ways += [] if args.bf16 or args.fp16 else ["--bf16 True"]
    return f"preflight: the longest batch does not fit into memory: {what}. Try {'; '.join([*ways, '--bits 4'])}"


def _accumulated(args: TrainingArguments) -> int:
    return min(
        2, args.gradient_accumulation_steps
    )  # the second batch is where gradients and activations meet


def _shortened(
    data: DataArguments, args: TrainingArguments, plan: Plan, scratch: Path
) -> list[str]:
    """The options that are not as in the run: the longest examples, few steps, nothing left behind."""
    packed = -(-data.pack_length // int(plan.positions)) if data.packing else 1
    sizes = {"train": args.per_device_train_batch_size * _accumulated(args) * packed, "eval": 2}
    values: dict[str, Any] = {
        "output_dir": scratch / "run",
        "max_steps": STEPS,
        "gradient_accumulation_steps": _accumulated(args),
        "save_strategy": "no",
        "eval_steps": STEPS,
        "eval_captions": min(1, args.eval_captions),
        "load_best_model_at_end": False,
        "push_to_hub": False,
        "resume_from_checkpoint": False,
        "report_to": "none",
        "disable_tqdm": True,
        "max_bad_images": 1,
        "cache_vision_features": "memory" if plan.cached else "off",
    }
    for name, folder in (("train", "train_image_folder"), ("eval", "val_image_folder")):
        if path := getattr(data, f"{name}_data_path"):
            records: Any
            records, images = open_data(path, getattr(data, folder), f"--{folder}")
            chosen = records.longest(
                max(16, sizes[name])
            )  # no fewer: some of their pictures may be missing
            rows = [records.rows.raw(index).replace(b"\n", b" ") for index in chosen]
            (scratch / f"{name}.jsonl").write_bytes(b"\n".join(rows))
            values |= {f"{name}_data_path": scratch / f"{name}.jsonl", folder: images}
    return [word for option, value in values.items() for word in (f"--{option}", str(value))]


def _try(words: list[str], scratch: Path, plan: Plan, args: TrainingArguments) -> dict[str, Any]:
    """The trial in its own process: what `trial` found.

    Raises:
        ValueError: it failed.
    """
    here = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "llava_simplified.training.preflight", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(here)},
    )
    if done.returncode == 0:
        return json.loads((scratch / "report.json").read_text())
    if done.returncode == -9 or any(sign in done.stderr for sign in _NO_MEMORY):
        raise ValueError(_too_large(plan, args, "it was tried"))
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    print(*lines[:-1], sep="\n", file=sys.stderr)
    raise ValueError(
        f"preflight: the run fails in its first steps: {lines[-1].removeprefix('error: ')}"
    )


def dry_run(argv: Sequence[str]) -> None:
    """In a process of its own: two steps, a save, a load, a caption; what was found goes to `report.json`.

    Raises:
        ValueError: the saved checkpoint is not the model that was trained.
    """
    model, data, args = parse_arguments(list(argv))
    output = Path(str(args.output_dir))
    precision = torch.autocast(
        args.device.type, getattr(torch, args.frozen_dtype), enabled=args.frozen_dtype != "float32"
    )
    batch, ours, seconds = _train(model, data, args, precision)
    cuda = args.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else _peak_rss()
    gc.collect()  # the trained model: memory need not hold two
    if cuda:
        torch.cuda.empty_cache()
    fresh = load_checkpoint(
        output, device=args.device, attn_implementation=model.attn_implementation
    ).eval()
    with torch.no_grad(), precision:
        theirs = fresh(**batch).logits.float()
    difference = float((ours - theirs).abs().max() / ours.abs().max())
    if not difference < (1e-3 if args.frozen_dtype == "float32" else 3e-2):
        raise ValueError(
            f"the saved checkpoint gives other logits than the trained model: off by {difference:.2%}"
        )
    caption = None
    if (record := open_records(str(data.train_data_path))[0]).images:
        with suppress(ImageError):  # counted, and reported, when training meets it
            pictures = [
                read_image_bytes(name, str(data.train_image_folder)) for name in record.images
            ]
            caption = fresh.chat(record.turns, pictures, max_new_tokens=16)
    found = {"seconds": seconds, "peak": peak, "caption": caption}
    (output.parent / "report.json").write_text(json.dumps(found))


def _train(
    model_args: ModelArguments,
    data: DataArguments,
    args: TrainingArguments,
    precision: torch.autocast,
) -> tuple[dict[str, Any], torch.Tensor, float]:
    """Steps and a save: a batch, the logits of it, the seconds of the last step."""
    trainer, _ = build_trainer(model_args, data, args)
    clock = _Clock()
    trainer.add_callback(clock)
    trainer.train()
    model: Any = trainer.model
    examples: Any = trainer.train_dataset
    batch: Any = trainer._prepare_inputs(
        trainer.data_collator([examples[i] for i in range(min(2, len(examples)))])
    )
    batch.pop("metadata")
    with torch.no_grad(), precision:
        logits = model.eval()(**batch).logits.float()
    trainer.save_final()
    trainer.accelerator.free_memory()
    return batch, logits, clock.seconds


class _Clock(TrainerCallback):
    """How long the last step took."""

    began = seconds = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self.began


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


if __name__ == "__main__":
    try:
        dry_run(sys.argv[1:])
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")

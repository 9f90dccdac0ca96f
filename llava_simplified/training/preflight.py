"""`--preflight`: check a long run before it starts."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from llava_simplified.arguments import DataArguments, ModelArguments, TrainingArguments
from llava_simplified.data.dataset import drop_bad_records
from llava_simplified.data.open_data import open_data
from llava_simplified.data.records import ALL_RECORDS, Record, open_records, response_problem
from llava_simplified.model.build import load_tokenizer
from llava_simplified.options import print_text
from llava_simplified.prompt import Prompt
from llava_simplified.training.plan import Plan, format_estimate, make_plan
from llava_simplified.training.preference_pairs import record_problem
from llava_simplified.training.resume import find_resume_folder, is_resuming

logger = logging.getLogger(__name__)

# A run of several days should not fail after hours for a reason that could be detected at its start.
# Therefore a long run is checked in two stages:
#
#     estimate   Does it fit into memory? Do its checkpoints fit on the disk?   (see `plan`)
#     dry run    Steps on the longest examples, evaluation, save, load, caption (see `dry_run`)
#
# The dry run is a separate process: it does not change the random state and the memory of the run
# itself, and if memory runs out, only the dry run is killed.

# Minimum number of steps for `auto`: a shorter run shows its problems soon enough without a preflight.
MIN_STEPS_FOR_AUTO = 2000
# The first step allocates memory and compiles. The second step is timed.
DRY_RUN_STEPS = 2
# With accumulation, the gradients of earlier micro-batches exist during the next one. Two micro-batches
# are sufficient to reproduce this.
DRY_RUN_ACCUMULATION = 2
# More records than a small batch needs, because some of their images may be missing.
MIN_DRY_RUN_RECORDS = 16

# Error messages of CUDA, torch, glibc and Python when memory runs out.
_OUT_OF_MEMORY_SIGNS = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "MemoryError",
)
_KILLED = -9  # exit status of a process that the kernel killed, usually because memory ran out


def preflight(
    argv: Sequence[str],
    model_args: ModelArguments,
    data: DataArguments,
    args: TrainingArguments,
) -> None:
    """Check memory and disk space and do a dry run, unless `--preflight` turns this off (see `_is_wanted`).

    Args:
        argv: The command line. The dry run gets the same options, except for some that are replaced.
        model_args: Model options.
        data: Data options.
        args: Training options.

    Raises:
        ValueError: The run would fail; the message suggests what to change.
    """
    if not _is_wanted(data, args):
        return
    # Check the output folder and the checkpoint here, because the dry run replaces both.
    find_resume_folder(args)
    plan = make_plan(model_args, data, args)
    output = Path(str(args.output_dir))
    output.mkdir(parents=True, exist_ok=True)
    _check_memory(plan, args)
    _check_disk(plan, args)
    with tempfile.TemporaryDirectory(prefix=".preflight-", dir=output) as scratch_name:
        scratch = Path(scratch_name)
        tokenizer = load_tokenizer(
            model_args.model_name_or_path, trust_remote_code=model_args.trust_remote_code
        )
        prompt = Prompt(tokenizer, model_args.template)
        changed = _dry_run_options(data, args, plan, scratch, prompt)
        result = _start_dry_run([*argv, *changed], scratch, plan, args)
    logger.info("%s", _describe_result(result, plan, data, args))


def _is_wanted(data: DataArguments, args: TrainingArguments) -> bool:
    """Return whether `--preflight` requires a check: it is "true", or it is "auto" and the run is new and long.

    Raises:
        ValueError: `--preflight` is invalid, or "true" under a launcher.
    """
    choice = args.preflight.lower()  # YAML may give "True"
    if choice not in ("auto", "true", "false"):
        raise ValueError(f"--preflight {args.preflight}: expected auto, true or false.")
    if choice == "false" or not data.train_data_path:
        return False
    if choice == "auto" and is_resuming(args):
        return False
    # Skip it under a launcher: the dry run would connect to the processes of the run itself.
    if "LOCAL_RANK" in os.environ:
        if choice == "true":
            raise ValueError(
                "--preflight true does not work under a launcher (torchrun, deepspeed): it runs in a single process. "
                "Pass --preflight false; to test first, run `llava plan --devices N` or a short run with --max_steps 20."
            )
        if args.process_index == 0:
            logger.info(
                "preflight: skipped under a launcher; `llava plan --devices N` estimates memory and time"
            )
        return False
    return choice == "true" or _count_steps(data, args) >= MIN_STEPS_FOR_AUTO


def _count_steps(data: DataArguments, args: TrainingArguments) -> int:
    """Return the approximate number of steps of the run."""
    if args.max_steps > 0:
        return args.max_steps
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    records = open_records(str(data.train_data_path), max_bad_records=data.max_bad_records)
    return int(args.num_train_epochs * len(records) / max(batch, 1))  # the run itself refuses 0


# ---- memory and disk ----


def _check_memory(plan: Plan, args: TrainingArguments) -> None:
    """Raise ValueError if the longest batch would not fit into the free memory."""
    available = _available_memory(args)
    if plan.peak > available:
        reason = f"it requires {plan.peak / 1e9:.3g} GB, but {available / 1e9:.3g} GB are available"
        raise ValueError(_describe_out_of_memory(plan, args, reason))


def _check_disk(plan: Plan, args: TrainingArguments) -> None:
    """Raise ValueError if the checkpoints and the final model do not fit on the disk."""
    free = shutil.disk_usage(str(args.output_dir)).free
    if plan.disk_peak(args) <= free:
        return
    # Besides the checkpoints that are kept, the next one and the final model must fit.
    fitting = (free - plan.final_model) // plan.checkpoint - 1
    advice = f"Pass --save_total_limit {fitting}, or another" if fitting > 0 else "Pass another"
    raise ValueError(
        f"preflight: the checkpoints, of {plan.checkpoint / 1e9:.2f} GB each, and the final model need "
        f"{plan.disk_peak(args) / 1e9:.2f} GB, but the disk of {args.output_dir} has {free / 1e9:.1f} GB free. "
        f"{advice} --output_dir."
    )


def _available_memory(args: TrainingArguments) -> int:
    """Return the free memory of the run's device in bytes."""
    if args.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(args.device)
        return free
    return psutil.virtual_memory().available


def _describe_out_of_memory(plan: Plan, args: TrainingArguments, reason: str) -> str:
    """Return an error message with options that reduce memory, those with the fewest side effects first."""
    remedies = []
    batch_size = args.per_device_train_batch_size
    bytes_per_sample = (plan.memory["activations"] + plan.memory["logits"]) / batch_size
    excess = plan.peak - _available_memory(args)
    fitting = int(batch_size - excess / bytes_per_sample)
    if 0 < fitting < batch_size:
        remedies.append(
            f"--per_device_train_batch_size {fitting} (with more --gradient_accumulation_steps)"
        )
    if not args.gradient_checkpointing:
        remedies.append("--gradient_checkpointing True")
    if not (args.bf16 or args.fp16):
        remedies.append("--bf16 True")
    remedies.append("--bits 4")
    return (
        f"preflight: the longest batch does not fit into memory: {reason}. "
        f"Pass one of: {'; '.join(remedies)}."
    )


# ---- the dry run ----


def _accumulation_of_dry_run(args: TrainingArguments) -> int:
    """Return the number of micro-batches in a step of the dry run."""
    return min(DRY_RUN_ACCUMULATION, args.gradient_accumulation_steps)


def _dry_run_options(
    data: DataArguments, args: TrainingArguments, plan: Plan, scratch: Path, prompt: Prompt
) -> list[str]:
    """Return the options of the dry run: the longest examples, few steps, all output in `scratch`."""
    accumulation = _accumulation_of_dry_run(args)
    values: dict[str, Any] = {
        "output_dir": scratch / "run",
        "max_steps": DRY_RUN_STEPS,
        "gradient_accumulation_steps": accumulation,
        "save_strategy": "no",
        "eval_steps": DRY_RUN_STEPS,
        "eval_captions": min(1, args.eval_captions),
        "load_best_model_at_end": False,
        "push_to_hub": False,
        "resume_from_checkpoint": False,
        "report_to": "none",
        "disable_tqdm": True,
        # These are fractions: accept any number of bad ones, since the longest records are often bad.
        "max_bad_images": 1,
        "max_bad_records": 1,
        "cache_vision_features": "memory" if plan.cached else "off",
    }
    records_per_row = 1
    if data.packing:
        records_per_row = math.ceil(data.pack_length / int(plan.positions))
    train_count = args.per_device_train_batch_size * accumulation * records_per_row
    if data.train_data_path:
        target = scratch / "train.jsonl"
        folder = _write_longest_records(
            data.train_data_path,
            data.train_image_folder,
            "--train_image_folder",
            count=train_count,
            target=target,
            prompt=prompt,
            max_length=args.model_max_length,
            problem_of=record_problem(args.objective),
        )
        # With --data, the command line has no other option for the records.
        option = "data" if data.data else "train_data_path"
        values |= {option: target, "train_image_folder": folder}
        # --sidecar describes the folder that --data names. A file of records has no sidecars.
        values["sidecar"] = ""
    if data.eval_data_path:
        target = scratch / "eval.jsonl"
        folder = _write_longest_records(
            data.eval_data_path,
            data.val_image_folder,
            "--val_image_folder",
            count=2,
            target=target,
            prompt=prompt,
            max_length=args.model_max_length,
            problem_of=response_problem,
        )
        values |= {"eval_data_path": target, "val_image_folder": folder}
    argv = []
    for name, value in values.items():
        argv += [f"--{name}", str(value)]
    return argv


def _write_longest_records(
    path: str,
    image_folder: str | None,
    option: str,
    count: int,
    target: Path,
    prompt: Prompt,
    max_length: int,
    problem_of: Callable[[Record], str],
) -> str:
    """Write the records with the longest texts to `target`, and return their image folder."""
    records, folder = open_data(
        path, image_folder, option, require_responses=False, max_bad_records=ALL_RECORDS
    )
    # The longest rows are often bad records, which the run leaves out.
    records = drop_bad_records(records, 1, prompt, max_length, problem_of)
    lines = []
    for index in records.longest(max(MIN_DRY_RUN_RECORDS, count)):
        # In a JSON array, a record can have several lines. JSON Lines need one line per record.
        lines.append(records.rows.raw(index).replace(b"\n", b" "))
    target.write_bytes(b"\n".join(lines))
    return folder


def _start_dry_run(
    argv: Sequence[str], scratch: Path, plan: Plan, args: TrainingArguments
) -> dict[str, Any]:
    """Start `dry_run` in a separate process, and return its report.

    Raises:
        ValueError: The dry run failed, for example because memory ran out.
    """
    package_parent = str(Path(__file__).parents[2])
    python_path = [package_parent]
    if os.environ.get("PYTHONPATH"):
        python_path.append(os.environ["PYTHONPATH"])
    done = subprocess.run(
        [sys.executable, "-m", "llava_simplified.training.dry_run", *argv],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(python_path)},
    )
    if done.returncode == 0:
        return json.loads((scratch / "report.json").read_text(encoding="utf-8"))
    if done.returncode == _KILLED or any(sign in done.stderr for sign in _OUT_OF_MEMORY_SIGNS):
        reason = "the dry run ran out of memory"
        raise ValueError(_describe_out_of_memory(plan, args, reason))
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    # Print what was logged before the error (the last line), because it may explain it.
    for line in lines[:-1]:
        print_text(line, file=sys.stderr)
    error = lines[-1].removeprefix("error: ")
    raise ValueError(f"preflight: the run fails in its first steps: {error}")


def _describe_result(
    result: Mapping[str, Any], plan: Plan, data: DataArguments, args: TrainingArguments
) -> str:
    """Return the result of the dry run as text, with the estimated duration of the run."""
    # The dry run has fewer micro-batches per step than the run.
    micro_batch_ratio = args.gradient_accumulation_steps / _accumulation_of_dry_run(args)
    # The dry run used the longest examples, so its time per step is an upper limit. Packs all have the
    # same length.
    longest = result["seconds"] * plan.steps * micro_batch_ratio
    shortest = longest if data.packing else longest * plan.positions / plan.longest
    sampling = ""
    if result["sampling_seconds"]:
        sampling = f" ({result['sampling_seconds']:.2f} s of it for sampling and rewards)"
    text = (
        f"preflight: {result['seconds']:.2f} s per step{sampling} on the longest examples, so {format_estimate(shortest)} to "
        f"{format_estimate(longest)} in total; {result['peak'] / 1e9:.2f} GB (estimate: {plan.peak / 1e9:.2f} GB); a "
        "checkpoint was saved and loaded, with the same logits"
    )
    if result["caption"] is not None:
        text += f"; a caption before training: {result['caption']!r}"
    return text

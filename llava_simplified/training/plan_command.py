"""`llava plan`: print the estimated resources of a run, from the options of `llava train` and a few more.

With `--cluster`, print the duration of all steps instead: download, clean, encode, train, caption.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from llava_simplified.jobs import prepare_output_file
from llava_simplified.options import CommandParser, configure_logging, print_text
from llava_simplified.training_options import add_training_options, exit_with_help

if TYPE_CHECKING:
    import torch

    from llava_simplified.arguments import TrainingArguments
    from llava_simplified.training.plan import Plan

# Rows and columns of the matrices whose products measure the speed of a device.
MATMUL_SIZES = (256, 512, 1024, 2048)


def build_parser() -> CommandParser:
    """Return the parser of `llava plan`, for help and completion."""
    parser = CommandParser(
        "llava plan",
        "Estimate the memory, time and disk space of a training run; pass the same options as to llava train. With "
        "--cluster, estimate the duration of all steps instead: download, clean, encode, train, caption.",
        usage="%(prog)s [options]",
        # Replace the help text of --deepspeed, which is also an option of `llava train`.
        conflict_handler="resolve",
    )
    add_training_options(parser)
    add_machine_options(parser)
    add_cluster_options(parser)
    return parser


def add_machine_options(parser: CommandParser) -> None:
    """Add the options that describe the machine, which `llava train` does not have."""
    group = parser.add_argument_group("Machine")
    group.add_argument(
        "--tflops",
        type=float,
        help="TFLOP/s of one device in a matrix product (default: measured on this machine)",
    )
    group.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        help="Fraction of --tflops that training achieves (default: %(default)s)",
    )
    group.add_argument(
        "--bandwidth",
        type=float,
        help="GB/s at which one device reads its memory, which limits the speed of sampling (default: measured on this "
        "machine)",
    )
    group.add_argument(
        "--devices",
        type=int,
        default=1,
        help="Number of devices; with --cluster, of each machine (default: %(default)s)",
    )
    group.add_argument(
        "--deepspeed",
        type=Path,
        help="DeepSpeed config of the run; its ZeRO stage determines what is sharded across devices",
    )


def add_cluster_options(parser: CommandParser) -> None:
    """Add the options of `--cluster`, and of the small runs that measure its rates."""
    group = parser.add_argument_group("Cluster")
    group.add_argument(
        "--cluster",
        type=int,
        default=0,
        metavar="N",
        help="Print how long N machines take for all steps: download, clean, encode, train, caption",
    )
    group.add_argument(
        "--urls",
        type=int,
        nargs="+",
        default=[3_300_000, 400_000_000],
        help="Numbers of URLs to plan for (default: 3300000 400000000)",
    )
    group.add_argument(
        "--cores",
        type=int,
        default=os.cpu_count(),
        help="Cores of each machine (default: the number of cores of this machine)",
    )
    group.add_argument(
        "--egress",
        type=float,
        default=1.0,
        help="Gbit/s that each machine receives from the internet (default: %(default)s)",
    )
    group.add_argument(
        "--num-endpoints",
        type=int,
        default=0,
        help="Number of endpoints that generate captions (default: one per machine)",
    )
    group.add_argument(
        "--rates",
        type=Path,
        default=Path("rates.json"),
        help="File of measured rates: written with --measure, else read (default: %(default)s)",
    )
    group.add_argument(
        "--measure",
        metavar="URLS",
        help="Run every step on a sample of this list of URLs (as for `llava download`), and write the measured rates to --rates",
    )
    group.add_argument(
        "--measure-rows",
        type=int,
        default=400,
        help="Number of URLs of the sample (default: %(default)s)",
    )
    group.add_argument(
        "--endpoint", help="URL of an endpoint; with it, --measure also measures captioning"
    )
    group.add_argument("--model", help="Name of the endpoint's model")
    group.add_argument(
        "--allow-private",
        action="store_true",
        help="Allow requests to private addresses with --measure",
    )


def main(argv: list[str] | None = None) -> int:
    """Run `llava plan`."""
    argv = sys.argv[1:] if argv is None else argv
    exit_with_help(argv, build_parser())
    # Two parsers read the command line. This one reads the options that only `llava plan` has; the parser of
    # `llava train` reads the others below.
    machine_parser = CommandParser("llava plan", "Estimate a training run.")
    add_machine_options(machine_parser)
    add_cluster_options(machine_parser)
    plan_options, training_options = machine_parser.parse_known_args(argv)
    check_machine_options(plan_options)
    check_cluster_options(plan_options)

    # Import these here, because they import torch and transformers, which takes seconds.
    import torch

    from llava_simplified.arguments import parse_arguments
    from llava_simplified.training.plan import make_plan

    model_args, data_args, args = parse_arguments(training_options)
    # Set the log level again: parsing the training options has set it without --verbose and --quiet.
    configure_logging(verbose=plan_options.verbose, quiet=plan_options.quiet)
    if plan_options.cluster:
        from llava_simplified.training.cluster_command import plan_cluster

        print_text(plan_cluster(plan_options, training_options, model_args, data_args, args))
        return 0
    zero = 3 if args.fsdp else read_zero_stage(plan_options.deepspeed)
    plan = make_plan(model_args, data_args, args, devices=plan_options.devices, zero=zero)
    tflops = plan_options.tflops
    if tflops is None:
        tflops = measure_matmul_flops(args.device, getattr(torch, args.frozen_dtype)) / 1e12
    # Measure the memory only if captions are sampled. Training is limited by arithmetic instead.
    bandwidth = plan_options.bandwidth
    if bandwidth is None and plan.sampling is not None:
        bandwidth = measure_bandwidth(args.device) / 1e9
    print_text(describe_plan(plan, args, tflops, plan_options.mfu, plan_options.devices, bandwidth))
    return 0


def check_machine_options(plan_options: argparse.Namespace) -> None:
    """Raise ValueError if an option that describes the machine is out of range."""
    numbers = {
        "--devices": plan_options.devices,
        "--tflops": plan_options.tflops,
        "--mfu": plan_options.mfu,
        "--bandwidth": plan_options.bandwidth,
    }
    for option, number in numbers.items():
        if number is not None and not number > 0:  # written this way, because a NaN must fail too
            raise ValueError(f"{option} must be above 0, not {number}.")
    if plan_options.mfu > 1:
        raise ValueError(f"--mfu must be a fraction of at most 1, not {plan_options.mfu}.")


def check_cluster_options(plan_options: argparse.Namespace) -> None:
    """Raise ValueError if an option of `--cluster` is out of range, or lacks another option that it requires."""
    if not plan_options.cluster:
        if plan_options.measure:
            raise ValueError("--measure requires --cluster N, the number of machines.")
        return
    counts = {
        "--cluster": plan_options.cluster,
        "--cores": plan_options.cores,
        "--egress": plan_options.egress,
        "--urls": min(plan_options.urls),
        "--num-endpoints": plan_options.num_endpoints or 1,
    }
    for option, count in counts.items():
        if not count > 0:
            raise ValueError(f"{option} must be above 0, not {count}.")
    # Each step is also measured on a quarter of the sample, which must not be empty.
    if plan_options.measure_rows < 8:
        raise ValueError(f"--measure-rows must be at least 8, not {plan_options.measure_rows}.")
    if bool(plan_options.endpoint) != bool(plan_options.model):
        raise ValueError("--endpoint and --model belong together: pass both or neither.")
    if plan_options.endpoint and not plan_options.measure:
        raise ValueError("--endpoint requires --measure URLS.")
    if plan_options.measure:
        prepare_output_file(plan_options.rates)


def read_zero_stage(config: Path | None) -> int:
    """Return the ZeRO stage of a DeepSpeed configuration, or 0 without one.

    Raises:
        ValueError: The file cannot be read, or has no zero_optimization.stage.
    """
    if config is None:
        return 0
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        return int(values["zero_optimization"]["stage"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--deepspeed {config}: expected a JSON file with zero_optimization.stage ({error!r})."
        ) from error


def measure_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matrix product on this device: an upper limit for training."""
    import torch

    best = 0.0
    for size in MATMUL_SIZES:
        matrix = torch.ones(size, size, device=device, dtype=dtype)
        # Keep the fastest of several products: the first ones allocate memory, and an idle device has a low clock.
        for _ in range(4):
            start = time.perf_counter()
            product = matrix @ matrix
            float(product[0, 0])  # wait until the device has finished
            seconds = time.perf_counter() - start
            # A product of two n x n matrices takes n multiplications and n additions for each of its n^2 elements.
            best = max(best, 2 * size**3 / seconds)
        # The next size would take seconds, for example in 16 bits on a CPU without instructions for them.
        if seconds > 0.2:
            break
    return best


def measure_bandwidth(device: torch.device) -> float:
    """Return the bytes per second at which this device reads its memory."""
    import torch

    values = torch.ones(1 << 26, device=device)  # 256 MB, so that they do not fit into a cache
    best = 0.0
    for _ in range(4):
        start = time.perf_counter()
        # A sum reads every value once, and computes almost nothing.
        float(values.sum())  # waits until the device has finished
        best = max(best, values.nbytes / (time.perf_counter() - start))
    return best


def describe_plan(
    plan: Plan,
    args: TrainingArguments,
    tflops: float,
    mfu: float,
    devices: int,
    bandwidth: float | None = None,
) -> str:
    """Return the plan as text.

    Args:
        plan: The plan.
        args: Training options.
        tflops: TFLOP/s of a device in a matrix product.
        mfu: Fraction of `tflops` that training achieves.
        devices: Number of devices.
        bandwidth: GB/s at which a device reads its memory; used if captions are sampled.
    """
    from llava_simplified.training.plan import format_estimate

    gigabyte = 1e9
    total_flops = plan.flops * plan.samples
    # Each device computes its share of the samples, at the fraction `mfu` of its peak.
    seconds = total_flops / (tflops * 1e12 * mfu * devices)
    decoding = 0.0
    if plan.sampling is not None and bandwidth is not None:
        # A decoding step takes as long as reading the weights and the cache.
        decoding = plan.sampling.steps * plan.sampling.bytes_per_step / (bandwidth * gigabyte)
    if plan.steps:
        run = f"the run           {plan.steps:,} steps, "
        checkpoints = f", {plan.count_checkpoints(args)} kept"
        features = f"{plan.features / gigabyte:.2f} GB if all features are cached"
    else:
        # Without --max_steps and --train_data_path, the number of steps is unknown.
        run = "one step          (pass --train_data_path for the whole run) "
        checkpoints = ""
        features = f"{plan.features / 1e3:.0f} KB per image if features are cached"
    lines = [
        plan.table,
        f"a sample          {plan.positions:.0f} positions (longest {plan.longest}), {plan.trained:.0f} trained, "
        f"{plan.flops / 1e9:,.1f} GFLOP",
        f"{run}{plan.samples:,} samples, {total_flops / 1e15:,.2f} PFLOP",
        f"time              {format_estimate(seconds + decoding)} on {devices} device(s) of {tflops:.3g} TFLOP/s at "
        f"{mfu:.0%} of that",
    ]
    if plan.sampling is not None:
        lines.append(
            f"sampling          {plan.sampling.tokens:,} tokens in {plan.sampling.steps:,} decoding steps, "
            f"{format_estimate(decoding)} of that time at {bandwidth:.3g} GB/s"
        )
    lines.append("memory per device, with the longest batch:")
    for name, size in plan.memory.items():
        lines.append(f"  {name:<16}{size / gigabyte:>8.2f} GB")
    lines += [
        f"  {'at the peak':<16}{plan.peak / gigabyte:>8.2f} GB, without the overhead of libraries and the allocator",
        f"disk              {plan.checkpoint / gigabyte:.2f} GB per checkpoint{checkpoints}; {features}",
    ]
    return "\n".join(lines)

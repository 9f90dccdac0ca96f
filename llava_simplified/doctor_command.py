"""`llava doctor`: report installed packages, devices, extras, access to the hub, and disk space.

Packages and extras are read from the metadata of the installation, so that the report always corresponds
to `pyproject.toml`.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava_simplified.extras import cpp_compiler, install_command
from llava_simplified.options import CommandParser, print_text

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PROJECT = "llava-simplified"
# Purpose of each extra, in the order of pyproject.toml. An extra that is not listed here is reported without a purpose.
EXTRA_PURPOSES = {
    "download": "`llava download`, and records in Parquet files",
    "datasets": "`--data` from data sets of the Hugging Face Hub",
    "report": "plots of training curves",
    "gguf": "`llava export --format gguf` and `llava demo`",
    "serve": "`llava serve`: a web page, and an API for OpenAI's clients",
    "deepspeed": "ZeRO-2 and ZeRO-3 (`llava train --deepspeed CONFIG`)",
    "ray": "`--engine ray`: download and caption on a cluster",
    "quant": "`--bits 4` (QLoRA) and `--bits 8`",
    "liger": "`--use_liger_kernel`: fused layers on a GPU",
    "wandb": "`--report_to wandb`",
    "all": "all extras above that work on every machine",
    "dev": "tests, linters and `--report_to tensorboard`",
    "fuzz": "`make fuzz`",
    "docs": "the documentation as a web site",
    "bench": "TRL, for the benchmarks",
    "lmms-eval": "`lmms-eval --model llava_simplified`: the benchmarks of lmms-eval",
}
# Optional packages that are not part of an extra, because they must be compiled for the installed torch.
OTHER_PURPOSES = {
    "flash-attn": (
        "`--attn_implementation flash_attention_2` on a CUDA GPU; install it with pip install flash-attn"
    ),
}


def build_parser() -> CommandParser:
    """Return the parser of `llava doctor`."""
    parser = CommandParser(
        "llava doctor", "Report what is installed, what this machine can do, and what is missing."
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=Path.home() / ".cache",
        help="Folder whose free disk space is reported (default: %(default)s)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run `llava doctor`; the exit status is 1 if a required package is missing or has the wrong version."""
    args = build_parser().parse_args(argv)
    print_text(
        f"Python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPUs"
    )
    package_lines, all_required_installed = _describe_packages()
    _print_section(package_lines)
    # Print each section before computing the next one: importing torch and connecting to the hub take
    # seconds, and may fail in a broken installation.
    _print_section(["devices", *_describe_devices()])
    _print_section(["extras", *_describe_extras()])
    _print_section(["hub", f"  {_describe_hub()}"])
    _print_section(["disk", f"  {_describe_disk(args.cache_dir)}"])
    return 0 if all_required_installed else 1


def _print_section(lines: Sequence[str]) -> None:
    print_text("\n".join(lines))


# ---- packages ----


class Requirements:
    """The packages that this project requires, with and without extras."""

    def __init__(self) -> None:
        from packaging.requirements import Requirement

        # Read the metadata of the installed package, since pyproject.toml exists only in a checkout.
        # A line is, for example, "gguf>=0.17; extra == 'gguf'". The part after the semicolon is the marker.
        lines = importlib.metadata.requires(PROJECT) or []
        self._requirements = [Requirement(line) for line in lines]
        metadata = importlib.metadata.metadata(PROJECT)
        self.extras: list[str] = list(metadata.get_all("Provides-Extra") or [])

    def required(self) -> list[Requirement]:
        """Return the requirements that always apply."""
        # All requirements of extras have a marker.
        return [item for item in self._requirements if item.marker is None]

    def of_extra(self, extra: str) -> list[Requirement]:
        """Return the requirements of an extra that apply on this machine."""
        found: list[Requirement] = []
        for item in self._requirements:
            # The marker names the extra, and may also depend on the Python version and the system.
            if item.marker is None or not item.marker.evaluate({"extra": extra}):
                continue
            # "all" consists of other extras of this project.
            if item.name == PROJECT:
                for other in sorted(item.extras):
                    found += self.of_extra(other)
            else:
                found.append(item)
        return found


def _problem(requirement: Requirement) -> str | None:
    """Return a message if the package is missing or has the wrong version, else None.

    The requirement is a parameter because there may be several for one package: an extra may exclude a version
    that the package without extras accepts.
    """
    version = _version(requirement.name)
    if version is None:
        return f"MISSING: pip install '{requirement.name}{requirement.specifier}'"
    # Accept development versions, such as "2.14.0.dev20261101" (nightly builds of torch).
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{version}, but {requirement.specifier} is required"
    return None


def _version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _describe_packages() -> tuple[list[str], bool]:
    """Return a line for each required package, and whether all are installed in a supported version."""
    requirements = Requirements()
    lines = [_row(PROJECT, str(_version(PROJECT)))]
    problems = []
    for requirement in requirements.required():
        problem = _problem(requirement)
        problems.append(problem)
        lines.append(_row(requirement.name, problem or str(_version(requirement.name))))
    return lines, not any(problems)


def _describe_extras() -> list[str]:
    """Return a line for each extra, and for each package of `OTHER_PURPOSES`."""
    requirements = Requirements()
    lines = []
    for extra in requirements.extras:
        missing = [item.name for item in requirements.of_extra(extra) if _problem(item)]
        state = "installed"
        if missing:
            state = f"missing: {', '.join(missing)}; run {install_command(extra)}"
        lines.append(_row(extra, _with_purpose(state, EXTRA_PURPOSES.get(extra))))
    for package, purpose in OTHER_PURPOSES.items():
        state = _version(package) or "not installed"
        lines.append(_row(package, _with_purpose(state, purpose)))
    return lines


def _with_purpose(state: str, purpose: str | None) -> str:
    return f"{state}; for {purpose}" if purpose else state


def _row(name: str, text: str) -> str:
    return f"  {name:<18}{text}"


# ---- machine ----


def _describe_devices() -> Sequence[str]:
    """Return a line for each accelerator, and lines about bfloat16 and compilation on the CPU."""
    import torch

    from llava_simplified.model.cpu_dtype import has_fast_products, trains_fast_in

    lines = []
    if torch.accelerator.is_available():
        for index in range(torch.accelerator.device_count()):
            device = torch.device(f"{torch.accelerator.current_accelerator()}:{index}")
            lines.append(f"  {device}: {_describe_device(index)}")
    else:
        lines.append("  no accelerator: everything runs on the CPU")
    if not has_fast_products(torch.bfloat16):
        bfloat16 = "slow; train with --bf16 False"
    elif not trains_fast_in(torch.bfloat16):
        bfloat16 = "slower than float32 in training; train with --bf16 False"
    else:
        bfloat16 = "fast"
    lines.append(f"  bfloat16 on this CPU: {bfloat16}")
    if torch.cuda.is_available():
        lines.append(
            "  to test and measure this GPU: python benchmarks/bench_gpu.py (in a checkout)"
        )
    # Look for the compiler that torch.compile uses for the CPU.
    compiler = cpp_compiler()
    compile_layers = "possible"
    if shutil.which(compiler) is None:
        compile_layers = f"requires the C++ compiler {compiler}"
    lines.append(f"  --compile_layers: {compile_layers}")
    return lines


def _describe_device(index: int) -> str:
    """Return the name of an accelerator; for a CUDA device also its memory, and whether it supports bfloat16."""
    import torch

    if not torch.cuda.is_available():
        return str(torch.accelerator.current_accelerator())
    properties = torch.cuda.get_device_properties(index)
    bfloat16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16: train with --fp16"
    return f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, {bfloat16}"


# ---- hub and disk ----


def _describe_hub() -> str:
    """Describe whether models can be downloaded from the Hugging Face hub, including gated models."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set: models are loaded from local folders and the cache only"
    # Wait at most three seconds, in case a firewall drops the packets.
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=3).close()
    except OSError as error:
        return (
            f"{constants.ENDPOINT} cannot be reached ({error}). Pass each model as a local folder with "
            "config.json, *.safetensors, and the files of the tokenizer or preprocessor, and set "
            "HF_HUB_OFFLINE=1."
        )
    if get_token():
        return "reachable, logged in. For a gated model (Llama, Mistral), accept its terms on its page."
    return (
        "reachable, not logged in. For a gated model (Llama, Mistral), accept its terms on its page, "
        "and run `hf auth login`."
    )


def _describe_disk(folder: Path) -> str:
    """Describe the free disk space of a folder. If it does not exist, use the home folder instead."""
    # The cache folder does not exist before the first download. It is usually on the same disk as the home folder.
    usage = shutil.disk_usage(folder if folder.exists() else Path.home())
    return f"{folder}: {usage.free / 1e9:.0f} GB free of {usage.total / 1e9:.0f} GB"
